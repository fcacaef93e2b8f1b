"""`experts_bf16` in Triton. Its contract is the docstring of `reference/experts_bf16.py`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from moe_fuzz.kernels.align import Sorting, align_shapes, counts_shape
from moe_fuzz.kernels.experts_bf16.blocks import PLANS, Blocks, Plan, choose, interpreted
from moe_fuzz.kernels.experts_bf16.kernels import grouped_product_kernel, sum_slots_kernel
from moe_fuzz.reference.experts_bf16 import check

_INTERPRETED = triton.knobs.runtime.interpret
_ALIGNMENT = 256  # bytes, of each part of a workspace: what the caching allocator gives, too
#: At most so many programs for each multiprocessor, in turn; those of the worst case may be ten times the tiles in use.
_PROGRAMS = 16
#: Options of a launch that may begin while the kernel before it runs.
_EARLY: dict[bool, dict[str, bool]] = {False: {}, True: {"launch_pdl": True}}


def experts_bf16(
    x: Tensor,  # [T, H] bfloat16 | float16, any strides; T >= 0
    w13: Tensor,  # [E, 2I, H] (relu2: [E, I, H]), dtype of x, any strides
    w2: Tensor,  # [E, H, I], dtype of x, any strides
    weights: Tensor,  # [T, k] float32, any strides
    ids: Tensor,  # [T, k] int32 | int64, any strides; k >= 1
    *,
    expert_map: Tensor | None = None,  # [G] int32: id -> expert in [0, E), or -1
    activation: str = "silu",
    gate_layout: str = "first",
    b13: Tensor | None = None,  # [E, 2I] (relu2: [E, I]), dtype of x or float32
    b2: Tensor | None = None,  # [E, H], dtype of x or float32
    apply_weight_on_input: bool = False,
    out: Tensor | None = None,  # [T, H], dtype of x, contiguous, overlapping no input
    workspace: Tensor | None = None,  # [>= workspace_bytes(...)] uint8, contiguous, aligned to 16 bytes
    plan: Plan | None = None,  # block shapes other than the table's
) -> Tensor:  # [T, H], dtype of x: `out` where it was given
    """A layer of experts in three launches, four with more than 16 slots, five with more than 128. E up to 8192.

    The contract is that of `reference/experts_bf16.py::experts_bf16`. Beyond it: sums are float32; the slots of a
    token are added in ascending order, without atomics; deterministic. Not batch-invariant: block shapes follow
    T * k / E, and with them the order of a product's sums may change; at the same T and E a row's bits depend on that
    row alone.
    With `workspace` nothing is allocated, unless `out` is missing. What it holds does not matter.

    Raises ValueError for anything outside these shapes, dtypes and names.
    """
    check(x, w13, w2, weights, ids, expert_map, activation, gate_layout, b13, b2, out)
    return run(x, w13, w2, weights, ids, expert_map, activation, gate_layout, b13, b2, apply_weight_on_input, out,
               workspace, plan)  # fmt: skip


def run(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None, activation: str,
    gate_layout: str, b13: Tensor | None, b2: Tensor | None, apply_weight_on_input: bool, out: Tensor | None,
    workspace: Tensor | None, plan: Plan | None, alphas: tuple[Tensor, Tensor] | None = None, alpha: float = 1.0,
    first: Callable[[Sorting | None], None] | None = None,
) -> Tensor:  # fmt: skip
    """`experts_bf16` of checked arguments. alphas: [E] float32 each, contiguous, which times `alpha` multiply the
    product with w13 and that with w2 before anything else. first: launches what the products need, and with it the
    first half of the sorting, where there is one."""
    (tokens, hidden), (experts, _, inter), top_k = x.shape, w2.shape, ids.shape[1]
    if experts > 8192:
        raise ValueError(f"at most 8192 experts, not {experts}")
    if out is None:
        out = x.new_empty((tokens, hidden))
    if tokens == 0:
        return out
    slots, num_ids = tokens * top_k, len(expert_map) if expert_map is not None else experts
    if plan is None:
        plan = interpreted(hidden, inter) if _INTERPRETED else choose(slots, num_ids)
    grouped = slots > plan.inline_slots
    h, y, *plan_of_slots = _parts(x, ids, inter, experts, plan, grouped, workspace)  # [N, I], [N, H]
    sorted_ids, expert_ids, padded = plan_of_slots[:3] if grouped else (None, None, None)
    sorting = None
    if grouped:
        sorting = Sorting(ids, plan.gate_up.m, experts, expert_map, plan_of_slots[:4], plan_of_slots[4])
    if first is not None:
        first(sorting)
    elif sorting is not None:
        sorting.count()
    if sorting is not None:
        sorting.place()

    # Worst case, as `align` has it: each of these experts has one slot, and one of them all the rest.
    alone = min(slots, experts)
    most_blocks = alone + (slots - alone) // plan.gate_up.m
    programs = 8 if _INTERPRETED else _PROGRAMS * _multiprocessors(x.device)  # a program's launch is what costs there

    def product(a: Tensor, per_row: int, w: Tensor, factor: Tensor | None, bias: Tensor | None, result: Tensor,
                blocks: Blocks, rows: tuple[int, int, int], activation: str, weight: str,
                early: bool) -> None:  # fmt: skip
        depth, width = a.shape[1], result.shape[1]
        columns = blocks.n // 2 if activation in ("silu", "gelu", "swiglu_oai") else blocks.n
        grouped_product_kernel[(min(most_blocks * triton.cdiv(width, columns), programs),)](
            a, w, bias, weights, result, factor,  # operands
            ids, expert_map, sorted_ids, expert_ids, padded,  # grouping
            slots, most_blocks, top_k, per_row, num_ids, experts, depth, width,  # sizes
            *rows,
            *a.stride(), *w.stride(), *(bias.stride() if bias is not None else (0, 0)),  # strides, in elements
            *weights.stride(), *ids.stride(), expert_map.stride(0) if expert_map is not None else 0,
            ACTIVATION=activation, WEIGHT=weight,
            HAS_ALPHA=factor is not None, ALPHA=alpha, HAS_BIAS=bias is not None,
            HAS_MAP=expert_map is not None and not grouped,
            GROUPED=grouped, EVEN=depth % blocks.d == 0,
            BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_D=blocks.d, GROUP=blocks.group,
            OVERLAPS=plan.overlaps, INTERPRETED=_INTERPRETED,
            num_warps=blocks.warps, num_stages=blocks.stages, **_EARLY[early],
        )  # fmt: skip

    # the first row of the gate, that of the up-projection, and the step to the next of either
    rows = {"first": (0, inter, 1), "up_first": (inter, 0, 1), "interleaved": (0, 1, 2)}[gate_layout]
    on_input = "input" if apply_weight_on_input else "none"
    alpha13, alpha2 = alphas or (None, None)
    product(x, top_k, w13, alpha13, b13, h, plan.gate_up, (0, 0, 1) if activation == "relu2" else rows, activation,
            on_input, False)  # fmt: skip
    product(h, 1, w2, alpha2, b2, y, plan.down, (0, 0, 1), "none", "none" if apply_weight_on_input else "output",
            plan.overlaps)

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
        OVERLAPS=plan.overlaps, INTERPRETED=_INTERPRETED,
        num_warps=warps, **_EARLY[plan.overlaps],
    )  # fmt: skip
    return out


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def workspace_bytes(tokens: int, top_k: int, hidden: int, inter: int, experts: int) -> int:
    """Bytes of a workspace that is enough for any call with at most so many tokens and a plan of the table."""
    slots = tokens * top_k
    sorted_ids = slots + min(slots, experts) * (max(plan.gate_up.m for plan in PLANS) - 1)
    counts = max(math.prod(counts_shape(few, experts)) for few in {1, min(slots, 1 << 14), slots})
    sizes = (2 * slots * inter, 2 * slots * hidden, 4 * sorted_ids, 4 * slots, 4, 4 * slots, 4 * counts)
    return sum(triton.cdiv(size, _ALIGNMENT) * _ALIGNMENT for size in sizes)


def _parts(
    x: Tensor, ids: Tensor, inter: int, experts: int, plan: Plan, grouped: bool, workspace: Tensor | None
) -> list[Tensor]:
    """h [N, I], the slots' outputs [N, H] and, if `grouped`, the four results of `align` and its counts: unset."""
    slots = ids.numel()
    wanted: list[tuple[tuple[int, ...], torch.dtype]] = [((slots, inter), x.dtype), ((slots, x.shape[1]), x.dtype)]
    if grouped:
        shapes = [*align_shapes(ids.shape, plan.gate_up.m, experts), counts_shape(slots, experts)]
        wanted += [(shape, torch.int32) for shape in shapes]
    if workspace is None:
        return [x.new_empty(shape, dtype=dtype) for shape, dtype in wanted]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in wanted]
    needed = sum(triton.cdiv(size, _ALIGNMENT) * _ALIGNMENT for size in sizes)
    if (
        workspace.dtype != torch.uint8 or workspace.dim() != 1 or not workspace.is_contiguous()
        or workspace.device != x.device or workspace.numel() < needed or workspace.data_ptr() % 16
    ):  # fmt: skip
        raise ValueError(f"workspace must be at least {needed} contiguous uint8 on {x.device}, aligned to 16 bytes "
                         f"(workspace_bytes tells how many), not {list(workspace.shape)} {workspace.dtype}")
    parts, used = [], 0
    for (shape, dtype), size in zip(wanted, sizes, strict=True):
        parts.append(workspace[used : used + size].view(dtype).view(shape))
        used += triton.cdiv(size, _ALIGNMENT) * _ALIGNMENT
    return parts
