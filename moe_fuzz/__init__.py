"""moe-fuzz: finds the bugs in mixture-of-experts serving kernels before they reach a GPU fleet."""

from __future__ import annotations

from moe_fuzz._version import __version__
from moe_fuzz.contract import Capabilities, Contract, declares

# Imported here and not on demand: the module moe_fuzz.fuzz would else take the function's place in the package as soon
# as anybody imported it. It is light, and imports nothing of moe_fuzz at its top but the error classes.
from moe_fuzz.fuzz import fuzz

__all__ = ["Capabilities", "Contract", "__version__", "declares", "fuzz"]
