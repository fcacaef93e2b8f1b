"""What compiles for a GPU runs in a worker's interpreter of Triton's, and means the same there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moe_fuzz.campaign.tally import Tally
from moe_fuzz.execute.runner import Runner
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.report.text import target_row
from moe_fuzz.strategies import grid
from moe_fuzz.verdict import PASS, REJECTED

START = """
import torch, triton, triton.language as tl
from triton.language.extra import cuda, libdevice
from moe_fuzz.execute.interpreter import hasten
from moe_fuzz.execute.interpreter_language import complete
from moe_fuzz.execute.interpreter_nan import pick
from moe_fuzz.execute.interpreter_values import correct
assert hasten() and correct() and pick() and complete() and complete()
torch.manual_seed(0)
N = 16
at = torch.arange(N)
"""

WORDS = """
@triton.jit
def kernel(x_ptr, out_ptr, n, flag, ROWS: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, min(max(x, -0.5), 0.5))
    tl.store(out_ptr + N + at, (x > 0 and at < 8).to(tl.int32))
    tl.store(out_ptr + 2 * N + at, (x > 0 or at < 8).to(tl.int32))
    tl.store(out_ptr + 3 * N + at, (not x > 0).to(tl.int32))
    tl.store(out_ptr + 4 * N + at, tl.max(x, 0))
    for row in tl.range(tl.program_id(0), n, 2, num_stages=2):
        tl.store(out_ptr + 5 * N + row.to(tl.int64), (row * 2).to(tl.float32))
    for row in range(ROWS):
        tl.store(out_ptr + 6 * N + row.to(tl.int64), min(row, 2))
    for far in range((n + 0).to(tl.int64), (n + 1).to(tl.int64)):
        tl.store(out_ptr + 7 * N + 2, ((far << 32) > 0).to(tl.float32))
    for row in tl.static_range(ROWS):
        tl.static_assert(row < ROWS)
    if flag and n > 3 and not (n > 9 or n < 2):
        tl.store(out_ptr + 7 * N, 1.0)
    if n < 3 and tl.load(out_ptr - 2**40) > 0:  # nobody looks there
        tl.store(out_ptr + 7 * N + 1, 1.0)

x, out = torch.randn(N), torch.zeros(8, N)
kernel[(2,)](x, out, 4, True, 4, N)
expected = [x.clamp(-0.5, 0.5), (x > 0) & (at < 8), (x > 0) | (at < 8), ~(x > 0), x.max().expand(N)]
for found, right in zip(out, expected):
    assert torch.equal(found, right.float())
assert out[5, :5].tolist() == [0, 2, 4, 6, 0] and out[6, :5].tolist() == [0, 1, 2, 2, 0]
assert out[7, :3].tolist() == [1, 0, 1]
"""

REDUCTIONS = """
@triton.jit
def add(a, b):
    return a + b

@triton.jit
def later(a, i, b, j):  # not commutative
    return a + b, j

@triton.jit
def kernel(x_ptr, scan_ptr, out_ptr, ids_ptr, counts_ptr, many_ptr, M: tl.constexpr, N: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + rows[:, None] * N + columns[None, :])
    index = tl.broadcast_to(columns[None, :], (M, N))
    tl.store(scan_ptr + rows[:, None] * N + columns[None, :], tl.associative_scan(x, -1, add))
    tl.store(scan_ptr + M * N + rows[:, None] * N + columns[None, :], tl.associative_scan(x, 1, add, reverse=True))
    tl.store(out_ptr + rows, tl.reduce(x, -1, add))
    tl.store(out_ptr + M + rows[:, None], tl.reduce(x, -1, add, keep_dims=True))
    total, last = tl.reduce((x, index), 1, later)
    tl.store(out_ptr + 2 * M + rows, total)
    tl.store(ids_ptr + rows, last)
    tl.store(ids_ptr + M + rows[:, None], tl.argmax(x, -1, tie_break_left=False, keep_dims=True))
    tl.store(ids_ptr + 2 * M + rows[:, None], tl.argmax(tl.where(index == 0, float("nan"), x), -1, keep_dims=True))
    tl.store(out_ptr + 3 * M + rows, tl.reduce(tl.reduce(x, 0, add), None, add))
    many = tl.load(many_ptr + tl.arange(0, 512))
    tl.store(counts_ptr + tl.arange(0, 4), tl.histogram(many, 4, mask=tl.arange(0, 512) < 400))

M = 4
for dtype in (torch.int64, torch.int32, torch.uint8):
    many = torch.zeros(512, dtype=dtype)
    many[300:] = 3
    many[0] = 4  # no bin's
    x, scans, out = torch.randn(M, N), torch.zeros(2, M, N), torch.zeros(4, M)
    ids, counts = torch.zeros(3, M, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    kernel[(1,)](x, scans, out, ids, counts, many, M, N)
    assert torch.allclose(scans[0], x.cumsum(1), atol=1e-5)
    assert torch.allclose(scans[1], x.flip(1).cumsum(1).flip(1), atol=1e-5)
    assert torch.allclose(out[:3], x.sum(1).expand(3, M), atol=1e-5) and torch.allclose(out[3], x.sum(), atol=1e-4)
    assert (ids[0] == N - 1).all() and torch.equal(ids[1], x.argmax(1).int()) and ((ids[2] >= 0) & (ids[2] < N)).all()
    assert counts.tolist() == [299, 0, 0, 100]
"""

LIBRARY = """
@triton.autotune(configs=[triton.Config({"BLOCK": size}, num_warps=4) for size in (N, 2 * N)], key=["n"])
@triton.jit
def kernel(x_ptr, out_ptr, ids_ptr, total_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    cuda.gdc_wait()
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, libdevice.tanh(x), mask=inside)
    tl.store(out_ptr + n + at, libdevice.rint(x), mask=inside)
    tl.store(out_ptr + 2 * n + at, libdevice.fast_expf(x), mask=inside)
    tl.store(out_ptr + 3 * n + at, libdevice.pow(tl.abs(x), 2.0), mask=inside)
    tl.store(out_ptr + 4 * n + at, libdevice.isnan(x).to(tl.float32), mask=inside)
    tl.store(ids_ptr + at, x.to(tl.int32), mask=inside)
    tl.store(ids_ptr + n + at, x.to(tl.bfloat16).to(tl.int32), mask=inside)
    tl.atomic_add(total_ptr + at % 4, (at + 0.5).to(tl.bfloat16), mask=inside)
    cuda.gdc_launch_dependents()

x = torch.randn(40) * 3
x[:6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e9, -3e9, 2.5])
out, ids, total = torch.zeros(5, 40), torch.zeros(2, 40, dtype=torch.int32), torch.zeros(4).bfloat16()
kernel[lambda meta: (triton.cdiv(40, meta["BLOCK"]),)](x, out, ids, total, 40, launch_pdl=True)
expected = [x.tanh(), x.round(), x.exp(), x.abs().square(), x.isnan().float()]
for found, right in zip(out, expected):
    assert torch.allclose(found, right, rtol=1e-6, equal_nan=True)
for found, given in zip(ids, (x, x.bfloat16())):
    assert found[:6].tolist() == [0, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 2]
    assert torch.equal(found[6:], given[6:].int())
sums = torch.zeros(4).bfloat16()
for one in range(40):
    sums[one % 4] += torch.tensor(one + 0.5).bfloat16()
assert torch.equal(total, sums)
"""

POINTERS = """
class Tensor:  # as OpenAI's kernels have one: a layer over a tensor, with what Triton asks of an argument
    def __init__(self, data):
        self.storage, self.dtype, self.shape = data, data.dtype, data.shape

    def data_ptr(self):
        return self.storage.data_ptr()

@triton.jit
def kernel(x_ptr, out_ptr, more_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at) + tl.load(more_ptr + at))

x, out = torch.randn(2 * N), torch.zeros(2, N, dtype=torch.bfloat16)
kernel[(1,)](Tensor(x[N:]), Tensor(out[1]), more_ptr=Tensor(at.float()), N=N)
assert torch.equal(out[1], (x[N:] + at).bfloat16()) and not out[0].any()
bits = torch.zeros(N, dtype=torch.int32)
kernel[(1,)](Tensor(x[N:]), triton.reinterpret(bits, tl.float32), x, N)  # what Triton itself wraps, as before
assert torch.equal(bits.view(torch.float32), x[N:] + x[:N])
"""


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "program", [WORDS, REDUCTIONS, LIBRARY, POINTERS], ids=["words", "reductions", "library", "pointers"]
)
def test_a_kernel_means_what_it_means_on_a_gpu(program, tmp_path):
    (tmp_path / "program.py").write_text(START + program)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, tmp_path / "program.py"], check=True, env=environment)


ROUTER = '''
import torch, triton, triton.language as tl

@triton.jit
def kernel(x_ptr, weights_ptr, ids_ptr, E, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * E + at, mask=at < E, other=float("-inf")).to(tl.float32)
    total = tl.sum(tl.exp(x - tl.max(x, 0)), 0)
    once = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [total], tl.float32, True, 1)
    tl.store(weights_ptr + row, once)
    tl.store(ids_ptr + row, tl.argmax(x, 0))

def router(logits, top_k):
    tokens, experts = logits.shape
    weights, ids = torch.empty(tokens, top_k), torch.empty(tokens, top_k, dtype=torch.int32)
    if tokens:
        kernel[(tokens,)](logits.contiguous(), weights, ids, experts, triton.next_power_of_2(experts))
    return weights, ids
'''


@pytest.mark.interpreter
def test_an_error_inside_a_kernel_is_told_as_it_is(tmp_path):
    source = ROUTER.replace("    once = tl.inline_asm", "    refuse(x)\n    once = tl.inline_asm")
    source = source.replace("def router", "@triton.jit\ndef refuse(x):\n    tl.reshape(x, (3, 5))\n\ndef router")
    (tmp_path / "router.py").write_text(source)
    target, runner = f"topk_softmax@{tmp_path / 'router.py'}:router", Runner("cpu")
    case = next(grid(get_space("topk_softmax"), runner.describe(target), "cpu", seed=5))
    [violation] = runner.run(case, target, RunOptions()).violations
    assert (violation.check, violation.symptom) == ("error", "ValueError")
    assert violation.message.count("Error") == 1
    assert violation.site.startswith("router.py:")
    assert violation.site.endswith(" in refuse")


@pytest.mark.interpreter
def test_what_the_interpreter_has_not_is_no_fault_of_the_kernel(tmp_path):
    (tmp_path / "router.py").write_text(ROUTER)
    target, runner = f"topk_softmax@{tmp_path / 'router.py'}:router", Runner("cpu")
    cases = grid(get_space("topk_softmax"), runner.describe(target), "cpu", seed=5)
    ran = [case for case, _ in zip(cases, range(8), strict=False)]
    verdicts = [runner.run(case, target, RunOptions()) for case in ran]
    assert {verdict.kind for verdict in verdicts} <= {PASS, REJECTED}  # a batch of no tokens launches nothing
    assert any("has not inline assembly" in verdict.detail for verdict in verdicts)
    tally = Tally()
    for verdict in verdicts:
        tally.count(target, verdict)
    told = target_row(tally.row(target, (), (), ""))
    assert "of them need inline assembly, which Triton's interpreter has not: they run on a GPU alone" in told
