"""The backend for many slots an expert: weights decoded as a whole, then the products of `experts_bf16`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moe_fuzz.kernels.align import Sorting
from moe_fuzz.kernels.experts_bf16.launch import run
from moe_fuzz.kernels.experts_bf16.launch import workspace_bytes as plain_bytes
from moe_fuzz.kernels.experts_nvfp4.prepare import decode_weights_kernel
from moe_fuzz.kernels.experts_nvfp4.workspace import Parts, bytes_of, take

_INTERPRETED = triton.knobs.runtime.interpret
#: What decoded weights have to be multiplied by; see `decode.py`.
_SHIFT_BACK = {torch.bfloat16: 256.0, torch.float16: 128.0}


def large(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, w13_scales: Tensor, w2_scales: Tensor,
    alphas: tuple[Tensor, Tensor], swizzled: bool, expert_map: Tensor | None, activation: str, gate_layout: str,
    b13: Tensor | None, b2: Tensor | None, apply_weight_on_input: bool, out: Tensor, workspace: Tensor | None,
) -> Tensor:  # fmt: skip
    """`experts_nvfp4` of checked arguments; codes as int64 blocks, scales as bytes."""
    (experts, rows13, blocks13), (_, rows2, blocks2) = w13.shape, w2.shape
    parts = _parts(x.shape[0], ids.shape[1], x.shape[1], 16 * blocks2, rows13, experts, x.dtype, workspace is not None)
    made = take(parts, x.device, workspace)
    rows, blocks = 16, 32
    if _INTERPRETED:  # few programs, and none that is much larger than what it decodes
        blocks = min(triton.next_power_of_2(max(blocks13, blocks2, 8)), 64)
        rows = min(triton.next_power_of_2(experts * max(rows13, rows2)), (1 << 15) // blocks)
    programs13 = triton.cdiv(experts * rows13, rows) * triton.cdiv(blocks13, blocks)
    programs2 = triton.cdiv(experts * rows2, rows) * triton.cdiv(blocks2, blocks)

    def decode(sorting: Sorting | None) -> None:
        if sorting is not None:  # a launch of its own: the registers that it takes would halve what decoding reaches
            sorting.count()
        decode_weights_kernel[(programs13 + programs2,)](
            w13, w13_scales, made["w13"], w2, w2_scales, made["w2"],  # operands
            rows13, blocks13, rows2, blocks2, programs13, experts,  # sizes
            SWIZZLED=swizzled, ROWS=rows, BLOCKS=blocks, INTERPRETED=_INTERPRETED, num_warps=4,
        )  # fmt: skip

    return run(
        x, made["w13"], made["w2"], weights, ids, expert_map, activation, gate_layout, b13, b2, apply_weight_on_input,
        out, made.get("rest"), None, alphas, _SHIFT_BACK[x.dtype], decode,
    )  # fmt: skip


def large_bytes(tokens: int, top_k: int, hidden: int, inter: int, rows13: int, experts: int) -> int:
    """Bytes of a workspace for `large`."""
    return bytes_of(_parts(tokens, top_k, hidden, inter, rows13, experts, torch.bfloat16, True))


def _parts(
    tokens: int, top_k: int, hidden: int, inter: int, rows13: int, experts: int, dtype: torch.dtype, all_of_it: bool
) -> Parts:
    """The weights, and where the caller's workspace is to serve the products, too, what they need."""
    parts: Parts = {"w13": ((experts, rows13, hidden), dtype), "w2": ((experts, hidden, inter), dtype)}
    if all_of_it:
        parts["rest"] = (plain_bytes(tokens, top_k, hidden, inter, experts),), torch.uint8
    return parts
