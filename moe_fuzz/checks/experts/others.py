"""The calls that relations compare with: the experts in another order, or shared by two ranks, or twice the weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_fuzz.ops.experts.inputs import ExpertsInputs

RANKS = 2
SCALE = 2.0
_MOST = 1 << 22  # elements of the projections that a relation may copy
_BY_EXPERT = ("w13", "w2", "b13", "b2", "w13_scales", "w2_scales", "w13_alpha", "w2_alpha")


def _copied(inputs: ExpertsInputs) -> bool:
    """Whether there are several experts, and few enough elements of them, to be laid out anew."""
    w13, w2 = inputs.plain["w13"], inputs.plain["w2"]
    return inputs.tokens > 0 and len(w2) > 1 and w13.numel() + w2.numel() <= _MOST


def relabelled(inputs: ExpertsInputs) -> ExpertsInputs | None:
    """The same experts, each in the next one's place, and the ids with them."""
    if not _copied(inputs):
        return None
    plain, count = inputs.plain, len(inputs.plain["w2"])
    changed: dict[str, Tensor] = {name: plain[name].roll(1, 0) for name in _BY_EXPERT if name in plain}
    place = "expert_map" if "expert_map" in plain else "ids"
    old = plain[place]
    changed[place] = torch.where((old >= 0) & (old < count), (old + 1) % count, old)
    return inputs.replace(**changed)


def sharded(inputs: ExpertsInputs) -> list[ExpertsInputs]:
    """The calls of two ranks, each with every second expert and a map; none where there is one expert."""
    return [_shard(inputs, rank) for rank in range(RANKS)] if _copied(inputs) else []


def _shard(inputs: ExpertsInputs, rank: int) -> ExpertsInputs:
    plain, count = inputs.plain, len(inputs.plain["w2"])
    changed: dict[str, Tensor] = {name: plain[name][rank::RANKS].contiguous() for name in _BY_EXPERT if name in plain}
    old = plain.get("expert_map", torch.arange(count, dtype=torch.int32, device=inputs.device))
    here = (old >= 0) & (old < count) & (old % RANKS == rank)
    changed["expert_map"] = torch.where(here, old // RANKS, -1).int()
    packed = {name: lie for name, lie in inputs.lies.items() if name not in changed}
    return replace(inputs.replace(**changed), lies=packed, folds={}, turned=())


def scaled(inputs: ExpertsInputs) -> ExpertsInputs | None:
    """Twice the routing weights; None where they are on the input, whose products pass a curve."""
    if not inputs.tokens or inputs.options["apply_weight_on_input"]:
        return None
    return inputs.replace(weights=inputs.plain["weights"] * SCALE)
