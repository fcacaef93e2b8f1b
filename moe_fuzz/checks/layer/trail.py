"""What a layer's router has decided, in a sentence for whoever looks at what its experts then did."""

from __future__ import annotations

from typing import Any

import numpy
import torch

from moe_fuzz.ops.layer.inputs import LayerInputs


def describe(inputs: LayerInputs, weights: torch.Tensor, ids: torch.Tensor) -> str:
    """The first row that breaks the router's contract, or that it breaks none; and that the experts have begun.

    A sentence is all: whether a rule is broken is for the checks to say, which see the result, where there is one.
    In numpy, since it runs while torch's allocations are those of the target.
    """
    weight, found = weights.detach().cpu().numpy(), ids.detach().cpu().numpy().astype(numpy.int64)
    experts, dialect = inputs.plain["gate"].shape[0], str(inputs.options["dialect"])
    flags = inputs.plain.get("is_padding")
    padding = numpy.zeros(len(found), dtype=bool) if flags is None else flags.cpu().numpy()
    bound = ~padding if dialect != "distinct" else numpy.ones_like(padding)  # to k distinct experts
    ordered = numpy.sort(found, axis=1)
    twice = bound & (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    none = ((found < 0) | (found >= experts)).any(axis=1)
    wanted = {"minus_one": -1, "num_experts": experts, "zero_weight": 0}.get(dialect)
    strange = numpy.zeros_like(bound) if wanted is None else padding & (found != wanted).any(axis=1)
    endless = bound & ~numpy.isfinite(weight).all(axis=1)
    for rows, table, what in (
        (bound & none, found, f", of which one is no expert in [0, {experts})"),
        (twice, found, ", one expert twice"),
        (strange, found, f", not the {wanted} of the dialect {dialect}"),
        (endless, weight, ""),
        (padding & none, found, f", as the dialect {dialect} has it"),
    ):
        if rows.any():
            row = int(rows.argmax())
            name, kind = "weights" if table is weight else "ids", "padding row" if padding[row] else "row"
            return f"the router gave {kind} {row} the {name} {_text(table[row])}{what}; then the experts began"
    return "the router gave every row ids within its contract; then the experts began"


def _text(row: Any, limit: int = 8) -> str:
    items = ", ".join(f"{value:.6g}" if row.dtype.kind == "f" else str(int(value)) for value in row[:limit])
    return f"[{items}{', …' if len(row) > limit else ''}]"
