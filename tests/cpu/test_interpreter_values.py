"""What Triton's interpreter gives in a worker is what a GPU gives."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice

import pytest

from moe_fuzz.execute.runner import Runner
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.strategies import grid
from moe_fuzz.verdict import PASS, REJECTED

START = """
import numpy, torch, triton, triton.language as tl
from triton.runtime import interpreter
from moe_fuzz.execute.interpreter import hasten
from moe_fuzz.execute.interpreter_values import correct
assert hasten() and correct() and correct()
torch.manual_seed(0)
N = 64
"""

CONVERSIONS = """
def same(found, expected):
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(found.signbit() & ~found.isnan(), expected.signbit() & ~expected.isnan())

types = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32,
         tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
any_bits = torch.randint(-2**31, 2**31, (1 << 16,), dtype=torch.int32)
short = torch.arange(1 << 16).to(torch.int16)
values = {tl.float32: torch.cat([any_bits, short.to(torch.int32) << 16, (short.to(torch.int32) << 16) + 0x8000,
                                 (short.to(torch.int32) << 16) + 0x8001]),  # ties, and a step beside
          tl.bfloat16: short, tl.float16: short, tl.float8e4nv: torch.arange(256).to(torch.uint8).to(torch.int8),
          tl.float8e5: torch.arange(256).to(torch.uint8).to(torch.int8)}
for source, of in types.items():
    for wanted, to in types.items():
        bits = values[source]
        value = bits.view(of).float()
        if wanted in (tl.float8e4nv, tl.float8e5):  # as cvt.satfinite
            value = value.clamp(-torch.finfo(to).max, torch.finfo(to).max)
        given = bits.numpy().view(interpreter._get_np_dtype(source))
        for shown in (given, given.reshape(2, -1).T, numpy.broadcast_to(given[:16], (3, 16))):
            found = interpreter._convert_float(shown, source, wanted, None)
            assert found.shape == shown.shape
        found = interpreter._convert_float(given, source, wanted, None).view(f"i{to.itemsize}")
        same(torch.from_numpy(found).view(to).float(), value.to(to).float())
cut = interpreter._convert_float(values[tl.float32].numpy().view("f4"), tl.float32, tl.bfloat16,
                                 interpreter._ir.ROUNDING_MODE.RTZ)
finite = values[tl.float32].view(torch.float32).isfinite()
assert torch.equal(torch.from_numpy(cut.astype("i4"))[finite], (values[tl.float32] >> 16 & 0xFFFF)[finite])
"""

ARITHMETIC = """
@triton.jit
def kernel(x_ptr, y_ptr, out_ptr, flags_ptr, dot_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, x + y)
    tl.store(out_ptr + N + at, x * y)
    tl.store(out_ptr + 2 * N + at, x - y)
    tl.store(out_ptr + 3 * N + at, tl.maximum(x, y))
    tl.store(out_ptr + 4 * N + at, -x)
    tl.store(out_ptr + 5 * N + at, tl.sum(x, 0))
    tl.store(out_ptr + 6 * N + at, tl.cumsum(x, 0))
    tl.store(out_ptr + 7 * N + at, at.to(tl.bfloat16))
    tl.store(out_ptr + 8 * N + at, tl.full((N,), 1.5, tl.bfloat16))
    tl.store(out_ptr + 9 * N + at, tl.fma(x, y, x))
    tl.store(out_ptr + 10 * N + at, tl.clamp(x, -0.5, 0.5))
    tl.store(flags_ptr + at, (x > y) | (x == 1.0))
    tl.store(flags_ptr + N + at, x.to(tl.int32))
    a, b = tl.reshape(x, (4, N // 4)), tl.reshape(y, (4, N // 4))
    where = tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(dot_ptr + where, tl.dot(a, tl.trans(b)))

x, y = (4 * torch.randn(N)).bfloat16(), torch.randn(N).bfloat16()
out, flags, dot = torch.zeros(11, N).bfloat16(), torch.zeros(2, N, dtype=torch.int32), torch.zeros(4, 4)
kernel[(1,)](x, y, out, flags, dot, N)
f, g = x.float(), y.float()
expected = [x + y, x * y, x - y, torch.maximum(x, y), -x, f.sum().bfloat16().expand(N), f.cumsum(0).bfloat16(),
            torch.arange(N).bfloat16(), torch.full((N,), 1.5).bfloat16(), (f * g + f).bfloat16(),
            f.clamp(-0.5, 0.5).bfloat16()]
for number, (found, right) in enumerate(zip(out, expected, strict=True)):
    assert torch.equal(found, right), number
assert torch.equal(flags[0].bool(), (x > y) | (x == 1)) and torch.equal(flags[1], x.to(torch.int32))
assert torch.allclose(dot, f.reshape(4, -1) @ g.reshape(4, -1).T, rtol=1e-5, atol=1e-5)
"""

NAN = """
@triton.jit
def kernel(x_ptr, out_ptr, ids_ptr, N: tl.constexpr, LEFT: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.maximum(x, 0.0))
    tl.store(out_ptr + N + at, tl.minimum(0.0, x))
    tl.store(out_ptr + 2 * N + at, tl.clamp(x, -1.0, 1.0))
    tl.store(out_ptr + 3 * N + at, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out_ptr + 4 * N + at, tl.max(x, 0))
    best = tl.argmax(x, 0, tie_break_left=LEFT)
    tl.store(ids_ptr, best)
    tl.store(ids_ptr + 1, tl.argmax(tl.where(at == best, float("-inf"), x), 0, tie_break_left=LEFT))
    rows = tl.reshape(x, (4, N // 4))
    tl.store(ids_ptr + 2 + tl.arange(0, 4), tl.argmin(rows, 1, tie_break_left=LEFT))
    value, index = tl.max(rows, 1, return_indices=True, return_indices_tie_break_left=LEFT, keep_dims=True)
    tl.store(ids_ptr + 6 + tl.arange(0, 4)[:, None], index)

for left in (True, False):
    for x in (torch.randn(N), torch.randn(N).where(torch.arange(N) % 5 > 0, torch.nan), torch.full((N,), torch.nan)):
        out, ids = torch.zeros(5, N), torch.zeros(10, dtype=torch.int32)
        kernel[(1,)](x, out, ids, N, left)
        nan = x.isnan()
        assert torch.equal(out[0], x.clamp(min=0).where(~nan, 0)) and torch.equal(out[1], x.clamp(max=0).where(~nan, 0))
        assert torch.equal(out[2], x.clamp(-1, 1).where(~nan, -1))
        assert torch.equal(out[3].isnan(), nan)
        assert torch.equal(out[4][0].nan_to_num(), x[~nan].max() if not nan.all() else torch.tensor(0.0))
        assert ((ids >= 0) & (ids < N)).all()
        if not nan.any():
            rows = x.reshape(4, -1)
            assert ids[0] == x.argmax() and ids[1] == x.topk(2).indices[1]
            assert ids[2:6].tolist() == rows.argmin(1).tolist() and ids[6:].tolist() == rows.argmax(1).tolist()
        if nan.all():  # the trap that routers fall into: what was taken is taken again
            assert ids[0] == ids[1]
"""

BITS_OF_NAN = """
@triton.jit
def kernel(x_ptr, out_ptr, N: tl.constexpr, BIAS: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    bits = x.to(tl.int32, bitcast=True)
    tl.store(out_ptr + at, bits)  # what was only moved, and what was picked
    tl.store(out_ptr + N + at, tl.where(at < N, x, 0.0).to(tl.int32, bitcast=True))
    tl.store(out_ptr + 2 * N + at, (x + BIAS).to(tl.int32, bitcast=True))
    tl.store(out_ptr + 3 * N + at, tl.sigmoid(x).to(tl.int32, bitcast=True))
    tl.store(out_ptr + 4 * N + at, (x - x).to(tl.int32, bitcast=True))
    tl.store(out_ptr + 5 * N + at, tl.fma(x, 0.0, x).to(tl.int32, bitcast=True))
    tl.store(out_ptr + 6 * N + at, tl.sqrt(x).to(tl.int32, bitcast=True))
    tl.store(out_ptr + 7 * N + at, tl.cumsum(x, 0).to(tl.int32, bitcast=True))
    tl.store(out_ptr + 8 * N + at, (tl.zeros((N,), tl.float32) + tl.sum(x, 0)).to(tl.int32, bitcast=True))

given = torch.tensor([-1, -4194304, 0x7FC00001, 0x7F800000, -8388608, 0x3F800000, 0, -2**31], dtype=torch.int32)
x, out = given.view(torch.float32), torch.zeros(9, 8, dtype=torch.int32)
kernel[(1,)](x, out, 8, 0.0)
assert torch.equal(out[0], given) and torch.equal(out[1], given)
for number, found in enumerate(out[2:], 2):
    nan = found.view(torch.float32).isnan()
    assert nan[:3].all() and (found[nan] == 0x7FFFFFFF).all(), (number, found)
assert out[2][3:].view(torch.float32).tolist() == (x[3:] + 0.0).tolist()
"""


@pytest.mark.interpreter
@pytest.mark.parametrize("program", [CONVERSIONS, ARITHMETIC, NAN, BITS_OF_NAN],
                         ids=["conversions", "bfloat16", "nan", "bits_of_nan"])  # fmt: skip
def test_it_gives_what_a_gpu_gives(program, tmp_path):
    (tmp_path / "program.py").write_text(START + program)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, tmp_path / "program.py"], check=True, env=environment)


#: As people write it: products of bfloat16 by `tl.dot`, stores that convert, and not a word of the interpreter.
EXPERTS = '''
import torch, triton, triton.language as tl
from moe_fuzz import Capabilities, Contract, declares

@triton.jit
def product(x_ptr, w_ptr, out_ptr, ids_ptr, weights_ptr, K, N, top_k, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
            WEIGHTED: tl.constexpr):
    slot = tl.program_id(0)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    row, n, k = slot // top_k, tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0)
    inside = (n[:, None] < N) & (k[None, :] < K)
    w = tl.load(w_ptr + expert * N * K + n[:, None] * K + k[None, :], mask=inside, other=0.0)
    y = tl.dot(tl.broadcast_to(x[None, :], (16, BLOCK_K)), tl.trans(w))
    y = tl.sum(tl.where(tl.arange(0, 16)[:, None] == 0, y, 0.0), 0)
    if WEIGHTED:
        y *= tl.load(weights_ptr + slot)
    tl.store(out_ptr + slot * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)

@declares(Contract(gate_up="dtype"), Capabilities(dtypes=("bfloat16", "float16"), activations=("silu",), strided=False,
          gate_layouts=("first",), biases=False, expert_map=False, weight_on_input=False))
def experts(x, w13, w2, weights, ids):
    (tokens, hidden), slots, inter = x.shape, ids.numel(), w2.shape[2]
    gate_up, down = x.new_empty(slots, 2 * inter), x.new_empty(slots, hidden)
    if slots == 0:
        return torch.zeros_like(x)
    up = triton.next_power_of_2
    product[(slots,)](x, w13, gate_up, ids, weights, hidden, 2 * inter, ids.shape[1], up(hidden), up(2 * inter), False)
    gate, value = gate_up.float().chunk(2, 1)
    inner = (torch.nn.functional.silu(gate) * value).to(x.dtype)
    product[(slots,)](inner, w2, down, ids, weights, inter, hidden, 1, up(inter), up(hidden), True)
    return down.view(tokens, -1, hidden).float().sum(1).to(x.dtype)
'''


@pytest.mark.interpreter
def test_a_kernel_that_multiplies_bfloat16_is_right(tmp_path):
    (tmp_path / "experts.py").write_text(EXPERTS)
    target, runner = f"experts_bf16@{tmp_path / 'experts.py'}:experts", Runner("cpu")
    info, space = runner.describe(target), get_space("experts_bf16")
    cases = (case for case in grid(space, info, "cpu", seed=5) if case.config["dtype"] == "bfloat16"
             and len(case.steps) == 1 and case.steps[0].tokens * int(case.config["top_k"]) <= 8)  # fmt: skip
    verdicts = [runner.run(case, target, RunOptions()) for case in islice(cases, 12)]
    assert [verdict for verdict in verdicts if verdict.kind not in (PASS, REJECTED)] == []
    assert sum(verdict.kind == PASS for verdict in verdicts) >= 8
