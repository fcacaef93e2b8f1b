"""The experts of a layer in plain PyTorch: a loop over experts, and grouped products. Worker side."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.reference.align import expert_of_slot
from moe_fuzz.reference.experts_bf16 import activate
from moe_fuzz.reference.nvfp4 import dequantize, unswizzle
from moe_fuzz.targets.torch_nvfp4 import nvfp4_quantize


def _product(a: Tensor, w: Tensor) -> Tensor:  # [n, D], [R, D] -> [n, R] float32
    """a @ w.T with nothing rounded on the way. A CPU's own product has no float32 result of 16-bit operands."""
    return torch.mm(a, w.t(), out_dtype=torch.float32) if a.is_cuda else a.float() @ w.float().t()


@declares(
    contract=Contract(deterministic=True, graph=False, slot="float32"),  # it asks the device which experts have tokens
    capabilities=Capabilities(compiles=False, dtypes=("bfloat16", "float16"), out=True, alignment=1, any_strides=True,
                              nan_weights=True, nan_biases=True),
)  # fmt: skip
def experts_bf16(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, *, expert_map: Tensor | None = None,
    activation: str = "silu", gate_layout: str = "first", b13: Tensor | None = None, b2: Tensor | None = None,
    apply_weight_on_input: bool = False, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """An expert after the other, as most model files have it. Shapes: `reference/experts_bf16.py`."""
    expert = expert_of_slot(ids, w13.shape[0], expert_map)  # [T, k]

    def activated(e: int, token: Tensor, weight: Tensor) -> Tensor:
        return _activated(_product(x[token], w13[e]), e, weight, activation, gate_layout, b13, apply_weight_on_input)

    def down(e: int, h: Tensor) -> Tensor:
        return _product(h.to(x.dtype), w2[e])

    return _summed(x, len(w2), weights, expert, activated, down, b2, apply_weight_on_input, out)


def _activated(
    a: Tensor, e: int, weight: Tensor, activation: str, gate_layout: str, b13: Tensor | None, on_input: bool
) -> Tensor:  # fmt: skip
    """The first product of an expert, weighted, biased and activated: float32 [n, I]."""
    if on_input:
        a = a * weight
    if b13 is not None:
        a = a + b13[e].float()
    return activate(a, activation, gate_layout)


def _summed(
    x: Tensor, experts: int, weights: Tensor, expert: Tensor, activated: Callable[[int, Tensor, Tensor], Tensor],
    down: Callable[[int, Tensor], Tensor], b2: Tensor | None, on_input: bool, out: Tensor | None,
) -> Tensor:  # fmt: skip
    """The sum over the slots of expert [T, k], -1 for none, an expert after the other."""
    slots = torch.zeros((*expert.shape, x.shape[1]), dtype=torch.float32, device=x.device)  # [T, k, H]
    top_k = expert.shape[1]
    named, order = expert.flatten().sort(stable=True)
    ends = torch.searchsorted(named, torch.arange(experts + 1, device=x.device)).tolist()  # asks the device once
    for e, (first, last) in enumerate(pairwise(ends)):
        if first == last:
            continue
        token, slot = order[first:last] // top_k, order[first:last] % top_k
        weight = weights[token, slot][:, None]
        y = down(e, activated(e, token, weight))
        if b2 is not None:
            y = y + b2[e].float()
        slots[token, slot] = y if on_input else y * weight
    total = slots.sum(dim=1).to(x.dtype)
    return total if out is None else out.copy_(total)


@declares(
    contract=Contract(deterministic=True, graph=False, slot="float32"),
    capabilities=Capabilities(dtypes=("bfloat16", "float16"), out=True, alignment=1, any_strides=True, nan_scales=True,
                              signed_scales=True, nan_biases=True),
)  # fmt: skip
def experts_nvfp4(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, w13_scales: Tensor, w2_scales: Tensor,
    w13_alpha: Tensor, w2_alpha: Tensor, *, scale_layout: str = "linear", activations: str = "as_given",
    x_global: Tensor | None = None, h_global: Tensor | None = None, expert_map: Tensor | None = None,
    activation: str = "silu", gate_layout: str = "first", b13: Tensor | None = None, b2: Tensor | None = None,
    apply_weight_on_input: bool = False, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Weights decoded as a whole, activations quantized and decoded again, then an expert after the other. Global
    scales multiply float32 sums. Shapes: `reference/experts_nvfp4.py`."""
    expert = expert_of_slot(ids, w13.shape[0], expert_map)  # [T, k]
    rows = _quantized(x, x_global)

    def activated(e: int, token: Tensor, weight: Tensor) -> Tensor:
        w = _decoded(w13[e], w13_scales[e], scale_layout).to(x.dtype)
        a = _product(rows[token], w) * _factor(w13_alpha[e], x_global)
        return _activated(a, e, weight, activation, gate_layout, b13, apply_weight_on_input)

    def down(e: int, h: Tensor) -> Tensor:
        w = _decoded(w2[e], w2_scales[e], scale_layout).to(x.dtype)
        return _product(_quantized(h.to(x.dtype), h_global), w) * _factor(w2_alpha[e], h_global)

    return _summed(x, len(w2), weights, expert, activated, down, b2, apply_weight_on_input, out)


def _decoded(codes: Tensor, scales: Tensor, layout: str) -> Tensor:
    """float32 [R, D]: codes times scales, exact in 16 bits as well."""
    if layout == "swizzled":
        scales = unswizzle(scales, len(codes), codes.shape[1] // 8)
    return dequantize(codes, scales, torch.ones(1, device=codes.device))


def _quantized(rows: Tensor, global_scale: Tensor | None) -> Tensor:
    """What NVFP4 leaves of rows, times the global scale; the rows themselves without one."""
    if global_scale is None:
        return rows
    return _decoded(*nvfp4_quantize(rows, global_scale), "linear").to(rows.dtype)


def _factor(alpha: Tensor, global_scale: Tensor | None) -> Tensor:
    return alpha if global_scale is None else alpha / global_scale


@declares(
    contract=Contract(gate_up="dtype", activation="dtype", down="dtype", reduce="dtype", weight_dtype="dtype"),
    capabilities=Capabilities(
        compiles=False, dtypes=("bfloat16",), weight_on_input=False, strided=False, min_multiple_h=8, min_multiple_i=8
    ),
)
def grouped(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, *, expert_map: Tensor | None = None,
    activation: str = "silu", gate_layout: str = "first", b13: Tensor | None = None, b2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Slots sorted by expert, then `grouped_mm` twice, without a sync: what model code does that wants to be fast.

    The first product is rounded to the dtype of x before the activation. Shapes: `reference/experts_bf16.py`.
    """
    (tokens, top_k), experts = ids.shape, w13.shape[0]
    flat = ids.reshape(-1).long()  # [N]
    if expert_map is not None:
        flat = expert_map[flat].long()
        flat = torch.where(flat < 0, experts, flat)  # sorted last, where no group is
    expert, order = torch.sort(flat)  # [N]
    ends = torch.searchsorted(expert, torch.arange(experts, device=x.device), right=True).int()  # [E]
    a = torch.nn.functional.grouped_mm(x[order // top_k], w13.transpose(1, 2), offs=ends)  # [N, 2I]
    here = expert.clamp(max=experts - 1)
    if b13 is not None:
        a = a + b13[here]
    if activation == "silu" and gate_layout == "first":
        gate, up = a.chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up
    else:
        h = activate(a, activation, gate_layout)
    y = torch.nn.functional.grouped_mm(h.to(x.dtype), w2.transpose(1, 2), offs=ends)  # [N, H]
    if b2 is not None:
        y = y + b2[here]
    y = y * weights.reshape(-1)[order, None].to(x.dtype)
    if expert_map is not None:
        y = y.masked_fill((expert == experts)[:, None], 0.0)  # rows that no group has written
    slot = torch.empty_like(order)
    slot[order] = torch.arange(len(order), device=x.device)  # cheaper than a second sort
    return y[slot].view(tokens, top_k, x.shape[1]).sum(dim=1).to(x.dtype)
