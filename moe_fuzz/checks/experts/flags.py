"""The first look at an output: whether anything is wrong, by what it is, with one wait for the device.

Nearly every output is right. Which element is wrong, and how, a check finds out where its flag says that one is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_fuzz.mirror import answers

if TYPE_CHECKING:
    from moe_fuzz.checks.experts.observation import ExpertsObservation


def first_look(seen: ExpertsObservation) -> Mapping[str, float]:
    """Of each of `wrong`, whether an element is, 1 or 0; and the largest error over its bound, as `bound_used`."""
    found = _enqueued(seen)
    return dict(zip(found, answers(list(found.values())), strict=True))


def look_together(observations: Iterable[ExpertsObservation]) -> None:
    """The first look at several outputs, which wait as one."""
    found = [(seen, _enqueued(seen)) for seen in observations]
    told = iter(answers([flag for _, flags in found for flag in flags.values()]))
    for seen, flags in found:
        seen.__dict__["flags"] = dict(zip(flags, told, strict=False))


def _enqueued(seen: ExpertsObservation) -> dict[str, Tensor]:
    """Of one element each."""
    found = {name: mask.any() for name, mask in wrong(seen).items()}
    low, high = seen.limits
    share = torch.where(seen.judged & high.isfinite() & low.isfinite(), shares(seen), 0.0)
    return found | {"bound_used": share.max() if share.numel() else share.new_zeros(())}


def shares(seen: ExpertsObservation) -> Tensor:
    """float64 [T, H]: the error over its bound."""
    return (seen.y - seen.numbers.value).abs() / seen.numbers.bound


def wrong(seen: ExpertsObservation) -> dict[str, Tensor]:
    """bool [T, H], by what is wrong there."""
    return dict(_wrong(seen))


def _wrong(seen: ExpertsObservation) -> Iterator[tuple[str, Tensor]]:
    y, written = seen.outputs.y, ~seen.missing
    low, high = seen.limits
    finite = y.isfinite()
    yield "written", seen.missing
    yield "nan", seen.claimed & y.isnan() & written
    yield "infinite", seen.claimed & y.isinf() & torch.where(y > 0, high < torch.inf, low > -torch.inf)
    weighty = (seen.kept & (seen.weights != 0)).any(dim=1)
    lost = torch.full_like(weighty, seen.inputs.quantizes)  # a code has no NaN
    yield "nan-lost", (seen.x.isnan().any(dim=1) & weighty & ~lost)[:, None] & ~y.isnan() & written
    yield "nonfinite-lost", seen.hopeless & finite & written
    yield "dropped", ~seen.kept.any(dim=1)[:, None] & ~(y == 0) & written
    yield "bound", seen.judged & ~((low <= seen.y) & (seen.y <= high))
    if seen.inputs.exact:
        expected, known = seen.exact
        yield "exact", known & written & finite & (seen.y != expected)
