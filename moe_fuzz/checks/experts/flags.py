"""The first look at an output: whether anything is wrong, by what it is, with one wait for the device.

Nearly every output is right. Which element is wrong, and how, a check finds out where its flag says that one is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_fuzz.checks.experts.observation import ExpertsObservation


def first_look(seen: ExpertsObservation) -> Mapping[str, float]:
    """Of each of `wrong`, whether an element is, 1 or 0; and the largest error over its bound, as `bound_used`."""
    return _looked(seen, 1)[0]


def look_together(observations: Sequence[ExpertsObservation]) -> None:
    """The first look at several outputs of the same inputs, as at one that is as often as long."""
    if observations:
        stacked = observations[0].with_outputs(torch.stack([seen.outputs.y for seen in observations]))
        for seen, flags in zip(observations, _looked(stacked, len(observations)), strict=True):
            seen.__dict__["flags"] = flags


def _looked(seen: ExpertsObservation, count: int) -> list[dict[str, float]]:
    """Of an output [T, H], or of `count` ones [count, T, H]."""
    size = seen.outputs.y.numel() // count  # there may be none
    names, masks = zip(*_wrong(seen), strict=True)
    found = torch.stack(masks).view(len(masks), count, size).any(dim=2).double()
    low, high = seen.closed
    share = torch.where(seen.judged & high & low, shares(seen), 0.0).view(count, size)
    used = share.amax(dim=1) if size else share.new_zeros(count)
    told = torch.cat([found, used[None]]).t().tolist()
    return [dict(zip((*names, "bound_used"), flags, strict=True)) for flags in told]


def shares(seen: ExpertsObservation) -> Tensor:
    """float64 [T, H]: the error over its bound."""
    return (seen.y - seen.numbers.value).abs() / seen.numbers.bound


def wrong(seen: ExpertsObservation) -> dict[str, Tensor]:
    """bool of the output's shape, by what is wrong there."""
    return dict(_wrong(seen))


def _wrong(seen: ExpertsObservation) -> Iterator[tuple[str, Tensor]]:
    # Small tensors cost what their operations cost to launch: what the inputs alone decide is asked once of them.
    y, written, nan = seen.outputs.y, seen.written, seen.outputs.y.isnan()
    low, high = seen.limits
    not_too_low, not_too_high = seen.closed
    yield "written", seen.missing
    yield "nan", seen.claimed & nan & written
    yield "infinite", seen.claimed & y.isinf() & torch.where(y > 0, not_too_high, not_too_low)
    yield "nan-lost", seen.tainted & ~nan & written
    yield "nonfinite-lost", seen.hopeless & seen.finite
    yield "dropped", seen.empty & (y != 0) & written
    yield "bound", seen.judged & ~((low <= seen.y) & (seen.y <= high))
    if seen.inputs.exact:
        expected, known = seen.exact
        yield "exact", known & seen.finite & (seen.y != expected)
