"""Our own kernels as targets, and what they promise."""

from __future__ import annotations

from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, declares
from moe_fuzz.kernels import routing

_PROMISE = "the contract in the docstring of moe_fuzz.reference.routing"

topk_softmax = declares(
    contract=Contract(
        deterministic=True, batch_invariant=True, ties="lowest_index_first", ordered=True, padding=PADDING_DIALECTS
    ),
    capabilities=Capabilities(out=True, alignment=1),
    clauses={"*": _PROMISE},
)(routing.topk_softmax)
