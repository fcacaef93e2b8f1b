"""Times of launches inside CUDA graphs, interleaved; and what no kernel can be faster than. Child side, CUDA only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

Call = Callable[[], Any]


def capture(calls: Sequence[Call], launches: int) -> torch.cuda.CUDAGraph:
    """A graph of `launches` calls, one after another, taken from `calls` in turn. The calls have run before."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for number in range(launches):
            calls[number % len(calls)]()
    return graph


def interleaved(graphs: Mapping[str, torch.cuda.CUDAGraph], launches: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds a launch, `rounds` samples for each graph. In a round each is replayed twice and timed once: the
    first replay brings its data and code back into the caches. The order rotates."""
    names = list(graphs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        marks = []
        for name in names[shift:] + names[:shift]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graphs[name].replay()
            start.record()
            graphs[name].replay()
            end.record()
            marks.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in marks:
            times[name].append(start.elapsed_time(end) * 1000 / launches)
    return times


def empty_launch(device: str) -> Call:
    """A kernel that does nothing: what is left is the launch."""
    word = torch.zeros(1, dtype=torch.int32, device=device)
    return lambda: _empty_kernel[(1,)](word, num_warps=1)


def copy_launch(moved: int, device: str) -> Call:
    """A kernel that reads and writes `moved` bytes in all, half and half, as large pieces at a time as pay."""
    words = max(1, moved // 8)
    source = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    block = min(4096, max(128, triton.next_power_of_2(triton.cdiv(words, 264))))  # two programs a multiprocessor
    return lambda: _copy_kernel[(triton.cdiv(words, block),)](source, target, words, BLOCK=block, num_warps=4)


def copy_bandwidth(device: str) -> float:
    """Bytes a microsecond, read and written, of a copy far larger than the L2."""
    moved = 1 << 31
    call = copy_launch(moved, device)
    call()
    times = interleaved({"copy": capture([call], 4)}, 4, 9)["copy"]
    return moved / sorted(times)[len(times) // 2]


def eager(call: Call, rounds: int) -> list[float]:
    """Microseconds of a call that cannot be captured, `rounds` samples, after one that is not timed. What the CPU
    leaves the GPU waiting for is part of it."""
    call()
    marks = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1000 for start, end in marks]


def product_rate(device: str) -> float:
    """Operations a microsecond of a large product of random bfloat16 matrices."""
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    call = partial(torch.mm, a, b)
    call()
    times = interleaved({"product": capture([call], 4)}, 4, 9)["product"]
    return 2 * 8192**3 / sorted(times)[len(times) // 2]


@triton.jit
def _empty_kernel(pointer):
    pass


@triton.jit(do_not_specialize=["size"])
def _copy_kernel(source_ptr, target_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + at, tl.load(source_ptr + at, mask=at < size), mask=at < size)
