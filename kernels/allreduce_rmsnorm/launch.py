"""`allreduce_rmsnorm` in Triton. Its contract is the docstring of `reference/allreduce_rmsnorm.py`."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from moe_fuzz.kernels.allreduce_rmsnorm.dispatch import BACKENDS, choose
from moe_fuzz.kernels.allreduce_rmsnorm.group import SIGNAL_BYTES, Group
from moe_fuzz.kernels.allreduce_rmsnorm.kernels import one_shot_kernel, two_shot_kernel
from moe_fuzz.reference.allreduce_rmsnorm import check

_INTERPRETED = triton.knobs.runtime.interpret
#: Threads of a group's blocks on a multiprocessor: a quarter of its threads. Two groups at once are both resident then,
#: and whatever else runs finds room: a block that waits for one that cannot start would wait for ever.
_THREADS = 512
_REGISTERS = 64  # a thread: half of a multiprocessor's, of so many threads
_WARP_BYTES = 512  # of a tile for each warp: 16 a thread, one load
#: Numbers of a thread that are normed at once. Where a row alone has more than 8 for each, more rows do not fit beside
#: what else there is: at H 7168 two at once took half a microsecond longer than one after the other.
_NORMED, _OF_A_ROW = 32, 8
_OF_A_PART = 16  # columns: fewer would be stored in less than 16 bytes at a time
_ALIGNMENT = 16


def allreduce_rmsnorm(
    x: Tensor,  # [T, H] of this rank, or [R, T, H] of all; bfloat16 | float16 | float32, any strides; T >= 0, H >= 1
    residual: Tensor | None,  # as x; [T, H] may stand for [R, T, H]
    gamma: Tensor,  # [H] bfloat16 | float16 | float32
    eps: float = 1e-6,  # > 0
    *,
    group: Group,
    out: tuple[Tensor, Tensor] | None = None,  # (normed, residual_out), contiguous; residual_out may be residual
    backend: str | None = None,  # "one_shot" | "split" | "two_shot"; the dispatch table decides if None
) -> tuple[Tensor, Tensor]:  # normed, residual_out: as x
    """All-reduce, residual and RMSNorm in one launch; no barrier behind it, and nothing waits for the host.

    The contract is that of `reference/allreduce_rmsnorm.py::allreduce_rmsnorm`. Beyond it: sums are float32, rounded
    once (rounds=("residual",)); deterministic; a row's bits depend on that row alone, not on T, the backend or the
    rank. CUDA graphs can be captured, every rank the same calls. More bytes than the group's capacity are sent in
    several launches; rows that are not packed or not aligned to 16 bytes are copied first.

    A rank that waits for a peer longer than the group's `timeout_s` gives up: its results are NaN, and RankTimeout is
    raised by `group.check()` and by the next call.

    Raises ValueError for anything outside these shapes, dtypes and names, RankTimeout for a call before this one.
    """
    ranks, shape = group.ranks_here, x.shape
    if x.dim() != (3 if group.rank is None else 2):
        wanted = "[R, T, H]" if group.rank is None else "[T, H]"
        raise ValueError(f"x must be {wanted} of this group, not {list(shape)}")
    x = x if group.rank is None else x[None]
    if residual is not None:
        residual = residual[None] if residual.dim() == 2 else residual
        if residual.dim() != 3 or len(residual) not in (1, ranks):
            raise ValueError(f"residual must be [T, H], or [{ranks}, T, H], not {list(residual.shape)}")
    if len(x) != ranks:
        raise ValueError(f"x must be of {ranks} ranks, not of {len(x)}")
    check(x[0], None if residual is None else residual[0], gamma, eps)
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    for name, tensor in (("x", x), ("residual", residual), ("gamma", gamma)):
        if tensor is not None and tensor.device != group.device:
            raise ValueError(f"{name} must be on {group.device}, not on {tensor.device}")
    if out is None:
        out = (torch.empty(shape, dtype=x.dtype, device=x.device), torch.empty(shape, dtype=x.dtype, device=x.device))
    for name, tensor in zip(("normed", "residual_out"), out, strict=True):
        if tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device or not tensor.is_contiguous():
            raise ValueError(f"out: {name} must be contiguous {list(shape)} {x.dtype} on {x.device}, "
                             f"not {list(tensor.shape)} {tensor.dtype} on {tensor.device}")  # fmt: skip
    group.raise_fault()
    tokens, hidden = x.shape[1:]
    if tokens == 0:
        return out

    # Alignment of one rank must not choose another binary there: its sums might be added in another order.
    results = [t if t.data_ptr() % _ALIGNMENT == 0 else torch.empty_like(t) for t in out]
    x, gamma = _packed(x), _packed(gamma)
    residual = None if residual is None else _packed(residual)
    row_bytes = hidden * x.element_size()
    most = group.capacity // row_bytes
    if most == 0:
        raise ValueError(f"a row has {row_bytes} bytes, and the group a capacity of {group.capacity}: "
                         "make one with more")
    if tokens <= most:
        _launch(x, residual, gamma, eps, group, results[0], results[1], 0, tokens, backend)
    else:
        for first in range(0, tokens, most):
            _launch(x, residual, gamma, eps, group, results[0], results[1], first, min(most, tokens - first), backend)
    for given, result in zip(out, results, strict=True):
        if given is not result:
            given.copy_(result)
    return out


def _launch(
    x: Tensor, residual: Tensor | None, gamma: Tensor, eps: float, group: Group, normed: Tensor, total: Tensor,
    first: int, tokens: int, backend: str | None,
) -> None:  # fmt: skip
    """Rows [first, first + tokens) of every rank that is here, in one launch or in one for each phase."""
    hidden, size, world = x.shape[-1], x.element_size(), group.world
    backend = backend or choose(world, arch_of(group.device), group.links, tokens * hidden * size, hidden * size)
    rows, columns, warps, blocks, parts = shape_of(group, tokens, hidden, size, backend)
    share = triton.cdiv(tokens, world)
    kernel, phases, slot = one_shot_kernel, 2, group.capacity // size
    if backend != "one_shot":
        kernel, phases, slot = two_shot_kernel, 3, triton.cdiv(share * hidden, 64) * 64
    # Not stride(0): where there is one row, or one rank, a packed tensor may have any number there. Triton compiles
    # for what divides it, and another binary might add a row's squares in another order.
    stride = x.shape[1] * hidden
    residual_stride = 0 if residual is None or len(residual) == 1 else stride
    part = slice(first, first + tokens)
    for phase in range(1, phases + 1) if group.launches == "phases" else (0,):
        kernel[(blocks * parts, group.ranks_here)](
            x[:, part], None if residual is None else residual[:, part], gamma,  # inputs
            normed[..., part, :], total[..., part, :],  # outputs
            group.buffers, group.pads, group.state, group.faults,  # of the group
            tokens, hidden, share, group.rank or 0, stride, residual_stride,  # sizes
            group.half_bytes, slot,
            eps, int(group.timeout_s * 1e9),
            WORLD=world, WORLD_PAD=triton.next_power_of_2(world), ROWS=rows, COLUMNS=columns,  # constants
            HAS_RESIDUAL=residual is not None, ALIKE=hidden % 16 == 0 and gamma.element_size() >= size,
            SINGLE=backend == "one_shot" and tokens <= blocks * rows,
            TOGETHER=_together(world // parts, rows * columns, warps), PARTS=parts, PHASE=phase,
            INTERPRETED=_INTERPRETED, num_warps=warps, maxnreg=_REGISTERS,
            enable_fp_fusion=False,  # else a sum of squares might be fused in one binary, and not in another
        )  # fmt: skip


def shape_of(group: Group, tokens: int, hidden: int, size: int, backend: str) -> tuple[int, int, int, int, int]:
    """(rows and columns of a tile, warps, blocks of a rank, programs of a block). Of the sizes alone: every rank comes
    to the same."""
    columns = triton.next_power_of_2(hidden)
    mine = tokens if backend == "one_shot" else triton.cdiv(tokens, group.world)
    most = SIGNAL_BYTES // (4 * group.world)
    if _INTERPRETED:  # a program costs 25 ms there, whatever its tile; of many rows it has two, as on a GPU
        blocks = max(1, 8 // group.world)
        each = triton.next_power_of_2(triton.cdiv(mine, blocks))
        rows = max(1, min(each if each <= 8 else each // 2, (1 << 16) // columns))
        warps, blocks, resident = 4, min(triton.cdiv(mine, rows), blocks), most
    else:
        rows = max(1, 512 // columns)  # of narrow rows several make a warp's worth
        # So many of a whole row, however it is split: its squares are added in one order, by which backend ever.
        warps = min(16, max(1, rows * columns * size // _WARP_BYTES))
        resident = _multiprocessors(group.device) * max(1, _THREADS // (32 * warps)) // group.ranks_here
        resident = min(resident, most)
        blocks = min(triton.cdiv(mine, rows), resident)
    return rows, columns, warps, blocks, _parts(group.world, columns, resident // blocks) if backend == "split" else 1


def _parts(world: int, columns: int, most: int) -> int:
    """Into how many parts rows are split: as many as can be, up to `most`."""
    parts = 1
    while world % (2 * parts) == 0 and 2 * parts <= most and columns >= 2 * parts * _OF_A_PART:
        parts *= 2
    return parts


def _together(world: int, tile: int, warps: int) -> int:
    """Of how many ranks' shares a block norms rows at once, a power of two: one wait for memory and one sum over the
    block's threads serve all of them, where one after the other each would wait for its own."""
    each = max(1, tile // (32 * warps))
    return 1 if each > _OF_A_ROW else min(triton.next_power_of_2(world), _NORMED // each)


def _packed(tensor: Tensor) -> Tensor:
    """Itself where its rows are packed and aligned, else a copy."""
    if tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def arch_of(device: torch.device) -> str:
    """"sm90", or "cpu"."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
