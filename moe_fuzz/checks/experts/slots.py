"""The slots of a layer in batches: those of experts with about as many slots each, for one product of matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST = {"cpu": 1 << 20, "cuda": 1 << 25}  # float64 elements of the largest tensor of a batch


@dataclass(frozen=True)
class Batch:
    """n slots each of e experts. Where an expert has fewer, `real` is False and the indices are those of others."""

    experts: Tensor  # int64 [e]
    token: Tensor  # int64 [e, n]
    slot: Tensor  # int64 [e, n]: the place in the token's row
    real: Tensor  # bool [e, n]


def batches(expert: Tensor, each: int, wide: int) -> Iterator[Batch]:
    """The slots of expert int64 [T, k], where -1 drops one. A loop over experts would launch as many kernels as there
    are; here it is one batch for every power of two of slots, and more where memory asks for it.

    each: elements that an expert's matrices have. wide: elements of a row of a slot's tensors.
    """
    top_k, flat = expert.shape[1], expert.flatten()
    if not flat.numel() or int(flat.max()) < 0:
        return
    counts = torch.bincount(flat[flat >= 0])
    order = flat.argsort(stable=True)[int((flat < 0).sum()) :]
    start = counts.cumsum(0) - counts
    most = _MOST[expert.device.type]
    used = {index: count for index, count in enumerate(counts.tolist()) if count}
    most_slots = max(used.values())
    little = len(used) * max(each, most_slots * wide) <= most // 8  # then one batch costs less than several
    by_size: dict[int, list[int]] = {}
    for index, count in used.items():
        by_size.setdefault(most_slots if little else 1 << (count - 1).bit_length(), []).append(index)
    for largest, members in by_size.items():
        rows = min(largest, max(1, most // wide))
        step = max(1, most // max(each, rows * wide))
        for begin in range(0, len(members), step):
            experts = torch.tensor(members[begin : begin + step], device=expert.device)
            here = counts[experts]
            for first in range(0, largest, rows):
                nth = torch.arange(first, min(first + rows, largest), device=expert.device)
                real = nth < here[:, None]  # [e, n]
                if first and not real.any():
                    break
                at = order[(start[experts][:, None] + nth).clamp(max=len(order) - 1)]
                yield Batch(experts, at // top_k, at % top_k, real)
