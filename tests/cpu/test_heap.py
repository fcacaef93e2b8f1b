"""Freed memory stays with the process: the next arrays need no new pages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from pathlib import Path
import torch
from moe_fuzz.execute.heap import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory()

def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before = resident()
parts = [torch.ones(1 << 20, dtype=torch.float64) for _ in range(12)]
there = resident()
del parts
print(there - before, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(("how", "share"), [("kept", (0.9, 1.1)), ("usual", (-0.1, 0.5))])
def test_what_stays_of_freed_arrays(how: str, share: tuple[float, float]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    there, left = map(int, done.stdout.split())
    assert there > 90 << 20
    assert share[0] < left / there < share[1]
