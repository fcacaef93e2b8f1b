"""Wrong answers of experts, each of which must be rejected: see checks/binding.py."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_fuzz.checks.binding import SAMPLE, rejected
from moe_fuzz.checks.experts.flags import look_together
from moe_fuzz.checks.experts.observation import ExpertsObservation
from moe_fuzz.checks.experts.values import values
from moe_fuzz.mirror import on_host, uploaded
from moe_fuzz.ops.experts.fp4_inputs import Fp4Inputs
from moe_fuzz.ops.experts.inputs import ExpertsInputs

_JUDGES = ("finite", "dropped")


def wrong_answers(seen: ExpertsObservation) -> dict[str, Tensor]:
    """All zero; two experts swapped; the last expert left out; the routing weights ignored; and to each row the answer
    of the row before it. Where rows are too much alike for that to be wrong, or there is one alone, the right answer to
    other x. What would change nothing is not asked for: one expert cannot be swapped."""
    x, weights, y = seen.x, seen.weights, seen.outputs.y
    there, expert, kept = on_host(weights), on_host(seen.expert), on_host(seen.kept)
    made = {"the last expert left out": (x, weights, torch.where(expert == expert.max(), -1, expert))}
    if seen.experts > 1:
        one = int(expert[kept & (there != 0)][0])
        neighbour = (one or seen.experts) - 1
        swapped = torch.where(expert == one, neighbour, torch.where(expert == neighbour, one, expert))
        made["two experts swapped"] = x, weights, swapped
    if not (there[kept] == 1).all():
        made["weights ignored"] = x, torch.ones_like(weights), expert
    found = {name: values(inputs, x, weights, seen.expert).to(y.dtype)
             for name, inputs in miswritten(seen.inputs).items()}  # fmt: skip
    exchanged = y.roll(1, 0)
    if seen.tokens == 1 or not (_is_far(seen, exchanged) or _rejected(seen, exchanged)):
        made["rows exchanged"] = seen.benign(torch.arange(seen.tokens)), weights, expert
    xs, each_weights, experts = (torch.cat(parts) for parts in zip(*made.values(), strict=True))
    each = values(seen.inputs, xs, each_weights, uploaded(experts, x.device)).to(y.dtype).split(seen.tokens)
    return {"all zero": torch.zeros_like(y), "rows exchanged": exchanged, **dict(zip(made, each, strict=True)), **found}


def miswritten(inputs: ExpertsInputs) -> dict[str, ExpertsInputs]:
    """Codes and scales as another reader would take them: the two codes of a byte exchanged, a row's scales those of
    the row before it. None where weights are numbers."""
    if not isinstance(inputs, Fp4Inputs):
        return {}
    codes, rows = inputs.plain["w13"], inputs.linear_scales("w13")
    options = {**inputs.options, "scale_layout": "linear"}
    moved = {f"{name}_scales": inputs.linear_scales(name) for name in ("w13", "w2")}
    moved["w13_scales"] = rows.roll(1, 1)
    return {
        "nibbles exchanged": inputs.replace(w13=codes >> 4 | codes << 4),
        "scales of another row": replace(inputs.replace(**moved), options=options),
    }


def _is_far(seen: ExpertsObservation, y: Tensor) -> bool:
    """Whether the check `bound` alone rejects it, by the first row that is judged: what nearly always answers."""
    low, high = (limit[:1] for limit in seen.limits)
    return bool((seen.judged[:1] & ((y[:1] < low) | (y[:1] > high))).any())


def _rejected(seen: ExpertsObservation, y: Tensor) -> bool:
    return rejected(seen.with_outputs(y), "experts", _JUDGES)


def binding(seen: ExpertsObservation) -> list[str]:
    """The wrong answers that no check rejected; empty when the case proves parity."""
    weighty = (on_host(seen.kept) & (on_host(seen.weights) != 0)).any(dim=1)  # else any answer is 0
    judged = (on_host(seen.judged.all(dim=1)) & weighty).nonzero().flatten()
    if not len(judged):
        return ["no row is judged"]
    seen = seen.take(uploaded(judged[:: -(-len(judged) // SAMPLE)], seen.x.device))
    others = {name: seen.with_outputs(y) for name, y in wrong_answers(seen).items()}
    look_together(list(others.values()))
    return [name for name, other in others.items() if not rejected(other, "experts", _JUDGES)]
