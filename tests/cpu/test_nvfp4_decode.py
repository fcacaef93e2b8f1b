"""The order of the columns that decoding gives, as the compiled kernels put it together: the interpreter has no machine
code, so what that gives of a block is spelled out here."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from moe_fuzz.kernels.experts_nvfp4 import decode
from moe_fuzz.kernels.experts_nvfp4.decode import decode_blocks, decode_in_order, place, placed, plain_code
from moe_fuzz.reference.nvfp4 import E2M1, E4M3

pytestmark = pytest.mark.interpreter

ROWS, BLOCKS = 2, 16


@triton.jit
def _one(codes, scales, n: tl.constexpr):  # type: ignore[no-untyped-def]
    return plain_code(codes >> (4 * n)) * decode._plain_scale(scales)


@triton.jit
def _spelled_out(codes, scales, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `_decode_asm`, in its order of nibbles."""
    return (
        _one(codes, scales, 0), _one(codes, scales, 4), _one(codes, scales, 1), _one(codes, scales, 5),
        _one(codes, scales, 2), _one(codes, scales, 6), _one(codes, scales, 3), _one(codes, scales, 7),
        _one(codes, scales, 8), _one(codes, scales, 12), _one(codes, scales, 9), _one(codes, scales, 13),
        _one(codes, scales, 10), _one(codes, scales, 14), _one(codes, scales, 11), _one(codes, scales, 15),
    )  # fmt: skip


@triton.jit
def _kernel(codes_ptr, scales_ptr, out_ptr, place_ptr, IN_ORDER: tl.constexpr, R: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, R)[:, None] * B + tl.arange(0, B)[None, :]
    codes, scales = tl.load(codes_ptr + at), tl.load(scales_ptr + at)
    if IN_ORDER:
        found = decode_in_order(codes, scales, tl.bfloat16, False)
    else:
        found = decode_blocks(codes, scales, tl.bfloat16, False)
    column = tl.arange(0, 16 * B)
    tl.store(out_ptr + tl.arange(0, R)[:, None] * 16 * B + column[None, :], found)
    tl.store(place_ptr + column, place(column))


@pytest.mark.parametrize("in_order", [True, False])
def test_every_column_is_where_it_belongs(monkeypatch: pytest.MonkeyPatch, in_order: bool) -> None:
    monkeypatch.setattr(decode, "_decode_asm", _spelled_out)
    generator = torch.Generator().manual_seed(1)
    code = torch.randint(0, 16, (ROWS, BLOCKS, 16), generator=generator)
    scale = torch.randint(0, 0x7F, (ROWS, BLOCKS), generator=generator, dtype=torch.uint8)
    packed = torch.zeros(ROWS, BLOCKS, dtype=torch.int64)
    for n in range(16):
        packed |= code[:, :, n] << (4 * n)
    out, places = torch.empty(ROWS, 16 * BLOCKS), torch.empty(16 * BLOCKS, dtype=torch.int32)
    _kernel[(1,)](packed, scale, out, places, IN_ORDER=in_order, R=ROWS, B=BLOCKS)
    values = torch.cat([E2M1, -E2M1])[code] * E4M3[scale.long()][..., None]
    found = out if in_order else out[:, places.long()]
    assert torch.equal(found, values.reshape(ROWS, -1))
    assert len(found.unique()) > 100


@triton.jit
def _placed_kernel(out_ptr, at_ptr, first, C: tl.constexpr, M: tl.constexpr):  # type: ignore[no-untyped-def]
    column, at = tl.arange(0, C), tl.arange(0, C)[:, None] * M + tl.arange(0, M)[None, :]
    found, where = placed(tl.broadcast_to((first + column)[:, None], (C, M)) * 1000 + tl.arange(0, M)[None, :], first)
    tl.store(out_ptr + at, found)
    tl.store(at_ptr + column, where)


@triton.jit
def _place_kernel(at_ptr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(at_ptr + tl.arange(0, C), place(tl.arange(0, C)))


@pytest.mark.parametrize("columns", [8, 16, 32, 64, 128, 256])
def test_a_tile_is_put_where_its_columns_belong(columns: int) -> None:
    """Those of one span of 128 side by side, so that they are written at once."""
    all_places = torch.empty(512, dtype=torch.int32)
    _place_kernel[(1,)](all_places, C=512)
    for first in range(0, 512, columns):
        out, at = torch.empty(columns, 4, dtype=torch.int32), torch.empty(columns, dtype=torch.int32)
        _placed_kernel[(1,)](out, at, first, C=columns, M=4)
        column = out[:, 0] // 1000
        assert sorted(column.tolist()) == list(range(first, first + columns))
        assert torch.equal(out, column[:, None] * 1000 + torch.arange(4))
        assert torch.equal(at, all_places[column.long()])
        if columns >= 16:
            runs = at.view(-1, min(columns, 128) // 8)
            assert torch.equal(runs, runs[:, :1] + torch.arange(runs.shape[1]))
