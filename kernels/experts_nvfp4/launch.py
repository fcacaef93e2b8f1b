"""`experts_nvfp4` in Triton. Its contract is the docstring of `reference/experts_nvfp4.py`."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from moe_fuzz.kernels.align import Sorting, align_shapes, counts_shape
from moe_fuzz.kernels.experts_bf16.kernels import sum_slots_kernel
from moe_fuzz.kernels.experts_bf16.launch import _EARLY, _PROGRAMS, _multiprocessors
from moe_fuzz.kernels.experts_nvfp4.blocks import (
    EVERY_PLAN,
    SCALED,
    SCALED_PLAN,
    Plan,
    Tile,
    choose,
    choose_backend,
    interpreted,
)
from moe_fuzz.kernels.experts_nvfp4.counting import counted
from moe_fuzz.kernels.experts_nvfp4.decode import GROUP
from moe_fuzz.kernels.experts_nvfp4.kernels import fp4_product_kernel
from moe_fuzz.kernels.experts_nvfp4.large import large, large_bytes
from moe_fuzz.kernels.experts_nvfp4.prepare import reorder_kernel
from moe_fuzz.kernels.experts_nvfp4.workspace import Parts, bytes_of, take
from moe_fuzz.kernels.nvfp4 import nvfp4_quantize
from moe_fuzz.reference.experts_nvfp4 import check

_INTERPRETED = triton.knobs.runtime.interpret
_SORTED = ("sorted_ids", "expert_ids", "padded", "inverse")  # the results of `align`


def experts_nvfp4(
    x: Tensor,  # [T, H] bfloat16 | float16, any strides; T >= 0
    w13: Tensor,  # [E, 2I, H/2] (relu2: [E, I, H/2]) uint8, aligned to 8 bytes
    w2: Tensor,  # [E, H, I/2] uint8, aligned to 8 bytes
    weights: Tensor,  # [T, k] float32, any strides
    ids: Tensor,  # [T, k] int32 | int64, any strides; k >= 1
    w13_scales: Tensor,  # [E, 2I, H/16], or swizzled and padded, uint8 | float8_e4m3fn
    w2_scales: Tensor,  # [E, H, I/16], or swizzled and padded
    w13_alpha: Tensor,  # [E] float32
    w2_alpha: Tensor,  # [E] float32
    *,
    scale_layout: str = "linear",
    activations: str = "as_given",
    x_global: Tensor | None = None,  # [1] float32, with activations="nvfp4"
    h_global: Tensor | None = None,  # [1] float32, with activations="nvfp4"
    expert_map: Tensor | None = None,  # [G] int32: id -> expert in [0, E), or -1
    activation: str = "silu",
    gate_layout: str = "first",
    b13: Tensor | None = None,  # [E, 2I] (relu2: [E, I]), dtype of x or float32
    b2: Tensor | None = None,  # [E, H], dtype of x or float32
    apply_weight_on_input: bool = False,
    out: Tensor | None = None,  # [T, H], dtype of x, contiguous, overlapping no input
    workspace: Tensor | None = None,  # [>= workspace_bytes(...)] uint8, contiguous, aligned to 16 bytes
    backend: str | None = None,  # "small" | "large" | "scaled"; else by the environment; else as `choose_backend` says
    plan: Plan | None = None,  # block shapes of `small` other than the table's
) -> Tensor:  # [T, H], dtype of x: `out` where it was given
    """A layer of experts in NVFP4. `small`: four launches, one more with quantized activations and one more with more
    than 128 slots; `large`: four, five with more than 32 slots, six with more than 128. Nothing is filled. E <= 8192.

    The contract is that of `reference/experts_nvfp4.py::experts_nvfp4`. Beyond it, that of the kernel `experts_bf16`:
    float32 sums without atomics, deterministic, not batch-invariant. Products of codes and scales are exact.
    With `workspace` nothing is allocated, unless `out` is missing. What it holds does not matter.

    Raises ValueError for anything outside these shapes, dtypes and names, and for a backend that cannot take the call.
    """
    check(x, w13, w2, weights, ids, w13_scales, w2_scales, w13_alpha, w2_alpha, scale_layout, activations, x_global,
          h_global, expert_map, activation, gate_layout, b13, b2, out)  # fmt: skip
    (tokens, hidden), experts, inter, top_k = x.shape, w13.shape[0], w2.shape[2] * 2, ids.shape[1]
    if experts > 8192:
        raise ValueError(f"at most 8192 experts, not {experts}")
    for name, codes in (("w13", w13), ("w2", w2)):
        if codes.data_ptr() % 8:
            raise ValueError(f"{name} must be aligned to 8 bytes; copy it into a tensor of its own")
    slots, num_ids = tokens * top_k, len(expert_map) if expert_map is not None else experts
    quantizes = activations == "nvfp4"
    chosen = choose_backend(slots, num_ids, quantizes, backend, _capability(x.device))
    if out is None:
        out = x.new_empty((tokens, hidden))
    if tokens == 0:
        return out
    blocks13, blocks2 = w13.view(torch.int64), w2.view(torch.int64)  # [E, 2I, H/16], [E, H, I/16]
    scales13, scales2 = w13_scales.view(torch.uint8), w2_scales.view(torch.uint8)
    if chosen == "large":
        return large(
            x, blocks13, blocks2, weights, ids, scales13, scales2, (w13_alpha, w2_alpha), scale_layout == "swizzled",
            expert_map, activation, gate_layout, b13, b2, apply_weight_on_input, out, workspace,
        )  # fmt: skip

    scaled = chosen == SCALED
    if plan is None:
        if scaled:
            plan = SCALED_PLAN
        elif _INTERPRETED:
            plan = interpreted(hidden, inter)
        else:
            plan = choose(slots, num_ids, experts, (w13.shape[1], hidden), (hidden, inter), _multiprocessors(x.device))
    overlaps = not _INTERPRETED
    parts = take(_parts(x, slots, inter, ids.shape, experts, plan, quantizes, scaled), x.device, workspace)
    x_ordered, h, y = parts["x"], parts["h"], parts["y"]  # [T, H'], [N, I'], [N, H]
    sorted_ids, expert_ids, padded, _ = plan_of_slots = [parts[name] for name in _SORTED]
    sorting = Sorting(ids, plan.gate_up.m, experts, expert_map, plan_of_slots, parts["counts"])

    # Worst case, as `align` has it: each of these experts has one slot, and one of them all the rest.
    alone = min(slots, experts)
    most_blocks = alone + (slots - alone) // plan.gate_up.m
    programs = 8 if _INTERPRETED else _PROGRAMS * _multiprocessors(x.device)  # a program's launch is what costs there

    def reorder(given: Tensor, global_scale: Tensor | None, result: Tensor, sorting: Sorting | None,
                early: bool) -> None:  # fmt: skip
        if scaled:
            if sorting is not None:
                sorting.count()
            of_blocks = parts["x_scales" if result is x_ordered else "h_scales"].view(torch.float8_e4m3fn)
            nvfp4_quantize(given, global_scale, out=(result, of_blocks))  # type: ignore[arg-type]
            return
        counting = counted(sorting)
        rows, columns = given.shape
        at_once = (1, 1024) if rows > 64 else (1, 256)
        if _INTERPRETED:
            at_once = triton.next_power_of_2(triton.cdiv(rows, 4)), min(triton.next_power_of_2(result.shape[1]), 2048)
        tiles = triton.cdiv(rows, at_once[0]) * triton.cdiv(result.shape[1], at_once[1])
        reorder_kernel[(tiles + counting.programs,)](
            given, global_scale, result, *counting.operands,  # operands
            rows, columns, result.shape[1], *given.stride(), *counting.numbers,  # sizes
            QUANTIZE=quantizes, TILE_ROWS=at_once[0], TILE_COLUMNS=at_once[1], OVERLAPS=overlaps,
            INTERPRETED=_INTERPRETED, **counting.constants, num_warps=counting.warps, **_EARLY[early],
        )  # fmt: skip

    def product(a: Tensor, per_row: int, w: Tensor, scales: Tensor, alpha: Tensor, global_scale: Tensor | None,
                bias: Tensor | None, result: Tensor, width: int, blocks: Tile, rows: tuple[int, int, int],
                activation: str, weight: str, reorders: bool) -> None:  # fmt: skip
        columns = blocks.n // 2 if activation in ("silu", "gelu", "swiglu_oai") else blocks.n
        tiles_n = triton.cdiv(result.shape[1] if reorders else width, columns)
        depth = w.shape[2] // 8 if scaled else w.shape[2]  # in blocks of 16
        unit = math.gcd(depth, 16)
        fp4_product_kernel[(min(most_blocks * tiles_n, programs),)](
            a, w, scales, parts["x_scales" if a is x_ordered else "h_scales"] if scaled else None,
            alpha, global_scale, bias, weights, result,  # operands
            sorted_ids, expert_ids, padded,  # grouping
            slots, top_k, per_row,
            w.shape[1], depth // unit, a.shape[1], width, result.shape[1],  # sizes
            *rows,
            *(bias.stride() if bias is not None else (0, 0)), *weights.stride(),  # strides, in elements
            ACTIVATION=activation, WEIGHT=weight, HAS_BIAS=bias is not None,
            HAS_GLOBAL=quantizes, SWIZZLED=scale_layout == "swizzled", REORDERS=reorders,
            SCALED=scaled, EVEN=16 * depth % blocks.d == 0, UNIT=unit,
            BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_D=blocks.d, GROUP_M=blocks.group,
            SORTED_LATE=a is x_ordered, OVERLAPS=overlaps, INTERPRETED=_INTERPRETED,
            num_warps=blocks.warps, num_stages=blocks.stages, **_EARLY[overlaps],
            **({"maxnreg": blocks.registers} if blocks.registers else {}),
        )  # fmt: skip

    # the first row of the gate, that of the up-projection, and the step to the next of either
    rows = {"first": (0, inter, 1), "up_first": (inter, 0, 1), "interleaved": (0, 1, 2)}[gate_layout]
    reorder(x, x_global, x_ordered, sorting, False)
    sorting.place()
    product(x_ordered, top_k, w13 if scaled else blocks13, scales13, w13_alpha, x_global, b13,
            parts["h_plain"] if quantizes else h, inter, plan.gate_up,
            (0, 0, 1) if activation == "relu2" else rows, activation,
            "input" if apply_weight_on_input else "none", not quantizes)  # fmt: skip
    if quantizes:
        reorder(parts["h_plain"], h_global, h, None, overlaps)
    product(h, 1, w2 if scaled else blocks2, scales2, w2_alpha, h_global, b2, y, hidden, plan.down, (0, 0, 1), "none",
            "none" if apply_weight_on_input else "output", False)

    # One row a program, and more programs for few tokens; a sum's bits do not depend on it.
    rows_in, columns, warps = (1, 1024, 4) if tokens > 64 else (1, 256, 1)
    if _INTERPRETED:
        rows_in, columns = triton.next_power_of_2(triton.cdiv(tokens, 4)), min(triton.next_power_of_2(hidden), 8192)
    sum_slots_kernel[(triton.cdiv(tokens, rows_in), triton.cdiv(hidden, columns))](
        y, ids, expert_map,  # inputs
        out,  # output
        tokens, top_k, hidden, num_ids, experts,  # sizes
        *ids.stride(), expert_map.stride(0) if expert_map is not None else 0,  # strides
        HAS_MAP=expert_map is not None, ROWS=rows_in, COLUMNS=columns, UNROLL=2 if _INTERPRETED else 8,  # constants
        OVERLAPS=overlaps, INTERPRETED=_INTERPRETED,
        num_warps=warps, **_EARLY[overlaps],
    )  # fmt: skip
    return out


def _capability(device: torch.device) -> tuple[int, int]:
    return (0, 0) if _INTERPRETED else torch.cuda.get_device_capability(device)


def _parts(
    x: Tensor, slots: int, inter: int, ids_shape: torch.Size, experts: int, plan: Plan, quantizes: bool,
    scaled: bool = False,
) -> Parts:  # fmt: skip
    """What `small` and `scaled` keep between their launches."""
    tokens, hidden = x.shape
    parts: Parts = {
        "x": ((tokens, hidden + -hidden % GROUP), x.dtype), "h": ((slots, inter + -inter % GROUP), x.dtype),
        "y": ((slots, hidden), x.dtype),
    }  # fmt: skip
    if scaled:
        for name, rows, columns in (("x", tokens, hidden), ("h", slots, inter)):
            parts[name] = (rows, columns // 2), torch.uint8
            parts[f"{name}_scales"] = (rows, columns // 16), torch.uint8
    if quantizes:
        parts["h_plain"] = (slots, inter), x.dtype
    shapes = [*align_shapes(ids_shape, plan.gate_up.m, experts), counts_shape(slots, experts)]
    return parts | {name: (shape, torch.int32) for name, shape in zip((*_SORTED, "counts"), shapes, strict=True)}


def workspace_bytes(
    tokens: int, top_k: int, hidden: int, inter: int, experts: int, *, activation: str = "silu", num_ids: int = 0,
    activations: str = "as_given", backend: str | None = None,
) -> int:  # fmt: skip
    """Bytes of a workspace that is enough for this call, with a plan of the table.

    num_ids: the length of the expert map, where there is one.
    """
    quantizes = activations == "nvfp4"
    x = torch.empty((tokens, hidden), dtype=torch.bfloat16, device="meta")
    if backend == SCALED:  # what it keeps is less than what `small` keeps
        backend = "small"
    if choose_backend(tokens * top_k, num_ids or experts, quantizes, backend) == "large":
        rows = inter if activation == "relu2" else 2 * inter
        return large_bytes(tokens, top_k, hidden, inter, rows, experts)
    shape = torch.Size((tokens, top_k))
    return max(
        bytes_of(_parts(x, tokens * top_k, inter, shape, experts, plan, quantizes)) for plan in EVERY_PLAN
    )  # fmt: skip
