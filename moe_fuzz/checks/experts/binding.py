"""Wrong answers of experts, each of which must be rejected: see checks/binding.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_fuzz.checks.binding import SAMPLE, rejected
from moe_fuzz.checks.experts.bounds import evaluate
from moe_fuzz.checks.experts.observation import ExpertsObservation
from moe_fuzz.contract import Contract
from moe_fuzz.ops.experts.inputs import ExpertsInputs

_JUDGES = ("finite", "dropped")
_ANY = Contract()  # for values alone


def wrong_answers(seen: ExpertsObservation) -> Iterator[tuple[str, torch.Tensor]]:
    """All zero; rows exchanged (each gets another's answer); two experts swapped; the last expert left out; the routing
    weights ignored. A fault that would change nothing is not asked for: one expert cannot be swapped."""
    y, expert = seen.outputs.y, seen.expert
    yield "all zero", torch.zeros_like(y)
    yield "rows exchanged", _exchanged(seen)
    one = int(expert[seen.kept][0])
    if seen.experts > 1:
        neighbour = (one or seen.experts) - 1
        swapped = torch.where(expert == one, neighbour, torch.where(expert == neighbour, one, expert))
        yield "two experts swapped", _answer(seen, seen.inputs, swapped)
    yield "the last expert left out", _answer(seen, seen.inputs, torch.where(expert == expert.max(), -1, expert))
    if not (seen.weights[seen.kept] == 1).all():
        yield "weights ignored", _answer(seen, seen.inputs.replace(weights=torch.ones_like(seen.weights)), expert)


def _answer(seen: ExpertsObservation, inputs: ExpertsInputs, expert: torch.Tensor) -> torch.Tensor:
    return evaluate(inputs, expert, _ANY).value.to(seen.x.dtype)


def _exchanged(seen: ExpertsObservation) -> torch.Tensor:
    """To each row the answer of the row before it. Where rows are too much alike for that to be wrong, or there is one
    alone, the right answer to other x."""
    other = seen.outputs.y.roll(1, 0)
    if seen.tokens > 1 and rejected(seen.with_outputs(other), "experts", _JUDGES):
        return other
    x = seen.benign(torch.arange(seen.tokens))
    return _answer(seen, seen.inputs.replace(x=x), seen.expert)


def binding(seen: ExpertsObservation) -> list[str]:
    """The wrong answers that no check rejected; empty when the case proves parity."""
    judged = (seen.judged.all(dim=1) & seen.kept.any(dim=1)).nonzero().flatten()
    if not len(judged):
        return ["no row is judged"]
    seen = seen.take(judged[:: -(-len(judged) // SAMPLE)])
    return [name for name, y in wrong_answers(seen) if not rejected(seen.with_outputs(y), "experts", _JUDGES)]
