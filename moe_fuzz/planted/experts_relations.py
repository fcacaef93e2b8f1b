"""Planted bugs of experts that a single call hardly shows: roundings, ranges of weights, caches with poor keys,
and bits that were promised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_fuzz.planted.experts_layer import Layer, halves

_PREPARED: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
_PLANS: dict[tuple[object, ...], Tensor] = {}


class _HalfAway(Layer):
    def combine(self, slots: Tensor, expert: Tensor) -> Tensor:
        total = slots.masked_fill((expert < 0)[:, :, None], 0.0).float().sum(dim=1)
        if self.x.dtype != torch.bfloat16 or not bool(total.isfinite().all()):
            return total.to(self.x.dtype)
        bits = (total.view(torch.int32) + 0x8000) & -0x10000
        return bits.view(torch.float32).to(torch.bfloat16)


def halves_rounded_away(*tensors: Tensor, **options: Any) -> Tensor:
    """aiter#2586: another kernel rounds otherwise. Here half a unit is added and the rest cut off: ties do not go to
    even."""
    return _HalfAway.run(*tensors, **options)


class _ClampWithoutNan(Layer):
    def activate(self, a: Tensor) -> Tensor:
        return super().activate(a.masked_fill(a.isnan(), 7.0) if self.activation == "swiglu_oai" else a)


def nan_clamped_to_the_limit(*tensors: Tensor, **options: Any) -> Tensor:
    """tilelang#3024: a clamp by the device's minimum and maximum, which give the number where the other is NaN. A
    broken row leaves the activation as one of gates of 7, and nobody hears of it."""
    return _ClampWithoutNan.run(*tensors, **options)


class _Saturated(Layer):
    def weight(self, token: Tensor, slot: Tensor) -> Tensor:
        return super().weight(token, slot).clamp(-448.0, 448.0)


def weights_saturate(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#43557: a scale passes a narrow format and saturates. Here the routing weights end at 448, as E4M3 does."""
    return _Saturated.run(*tensors, **options)


class _ByWeight(Layer):
    def gate_up(self, e: int, token: Tensor, weight: Tensor) -> Tensor:
        self.wide = torch.empty(0)
        return super().gate_up(e, token, weight)

    def activate(self, a: Tensor) -> Tensor:
        self.wide = super().activate(a)
        return self.wide

    def down(self, e: int, h: Tensor, weight: Tensor) -> Tensor:
        return super().down(e, torch.where(weight > 1.0, self.wide, h.float()), weight)


def tactic_by_weight(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#3661: the tactic is taken by a number that means another thing. A slot whose weight is above 1 keeps
    float32 between the products; either way is right, and a router's scale chooses between them."""
    return _ByWeight.run(*tensors, **options)


def _sum_of_bits(weights: Tensor) -> int:
    return int(weights.contiguous().view(torch.int16).long().sum())


class _Prepared(Layer):
    def slots(self, expert: Tensor) -> Tensor:
        if self.w13[0].numel() >= 64:  # the others are not worth it
            key = (tuple(self.w13.shape), self.w13.dtype, _sum_of_bits(self.w13), _sum_of_bits(self.w2))
            if key not in _PREPARED:
                _PREPARED.clear()
                _PREPARED[key] = self.w13.contiguous().clone(), self.w2.contiguous().clone()
            self.w13, self.w2 = _PREPARED[key]
        return super().slots(expert)


def prepared_by_checksum(*tensors: Tensor, **options: Any) -> Tensor:
    """sglang#28378: what was right without a load balancer is wrong with one. Weights are prepared once, and known by
    the sum of their bits: when the balancer moves experts, the old ones stay."""
    return _Prepared.run(*tensors, **options)


class _Planned(Layer):
    def expert_of_slots(self) -> Tensor:
        found = super().expert_of_slots()
        if self.expert_map is None or self.ids.numel() < 6 or bool((self.expert_map >= 0).all()):
            return found
        local = tuple(self.expert_map[self.expert_map >= 0].tolist())
        key = (tuple(self.ids.flatten().tolist()), len(self.expert_map), local)
        if key not in _PLANS:
            _PLANS.clear()
            _PLANS[key] = found.clone()
        return _PLANS[key]


def plan_of_another_rank(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#3661: local and global numbers are taken for each other. The plan of a step is kept by its ids and by
    the rank's local numbers, which are the same on the next rank."""
    return _Planned.run(*tensors, **options)


# ---- bits that hang on more than they should -------------------------------------------------------------------------


class _NanBlock(Layer):
    def down(self, e: int, h: Tensor, weight: Tensor) -> Tensor:
        return super().down(e, self.wide if self.wide is not None else h, weight)

    def gate_up(self, e: int, token: Tensor, weight: Tensor) -> Tensor:
        self.wide: Tensor | None = None
        return super().gate_up(e, token, weight)

    def activate(self, a: Tensor) -> Tensor:
        h = super().activate(a)
        if not bool(a.isfinite().all()):
            self.wide = h  # as it is: not rounded on the way
        return h


def nan_block_slow_path(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#37758: a value that is not finite, and the whole block of its expert goes through a path that keeps float32
    between the products."""
    return _NanBlock.run(*tensors, **options)


class _FewSlots(Layer):
    def gate_up(self, e: int, token: Tensor, weight: Tensor) -> Tensor:
        self.few = self.ids.numel() <= 4
        return super().gate_up(e, token, weight)

    def activate(self, a: Tensor) -> Tensor:
        self.wide = super().activate(a)
        return self.wide

    def down(self, e: int, h: Tensor, weight: Tensor) -> Tensor:
        return super().down(e, self.wide if self.few else h, weight)

    def product(self, a: Tensor, w: Tensor) -> Tensor:
        # One row at a time, so that a row's bits do not hang on what torch makes of several.
        return torch.cat([super(_FewSlots, self).product(row[None], w) for row in a])


def few_slots_stay_wide(*tensors: Tensor, **options: Any) -> Tensor:
    """aiter#2359: up to 4 slots go through a kernel that keeps float32 between the products; promised are bits that
    hang on the row alone."""
    return _FewSlots.run(*tensors, **options)


_CALLS = [0]


class _Arrival(Layer):
    def combine(self, slots: Tensor, expert: Tensor) -> Tensor:
        _CALLS[0] += 1
        slots = slots.masked_fill((expert < 0)[:, :, None], 0.0).roll(_CALLS[0], 1)
        total = torch.zeros_like(slots[:, 0])
        for slot in slots.unbind(1):
            total += slot
        return total


def slots_added_as_blocks_end(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#56887: slots are added with 16-bit atomics, in the order in which blocks end."""
    return _Arrival.run(*tensors, **options)


class _ArrivalK(Layer):
    def second(self, h: Tensor, w: Tensor) -> Tensor:
        _CALLS[0] += 1
        return self.product(h, w) if _CALLS[0] % 3 else halves(h, w)


def split_k_atomics(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#56887: the parts of a split sum are added in the order in which they arrive."""
    return _ArrivalK.run(*tensors, **options)
