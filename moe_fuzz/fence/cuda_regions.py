"""Many pieces of device memory filled, fetched, laid with a pattern or compared with it, in one launch.

A case has a dozen tensors with two or three pieces of slack each, and most are small. A torch operation for each of
them would be most of what a small case does on the device, and where several processes share it, each operation is a
turn to wait for. So what is to be done is gathered into a table, and one kernel does it, which reads and writes pinned
memory of the host by itself.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moe_fuzz.fence import cuda_driver
from moe_fuzz.fence.launching import Launcher
from moe_fuzz.fence.layout import contiguous

_BLOCK = 1024  # words of eight bytes
_PROGRAMS = 64  # for one piece, at most
_RING = 64 << 20  # bytes of pinned memory
_SIZE = itemgetter(1)  # of a Piece, of a Move
SMALL = 256 << 10  # bytes that pass through it at most; more is what copies are for


class Piece(NamedTuple):
    """Memory that holds, or is to hold, a pattern."""

    address: int
    size: int  # bytes
    pattern: int  # eight bytes, as a signed integer, repeated from addresses that are a multiple of eight


class Move(NamedTuple):
    """Memory that is to hold a pattern, or what is at another address, as far from a multiple of eight as this one."""

    address: int
    size: int  # bytes
    pattern: int
    source: int = 0  # an address; 0: the pattern


class Ring:
    """Pinned memory, taken in turn. What was taken may be used until 64 MiB more have been."""

    def __init__(self, size: int = _RING) -> None:
        self._size, self._used = size, 0
        self._base = 0  # address
        self._memory: torch.Tensor | None = None
        self._flat: dict[torch.dtype, torch.Tensor] = {}  # all of it, as elements of a dtype

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, like: int = 0) -> torch.Tensor:
        """A packed tensor, at an address that is as far from a multiple of 16 as `like`. Raises DeviceLost."""
        memory, start = self._reserve(math.prod(shape) * dtype.itemsize, like)
        flat = self._flat.get(dtype)
        if flat is None:
            flat = self._flat[dtype] = memory.view(dtype)
        return flat.as_strided(shape, contiguous(shape), flat.storage_offset() + start // dtype.itemsize)

    def hold(self, source: int | bytes, size: int, like: int = 0) -> int:
        """The address of a copy of `size` bytes of the host's, as far from a multiple of 16 as `like`: of little memory
        it takes less time than the operations of a tensor do. source: the bytes, or their address. Raises DeviceLost.
        """
        _, start = self._reserve(size, like)
        address = self._base + start
        ctypes.memmove(address, source, size)
        return address

    def _reserve(self, size: int, like: int) -> tuple[torch.Tensor, int]:
        if self._memory is None:
            self._memory = torch.empty(self._size, dtype=torch.uint8, pin_memory=True)
            self._base = self._memory.data_ptr()
        start = -(-self._used // 16) * 16 + like % 16
        if start + size > self._size:
            cuda_driver.synchronize()  # nobody may read or write what stands there any more
            start = like % 16
        self._used = start + size
        return self._memory, start


_RING_OF_PROCESS = Ring()


def staged(value: torch.Tensor, to: int) -> Move:
    """What copies a small tensor of the host to a device address."""
    packed = value.contiguous()
    return Move(to, packed.nbytes, 0, _RING_OF_PROCESS.hold(packed.data_ptr(), packed.nbytes, to))


def is_small(tensor: torch.Tensor) -> bool:
    """Whether it may pass through the ring: its bytes lie in a row, are not many, and are what torch would copy."""
    return (
        type(tensor) is torch.Tensor and tensor.layout is torch.strided and 0 < tensor.nbytes <= SMALL
        and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    )  # fmt: skip


def fetched(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of small tensors in pinned memory of the host, there when the current stream has been waited for."""
    copies, moves = [], []
    for tensor in tensors:
        source = tensor.data_ptr()
        copy = _RING_OF_PROCESS.take(tensor.shape, tensor.dtype, source)
        copies.append(copy)
        moves.append(Move(copy.data_ptr(), copy.nbytes, 0, source))
    move(moves)
    return copies


def move(moves: Sequence[Move]) -> None:
    """Does all of it, in no order: the pieces must not overlap. Asynchronous, on the current stream."""
    moves = [one for one in moves if one.size]
    if moves:
        _move(len(moves), _programs(moves), _table(moves))


def lay(pieces: Sequence[Piece]) -> None:
    """Writes the patterns of at most three pieces. Asynchronous, on the current stream; may be captured."""
    pieces = [piece for piece in pieces if piece.size]
    if pieces:
        given = chain.from_iterable(pieces)
        _lay(len(pieces), _programs(pieces), *given, *[0] * (9 - 3 * len(pieces)))


def changed(pieces: Sequence[Piece]) -> torch.Tensor:
    """int32 [pieces] on the host, 0 or 1: those that do not hold their pattern. There when the current stream has been
    waited for."""
    flags = _RING_OF_PROCESS.take((len(pieces),), torch.int32).zero_()
    if pieces:
        _changed(len(pieces), _programs(pieces), _table(pieces), flags.data_ptr())
    return flags


def _table(rows: Sequence[Piece] | Sequence[Move]) -> int:
    """The address of an int64 [rows, fields], which a kernel can read."""
    table = struct.pack(f"{len(rows) * len(rows[0])}q", *chain.from_iterable(rows))
    return _RING_OF_PROCESS.hold(table, len(table))


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, there when the current stream has been waited for."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def _programs(pieces: Sequence[Piece] | Sequence[Move]) -> int:
    return min(_PROGRAMS, -(-max(map(_SIZE, pieces)) // (8 * _BLOCK)) + 1)


@triton.jit
def _visit(  # type: ignore[no-untyped-def]
    first, size, pattern, source, CHECK: tl.constexpr, MOVE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """This program's share of a piece: how much of it is wrong (CHECK), or nothing, and it is right from now on. MOVE:
    it shall hold what is at `source`, unless that is 0."""
    first = first.to(tl.int64)
    pattern = pattern.to(tl.int64)
    last = first + size
    # Whole words in the middle; up to seven bytes before and behind them.
    body = tl.minimum((first + 7) // 8 * 8, last)
    end = tl.maximum(last // 8 * 8, body)
    lane = tl.arange(0, 8)
    wrong = 0
    if tl.program_id(1) == 0:
        for edge in tl.static_range(2):
            lo = first if edge == 0 else end
            hi = body if edge == 0 else last
            at = lo + lane
            inside = at < hi
            wanted = (pattern >> (8 * (at % 8))).to(tl.int8)
            pointer = at.to(tl.pointer_type(tl.int8))
            if CHECK:
                found = tl.load(pointer, mask=inside, other=0)
                wrong += tl.sum((inside & (found != wanted)).to(tl.int32))
            else:
                if MOVE:
                    there = (at - first + source).to(tl.pointer_type(tl.int8))
                    wanted = tl.where(source != 0, tl.load(there, mask=inside & (source != 0), other=0), wanted)
                tl.store(pointer, wanted, mask=inside)
    words = (end - body) // 8
    step = tl.num_programs(1).to(tl.int64) * BLOCK
    start = tl.program_id(1).to(tl.int64) * BLOCK
    while start < words:
        at = start + tl.arange(0, BLOCK)
        pointer = (body + 8 * at).to(tl.pointer_type(tl.int64))
        if CHECK:
            found = tl.load(pointer, mask=at < words, other=0)
            wrong += tl.sum(((at < words) & (found != pattern)).to(tl.int32))
        else:
            word = tl.zeros([BLOCK], tl.int64) + pattern
            if MOVE:
                there = (body - first + source + 8 * at).to(tl.pointer_type(tl.int64))
                word = tl.where(source != 0, tl.load(there, mask=(at < words) & (source != 0), other=0), word)
            tl.store(pointer, word, mask=at < words)
        start += step
    return wrong


@triton.jit(do_not_specialize=["first0", "size0", "pattern0", "first1", "size1", "pattern1",
                               "first2", "size2", "pattern2"])  # fmt: skip
def _lay_kernel(  # type: ignore[no-untyped-def]
    first0: tl.int64, size0: tl.int64, pattern0: tl.int64,
    first1: tl.int64, size1: tl.int64, pattern1: tl.int64,
    first2: tl.int64, size2: tl.int64, pattern2: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        _visit(first0, size0, pattern0, 0, False, False, BLOCK)
    elif tl.program_id(0) == 1:
        _visit(first1, size1, pattern1, 0, False, False, BLOCK)
    else:
        _visit(first2, size2, pattern2, 0, False, False, BLOCK)


@triton.jit(do_not_specialize=["table"])
def _move_kernel(table: tl.int64, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = table.to(tl.pointer_type(tl.int64)) + 4 * tl.program_id(0)
    _visit(tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), False, True, BLOCK)


@triton.jit(do_not_specialize=["table", "flags"])
def _changed_kernel(table: tl.int64, flags: tl.int64, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = table.to(tl.pointer_type(tl.int64)) + 3 * tl.program_id(0)
    wrong = _visit(tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), 0, True, False, BLOCK)
    if wrong > 0:
        tl.store(flags.to(tl.pointer_type(tl.int32)) + tl.program_id(0), 1)


_lay = Launcher(_lay_kernel, BLOCK=_BLOCK)
_move = Launcher(_move_kernel, BLOCK=_BLOCK)
_changed = Launcher(_changed_kernel, BLOCK=_BLOCK)
