"""moe-fuzz: finds the bugs in mixture-of-experts serving kernels before they reach a GPU fleet."""

from __future__ import annotations

from moe_fuzz._version import __version__
from moe_fuzz.contract import Capabilities, Contract, declares


__all__ = ["Capabilities", "Contract", "__version__", "declares"]
