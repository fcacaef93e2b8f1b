"""moe-fuzz: a correctness and robustness fuzzer for mixture-of-experts serving kernels."""

# Imported here and not on demand: the module moe_fuzz.fuzz would else take the function's place in the package as soon
# as anybody imported it. It is light, and imports none of the rest of moe_fuzz but the error classes.
from moe_fuzz._version import __version__
from moe_fuzz.fuzz import fuzz

__all__ = ["__version__", "fuzz"]
