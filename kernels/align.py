"""`align` in Triton: a stable counting sort. Its contract is the docstring of `reference/align.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = triton.knobs.runtime.interpret
#: What no instruction depends on. Each of them would else double the number of binaries, which take a second each.
_NUMBERS = ["slots", "top_k", "num_experts", "num_ids", "block_size", "blocks", "chunks",
            "stride_t", "stride_k", "map_stride"]  # fmt: skip
_SCALARS = ["ids_ptr", "map_ptr", "expert_ids_ptr", "padded_ptr", "inverse_ptr"]  # no vector is loaded or stored there
_CHUNKS = ((16, 16), (128, 1 << 14), (512, 1 << 16))  # slots of a program, up to so many in all


def align(
    ids: Tensor,  # [T, k] int32 | int64, any strides; T >= 0, k >= 1
    block_size: int,  # B >= 1
    num_experts: int,  # 1 <= E <= 8192: the experts that blocks are made for
    *,
    expert_map: Tensor | None = None,  # [G] int32, G >= 1: id -> expert in [0, E), or -1
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,  # the four results, contiguous int32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # sorted_token_ids [M], expert_ids [M/B], num_tokens_post_padded, inverse
    """Sorts the slots of a routing decision by expert, each expert padded to whole blocks, in one or two launches.

    The contract is that of `reference/align.py::align`. Beyond it: deterministic; the slots of an expert ascend.

    Raises ValueError for anything outside these shapes, dtypes and ranges.
    """
    if ids.dim() != 2 or ids.shape[1] < 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be [T, k] in int32 or int64 with k >= 1, not {list(ids.shape)} {ids.dtype}")
    if not 1 <= num_experts <= 8192:
        raise ValueError(f"num_experts must be from 1 to 8192, not {num_experts}")
    if expert_map is not None and (
        expert_map.dim() != 1 or not len(expert_map) or expert_map.dtype != torch.int32
        or expert_map.device != ids.device
    ):  # fmt: skip
        raise ValueError(f"expert_map must be [G] int32 on {ids.device} with G >= 1, "
                         f"not {list(expert_map.shape)} {expert_map.dtype} on {expert_map.device}")
    shapes = align_shapes(ids.shape, block_size, num_experts)
    if shapes[0][0] + block_size >= 2**31:
        raise ValueError(f"{shapes[0][0]} sorted ids do not fit int32; split the batch")
    if out is None:
        out = tuple(ids.new_empty(shape, dtype=torch.int32) for shape in shapes)
    assert out is not None
    for tensor, shape in zip(out, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(f"out must be contiguous int32 of shapes {shapes}, not {[list(t.shape) for t in out]}")
    if ids.shape[0] == 0:
        out[2].zero_()
        return out

    sorting = Sorting(ids, block_size, num_experts, expert_map, out)
    sorting.count()
    sorting.place()
    return out


class Sorting:
    """`align` of checked arguments, with at least one slot, in its two launches: so that the first may be a part of a
    kernel that its caller launches anyway, by `count_slots` with these operands, numbers and constants.

    Up to 128 slots are done after the first.
    """

    def __init__(
        self, ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None,
        out: Sequence[Tensor], counts: Tensor | None = None,
    ) -> None:  # fmt: skip
        slots, chunk = ids.numel(), _chunk(ids.numel())
        self.chunks = triton.cdiv(slots, chunk)
        if counts is None:
            counts = ids.new_empty(counts_shape(slots, num_experts), dtype=torch.int32)
        _, expert_pad = counts_shape(slots, num_experts)
        self.operands = (ids, expert_map, counts, *out)
        self.numbers = (
            slots, ids.shape[1], num_experts, len(expert_map) if expert_map is not None else num_experts,
            block_size, len(out[1]), self.chunks, *ids.stride(), expert_map.stride(0) if expert_map is not None else 0,
        )  # fmt: skip
        self.constants = {
            "HAS_MAP": expert_map is not None, "CHUNK": chunk, "EXPERT_PAD": expert_pad,
            "PART": _part(slots, chunk),
            "ONE": self.chunks == 1,
        }  # fmt: skip
        self.warps = 8 if expert_pad > 1024 else 4

    def count(self) -> None:
        _count_kernel[(self.chunks,)](*self.operands, *self.numbers, **self.constants, num_warps=self.warps)

    def place(self) -> None:
        if self.chunks > 1:
            _place_kernel[(self.chunks,)](*self.operands, *self.numbers, **self.constants, num_warps=self.warps)


def counts_shape(slots: int, num_experts: int) -> tuple[int, int]:
    """Of the int32 table that the first launch leaves for the second."""
    return triton.cdiv(slots, _chunk(slots)), _expert_pad(num_experts)


def align_shapes(ids_shape: torch.Size, block_size: int, num_experts: int) -> list[tuple[int, ...]]:
    """The shapes of the four results: they depend on shapes alone."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    slots = ids_shape.numel()
    alone = min(slots, num_experts)  # worst case: each of these experts has one slot, and one of them all the rest
    blocks = alone + (slots - alone) // block_size
    return [(blocks * block_size,), (blocks,), (1,), tuple(ids_shape)]


def _chunk(slots: int) -> int:
    """Slots of a program. Up to 128 need one launch only. Beyond 128 chunks the table of counts, which every program of
    the second launch reads, costs more than larger chunks do.

    In the interpreter a program costs the same whatever its chunk.
    """
    if _INTERPRETED:
        return min(max(triton.next_power_of_2(slots), 16), 1024)
    return next((chunk for chunk, up_to in _CHUNKS if slots <= up_to), 1024)


def _part(slots: int, chunk: int) -> int:
    """Slots of a chunk that are ranked at once, each compared with every other: 128^2 comparisons are half a
    microsecond's work, and take few registers.

    In the interpreter all at once, but for one number of slots in three: the seams are to be run as well.
    """
    if _INTERPRETED:
        return chunk // 2 if slots > 1024 and slots % 3 == 0 else chunk
    return min(chunk, 128)


def _expert_pad(num_experts: int) -> int:
    """Columns of a table of counts: a power of two. Few sizes below 256, as each is a binary and none is faster."""
    return max(triton.next_power_of_2(num_experts), 32 if num_experts <= 32 else 128)


@triton.jit
def local_experts(
    ids, map_ptr, map_stride, num_ids, num_experts, ok, HAS_MAP: tl.constexpr
):
    """The expert of each slot, or -1: for `ok` that is false, an id out of range, an expert that is not here.

    The range is checked before the id is an index: a -1 would read the map's last element or what lies before it
    (vllm#42034).
    """
    ok = ok & (ids >= 0) & (ids < num_ids)
    if HAS_MAP:
        ids = tl.load(map_ptr + ids.to(tl.int64) * map_stride, mask=ok, other=-1)
        ok = ok & (ids >= 0) & (ids < num_experts)
    return tl.where(ok, ids, -1).to(tl.int32)


@triton.jit
def _experts_from(
    first, ids_ptr, map_ptr, slots, top_k, num_experts, num_ids, stride_t, stride_k, map_stride,
    HAS_MAP: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    slot = first + tl.arange(0, COUNT)
    ok = slot < slots
    where = (slot // top_k).to(tl.int64) * stride_t + (slot % top_k).to(tl.int64) * stride_k
    ids = tl.load(ids_ptr + where, mask=ok, other=-1)
    return slot, local_experts(ids, map_ptr, map_stride, num_ids, num_experts, ok, HAS_MAP)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_SCALARS)
def _count_kernel(
    ids_ptr, map_ptr,  # [T, k], [G]
    counts_ptr, sorted_ptr, expert_ids_ptr, padded_ptr, inverse_ptr,  # [P, E'], [M], [M/B], [1], [T, k]
    slots, top_k, num_experts, num_ids, block_size, blocks, chunks,
    stride_t, stride_k, map_stride,
    HAS_MAP: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, EXPERT_PAD: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    count_slots(
        ids_ptr, map_ptr, counts_ptr, sorted_ptr, expert_ids_ptr, padded_ptr, inverse_ptr,
        slots, top_k, num_experts, num_ids, block_size, blocks, chunks, stride_t, stride_k, map_stride,
        HAS_MAP, CHUNK, PART, EXPERT_PAD, ONE,
    )  # fmt: skip


@triton.jit
def count_slots(
    ids_ptr, map_ptr, counts_ptr, sorted_ptr, expert_ids_ptr, padded_ptr, inverse_ptr,
    slots, top_k, num_experts, num_ids, block_size, blocks, chunks, stride_t, stride_k, map_stride,
    HAS_MAP: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, EXPERT_PAD: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Counts a chunk's experts, ranks its slots among those of the same expert, and fills `sorted_ptr` with N; where
    there is one chunk alone, does all. For the first `chunks` programs of a launch."""
    for first in range(tl.program_id(0) * 1024, blocks * block_size, chunks * 1024):
        where = first + tl.arange(0, 1024)
        tl.store(sorted_ptr + where, slots, mask=where < blocks * block_size)
    begin = tl.program_id(0) * CHUNK
    count = tl.zeros((EXPERT_PAD,), tl.int32)
    if ONE:
        slot, expert, rank, count = _ranked(
            begin, count,
            ids_ptr, map_ptr, slots, top_k, num_experts, num_ids, stride_t, stride_k, map_stride, HAS_MAP, PART,
        )  # fmt: skip
        tl.debug_barrier()  # other threads have filled the places that these slots go to
        _place(
            slot, expert, rank, count, tl.zeros_like(count),
            sorted_ptr, expert_ids_ptr, padded_ptr, inverse_ptr, slots, block_size, blocks, chunks,
            EXPERT_PAD,
        )  # fmt: skip
    else:
        for first in range(begin, begin + CHUNK, PART):
            slot, expert, rank, count = _ranked(
                first, count,
                ids_ptr, map_ptr, slots, top_k, num_experts, num_ids, stride_t, stride_k, map_stride, HAS_MAP, PART,
            )  # fmt: skip
            tl.store(inverse_ptr + slot, rank, mask=slot < slots)  # for the second launch, which overwrites it
        column = tl.arange(0, EXPERT_PAD)
        tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * EXPERT_PAD + column, count)


@triton.jit
def _ranked(
    first, before,  # before: [E'], of each expert how many of the chunk's slots before `first` have it
    ids_ptr, map_ptr, slots, top_k, num_experts, num_ids, stride_t, stride_k, map_stride,
    HAS_MAP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The slots of a part [P] and their experts; how many slots of the chunk before each have the same expert; and
    `before` for the next part."""
    slot, expert = _experts_from(
        first, ids_ptr, map_ptr, slots, top_k, num_experts, num_ids, stride_t, stride_k, map_stride, HAS_MAP, PART
    )
    earlier = (expert[:, None] == expert[None, :]) & (slot[:, None] < slot[None, :])
    rank = tl.sum(earlier.to(tl.int32), axis=0) + tl.gather(before, tl.maximum(expert, 0), axis=0)
    return slot, expert, rank, before + tl.histogram(expert, before.shape[0], mask=expert >= 0)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_SCALARS)
def _place_kernel(
    ids_ptr, map_ptr, counts_ptr,
    sorted_ptr, expert_ids_ptr, padded_ptr, inverse_ptr,
    slots, top_k, num_experts, num_ids, block_size, blocks, chunks,
    stride_t, stride_k, map_stride,
    HAS_MAP: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, EXPERT_PAD: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Adds up the counts of all chunks, each program for itself, and writes every slot to its place."""
    slot, expert = _experts_from(
        tl.program_id(0) * CHUNK,
        ids_ptr, map_ptr, slots, top_k, num_experts, num_ids, stride_t, stride_k, map_stride, HAS_MAP, CHUNK,
    )  # fmt: skip
    rank = tl.load(inverse_ptr + slot, mask=slot < slots, other=0)
    ROWS: tl.constexpr = 1 if EXPERT_PAD >= 4096 else 4096 // EXPERT_PAD
    column = tl.arange(0, EXPERT_PAD)
    total = tl.zeros((EXPERT_PAD,), tl.int32)
    before = tl.zeros((EXPERT_PAD,), tl.int32)
    for first in range(0, chunks, ROWS):
        row = first + tl.arange(0, ROWS)
        count = tl.load(
            counts_ptr + row[:, None].to(tl.int64) * EXPERT_PAD + column[None, :],
            mask=(row < chunks)[:, None] & (column < num_experts)[None, :], other=0,
        )  # fmt: skip
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where((row < tl.program_id(0))[:, None], count, 0), axis=0)
    _place(
        slot, expert, rank, total, before,
        sorted_ptr, expert_ids_ptr, padded_ptr, inverse_ptr, slots, block_size, blocks, chunks,
        EXPERT_PAD,
    )  # fmt: skip


@triton.jit
def _place(
    slot, expert, rank, total, before,  # [C], [C], [C] in the chunk, [E'] in all chunks, [E'] in earlier chunks
    sorted_ptr, expert_ids_ptr, padded_ptr, inverse_ptr, slots, block_size, blocks, chunks,
    EXPERT_PAD: tl.constexpr,
):  # fmt: skip
    own = (total + block_size - 1) // block_size  # [E'], in blocks
    end = tl.cumsum(own)
    start = end - own
    place = tl.gather(start * block_size + before, tl.maximum(expert, 0), axis=0) + rank  # [C]
    tl.store(sorted_ptr + place, slot, mask=expert >= 0)
    tl.store(inverse_ptr + slot, tl.where(expert >= 0, place, -1), mask=slot < slots)

    used = tl.max(end)  # blocks
    tl.store(padded_ptr, used * block_size, mask=tl.program_id(0) == 0)
    for nth in range(tl.program_id(0), tl.max(own), chunks):  # the n-th block of every expert that has so many
        tl.store(expert_ids_ptr + start + nth, tl.arange(0, EXPERT_PAD), mask=nth < own)
    for first in range(used + tl.program_id(0) * 1024, blocks, chunks * 1024):
        block = first + tl.arange(0, 1024)
        tl.store(expert_ids_ptr + block, -1, mask=block < blocks)  # not 0: expert 0 would do them (vllm#35161)
