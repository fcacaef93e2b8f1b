"""What relations between two calls have in common: the outputs are compared row by row, bit for bit."""

from __future__ import annotations

from typing import Any

import torch

from moe_fuzz.ops.inputs import Inputs, element_bits

REPEATS = 3
_EVERY = 4  # case has huge neighbours: a call of its own, which few defects need


def has_huge_neighbours(seen: Any) -> bool:
    """Whether a case has rows exchanged for huge ones, by its seed: by other bits than choose a relation of experts."""
    return bool((seen.case.seed >> 16) % _EVERY == 0)


def huge(rows: torch.Tensor) -> torch.Tensor:
    """The same rows with the dtype's largest number in every place, and the signs they have."""
    return torch.full_like(rows, torch.finfo(rows.dtype).max).copysign(rows)


def tensors(outputs: Any) -> dict[str, torch.Tensor]:
    """The results that are there, by name."""
    return {name: tensor for name, tensor in vars(outputs).items() if tensor is not None}


def differs(one: Any, other: Any) -> torch.Tensor:
    """bool [T]: rows whose bits differ in any output. Every output has a row a token."""
    pairs = list(zip(tensors(one).values(), tensors(other).values(), strict=True))
    found = torch.zeros(pairs[0][0].shape[0], dtype=torch.bool, device=pairs[0][0].device)
    for a, b in pairs:
        if a.shape != b.shape or a.dtype != b.dtype:
            return torch.ones_like(found)
        found |= (element_bits(a) != element_bits(b)).flatten(1).any(dim=1)
    return found


def same(one: Any, other: Any) -> bool:
    """Whether no row differs: less work than to say which one does."""
    pairs = zip(tensors(one).values(), tensors(other).values(), strict=True)
    return all(a.dtype == b.dtype and torch.equal(element_bits(a), element_bits(b)) for a, b in pairs)


def steady(seen: Any, one: Inputs, other: Inputs, rows: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether both calls repeat their own bits on these rows: if not, a difference between them is nondeterminism."""
    first_one, first_other = seen.call(one), seen.call(other)
    for _ in range(REPEATS):
        if differs(first_one, seen.call(one))[rows].any() or differs(first_other, seen.call(other))[others].any():
            return False
    return True


def pick(outputs: Any, rows: torch.Tensor) -> Any:
    """The outputs of these rows, int64 [R]."""
    return type(outputs)(*(None if tensor is None else tensor[rows] for tensor in vars(outputs).values()))
