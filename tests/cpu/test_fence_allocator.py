"""The allocator of `--fence all`, over a driver that is arithmetic: what it maps where, uses again, and gives back."""

from __future__ import annotations

import threading

import pytest

from moe_fuzz.fence import FenceOptions, allocator, cuda_driver, open_arena
from moe_fuzz.fence.allocator import Allocator

GRANULE = 2 << 20


class Driver:
    """Address space and memory of a device that does not exist."""

    def __init__(self) -> None:
        self.next, self.memory, self.limit = 1 << 40, {}, 1 << 40
        self.access: dict[int, int] = {}
        self.filled: list[tuple[int, int, int]] = []
        self.waits = 0

    def granularity(self, device: int) -> int:
        return GRANULE

    def make_current(self, device: int) -> None:
        assert device == 0

    def reserve(self, size: int) -> int:
        self.next += size + (1 << 30)
        return self.next - size

    def free(self, address: int, size: int) -> None:
        assert not [a for a in self.memory if address <= a < address + size], "freed with memory in it"

    def back(self, address: int, size: int, device: int) -> None:
        if sum(self.memory.values()) + size > self.limit:
            raise MemoryError("no more")
        assert address % GRANULE == size % GRANULE == 0
        self.memory[address] = size

    def protect(self, address: int, size: int, device: int, access: int) -> None:
        assert self.memory[address] == size
        self.access[address] = access

    def unmap(self, address: int, size: int) -> None:
        assert self.waits
        assert self.memory.pop(address) == size

    def fill(self, address: int, word: int, size: int, stream: int) -> None:
        assert self.access[address] == cuda_driver.WRITE
        self.filled.append((address, size, stream))

    def synchronize(self) -> None:
        self.waits += 1

    def end(self, address: int) -> int:
        """Where the memory around an address ends."""
        start = max(a for a in self.memory if a <= address)
        end = start + self.memory[start]
        while end in self.memory:
            end += self.memory[end]
        return end


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    for name in ("granularity", "make_current", "reserve", "free", "back", "protect", "unmap", "fill", "synchronize"):
        monkeypatch.setattr(cuda_driver, name, getattr(fake, name))
    return fake


@pytest.mark.parametrize("size", [1, 15, 16, 4000, GRANULE - 4, GRANULE, GRANULE + 1, 5 * GRANULE + 48])
def test_memory_ends_where_the_address_space_does(driver: Driver, size: int) -> None:
    heap = Allocator()
    right = heap.take(size, 0, 7)
    assert right % 16 == 0
    assert 0 <= driver.end(right) - right - size < 16
    assert driver.filled[-1][1:] == (-(-size // GRANULE) * GRANULE, 7)
    with heap.fencing(FenceOptions(), "left"):
        left = heap.take(size, 0, 7)
    assert left in driver.memory  # the first byte of what is mapped
    assert left - GRANULE not in driver.memory


def test_soft_and_readable_guards_for_the_reruns_that_name_a_culprit(driver: Driver) -> None:
    heap = Allocator()
    with heap.fencing(FenceOptions(hard=()), "right"):
        soft = heap.take(4096, 0, 0)
    assert driver.end(soft) == soft + 4096 + GRANULE
    with heap.fencing(FenceOptions(access="write", sides="right"), "right"):
        readable = heap.take(4096, 0, 0)
    end = readable + 4096
    assert (driver.access[end], driver.memory[end]) == (cuda_driver.READ, GRANULE)
    with heap.fencing(FenceOptions(hard=(allocator.NAME,)), "right"):
        hard = heap.take(4096, 0, 0)
    assert driver.end(hard) == hard + 4096


def test_freed_memory_is_used_again_on_its_own_stream_and_poisoned_there(driver: Driver) -> None:
    heap = Allocator()
    first = heap.take(100, 0, 1)
    heap.give(first)
    assert heap.take(100, 0, 2) != first  # another stream may overtake
    again = heap.take(90, 0, 1)
    assert abs(again - first) <= 16
    assert [stream for _, _, stream in driver.filled] == [1, 2, 1]
    assert heap.made == 2


def test_memory_that_ends_is_the_cases_to_tell(driver: Driver) -> None:
    heap = Allocator()
    kept, idle = heap.take(100, 0, 0), heap.take(8 * GRANULE, 0, 0)
    heap.give(idle)
    driver.limit = sum(driver.memory.values())
    assert heap.take(3 * GRANULE, 0, 0)  # what was idle makes room
    with pytest.raises(MemoryError, match="no more"), heap.fencing(FenceOptions(), "right"):
        assert heap._alloc(64 * GRANULE, 0, None) is None
    with heap.fencing(FenceOptions(), "right"):  # and not the next one's
        heap._free(kept, 100, 0, None)
    with heap.fencing(FenceOptions(), "right"):
        assert heap._alloc(0, 0, None) is None
        heap._free(None, 0, 0, None)


def test_a_lost_device_is_not_memory_that_ran_out(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laying a readable guard waits for the device, and so may be the first to hear what a kernel before did."""
    heap = Allocator()
    kept = heap.take(100, 0, 0)

    def lost() -> None:
        raise cuda_driver.DeviceLost("illegal-access", "a kernel broke the CUDA context")

    monkeypatch.setattr(cuda_driver, "synchronize", lost)
    monkeypatch.setattr(allocator, "_MAX_IDLE", 0)
    with heap.fencing(FenceOptions(access="write"), "right"):
        assert heap._alloc(64, 0, None) is None
        heap._free(kept, 100, 0, None)
    assert heap.failed is None


def test_idle_memory_is_bounded(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_MAX_IDLE", 8 * GRANULE)
    heap = Allocator()
    addresses = [heap.take(GRANULE, 0, 0) for _ in range(20)]
    threads = [threading.Thread(target=heap.give, args=(address,)) for address in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < sum(driver.memory.values()) <= 8 * GRANULE


def test_on_a_cpu_all_is_what_python_asks_for() -> None:
    import torch

    with open_arena("cpu", FenceOptions(own="all")) as arena, arena.own():
        assert not torch.empty(3).untyped_storage().resizable()
    with open_arena("cpu", FenceOptions(own="off")) as arena, arena.own():
        assert torch.empty(3).untyped_storage().resizable()
