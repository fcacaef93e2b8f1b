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
from moe_fuzz.execute.interpreter_language import complete
from moe_fuzz.execute.interpreter_nan import pick
from moe_fuzz.execute.interpreter_values import correct
assert hasten() and correct() and pick() and complete() and correct() and pick()
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

#: What an H200 gives (Triton 3.6).
CONVERTED_NAN = """
from triton.language.extra import libdevice

@triton.jit
def kernel(x_ptr, out_ptr, wide_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty))
    tl.store(wide_ptr + at, x)

bits = {torch.float32: (torch.int32, [0x7FC00000, 0x7F800001, -1]), torch.float16: (torch.int16, [0x7E00, 0x7C01, -1]),
        torch.bfloat16: (torch.int16, [0x7FC0, 0x7F81, -1]), torch.float8_e4m3fn: (torch.int8, [0x7F, -1]),
        torch.float8_e5m2: (torch.int8, [0x7D, 0x7F, -1])}
for source, (kind, given) in bits.items():
    x = torch.tensor((given * 8)[:8], dtype=kind).view(source)
    for wanted, (to, _) in bits.items():
        if source == wanted or (source, wanted) == (torch.bfloat16, torch.float32):
            continue  # moved, or widened by its bits
        if source.itemsize == wanted.itemsize == 1 or (source, wanted) == (torch.float8_e5m2, torch.bfloat16):
            continue  # does not compile; is a number there
        out, stored = torch.zeros(8, dtype=wanted), torch.zeros(8, dtype=wanted)
        kernel[(1,)](x, out, stored, 8)
        most = torch.iinfo(to).max  # all bits but the sign
        assert (out.view(to) == most).all() and (stored.view(to) == most).all(), (source, wanted, out.view(to))
wide = torch.zeros(8)
x = torch.tensor([-1, 0x7F81] * 4, dtype=torch.int16).view(torch.bfloat16)
kernel[(1,)](x, wide, torch.zeros(8), 8)
assert wide.view(torch.int32).tolist() == [-65536, 0x7F810000] * 4

@triton.jit
def functions(x_ptr, out_ptr):
    at = tl.arange(0, 2)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.rsqrt(x))
    tl.store(out_ptr + 2 + at, tl.erf(x))
    tl.store(out_ptr + 4 + at, libdevice.rint(libdevice.sqrt(x)))
    tl.store(out_ptr + 6 + at, libdevice.abs(x))

out = torch.zeros(8)
functions[(1,)](torch.tensor([-1, -0x400000], dtype=torch.int32).view(torch.float32), out)
assert out.view(torch.int32).tolist() == [0x7FFFFFFF] * 6 + [0x7FFFFFFF, 0x7FC00000]  # the last two lose a sign alone
"""

INTEGERS = """
@triton.jit
def kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, tl.sum(x, 0))
    rows = tl.reshape(x, (2, N // 2))
    tl.store(out_ptr + N + at, tl.sum(rows))
    tl.store(out_ptr + 2 * N + at, tl.cumsum(x, 0))
    tl.store(out_ptr + 3 * N + at, tl.umulhi(x, y))
    tl.store(out_ptr + 4 * N + at, tl.umulhi(x, y) > 0)
    tl.store(out_ptr + 5 * N + at, tl.sum(tl.sum(rows, 1), 0))

for dtype in (torch.int32, torch.int64):
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    x = torch.tensor([-1, least, -7, most, -3, most, 5, 9], dtype=dtype)
    y = torch.tensor([3, 7, -3, 2, -2, most, 9, least], dtype=dtype)
    out = torch.zeros(6, 8, dtype=dtype)
    kernel[(1,)](x, y, out, 8)
    size = 1 << 8 * dtype.itemsize
    signed = lambda number: (number % size + size // 2) % size - size // 2
    total = signed(sum(x.tolist()))
    assert sum(x.tolist()) > most
    assert all((out[row] == total).all() for row in (0, 1, 5))
    assert out[2].tolist() == [signed(sum(x[: end + 1].tolist())) for end in range(8)]
    right = [signed((a % size) * (b % size) // size) for a, b in zip(x.tolist(), y.tolist())]
    assert out[3].tolist() == right and out[4].tolist() == [one > 0 for one in right]
    assert right[:3] == [2, 3, signed(size - 10)]  # the first two as an H200 has them
"""

FMA = """
from fractions import Fraction
from triton.language.extra import libdevice

@triton.jit
def kernel(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.fma(tl.load(x_ptr + at), tl.load(y_ptr + at), tl.load(z_ptr + at)))

def once(x, dtype):  # of a fraction: the nearest there is, ties to even
    near = torch.tensor(float(x), dtype=torch.float64).to(dtype)
    ways = [near, *(torch.nextafter(near, torch.tensor(side, dtype=dtype)) for side in (-torch.inf, torch.inf))]
    odd = lambda one: one.view(torch.int16 if dtype.itemsize == 2 else torch.int32).item() & 1
    return min(ways, key=lambda one: (abs(Fraction(one.item()) - x), odd(one))).item()

ties = {torch.float32: (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60), torch.float16: (1 + 2.0**-5, 1 + 2.0**-6, 2.0**-24),
        torch.bfloat16: (1 + 2.0**-4, 1 + 2.0**-4, 2.0**-60)}  # products halfway, and less than float64 has room for
for dtype, (a, b, tiny) in ties.items():
    x, y = torch.randn(N).to(dtype), torch.randn(N).to(dtype)
    z = -x * y  # what is left is what the product is rounded by
    z[32:] += torch.randn(32).to(dtype) * 1e-3
    x[:8] = torch.tensor([a, -a, a, a, torch.inf, torch.nan, 1e-3, 3.0]).to(dtype)
    y[:8] = torch.tensor([b, b, b, b, 1.0, 1.0, 1e-3, torch.inf]).to(dtype)
    z[:8] = torch.tensor([tiny, -tiny, -tiny, 0.0, -torch.inf, 1.0, 1e-3, 1.0]).to(dtype)
    out = torch.zeros(N).to(dtype)
    kernel[(1,)](x, y, z, out, N)
    for number, (a, b, c, found) in enumerate(zip(x.tolist(), y.tolist(), z.tolist(), out.tolist())):
        if number not in (4, 5, 7):
            assert found == once(Fraction(a) * Fraction(b) + Fraction(c), dtype), (dtype, a, b, c, found)
    assert out[4].isnan() and out[5].isnan() and out[7] == torch.inf
    assert (out[4:6].view(torch.int16 if dtype.itemsize == 2 else torch.int32).bitwise_not() << 1 == 0).all()

@triton.jit
def of_libdevice(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, libdevice.fma(tl.load(x_ptr + at), tl.load(y_ptr + at), tl.load(z_ptr + at)))

x, y, z = (torch.full((N,), one) for one in ties[torch.float32])
of_libdevice[(1,)](x, y, z, out := torch.zeros(N), N)
assert (out == 1 + 2.0**-11 + 2.0**-23).all()
"""

TF32 = """
import os
@triton.jit
def kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr, WAY: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j)
    if WAY == "default":
        y = tl.dot(a, b)
    elif WAY == "allow_tf32":
        y = tl.dot(a, b, allow_tf32=True)
    elif WAY == "forbidden":
        y = tl.dot(a, b, allow_tf32=False)
    else:
        y = tl.dot(a, b, input_precision=WAY)
    tl.store(out_ptr + i * N + j, y)

def product(a, b, way):
    out = torch.zeros(16, 16)
    kernel[(1,)](a, b, out, 16, way)
    return out

generator = torch.Generator().manual_seed(16)
a, b = (torch.randn(256, generator=generator) for _ in range(2))
a, b = a.reshape(16, 16), b.reshape(16, 16).T.contiguous()
in_tf32 = torch.tensor([  # the first row, of an H200
    3.22282362, -1.49366999, -5.20650911, 9.37884331, 2.48218727, -2.63909411, -4.62842941, -2.78704381, 0.212554455,
    5.1453371, 4.05640459, -2.77184439, -2.77806044, -6.40171099, -4.35482454, -0.560889184])
for way in ("default", "allow_tf32", "tf32"):
    assert torch.allclose(product(a, b, way)[0], in_tf32, rtol=0, atol=2e-6), way
for way in ("forbidden", "ieee", "tf32x3"):
    assert torch.allclose(product(a, b, way), a @ b, rtol=0, atol=2e-6), way
os.environ["TRITON_F32_DEFAULT"] = "ieee"
assert torch.equal(product(a, b, "default"), product(a, b, "ieee"))
del os.environ["TRITON_F32_DEFAULT"]
for dtype in (torch.bfloat16, torch.float16):  # these lose nothing, neither as they are nor widened
    short = a.to(dtype), b.to(dtype)
    right = product(*(one.float() for one in short), "ieee")
    assert torch.equal(product(*(one.float() for one in short), "tf32"), right)
    assert torch.equal(product(*short, "tf32"), right)
a[0, 0], a[1, 0] = torch.inf, torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
found = product(a, b.abs(), "tf32")
assert (found[0] == torch.inf).all() and found[1].isnan().all() and found[2:].isfinite().all()
"""

TRUTH = """
@triton.jit
def kernel(limit_ptr, x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    limit, x = tl.load(limit_ptr), tl.load(x_ptr + at)
    alone, each = limit >= 1, x > limit  # a scalar's, and a block's
    tl.store(out_ptr + at, (alone & each).to(tl.int32))
    tl.store(out_ptr + N + at, tl.where(~(alone & (at < 8)), 1, 0))
    tl.store(out_ptr + 2 * N + at, tl.where((limit != limit) | each, 1, 0))
    tl.store(out_ptr + 3 * N + at, (alone ^ each).to(x.dtype).to(tl.int32))
    tl.store(out_ptr + 4 * N + at, tl.sum((alone & each).to(tl.int32), 0))
    tl.store(out_ptr + 5 * N + at, 5, mask=alone & (at % 2 == 0))

at = torch.arange(N)
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8):
    for limit in (0, 3):
        alone, each = torch.tensor(limit >= 1), at > limit
        out = torch.zeros(6, N, dtype=torch.int32)
        kernel[(1,)](torch.tensor([limit]).to(dtype), at.to(dtype), out, N)
        expected = (alone & each, ~(alone & (at < 8)), each, alone ^ each, (alone & each).sum().expand(N),
                    5 * (alone & (at % 2 == 0)))
        for found, right in zip(out, expected):
            assert torch.equal(found, right.int()), (dtype, limit, found, right)
"""


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "program", [CONVERSIONS, ARITHMETIC, NAN, BITS_OF_NAN, CONVERTED_NAN, INTEGERS, FMA, TF32, TRUTH],
    ids=["conversions", "bfloat16", "nan", "bits_of_nan", "converted_nan", "integers", "fma", "tf32", "truth"],
)  # fmt: skip
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
