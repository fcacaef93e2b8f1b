"""Programs that step out of their memory on a GPU, and probes of the fences there; run by test_fence_cuda.py.

This process imports torch and Triton once, without touching CUDA, and forks a child for each request: a JSON line on
stdin {"victim": …, "options": {…}, "edge": …}. The answer is one too: {"status": 0, "lost": "" | "illegal-access", …}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from moe_fuzz.fence import FenceOptions, cuda, cuda_driver, cuda_placed, open_arena, unwritten
from moe_fuzz.fence.cuda import CudaArena

sys.path.append(str(Path(__file__).resolve().parents[1] / "cpu"))  # with -P nothing beside a script is found
from fence_programs import COLUMNS, ROWS, VICTIMS, copy


@triton.jit(do_not_specialize=["start", "n"])
def _zero_bytes_kernel(first, start, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(first + start + i, tl.zeros((BLOCK,), tl.uint8), mask=i < n)


def scribble(tensor: torch.Tensor, start: int, count: int = 1) -> None:
    """Writes zeros over `count` bytes, from `start` bytes past the tensor's first."""
    first = tensor.as_strided((1,), (1,)).view(torch.uint8)
    _zero_bytes_kernel[(1,)](first, start, count, BLOCK=triton.next_power_of_2(count))


def write_on_another_stream(src: torch.Tensor, dst: torch.Tensor) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        copy(src, dst, dst_shift=1)


VICTIMS["read_far"] = lambda src, dst: copy(src, dst, src_shift=(255 << 20) // 4)
VICTIMS["write_on_another_stream"] = write_on_another_stream


def run_victim(name: str, edge: str, options: FenceOptions) -> dict[str, Any]:
    with open_arena("cuda", options, edge) as arena:
        src = arena.tensor("src", (ROWS, COLUMNS), torch.float32)
        src.copy_(torch.arange(1.0, ROWS * COLUMNS + 1).view(ROWS, COLUMNS))
        dst = arena.tensor("dst", (ROWS, COLUMNS), torch.float32, role="output")
        arena.protect()
        try:
            with arena.own():
                VICTIMS[name](src, dst)
        finally:
            cuda_driver.synchronize()  # if the context is lost, what torch or Triton raised is a consequence
        arena.unprotect()
        return {
            "violations": [[v.symptom, v.where[0]] for v in arena.check()],
            "unwritten": int(unwritten(dst).sum()),
            "nan": int(dst.isnan().sum()),
        }


# ---- probes: what the fences do while everybody stays inside --------------------------------------------------------

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8,
           torch.bool, torch.float8_e4m3fn)  # fmt: skip


def probe_dtypes(arena: CudaArena) -> dict[str, Any]:
    """Bits go in and come out, NaN payloads too; outputs come poisoned."""
    wrong = []
    for dtype in _DTYPES:
        bits = torch.arange(7 * 5 * dtype.itemsize) % (2 if dtype == torch.bool else 251)
        plain = bits.to(torch.uint8).view(dtype).view(7, 5)
        fenced = arena.tensor(f"in {dtype}", (7, 5), dtype, alignment=dtype.itemsize).copy_(plain)
        out = arena.tensor(f"out {dtype}", (7, 5), dtype, role="output", alignment=dtype.itemsize)
        same = torch.equal(fenced.cpu().view(torch.uint8), plain.view(torch.uint8))
        poisoned = bool(unwritten(out).all()) and bool(unwritten(out.cpu()).all())
        out.zero_()
        exact = all(t.untyped_storage().nbytes() == plain.nbytes and not t.storage_offset() for t in (fenced, out))
        if not (same and poisoned and exact and not unwritten(out).any() and fenced.dtype == out.dtype == dtype):
            wrong.append(str(dtype))
    return {"wrong": wrong, "violations": [v.symptom for v in arena.check()]}


def probe_canaries(arena: CudaArena) -> dict[str, Any]:
    """Every byte of the slack is watched, next to an odd first and last byte too, and so are gaps."""
    told = []
    shapes = (((3, 5), torch.float32, 16), ((7,), torch.bool, 1), ((7,), torch.uint8, 16))
    for number, (shape, dtype, alignment) in enumerate(shapes):
        tensor = arena.tensor(f"t{number}", shape, dtype, role="output", alignment=alignment)
        assert arena.check() == []
        places = [(-1, 1), (-2, 1), (-33, 4)] if arena.edge == "right" else []
        places += [(tensor.nbytes, 1)] if arena.edge == "left" or alignment > 1 else []
        for start, count in places:
            scribble(tensor, start, count)
            told.append([start, [[v.symptom, v.where[0]] for v in arena.check()]])
            arena._placed[-1].reset(whole=False)
    strided = arena.tensor("strided", (4, 6), torch.float32, strides=(8, 1), offset=1)
    strided.fill_(1)
    assert arena.check() == []
    scribble(strided, 6 * 4, 3)
    return {"told": told, "gap": [[v.symptom, v.where[0], v.message] for v in arena.check()]}


def probe_pool(arena: CudaArena) -> dict[str, Any]:
    """Memory is used again, not before its tensors are dead, and comes back clean."""
    arena.close()
    made, clean, damaged = [], [], []
    for _ in range(3):
        with open_arena("cuda") as one:
            tensors = [one.tensor(f"t{i}", (64, 64), torch.float32, role="output") for i in range(4)]
            clean.append(all(bool(unwritten(t).all()) for t in tensors) and one.check() == [])
            tensors[0].zero_()
            scribble(tensors[1], -8, 8)
            damaged.append([v.symptom for v in one.check()])
            tensors.clear()
        made.append(cuda_placed.POOL.made)
    with open_arena("cuda") as one:
        keeper = one.tensor("keeper", (64, 64), torch.float32, role="output").fill_(3)
    with open_arena("cuda") as two:
        others = [two.tensor(f"t{i}", (64, 64), torch.float32) for i in range(8)]
        shared = keeper.data_ptr() in [t.data_ptr() for t in others]
        others.clear()
        scribble(keeper, -4, 4)
        stale = [v.symptom for v in two.check()]
        again = [v.symptom for v in two.check()]
    intact, kept = bool((keeper == 3).all()), len(cuda._KEPT)
    del keeper
    with open_arena("cuda"):
        return {"made": made, "clean": clean, "damaged": damaged, "shared": shared, "stale": stale, "again": again,
                "intact": intact, "kept": [kept, len(cuda._KEPT)]}  # fmt: skip


def probe_own(arena: CudaArena) -> dict[str, Any]:
    with arena.own():
        empty = torch.empty((3, 5), device="cuda")
        zeros = torch.zeros((3, 5), device="cuda", dtype=torch.bfloat16)
        here = torch.empty(3)
        scribble(zeros, zeros.nbytes)
    return {"poisoned": bool(unwritten(empty).all()), "zeros": bool((zeros == 0).all()), "here": str(here.device),
            "symptoms": [[v.tensor, v.symptom] for v in arena.check()]}  # fmt: skip


def probe_memory(arena: CudaArena) -> dict[str, Any]:
    """A tensor that no GPU can hold is a MemoryError, and the next one fits."""
    try:
        arena.tensor("huge", (1 << 42,), torch.uint8)
    except MemoryError:
        return {"refused": True, "next": int(arena.tensor("small", (4,), torch.uint8).zero_().sum())}
    return {"refused": False}


PROBES = {"dtypes": probe_dtypes, "canaries": probe_canaries, "pool": probe_pool, "own": probe_own,
          "memory": probe_memory}  # fmt: skip


def answer(request: dict[str, Any]) -> dict[str, Any]:
    name, edge, options = request["victim"], request["edge"], FenceOptions.from_json(request["options"])
    try:
        if name not in PROBES:
            return {"lost": "", **run_victim(name, edge, options)}
        with CudaArena(options, edge) as arena:
            return {"lost": "", **PROBES[name](arena)}
    except cuda_driver.DeviceLost as lost:
        return {"lost": lost.symptom}


def _child(request: dict[str, Any], pipe: int) -> None:
    status = 1
    try:
        os.write(pipe, json.dumps(answer(request)).encode())
        status = 0
    except BaseException:  # noqa: BLE001 - the fork must never return into the loop; the parent sees the status
        traceback.print_exc()
    os._exit(status)


def main() -> None:
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            _child(json.loads(line), write)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            told = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({**(json.loads(told) if told else {}), "status": status}), flush=True)


if __name__ == "__main__":
    main()
