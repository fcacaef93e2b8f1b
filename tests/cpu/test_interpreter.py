"""The faster interpreter computes what the interpreter computes."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, hashlib, torch
from moe_fuzz.execute.interpreter import hasten
if sys.argv[1] == "patched":
    assert hasten() and hasten()
from moe_fuzz.kernels.experts_bf16 import experts_bf16
from moe_fuzz.kernels.routing import topk_softmax
torch.manual_seed(0)
digest = hashlib.sha256()
for tokens, experts, k in ((1, 1, 1), (5, 60, 4), (33, 129, 7)):
    for _ in range(2):  # the language is patched anew at each launch, and given back
        found = topk_softmax(torch.randn(tokens, experts), k, renormalize=True, bias=torch.randn(experts))
        digest.update(found[0].numpy().tobytes() + found[1].numpy().tobytes())
mapped = torch.tensor([1, -1, 0, 2], dtype=torch.int32)
for tokens, k, map in ((1, 2, None), (7, 3, mapped)):  # grouped inside, by `align`
    ids = torch.arange(tokens * k, dtype=torch.int32).reshape(tokens, k) % 4
    shapes = (tokens, 24), (4 if map is None else 3, 40, 24), (4 if map is None else 3, 24, 20)
    y = experts_bf16(*(torch.randn(shape).bfloat16() for shape in shapes), torch.rand(tokens, k), ids, expert_map=map)
    digest.update(y.view(torch.int16).numpy().tobytes())
import triton.language as tl
print(digest.hexdigest(), tl.load.__module__)
"""


@pytest.mark.interpreter
def test_the_same_bits_and_the_language_given_back():
    said = [
        subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, env=ENV).stdout
        for how in ("plain", "patched")
    ]
    assert said[0] == said[1]
    assert len(said[0]) > 64


ENV = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
