"""`moe_layer` of our own kernels. Its contract is the docstring of `reference/moe_layer.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fuzz.kernels.experts_bf16 import experts_bf16
from moe_fuzz.kernels.routing import topk_sigmoid, topk_softmax
from moe_fuzz.reference.moe_layer import check, shard_bounds, shard_map

_INTERPRETED = triton.knobs.runtime.interpret


def moe_layer(
    hidden: Tensor,  # [T, H] bfloat16 | float16, any strides; T = ranks * rows of a rank, T >= 0
    gate: Tensor,  # [E, H], dtype of hidden or float32, any strides
    w13: Tensor,  # [E, 2I, H] (relu2: [E, I, H]), dtype of hidden
    w2: Tensor,  # [E, H, I], dtype of hidden
    top_k: int,  # 1 <= top_k <= min(E, 32)
    *,
    is_padding: Tensor | None = None,  # [T] bool
    ranks: int = 1,  # data-parallel ranks; divides T
    shards: int = 1,  # expert-parallel ranks, at most E
    dialect: str = "distinct",  # what the router says of padding, and the experts must understand
    scoring: str = "softmax",  # "softmax" | "sigmoid"
    renormalize: bool = False,
    bias: Tensor | None = None,  # [E] float32, of the router
    scale: float = 1.0,
    activation: str = "silu",
    gate_layout: str = "first",
    b13: Tensor | None = None,  # [E, 2I] (relu2: [E, I]), dtype of hidden or float32
    b2: Tensor | None = None,  # [E, H], dtype of hidden or float32
    observe: Callable[[Tensor, Tensor], None] | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,  # (y, weights, ids) as below, contiguous
) -> tuple[Tensor, Tensor, Tensor]:  # y [T, H] dtype of hidden, weights [T, k] float32, ids [T, k] int32
    """Gate, router and experts, all shards on one device, one after another: as one rank would run each.

    The contract is that of `reference/moe_layer.py::moe_layer`. Beyond it: logits are float32 sums and stay float32;
    the shards' results are rounded to the dtype of hidden, and summed in float32, in the order of the shards;
    deterministic; nothing waits for the device, and a CUDA graph can be captured. At the same T a row's bits depend on
    that row alone.

    Raises ValueError for anything outside these shapes, dtypes and names.
    """
    check(hidden, gate, w13, w2, ranks, shards, scoring)
    tokens, experts = len(hidden), len(gate)
    if out is None:
        out = (hidden.new_empty(hidden.shape), hidden.new_empty((tokens, top_k), dtype=torch.float32),
               hidden.new_empty((tokens, top_k), dtype=torch.int32))  # fmt: skip
    y, weights, ids = out
    if y.shape != hidden.shape or y.dtype != hidden.dtype or not y.is_contiguous():
        raise ValueError(f"out[0] must be {list(hidden.shape)} {hidden.dtype}, contiguous, "
                         f"not {list(y.shape)} {y.dtype}")
    route = topk_softmax if scoring == "softmax" else topk_sigmoid
    weights, ids = route(
        gate_logits(hidden, gate), top_k, renormalize=renormalize, bias=bias, scale=scale, is_padding=is_padding,
        padding=dialect, out=(weights, ids),
    )  # fmt: skip
    if observe is not None:
        observe(weights, ids)

    def shard(first: int, last: int, result: Tensor | None) -> Tensor:
        part, whole = slice(first, last), last - first == experts
        return experts_bf16(
            hidden, w13[part], w2[part], weights, ids,
            expert_map=None if whole else shard_map(experts, first, last, hidden.device),
            activation=activation, gate_layout=gate_layout,
            b13=None if b13 is None else b13[part], b2=None if b2 is None else b2[part], out=result,
        )  # fmt: skip

    if shards == 1:
        shard(0, experts, y)
        return out
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for first, last in shard_bounds(experts, shards):
        total += shard(first, last, None)
    y.copy_(total)
    return out


def gate_logits(hidden: Tensor, gate: Tensor) -> Tensor:
    """hidden @ gate.T, [T, E] float32, each logit one float32 sum: a row's bits depend on that row alone."""
    (tokens, width), experts = hidden.shape, len(gate)
    logits = hidden.new_empty((tokens, experts), dtype=torch.float32)
    if not logits.numel():
        return logits
    # A tile of the batch reads all of `gate`, a few MB that stay in L2; more programs for few tokens come from E.
    rows, columns = 16, 32 if experts > 16 else 16
    if _INTERPRETED:
        rows, columns = (max(16, min(triton.next_power_of_2(n), 256)) for n in (tokens, experts))
    _gate_kernel[(triton.cdiv(tokens, rows), triton.cdiv(experts, columns))](
        hidden, gate,  # inputs
        logits,  # output
        tokens, experts, width,  # sizes
        *hidden.stride(), *gate.stride(),  # strides, in elements
        ROWS=rows, COLUMNS=columns, DEPTH=64, WIDE=_INTERPRETED or gate.dtype == torch.float32,  # constants
        num_warps=4,
    )  # fmt: skip
    return logits


@triton.jit(do_not_specialize=["tokens", "experts"])
def _gate_kernel(
    hidden_ptr, gate_ptr, logits_ptr,  # [T, H], [E, H], [T, E]
    tokens, experts, width,
    hidden_stride_t, hidden_stride_h, gate_stride_e, gate_stride_h,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    WIDE: tl.constexpr,  # multiplied as float32: a float32 gate, or the interpreter, whose dot mistakes bfloat16
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [R]
    expert = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [C]
    h = tl.arange(0, DEPTH).to(tl.int64)
    # 64 bits: rows may stand far apart, and T * H passes 2^31
    x = hidden_ptr + row.to(tl.int64)[:, None] * hidden_stride_t + h[None, :] * hidden_stride_h
    g = gate_ptr + expert.to(tl.int64)[None, :] * gate_stride_e + h[:, None] * gate_stride_h
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for done in range(0, width, DEPTH):
        inside = h < width - done
        left = tl.load(x, mask=(row < tokens)[:, None] & inside[None, :], other=0.0)
        right = tl.load(g, mask=(expert < experts)[None, :] & inside[:, None], other=0.0)
        if WIDE:  # not in tf32: that has the mantissa of float16
            sums = tl.dot(left.to(tl.float32), right.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(left, right, sums)
        x += tl.cast(DEPTH, tl.int64) * hidden_stride_h
        g += tl.cast(DEPTH, tl.int64) * gate_stride_h
    where = row.to(tl.int64)[:, None] * experts + expert[None, :]
    tl.store(logits_ptr + where, sums, mask=(row < tokens)[:, None] & (expert < experts)[None, :])
