"""The slots of a layer in batches: those of experts with about as many slots each, for one product of matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from moe_fuzz.mirror import on_host, uploaded

_MOST = {"cpu": 1 << 20, "cuda": 1 << 25}  # float64 elements of the largest tensor of a batch
#: Microseconds on a host: of a batch, of a number of a slot's rows, and of one of an expert's matrices for each slot.
_BATCH, _NUMBER, _PRODUCT = 600.0, 0.03, 0.0012
_BATCHES = "_moe_fuzz_batches"  # an attribute of the experts of slots, which several evaluations ask for


@dataclass(frozen=True)
class Batch:
    """n slots each of e experts. Where an expert has fewer, `real` is False and the indices are those of others.

    What is real is also there as a list, because a mask as an index waits for the device.
    """

    experts: Tensor  # int64 [e]
    token: Tensor  # int64 [e, n]
    slot: Tensor  # int64 [e, n]: the place in the token's row
    real: Tensor  # bool [e, n]
    at: Tensor  # int64 [m]: where `real` is True, flat
    tokens: Tensor  # int64 [m]: the tokens there
    places: Tensor  # int64 [m]: token * k + slot there

    def of_real(self, values: Tensor) -> Tensor:
        """[m, D]: the rows of [e, n, D] that are real."""
        if self.at.numel() == self.real.numel():
            return values.flatten(0, 1)
        return values.flatten(0, 1).index_select(0, self.at)


def batches(expert: Tensor, each: int, wide: int) -> Iterator[Batch]:
    """The slots of expert int64 [T, k], where -1 drops one. A loop over experts would launch as many kernels as there
    are; here it is one batch for experts with about as many slots, and more where memory asks for it.

    They are put together on the host: of an `expert` that it has made, nothing waits for the device (see mirror.py).

    each: elements that an expert's matrices have. wide: elements of a row of a slot's tensors.
    """
    made = expert.__dict__.setdefault(_BATCHES, {})
    if (each, wide) not in made:
        made[each, wide] = [_there(batch, expert) for batch in _planned(on_host(expert), each, wide, expert.device)]
    yield from made[each, wide]


def _planned(
    expert: Tensor, each: int, wide: int, device: torch.device
) -> Iterator[tuple[Any, Any, Any]]:  # fmt: skip
    """Of each batch the experts [e], and for each of their places the slot, token * k + j, and whether it is real
    [e, n]. In numpy, whose operations on a few numbers cost a third of torch's."""
    flat = expert.numpy().ravel()
    order = flat.argsort(kind="stable")
    dropped = int((flat < 0).sum())
    if dropped == len(flat):
        return
    order = order[dropped:]
    counts = numpy.bincount(flat[order])
    start = counts.cumsum() - counts
    most = _MOST[device.type]
    for largest, members in _alike(counts, each, wide, device):
        rows = min(largest, max(1, most // wide))
        step = max(1, most // max(each, rows * wide))
        for begin in range(0, len(members), step):
            experts = members[begin : begin + step]
            here, first_slot = counts[experts], start[experts]
            for first in range(0, largest, rows):
                nth = numpy.arange(first, min(first + rows, largest))
                real = nth < here[:, None]  # [e, n]
                if first and not real.any():
                    break
                yield experts, order[(first_slot[:, None] + nth).clip(max=len(order) - 1)], real


def _alike(counts: Any, each: int, wide: int, device: torch.device) -> list[tuple[int, Any]]:
    """Experts that have slots, in groups: the most slots that one of a group has, and the group."""
    used = counts.nonzero()[0]
    most_slots = int(counts.max())
    if device.type == "cpu":
        return _by_cost(counts, used[counts[used].argsort(kind="stable")], _NUMBER * wide + _PRODUCT * each)
    if len(used) * max(each, most_slots * wide) <= _MOST[device.type] // 8:  # then one batch costs less than several
        return [(most_slots, used)]
    sizes = numpy.array([1 << (count - 1).bit_length() for count in counts[used].tolist()])
    return [(size, used[sizes == size]) for size in dict.fromkeys(sizes.tolist())]


def _by_cost(counts: Any, used: Any, slot: float) -> list[tuple[int, Any]]:
    """used: in the order of their slots, the most last. A group ends where it would cost less to begin another than to
    compute the slots that its members do not have, at `slot` microseconds each."""
    found, last, wasted = [], len(used), 0.0
    sizes = counts[used].tolist()
    for at in range(len(used) - 2, -1, -1):
        wasted += (sizes[last - 1] - sizes[at]) * slot
        if wasted > _BATCH:
            found.append((sizes[last - 1], used[at + 1 : last]))
            last, wasted = at + 1, 0.0
    return [*found, (sizes[last - 1], used[:last])]


def _there(planned: tuple[Any, Any, Any], expert: Tensor) -> Batch:
    """A batch where the experts of the slots are, moved in one piece."""
    experts, place, real = planned
    at, top_k = real.ravel().nonzero()[0], expert.shape[1]
    places = place.ravel()[at]
    parts = [experts, (place // top_k).ravel(), (place % top_k).ravel(), real.ravel(), at, places // top_k, places]
    whole = torch.from_numpy(numpy.concatenate(parts, dtype=numpy.int64, casting="unsafe"))
    moved = uploaded(whole, expert.device).split([part.size for part in parts])
    return Batch(moved[0], moved[1].view(place.shape), moved[2].view(place.shape), moved[3].view(place.shape).bool(),
                 moved[4], moved[5], moved[6])  # fmt: skip
