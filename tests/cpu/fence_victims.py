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
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # must be set before Triton is imported

import torch

from moe_fuzz.fence import FenceOptions, open_arena, unwritten

sys.path.append(str(Path(__file__).resolve().parents[1] / "cpu"))  # with -P nothing beside a script is found
from fence_programs import COLUMNS, ROWS, VICTIMS

VICTIMS["read_far"] = lambda src, dst: ctypes.string_at(src.data_ptr() + src.nbytes + (1 << 20) - 1, 1)


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
