"""What a wrong row would be right for: the words after "it looks as if". For a person; nothing is judged by it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_fuzz.checks.experts.bounds import Numbers, evaluate
from moe_fuzz.checks.experts.declaration import declaration
from moe_fuzz.checks.experts.observation import ExpertsObservation
from moe_fuzz.ops.experts.inputs import ExpertsInputs

_MOST = 1 << 24  # elements of the projections that an explanation may multiply
_SLOTS = 16


def explain(seen: ExpertsObservation, token: int) -> str:
    """`; it looks as if slot 1 read expert 3, not 5`, or which declaration would make it right, or nothing."""
    if seen.brief:
        return ""
    if not bool((seen.y[token] != 0).any()):
        return "; the row is all zero"
    hint = reading(seen, token)
    return f"; it looks as if {hint}" if hint else declaration(seen)


def reading(seen: ExpertsObservation, token: int) -> str:
    """What may have happened to this token, of what would make its row right; empty where nothing of that would."""
    for hint, numbers, row in _readings(seen, token):
        if bool(((seen.y[token] - numbers.value[row]).abs() <= numbers.bound[row]).all()):
            return hint
    return ""


def _readings(seen: ExpertsObservation, token: int) -> Iterator[tuple[str, Numbers, int]]:
    """What may have happened, and the row of the numbers that would then be right."""
    fits = ((seen.y[token] - seen.numbers.value).abs() <= seen.numbers.bound).all(dim=1) & seen.claimed.all(dim=1)
    if bool(fits[token]):  # within the bound of the right numbers, as would be much that did not happen
        return
    for other in fits.nonzero().flatten().tolist()[:1]:
        name = other if seen.rows is None else seen.rows[other]
        yield f"the token got what token {name} should have", seen.numbers, other
    hidden, inter = seen.x.shape[1], seen.inputs.inter
    expert = seen.expert[token]  # [k]
    slots = seen.kept[token].nonzero().flatten().tolist()[:_SLOTS]
    if 3 * hidden * inter * seen.experts > _MOST:
        return
    yield from _alone(seen, token, "the weights were ignored", weights=torch.ones_like(seen.weights[token]))
    yield from _alone(seen, token, "the weights were applied twice", weights=seen.weights[token].square())
    for slot in slots:
        others = expert.repeat(seen.experts + 1, 1)  # [E + 1, k]
        others[:, slot] = torch.arange(-1, seen.experts, device=expert.device)
        inputs = _copies(seen, token, len(others))
        numbers = evaluate(inputs, others, seen.info.contract)
        near = ((seen.y[token] - numbers.value).abs() <= numbers.bound).all(dim=1)
        near[int(expert[slot]) + 1] = False
        for found in near.nonzero().flatten().tolist()[:1]:
            read = f"slot {slot} read expert {found - 1}, not {int(expert[slot])}"
            yield read if found else f"slot {slot} is missing", numbers, found


def _copies(seen: ExpertsObservation, token: int, count: int) -> ExpertsInputs:
    rows = torch.full((count,), token, device=seen.x.device)
    return seen.rows_of(seen.inputs, rows)


def _alone(
    seen: ExpertsObservation, token: int, hint: str, weights: torch.Tensor
) -> Iterator[tuple[str, Numbers, int]]:  # fmt: skip
    inputs = _copies(seen, token, 1).replace(weights=weights[None])
    yield hint, evaluate(inputs, seen.expert[token][None], seen.info.contract), 0
