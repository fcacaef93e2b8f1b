"""The generator gives the same bits on a CUDA device as on the host."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import torch
from moe_fuzz import generator
columns = [*range(0, 60), 77, 1023]
for rows in (range(3), [5, 4095, 2**31 - 1]):
    for make in (generator.words, generator.triangular):
        host = make(2**62 - 3, "logits", rows, columns, 7)
        device = make(2**62 - 3, "logits", rows, columns, 7, "cuda")
        assert device.is_cuda and torch.equal(host, device.cpu())
    host, device = (generator.choice(9, "x", rows, columns, 6, 1, where) for where in ("cpu", "cuda"))
    assert torch.equal(host, device.cpu())
print("same")
"""


@pytest.mark.gpu
def test_the_same_bits_on_the_device():
    done = subprocess.run([sys.executable, "-P", "-c", _SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "same", done.stderr
