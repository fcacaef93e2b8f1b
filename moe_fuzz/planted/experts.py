"""Planted bugs of experts: wrong values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_fuzz.planted.experts_layer import Layer, scaled
from moe_fuzz.planted.layer_parts import by_expert
from moe_fuzz.reference.align import expert_of_slot


class _MapOfMinusOne(Layer):
    def expert_of_slots(self) -> Tensor:
        if self.expert_map is None:
            return super().expert_of_slots()
        known = self.ids < len(self.expert_map)
        wrapped = torch.where(known & (self.ids >= -len(self.expert_map)), self.ids, 0).long()
        return torch.where(known, self.expert_map[wrapped], -1).long()


def map_of_minus_one(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#42034: the padding id -1 indexes the map from its end, and names the expert of its last entry."""
    return _MapOfMinusOne.run(*tensors, **options)


class _IdsClamped(Layer):
    def expert_of_slots(self) -> Tensor:
        count = self.experts if self.expert_map is None else len(self.expert_map)
        return expert_of_slot(self.ids.clamp(max=count - 1), self.experts, self.expert_map)


def ids_clamped(*tensors: Tensor, **options: Any) -> Tensor:
    """DeepGEMM#38: a slot that should be skipped is not. Ids past the last expert are clamped to it, for safety."""
    return _IdsClamped.run(*tensors, **options)


class _ZeroOffRank(Layer):
    def expert_of_slots(self) -> Tensor:
        found = super().expert_of_slots()
        return torch.where(self.ids < self.experts, found, -1)


def zero_off_rank(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#3547: ids of all ranks are compared with this rank's number of experts, before they are looked up.

    Where the rank's experts are not the first ones, every slot is dropped, and the output is all zero.
    """
    return _ZeroOffRank.run(*tensors, **options)


class _StaleSlots(Layer):
    on_device = True  # what nobody wrote is poison there

    def combine(self, slots: Tensor, expert: Tensor) -> Tensor:
        return slots.float().sum(dim=1).to(self.x.dtype)


def stale_slots_summed(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#46408: the rows of dropped slots are never written, and are summed up all the same."""
    return _StaleSlots.run(*tensors, **options)


class _NanWeight(Layer):
    def combine(self, slots: Tensor, expert: Tensor) -> Tensor:
        factor = torch.where(expert >= 0, 1.0, self.weights * 0.0)  # [T, k]
        slots = slots.masked_fill((expert < 0)[:, :, None], 0.0).float()
        return (slots * factor[:, :, None]).sum(dim=1).to(self.x.dtype)


def nan_weight_masked_by_zero(*tensors: Tensor, **options: Any) -> Tensor:
    """sglang#24850: what a dropped slot holds is multiplied by 0 instead of being left out: a NaN stays one."""
    return _NanWeight.run(*tensors, **options)


class _SlotZero(Layer):
    BLOCK = 16

    def slots(self, expert: Tensor) -> Tensor:
        slots = self.x.new_empty((expert.numel(), self.hidden))
        zero = torch.zeros(1, dtype=torch.int64, device=self.x.device)
        for e, members in by_expert(expert):
            lanes = torch.cat([members, zero]) if len(members) % self.BLOCK else members  # past the end: slot 0
            slots[lanes] = self.of_expert(e, lanes // self.top_k, lanes % self.top_k)
        return slots.view(*expert.shape, self.hidden)


def partial_block_writes_slot_zero(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#28619: lanes past the end of a partial block take index 0, compute slot 0 by this block's expert and store
    it there."""
    return _SlotZero.run(*tensors, **options) if tensors[4].numel() else Layer.run(*tensors, **options)


class _WeightTwice(Layer):
    def down(self, e: int, h: Tensor, weight: Tensor) -> Tensor:
        y = super().down(e, h, weight)
        return scaled(y.float(), weight).to(y.dtype) if self.on_input else y


def weight_applied_twice(*tensors: Tensor, **options: Any) -> Tensor:
    """sglang#21348: the path that has weighted its input goes through an epilogue that weights once more."""
    return _WeightTwice.run(*tensors, **options)


class _WeightOfToken(Layer):
    def weight(self, token: Tensor, slot: Tensor) -> Tensor:
        return self.weights[token, 0]


def weight_of_token(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#2629: the token's index stands where the slot's should: with k > 1 all slots have the first weight."""
    return _WeightOfToken.run(*tensors, **options)


class _EndPadded(Layer):
    def activate(self, a: Tensor) -> Tensor:
        if self.activation == "relu2" or self.gate_layout == "interleaved":
            return super().activate(a)
        padded = -(-self.inter // 16) * 16
        a = torch.nn.functional.pad(a, (0, 2 * (padded - self.inter)))
        return super().activate(a)[:, : self.inter]


def padded_at_the_end(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#55649: gate and up-projection are padded as one, at the end, and then split in the middle.

    Both halves are off by what was padded where I is not a multiple of 16.
    """
    return _EndPadded.run(*tensors, **options)


class _Swapped(Layer):
    def activate(self, a: Tensor) -> Tensor:
        if self.gate_layout == "up_first":
            self.gate_layout = "first"
        return super().activate(a)


def gate_and_up_swapped(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#34673: a backend knows one order of the halves, and is chosen for the other."""
    return _Swapped.run(*tensors, **options)


class _ByTanh(Layer):
    def activate(self, a: Tensor) -> Tensor:
        if self.activation != "gelu":
            return super().activate(a)
        one, other = (a[..., ::2], a[..., 1::2]) if self.gate_layout == "interleaved" else a.chunk(2, dim=-1)
        gate, up = (other, one) if self.gate_layout == "up_first" else (one, other)
        return torch.nn.functional.gelu(gate, approximate="tanh") * up


def gelu_by_tanh(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#41574: of the two curves that are called gelu the other one. They are 0.0005 apart at most, and a tenth of
    the result where the gate is -3."""
    return _ByTanh.run(*tensors, **options)


class _BiasOffset(Layer):
    def bias(self, e: int) -> Tensor:
        assert self.b2 is not None
        flat = self.b2.float().flatten()
        at = e * (-(-self.hidden // 16) * 16) + torch.arange(self.hidden, device=flat.device)
        return flat[at.clamp(max=len(flat) - 1)]


def bias_offset_padded(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#35497: the offset of an expert's bias is computed from H padded to 16: wrong for experts other than 0."""
    return _BiasOffset.run(*tensors, **options)


def biases_without_their_strides(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#34673: a layout is taken for another. Reads biases whose rows stand apart, or whose columns are packed, as
    if their rows were."""
    for name in ("b13", "b2"):
        bias = options.get(name)
        if bias is not None:
            options[name] = bias.as_strided(bias.shape, (bias.shape[1], 1))
    return Layer.run(*tensors, **options)


def one_flag_for_both_biases(*tensors: Tensor, **options: Any) -> Tensor:
    """The class of vllm#22508, biases that a kernel has only for the model it came with. One flag, taken from b13, says
    whether there are biases: where w2 alone has them, they are lost, and so a test with both of them never shows it."""
    return Layer.run(*tensors, **options | ({"b2": None} if options.get("b13") is None else {}))


class _Bf16Sums(Layer):
    def product(self, a: Tensor, w: Tensor) -> Tensor:
        total = torch.zeros((len(a), len(w)), dtype=torch.bfloat16, device=a.device)
        for first in range(0, a.shape[1], 16):
            total += a[:, first : first + 16].float() @ w[:, first : first + 16].float().t()
        return total.float()


def bf16_partial_sums(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#56887: the parts of a split sum meet in 16 bits."""
    return _Bf16Sums.run(*tensors, **options)


class _NarrowParts(Layer):
    def product(self, a: Tensor, w: Tensor) -> Tensor:
        middle = a.shape[1] // 2
        parts = [super(_NarrowParts, self).product(a[:, at], w[:, at]) for at in (slice(middle), slice(middle, None))]
        return sum((part.to(self.x.dtype).float() for part in parts), torch.zeros_like(parts[0]))


def narrow_split_sums(*tensors: Tensor, **options: Any) -> Tensor:
    """The class of vllm#56887, partial sums in 16 bits. Of a split sum each half is float32, and is stored in the dtype
    of x before they are added up: where they are small whole numbers, or as small as their sum, it loses nothing that
    the last store does not."""
    return _NarrowParts.run(*tensors, **options)


class _Bf16Weights(Layer):
    def weight(self, token: Tensor, slot: Tensor) -> Tensor:
        return self.weights[token, slot].bfloat16().float()


def bf16_weights(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#3595: the router's float32 weights are taken as bfloat16. The error hides within those of the stores,
    and doubles their spread."""
    return _Bf16Weights.run(*tensors, **options)


def bf16_biases(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#22508: biases are kept in bfloat16, whatever they come in. That loses less than a step of the result,
    and shows where a sum lies near the middle between two."""
    narrow = {name: options[name].bfloat16() for name in ("b13", "b2") if options.get(name) is not None}
    return Layer.run(*tensors, **{**options, **narrow})


class _KTail(Layer):
    def first(self, x: Tensor, w: Tensor) -> Tensor:
        whole = x.shape[1] if x.shape[1] < 32 else x.shape[1] // 32 * 32
        return super().first(x[:, :whole], w[:, :whole])


def k_tail_dropped(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#47303: the loop over H takes whole steps of 32; what is left is never added."""
    return _KTail.run(*tensors, **options)


class _LastExperts(Layer):
    def slots(self, expert: Tensor) -> Tensor:
        slots = super().slots(expert)
        return slots.masked_fill((expert >= max(1, self.experts // 4 * 4))[:, :, None], 0.0)


def last_experts_dropped(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#21079: experts are walked in fours, and those left over have no one."""
    return _LastExperts.run(*tensors, **options)


class _CountedOnce(Layer):
    def combine(self, slots: Tensor, expert: Tensor) -> Tensor:
        earlier = torch.ones(self.top_k, self.top_k, device=self.x.device).tril(-1).bool()
        again = ((expert[:, :, None] == expert[:, None, :]) & earlier).any(dim=2)  # [T, k]
        return super().combine(slots, expert.masked_fill(again, -1))


def duplicate_counted_once(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#3011: the search for a token's experts stops at the first match: a second slot of it is nobody's."""
    return _CountedOnce.run(*tensors, **options)


class _LocalShare(Layer):
    def combine(self, slots: Tensor, expert: Tensor) -> Tensor:
        here = (expert >= 0).sum(dim=1, keepdim=True)
        y = super().combine(slots, expert)
        return torch.where((here > 0) & (here < self.top_k), (y * self.top_k / here.clamp(min=1)).to(y.dtype), y)


def mean_of_local_slots(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#3191: sizes of the rank stand for those of the layer: a sum over the slots that are here is scaled up
    to k of them."""
    return _LocalShare.run(*tensors, **options)


class _NarrowIds(Layer):
    def expert_of_slots(self) -> Tensor:
        if self.ids.dtype == torch.int64:
            self.ids = self.ids.contiguous().view(torch.int32)[:, : self.top_k]  # as the callee's ABI has it
        return super().expert_of_slots()


def int64_ids_read_as_int32(*tensors: Tensor, **options: Any) -> Tensor:
    """sglang#29929: int64 ids are handed to an interface of int32, which sees every second one as 0."""
    return _NarrowIds.run(*tensors, **options)


class _CutIds(Layer):
    def expert_of_slots(self) -> Tensor:
        self.ids = self.ids.int()
        return super().expert_of_slots()


def int64_ids_cut_to_32_bits(*tensors: Tensor, **options: Any) -> Tensor:
    """sglang#29929: int64 ids are cast to the callee's int32 before anybody looked at them: one of no expert may pass
    for an expert."""
    return _CutIds.run(*tensors, **options)


class _BatchScale(Layer):
    def first(self, x: Tensor, w: Tensor) -> Tensor:
        scale = self.x.float().abs().amax().clamp(min=2.0**-20).log2().floor().exp2()
        return ((x.float() / scale) @ w.float().t()) * scale


def amax_of_the_layer(*tensors: Tensor, **options: Any) -> Tensor:
    """aiter#6568: the scale is that of the whole batch: one padding row of Inf and every row is NaN."""
    return _BatchScale.run(*tensors, **options) if tensors[0].numel() else Layer.run(*tensors, **options)


def no_tokens_raises(*tensors: Tensor, **options: Any) -> Tensor:
    """sglang#31794: T = 0 gives a grid of no blocks, which no launch takes."""
    grid = (tensors[0].shape[0], tensors[1].shape[0])
    if not grid[0]:
        raise RuntimeError(f"CUDA error: invalid configuration argument (grid {grid})")
    return Layer.run(*tensors, **options)


def float32_result(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#3644: the dtype of the result is that of the accumulator, where the slots of a token are one alone."""
    y = Layer.run(*tensors, **options)
    return y.float() if tensors[4].shape[1] == 1 else y
