"""The faults: adversities that serving brings and tests do not, each a small class that lays itself into a tensor.

A fault on values writes into the rows a case names; a fault on layout changes where the elements lie. Both take all
they need from the case's own generator, so that a fault is the same after rows or experts have been taken away.
Which fault may lie where is said by the spaces (ops/*/space.py), by name.

Those of any op are here; those of one family register where its inputs are made (ops/*/inputs.py).
"""

from moe_fuzz.faults import layout, values  # noqa: F401 - they register
from moe_fuzz.faults.fault import FAULTS, Canvas, Fault, register

__all__ = ["FAULTS", "Canvas", "Fault", "register"]
