"""Pieces of memory laid and compared by the kernels of fences on CUDA: here interpreted, on host memory."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import inspect
import random

import pytest
import torch

from moe_fuzz.fence import canary, cuda_regions
from moe_fuzz.fence.cuda_regions import Piece, lay

CANARY = int.from_bytes(canary.WORD * 4, "little")
pytestmark = pytest.mark.interpreter
DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.int64)


def changed(pieces: list[Piece]) -> list[bool]:
    return [flag != 0 for flag in cuda_regions.changed(pieces).tolist()]


@pytest.fixture(autouse=True)
def _ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of memory that is not pinned; a small one, whose end comes soon."""
    ring = cuda_regions.Ring(4096)
    ring._memory = torch.zeros(4096 + 15, dtype=torch.uint8)
    ring._memory = ring._memory[-ring._memory.data_ptr() % 16 :][:4096]
    ring._base = ring._memory.data_ptr()
    monkeypatch.setattr(cuda_regions, "_RING_OF_PROCESS", ring)
    monkeypatch.setattr(cuda_regions.cuda_driver, "synchronize", lambda: None)


@pytest.mark.parametrize("seed", range(25))
def test_what_is_moved_is_what_it_was_at_any_address(seed: int) -> None:
    chosen = random.Random(seed)
    memory = torch.zeros(2048, dtype=torch.uint8)
    base, expected = memory.data_ptr(), torch.zeros(2048, dtype=torch.uint8)
    moves, at = [], 0
    for _ in range(chosen.randint(1, 5)):
        at += chosen.randrange(40)
        dtype = chosen.choice(DTYPES)
        at += -(base + at) % dtype.itemsize
        value = torch.randint(0, 256, (chosen.randint(1, 30) * dtype.itemsize,)).to(torch.uint8).view(dtype)
        moves.append(cuda_regions.staged(value, base + at))
        expected[at : at + value.nbytes] = value.view(torch.uint8)
        at += value.nbytes
        moves.append(cuda_regions.Move(base + at, 7, CANARY))
        for byte in range(at, at + 7):
            expected[byte] = (CANARY >> (8 * ((base + byte) % 8))) & 0xFF
        at += 7
    cuda_regions.move(moves)
    assert torch.equal(memory, expected)
    start = chosen.randrange(0, 64, 8) + (-base) % 8
    parts = [memory[start : start + 96].view(torch.float64).view(3, 4), memory[5:300]]
    for copy, part in zip(cuda_regions.fetched(parts), parts, strict=True):
        assert copy.shape == part.shape
        assert torch.equal(copy.view(torch.uint8), part.view(torch.uint8))


def test_only_what_lies_in_a_row_passes_through_the_ring() -> None:
    x = torch.zeros(4, 6)
    assert cuda_regions.is_small(x)
    assert not cuda_regions.is_small(x.t())
    assert not cuda_regions.is_small(x[:0])
    assert not cuda_regions.is_small(torch.zeros(cuda_regions.SMALL // 4 + 1))


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


@pytest.mark.parametrize("name", ["lay", "move", "changed"])
def test_a_kernel_of_ours_has_one_binary_whatever_it_is_given(name: str) -> None:
    """Else Triton would make another of small numbers, and the first one would be launched with them."""
    kernel = getattr(cuda_regions, f"_{name}_kernel").fn
    *numbers, constant = kernel.__annotations__.items()
    assert {kind for _, kind in numbers} == {"tl.int64"}
    assert constant == ("BLOCK", "tl.constexpr")
    assert [parameter for parameter, _ in kernel.__annotations__.items()] == list(inspect.signature(kernel).parameters)
