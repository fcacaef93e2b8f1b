"""Many pieces of device memory laid with a pattern, or compared with it, in one launch.

A case has a dozen tensors with two or three pieces of slack each. A torch operation for each of them would be most of
what a small case does on the device, and where several processes share it, each operation is a turn to wait for.
A piece is (address, bytes, pattern): eight bytes, repeated from addresses that are a multiple of eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # words of eight bytes
_PROGRAMS = 64  # for one piece, at most


class Piece(NamedTuple):
    """Memory that holds, or is to hold, a pattern."""

    address: int
    size: int  # bytes
    pattern: int  # as a signed integer of eight bytes


def lay(pieces: Sequence[Piece]) -> None:
    """Writes the patterns of at most three pieces. Asynchronous, on the current stream."""
    pieces = [piece for piece in pieces if piece.size]
    if not pieces:
        return
    one, other, third = (*pieces, *[pieces[0]._replace(size=0)] * (3 - len(pieces)))
    grid = (len(pieces), _programs(pieces))
    _lay_kernel[grid](*one, *other, *third, BLOCK=_BLOCK)


def changed(pieces: Sequence[Piece]) -> torch.Tensor:
    """int32 [pieces] on the host, 0 or 1: those that do not hold their pattern. There when the current stream has been
    waited for."""
    if not pieces:
        return torch.zeros(0, dtype=torch.int32)
    table = torch.tensor(pieces, dtype=torch.int64).pin_memory().to("cuda", non_blocking=True)  # [pieces, 3]
    flags = torch.zeros(len(pieces), dtype=torch.int32, device="cuda")
    _changed_kernel[(len(pieces), _programs(pieces))](table, flags, BLOCK=_BLOCK)
    return to_host(flags)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, there when the current stream has been waited for."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def _programs(pieces: Sequence[Piece]) -> int:
    return min(_PROGRAMS, triton.cdiv(max(piece.size for piece in pieces), 8 * _BLOCK) + 1)


@triton.jit
def _visit(first, size, pattern, CHECK: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's share of a piece: how much of it is wrong (CHECK), or nothing, and it is right from now on."""
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
            tl.store(pointer, tl.zeros([BLOCK], tl.int64) + pattern, mask=at < words)
        start += step
    return wrong


@triton.jit(do_not_specialize=["first0", "size0", "pattern0", "first1", "size1", "pattern1",
                               "first2", "size2", "pattern2"])  # fmt: skip
def _lay_kernel(  # type: ignore[no-untyped-def]
    first0, size0, pattern0, first1, size1, pattern1, first2, size2, pattern2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        _visit(first0, size0, pattern0, False, BLOCK)
    elif tl.program_id(0) == 1:
        _visit(first1, size1, pattern1, False, BLOCK)
    else:
        _visit(first2, size2, pattern2, False, BLOCK)


@triton.jit
def _changed_kernel(table_ptr, flags_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = table_ptr + 3 * tl.program_id(0)
    wrong = _visit(tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), True, BLOCK)
    if wrong > 0:
        tl.store(flags_ptr + tl.program_id(0), 1)
