"""Pieces of memory laid and compared by the kernels of fences on CUDA: here interpreted, on host memory."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import random

import pytest
import torch

from moe_fuzz.fence import canary, cuda_regions
from moe_fuzz.fence.cuda_regions import Piece, lay

CANARY = int.from_bytes(canary.WORD * 4, "little")
DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.int64)


def changed(pieces: list[Piece]) -> list[bool]:
    table = torch.tensor(pieces, dtype=torch.int64)
    flags = torch.zeros(len(pieces), dtype=torch.int32)
    grid = (len(pieces), cuda_regions._programs(pieces))
    cuda_regions._changed_kernel[grid](table, flags, BLOCK=16)
    return [flag != 0 for flag in flags.tolist()]


@pytest.mark.parametrize("seed", range(25))
def test_pieces_at_any_address_and_of_any_size(seed: int) -> None:
    chosen = random.Random(seed)
    memory = torch.zeros(2048, dtype=torch.uint8)
    base = memory.data_ptr()
    start, size = chosen.randrange(300), chosen.randrange(700)
    other, behind = start + size + chosen.randrange(9), chosen.randrange(1, 60)
    pieces = [Piece(base + start, size, CANARY),
              Piece(base + other, behind, canary.poison_pattern(chosen.choice(DTYPES)))]  # fmt: skip
    lay(pieces)
    expected = torch.zeros_like(memory)
    for piece in pieces:
        for address in range(piece.address, piece.address + piece.size):
            expected[address - base] = (piece.pattern >> (8 * (address % 8))) & 0xFF
    assert torch.equal(memory, expected)
    assert changed(pieces) == [False, False]
    memory[other + chosen.randrange(behind)] ^= 1
    assert changed(pieces) == [False, True]
    if size:
        memory[start + chosen.randrange(size)] ^= 0x80
        assert changed(pieces) == [True, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_poisoned_storage_is_unwritten(dtype: torch.dtype) -> None:
    memory = torch.zeros(40, dtype=torch.uint8)
    lay([Piece(memory.data_ptr(), 40, canary.poison_pattern(dtype))])
    assert canary.unwritten(memory.view(dtype)).all()


def test_a_canary_is_what_the_host_lays() -> None:
    laid, host = torch.zeros(33, dtype=torch.uint8), torch.zeros(33, dtype=torch.uint8)
    lay([Piece(laid.data_ptr() + 1, 31, CANARY)])
    canary.fill(host.data_ptr() + 1, 31)
    assert laid.data_ptr() % 2 == host.data_ptr() % 2
    assert torch.equal(laid, host)
