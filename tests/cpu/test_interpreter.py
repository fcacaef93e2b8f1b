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


#: Reductions and scans by functions that the interpreter does not know, one of which branches.
COMBINES = """
import sys, hashlib, torch, triton, triton.language as tl
from moe_fuzz.execute.interpreter import hasten
if sys.argv[1] == "patched":
    assert hasten()
asked = []

@triton.jit
def subtract(a, b):
    asked.append(1)
    return a - b * 0.5

@triton.jit
def first_of_larger(a, i, b, j):
    return tl.where(a >= b, a, b), tl.where(a >= b, i, j)

@triton.jit
def branching(a, b):
    return a if a > b else b - 1.0

@triton.jit
def kernel(x_ptr, out_ptr, index_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    place = tl.broadcast_to(n[None, :], (M, N))
    tl.store(out_ptr + m, tl.reduce(x, 1, subtract))
    tl.store(out_ptr + M, tl.reduce(x, None, subtract))
    tl.store(out_ptr + M + 1 + n[None, :], tl.reduce(x, 0, subtract, keep_dims=True))
    value, index = tl.reduce((x, place), 1, first_of_larger)
    tl.store(index_ptr + m, index)
    out_ptr += M + 1 + N
    tl.store(out_ptr + m, value)
    tl.store(out_ptr + M + m, tl.reduce(x, 1, branching))
    out_ptr += 2 * M
    at = m[:, None] * N + n[None, :]
    tl.store(out_ptr + at, tl.associative_scan(x, 1, subtract))
    tl.store(out_ptr + M * N + at, tl.associative_scan(x, 0, subtract, reverse=True))
    tl.store(out_ptr + 2 * M * N + at, tl.associative_scan(x, 1, branching))
    tl.store(out_ptr + 3 * M * N + at, tl.sort(x, 1, descending=True))
    tl.store(out_ptr + 4 * M * N + at, tl.cumprod(x, 1))
    tl.store(index_ptr + M, tl.xor_sum(tl.sum(place, 1), 0))

torch.manual_seed(0)
M, N = 8, 16
x, out, index = torch.randn(M, N), torch.zeros(3 * M + 1 + N + 5 * M * N), torch.zeros(M + 1, dtype=torch.int32)
kernel[(1,)](x, out, index, M, N)
assert torch.equal(index[:M].long(), x.argmax(1)) and torch.equal(out[3 * M + 1 + N:][3 * M * N:][:M * N].view(M, N),
                                                                 x.sort(1, descending=True).values)
slices = (N - 1) + (M * N - 1) + (M - 1) + (N - 1) + (M - 1)
assert len(asked) == slices or sys.argv[1] == "plain", (len(asked), slices)
print(hashlib.sha256(out.numpy().tobytes() + index.numpy().tobytes()).hexdigest(), out.shape)
"""


@pytest.mark.interpreter
def test_a_function_that_combines_is_called_for_whole_slices(tmp_path):
    (tmp_path / "program.py").write_text(COMBINES)
    said = [
        subprocess.run([sys.executable, tmp_path / "program.py", how], capture_output=True, text=True, check=True,
                       env=ENV).stdout
        for how in ("plain", "patched")
    ]  # fmt: skip
    assert said[0] == said[1]
    assert len(said[0]) > 64


ENV = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
