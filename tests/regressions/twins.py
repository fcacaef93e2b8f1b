"""Twins of defects found in released kernels that no planted bug stands for: the same flaw, in plain torch."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.reference.align import expert_of_slot
from moe_fuzz.reference.nvfp4 import dequantize
from moe_fuzz.targets.marlin_layout import marlin_weights
from moe_fuzz.targets.torch_experts import experts_bf16


def reciprocal_of_the_sum(
    logits: Tensor, top_k: int, *, renormalize: bool = False, scale: float = 1.0, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Multiplies by scale / sum, with a guard for a sum of 0: of a sum below about 2^-128 that is infinite."""
    scores = torch.sigmoid(logits.float())
    ids = (scores if bias is None else scores + bias).argsort(dim=1, descending=True, stable=True)[:, :top_k]
    weights = scores.gather(1, ids)
    total = weights.sum(dim=1, keepdim=True)
    return weights * (scale / torch.where(total > 0, total, 1.0) if renormalize else scale), ids.int()


def steps_of_sixteen(x: Tensor, *tensors: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
    """A kernel for many tokens writes whole steps of 16 elements, and its launcher lets it have every multiple of 8."""
    y = experts_bf16(x, *tensors, **options)
    tokens, hidden = y.shape
    steps = tokens > 256 and hidden % 8 == 0 and y.dtype == torch.bfloat16
    written = hidden // 16 * 16 if steps else hidden
    result = torch.empty_like(y) if out is None else out
    result[:, :written] = y[:, :written]
    return result


def thread_for_sixteen(x: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    """A block of hidden / 16 threads, of which there are none below 16. On a GPU nobody hears of it."""
    if len(x) and x.shape[1] < 16:
        raise RuntimeError("CUDA error: invalid argument (a block of 0 threads)")
    return experts_bf16(x, *tensors, **options)


def divides_by_the_tokens(x: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    """Slots by tokens gives top_k, on the host: of no tokens the process dies."""
    if not len(x):
        signal.raise_signal(signal.SIGFPE)
    return experts_bf16(x, *tensors, **options)


# ---- Marlin's NVFP4 -------------------------------------------------------------------------------------------------

#: The sums of a projection of an expert as Marlin has them, float64 [n, R]: 2^-119 of their value in bfloat16 and 2^-7
#: in float16, and less where scales are moved up. The factor float32 that makes up for that and for the global scale,
#: and the weights float32 [n, 1], or none.
Stored = Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
_MARLIN = declares(
    contract=Contract(graph=False, gate_up="dtype", activation="dtype", down="dtype", weight_dtype="dtype"),
    capabilities=Capabilities(dtypes=("bfloat16", "float16"), layouts=("linear",), activation_formats=("as_given",),
                              activations=("silu", "relu2"), gate_layouts=("first",), biases=False, min_multiple_h=64,
                              min_multiple_i=64),
)  # fmt: skip


def _marlin(
    stored: Stored, least: float, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, w13_scales: Tensor,
    w2_scales: Tensor, w13_alpha: Tensor, w2_alpha: Tensor, *, expert_map: Tensor | None = None,
    activation: str = "silu", apply_weight_on_input: bool = False, **_: Any,
) -> Tensor:  # fmt: skip
    """A layer of it. least: of what each term of a sum is a multiple, the rest cut off, where products are that low."""
    expert, one = expert_of_slot(ids, len(w13), expert_map), torch.ones(1)
    slots = torch.zeros((*expert.shape, x.shape[1]), dtype=x.dtype)

    def product(a: Tensor, given: tuple[Tensor, Tensor, Tensor], e: int, weight: Tensor | None) -> Tensor:
        codes, scales, alpha = given
        factor = marlin_weights(codes[e : e + 1], scales[e : e + 1], one, x.dtype).globals.double()
        w = dequantize(codes[e], scales[e], one).double() / factor
        sums = a.double() @ w.t()
        if least:
            sums = torch.stack([torch.trunc(w * row / least).sum(dim=1) * least for row in a.double()])
        return stored(sums, factor.float() * alpha[e], weight, x.dtype)

    for e in expert.unique().tolist():
        token, slot = (expert == e).nonzero(as_tuple=True)
        if e < 0:
            continue
        weight = weights[token, slot, None]
        a = product(x[token], (w13, w13_scales, w13_alpha), e, weight if apply_weight_on_input else None).float()
        gate, up = a.chunk(2, dim=1) if activation == "silu" else (a.clamp(min=0.0), a.clamp(min=0.0))
        if activation == "silu":
            gate = (gate / (1.0 + torch.exp(-gate))).to(x.dtype).float()
        h = (gate * up).to(x.dtype)
        slots[token, slot] = product(h, (w2, w2_scales, w2_alpha), e, None if apply_weight_on_input else weight)
    return slots.float().sum(dim=1).to(x.dtype)


@_MARLIN
def stored_before_the_global_scale(x: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    """A product that is weighted is stored as it is, and the weight is what takes the global scale, in x's dtype."""

    def stored(sums: Tensor, factor: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        if weight is None:
            return (sums * factor.double()).to(dtype)
        return (sums.to(dtype).float() * (weight * factor).to(dtype).float()).to(dtype)

    return _marlin(stored, 0.0, x, *tensors, **options)


@_MARLIN
def sums_of_subnormals(x: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    """Terms of a sum are cut off where float32 ends, and all stand 2^-119 of their value low."""

    def stored(sums: Tensor, factor: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        found = (sums * factor.double()).to(dtype)
        return found if weight is None else (found.float() * weight.to(dtype).float()).to(dtype)

    return _marlin(stored, 2.0**-149, x, *tensors, **options)
