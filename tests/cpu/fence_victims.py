"""Programs that step out of their memory, run by test_fence_victims.py.

This process imports torch and Triton once and forks a child for each request: a JSON line on stdin
{"victim": …, "options": {…}, "edge": …}; the answer is one too: {"signal": 0 | 11, "violations": [[symptom, where]]}.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback

os.environ["TRITON_INTERPRET"] = "1"  # must be set before Triton is imported

import torch
import triton
import triton.language as tl

from moe_fuzz.fence import FenceOptions, open_arena, unwritten

ROWS, COLUMNS = 8, 16  # 512 bytes of float32: no slack


@triton.jit
def _copy_kernel(src, dst, n, src_shift, dst_shift, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(src + i + src_shift, mask=i < n)
    tl.store(dst + i + dst_shift, x, mask=i < n)


@triton.jit
def _scale_in_place_kernel(src, dst, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(src + i, mask=i < n) * 2
    tl.store(src + i, x, mask=i < n)
    tl.store(dst + i, x, mask=i < n)


def copy(src: torch.Tensor, dst: torch.Tensor, src_shift: int = 0, dst_shift: int = 0) -> None:
    n = src.numel()
    _copy_kernel[(1,)](src, dst, n, src_shift, dst_shift, BLOCK=triton.next_power_of_2(n))


def read_own_workspace(src: torch.Tensor, dst: torch.Tensor) -> None:
    workspace = torch.empty(src.numel())
    copy(src, workspace)
    copy(workspace, dst, src_shift=1)


def write_own_workspace(src: torch.Tensor, dst: torch.Tensor) -> None:
    workspace = torch.empty_like(src)
    copy(src, workspace, dst_shift=1)
    copy(src, dst)


VICTIMS = {
    "honest": copy,
    "honest_own": lambda src, dst: copy(src.clone(), dst),
    "read_right": lambda src, dst: copy(src, dst, src_shift=1),
    "read_left": lambda src, dst: copy(src, dst, src_shift=-1),
    "read_row_off_by_one": lambda src, dst: copy(src, dst, src_shift=COLUMNS),
    "read_far": lambda src, dst: ctypes.string_at(src.data_ptr() + src.nbytes + (1 << 20) - 1, 1),
    "write_right": lambda src, dst: copy(src, dst, dst_shift=1),
    "write_left": lambda src, dst: copy(src, dst, dst_shift=-1),
    "write_input": lambda src, dst: _scale_in_place_kernel[(1,)](src, dst, src.numel(), BLOCK=ROWS * COLUMNS),
    "torch_write_input": lambda src, dst: src.add_(1),
    "torch_read_input": lambda src, dst: dst.copy_(src),
    "read_empty": lambda src, dst: _copy_kernel[(1,)](src.new_empty(0), dst, 1, 0, 0, BLOCK=1),
    "read_own_workspace": read_own_workspace,
    "write_own_workspace": write_own_workspace,
}


def run(request: dict) -> dict:
    with open_arena("cpu", FenceOptions.from_json(request["options"]), request["edge"]) as arena:
        src = arena.tensor("src", (ROWS, COLUMNS), torch.float32)
        src.copy_(torch.arange(1.0, ROWS * COLUMNS + 1).view(ROWS, COLUMNS))
        dst = arena.tensor("dst", (ROWS, COLUMNS), torch.float32, role="output")
        arena.protect()
        with arena.own():
            VICTIMS[request["victim"]](src, dst)
        arena.unprotect()
        found = arena.check()
        return {
            "violations": [[v.symptom, v.where[0]] for v in found],
            "unwritten": int(unwritten(dst).sum()),
            "nan": int(dst.isnan().sum()),
        }


def _child(request: dict, pipe: int) -> None:
    status = 1
    try:
        os.write(pipe, json.dumps(run(request)).encode())
        status = 0
    except BaseException:  # noqa: BLE001 - the fork must never return into the loop; the parent sees the status
        traceback.print_exc()
    os._exit(status)


def main() -> None:
    torch.set_num_threads(1)  # a fork takes one thread along
    run({"victim": "honest_own", "edge": "right", "options": {}})  # the first launch imports a lot: once for all
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            _child(json.loads(line), write)
        os.close(write)
        with os.fdopen(read, "rb") as answer:
            told = answer.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        result = json.loads(told) if told else {}
        print(json.dumps({"signal": max(0, -status), "status": max(0, status), **result}), flush=True)


if __name__ == "__main__":
    main()
