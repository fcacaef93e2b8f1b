"""Rows far apart on a GPU are written and compared at once where they lie evenly: here in a host's memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_fuzz.fence import evenly as rows_at_once
from moe_fuzz.fence.evenly import Evenly
from moe_fuzz.fence.layout import place
from moe_fuzz.fence.sparse import Island, islands

PAGE, WORD = 256, 0x7FFD


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    found = torch.zeros(1 << 16, dtype=torch.uint8)
    monkeypatch.setattr(rows_at_once, "bytes_at", lambda address, size: found[address : address + size])
    return found


def laid(rows: int, columns: int, stride: int, itemsize: int, edge: str) -> tuple[Island, ...]:
    shape, strides = (rows, columns), (stride, 1)
    return islands("x", place(shape, strides, 0, itemsize, itemsize, edge, PAGE), shape, strides, 0, itemsize, PAGE)


def slowly(memory: torch.Tensor, found: tuple[Island, ...], inside: int, outside: int) -> torch.Tensor:
    """The memory with these words in the rows and beside them."""
    wanted = memory.clone()
    for island in found:
        wanted[island.lo : island.hi].view(torch.int16).fill_(outside)
        wanted[island.start : island.end].view(torch.int16).fill_(inside)
    return wanted


LAID = [(rows, columns, stride, itemsize, edge) for rows in (1, 2, 5) for columns, stride in ((3, 516), (61, 1037))
        for itemsize in (2, 4) for edge in ("left", "right")]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns", "stride", "itemsize", "edge"), LAID)
def test_what_lies_evenly_is_written_at_once(
    memory: torch.Tensor, rows: int, columns: int, stride: int, itemsize: int, edge: str
) -> None:
    found = laid(rows, columns, stride, itemsize, edge)
    evenly = Evenly.of(found)
    if evenly is None:  # a row crosses a page where another does not
        assert len({(at.hi - at.lo, at.lo - at.start) for at in found}) > 1
        return
    wanted = slowly(memory, found, 5, WORD)
    evenly.pages().fill_(WORD)
    evenly.rows().fill_(5)
    assert torch.equal(memory, wanted)


@pytest.mark.parametrize("spoil", [lambda at: at.start - 1, lambda at: at.end, lambda at: at.lo, lambda at: at.hi - 1])
@pytest.mark.parametrize("nth", [0, 3])
def test_a_byte_beside_a_row_is_seen(memory: torch.Tensor, spoil: Callable[[Island], int], nth: int) -> None:
    found = tuple(Island(at.lo + 512, at.hi + 512, at.start + 512, at.end + 512) for at in laid(4, 33, 519, 2, "left"))
    found = tuple(Island(at.lo, at.hi, at.start + 64, at.end + 64) for at in found)
    evenly = Evenly.of(found)
    assert evenly is not None
    memory.copy_(slowly(memory, found, 5, WORD))
    assert not evenly.differs(WORD)
    memory[spoil(found[nth])] ^= 1
    assert evenly.differs(WORD)


def test_odd_addresses_and_uneven_rows_are_left_to_the_slow_way() -> None:
    assert Evenly.of(laid(3, 33, 1024, 1, "left")) is None  # rows of 33 bytes
    assert Evenly.of((Island(0, 256, 0, 8), Island(512, 1024, 512, 520))) is None
    assert Evenly.of((Island(0, 256, 0, 8), Island(512, 768, 512, 520), Island(1536, 1792, 1536, 1544))) is None


@pytest.mark.parametrize("edge", ["left", "right"])
def test_rows_as_far_apart_as_the_fault_lays_them_use_the_same_pages(edge: str) -> None:
    pages = 2 << 20
    for rows in (2, 7, 64):
        apart = -(-(1 << 31) // (rows - 1) // (1 << 21)) << 21
        made = set()
        for gap in (1, 2, 13):
            for columns in (1, 60, 512):
                shape, strides = (rows, columns), (apart + gap, 1)
                layout = place(shape, strides, 0, 4, 16, edge, pages)
                made.add((layout.pages, *((at.lo, at.hi) for at in islands("x", layout, shape, strides, 0, 4, pages))))
        assert len(made) == 1
