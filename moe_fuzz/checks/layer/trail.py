"""What a layer's router has decided, in a sentence for whoever looks at what its experts then did."""

from __future__ import annotations

import torch

from moe_fuzz.checks.coordinates import row_text
from moe_fuzz.ops.layer.inputs import LayerInputs


def describe(inputs: LayerInputs, weights: torch.Tensor, ids: torch.Tensor) -> str:
    """The first row that breaks the router's contract, or that it breaks none; and that the experts have begun.

    A sentence is all: whether a rule is broken is for the checks to say, which see the result, where there is one.
    """
    weights, ids = weights.detach().cpu(), ids.detach().cpu().long()
    experts, dialect = inputs.plain["gate"].shape[0], str(inputs.options["dialect"])
    flagged = inputs.plain.get("is_padding")
    padding = torch.zeros(len(ids), dtype=torch.bool) if flagged is None else flagged.cpu()
    bound = ~padding if dialect != "distinct" else torch.ones_like(padding)  # to k distinct experts
    ordered = ids.sort(dim=1).values
    twice = bound & (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    outside = bound & ((ids < 0) | (ids >= experts)).any(dim=1)
    wanted = {"minus_one": -1, "num_experts": experts, "zero_weight": 0}.get(dialect)
    strange = torch.zeros_like(bound) if wanted is None else padding & (ids != wanted).any(dim=1)
    for rows, what in ((outside, f"of which one is no expert in [0, {experts})"), (twice, "one expert twice"),
                       (strange, f"not the {wanted} of the dialect {dialect}")):  # fmt: skip
        if rows.any():
            row = int(rows.nonzero()[0])
            kind = "padding row" if padding[row] else "row"
            return f"the router gave {kind} {row} the ids {row_text(ids[row])}, {what}; then the experts began"
    dropped = padding & ((ids < 0) | (ids >= experts)).any(dim=1)
    if dropped.any():
        row = int(dropped.nonzero()[0])
        return (f"the router gave padding row {row} the ids {row_text(ids[row])}, as the dialect {dialect} has it; "
                "then the experts began")  # fmt: skip
    if not bool(torch.isfinite(weights[bound]).all()):
        row = int((bound & ~torch.isfinite(weights).all(dim=1)).nonzero()[0])
        return f"the router gave row {row} the weights {row_text(weights[row])}; then the experts began"
    return "the router gave every row ids within its contract; then the experts began"
