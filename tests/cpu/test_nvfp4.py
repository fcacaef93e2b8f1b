"""`nvfp4_quantize`: the reference against the format's own numbers, the Triton kernel against the reference, bit for
bit, in the interpreter."""

from __future__ import annotations

import math
import os
from fractions import Fraction

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import itertools

import pytest
import torch

from moe_fuzz.kernels.nvfp4 import nvfp4_quantize
from moe_fuzz.reference import nvfp4
from moe_fuzz.reference.nvfp4 import E2M1, E4M3, dequantize, nearest, pack, swizzle, unpack, unswizzle
from moe_fuzz.reference.nvfp4 import nvfp4_quantize as reference

# numpy mentions the NaN and the infinity that some tests are about
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAN, INF = math.nan, math.inf
BOTH = pytest.mark.parametrize(
    "quantize", [pytest.param(nvfp4_quantize, marks=pytest.mark.interpreter), reference], ids=["kernel", "reference"]
)
LAYOUTS = pytest.mark.parametrize("layout", ["linear", "swizzled"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def scale_of(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def data(rows, columns, dtype=torch.float32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bytes_of(result):
    codes, scales = result
    assert codes.dtype == torch.uint8
    assert scales.dtype == torch.float8_e4m3fn
    return unpack(codes), scales.view(torch.uint8)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(bytes_of(one), bytes_of(other), strict=True))


def row(*values):
    """[1, 16]"""
    return torch.tensor([[*values, *[0.0] * (16 - len(values))]])


# ---- the format -----------------------------------------------------------------------------------------------------


def test_the_sixteen_codes():
    codes = torch.arange(16, dtype=torch.uint8)[None]
    value = dequantize(pack(codes), torch.tensor([[0x38]], dtype=torch.uint8), scale_of(1.0))[0]
    assert value.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert value.signbit().tolist() == [False] * 8 + [True] * 8


def test_all_256_scale_bytes():
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    ones = pack(torch.full((256, 16), 2, dtype=torch.uint8))
    got = dequantize(ones, scales, scale_of(1.0))[:, 0]
    expected = scales.view(torch.float8_e4m3fn)[:, 0].float()
    assert torch.equal(got.isnan(), expected.isnan())
    assert got[~got.isnan()].tolist() == expected[~expected.isnan()].tolist()
    assert got.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert (E4M3[126], E4M3[8], E4M3[1]) == (448, 2**-6, 2**-9)


def test_every_product_of_a_code_and_a_scale_is_exact_in_bfloat16_and_float16():
    products = (E2M1[:, None] * E4M3[None, :]).unique()
    assert torch.equal(products.bfloat16().float(), products)
    assert torch.equal(products.half().float(), products)


@pytest.mark.parametrize("table", [E2M1, E4M3], ids=["E2M1", "E4M3"])
def test_nearest_of_every_tie_and_of_its_neighbours(table):
    """By fractions, which have no rounding."""
    exact = [Fraction(float(v)) for v in table]
    for at, (low, high) in enumerate(itertools.pairwise(exact)):
        middle = torch.tensor([float((low + high) / 2)])
        assert Fraction(float(middle)) == (low + high) / 2
        assert int(nearest(middle, table)) == at + at % 2
        assert int(nearest(torch.nextafter(middle, scale_of(0.0)), table)) == at
        assert int(nearest(torch.nextafter(middle, scale_of(INF)), table)) == at + 1
    assert nearest(table, table).tolist() == list(range(len(table)))


def test_the_first_of_two_codes_lies_in_the_low_nibble():
    codes, _ = reference(row(1.0, 6.0), scale_of(1.0))
    assert int(codes[0, 0]) == 0x72
    assert torch.equal(pack(unpack(codes)), codes)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (127, 4), (128, 4), (129, 7), (300, 12)])
def test_swizzle_puts_each_byte_where_the_formula_says(rows, columns):
    scales = torch.arange(rows * columns).remainder(120).add(1).to(torch.uint8).view(rows, columns)
    table = swizzle(scales)
    assert table.shape == (-(-rows // 128) * 128, -(-columns // 4) * 4)
    tiles, flat = table.shape[1] // 4, table.flatten()
    for m in range(0, rows, 13):
        for k in range(columns):
            place = ((m // 128 * tiles + k // 4) * 32 + m % 32) * 16 + m // 32 % 4 * 4 + k % 4
            assert flat[place] == scales[m, k]
    assert torch.equal(unswizzle(table, rows, columns), scales)
    assert int((table != 0).sum()) == rows * columns


# ---- quantizing -----------------------------------------------------------------------------------------------------


@BOTH
def test_every_tie_of_a_code(quantize):
    """A scale of 1, so that codes are those of the values themselves."""
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    x = row(6.0, *ties, *[-t for t in ties], -0.0)
    codes, scales = bytes_of(quantize(x, scale_of(1.0)))
    assert scales.tolist() == [[0x38]]
    even = [0, 2, 2, 4, 4, 6, 6]
    assert codes[0].tolist() == [7, *even, *[8 + c for c in even], 8]
    up = torch.nextafter(x, torch.full_like(x, INF))
    up[0, 0] = 6.0
    assert bytes_of(quantize(up, scale_of(1.0)))[0][0, 1:8].tolist() == [1, 2, 3, 4, 5, 6, 7]
    down = torch.nextafter(x, torch.full_like(x, -INF))
    down[0, 0] = 6.0
    assert bytes_of(quantize(down, scale_of(1.0)))[0][0, 1:8].tolist() == [0, 1, 2, 3, 4, 5, 6]


@BOTH
def test_every_tie_of_a_scale(quantize):
    """A global scale of 6, under which the scale is that of the block's maximum itself: all 126 ties, and beside."""
    middle = (E4M3[1:] + E4M3[:-1]) / 2
    below, above = torch.nextafter(middle, scale_of(0.0)), torch.nextafter(middle, scale_of(INF))
    x = torch.zeros(3 * 126, 16)
    x[:, 5] = -torch.cat([middle, below, above])
    _, scales = bytes_of(quantize(x, scale_of(6.0)))
    lower = torch.arange(126)
    assert scales[:126, 0].tolist() == (lower + lower % 2).tolist()
    assert scales[126:252, 0].tolist() == lower.tolist()
    assert scales[252:, 0].tolist() == (lower + 1).tolist()


@BOTH
def test_a_scale_that_only_exact_division_rounds_to_even(quantize):
    """With global_scale * (1/6) in place of global_scale / 6 one of these comes out a step off."""
    found = 0
    for number in range(1, 400):
        scale = scale_of(float(number))
        if scale / 6 == scale * scale_of(1 / 6):
            continue
        step, middle = scale / 6, (E4M3[1:] + E4M3[:-1]) / 2
        amax = middle / step
        tie = (amax * step == middle) & (amax * (scale * scale_of(1 / 6)) != middle)
        found += int(tie.any())
        if tie.any():
            x = torch.zeros(int(tie.sum()), 16)
            x[:, 0] = amax[tie]
            at = tie.nonzero().flatten()
            assert bytes_of(quantize(x, scale))[1][:, 0].tolist() == (at + at % 2).tolist()
        if found >= 3:
            return
    assert found


@BOTH
@LAYOUTS
@DTYPES
def test_the_grid_comes_back_exactly(quantize, layout, dtype):
    """Values of E2M1 times a power of two, 6 among them in each block: nothing is lost."""
    choose = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (37, 6, 16), generator=choose)
    codes[:, :, 3] = 7
    value = E2M1[codes % 8] * torch.where(codes < 8, 1.0, -1.0)
    x = (value * 2.0 ** torch.randint(-6, 6, (37, 6, 1), generator=choose)).view(37, 96).to(dtype)
    packed, scales = quantize(x, scale_of(1.0), layout)
    linear = unswizzle(scales, 37, 6) if layout == "swizzled" else scales
    assert torch.equal(dequantize(packed, linear, scale_of(1.0)), x.float())


@BOTH
def test_blocks_without_a_number_worth_keeping(quantize):
    x = torch.zeros(6, 32)
    x[:, 16:] = 1.0
    x[1, :16] = 1e-30
    x[2, :16] = 1e30
    x[3, :3] = torch.tensor([NAN, -NAN, 3.0])
    x[4, :3] = torch.tensor([INF, -INF, 3.0])
    x[5, :16] = NAN
    x[0, 2] = -0.0
    codes, scales = bytes_of(quantize(x, scale_of(2.0)))
    assert scales[:, 0].tolist() == [0, 0, 126, 0x38, 126, 0]
    assert scales[:, 1].unique().numel() == 1
    assert codes[0, :16].tolist() == codes[1, :16].tolist() == codes[5, :16].tolist() == [0] * 16
    assert codes[2, :16].tolist() == [7] * 16
    assert codes[3, :4].tolist() == [0, 0, 7, 0]
    assert codes[4, :4].tolist() == [7, 15, 0, 0]
    assert torch.equal(codes[:, 16:], codes[:1, 16:].expand(6, 16))


@BOTH
@LAYOUTS
@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, INF, -INF, NAN, 1e-40])
def test_a_global_scale_without_sense_stores_nothing(quantize, layout, scale):
    codes, scales = bytes_of(quantize(data(3, 32), scale_of(scale), layout))
    assert not codes.any()
    assert not scales.any()


@BOTH
def test_calibration_on_smaller_data_saturates(quantize):
    x = data(4, 64) * 100
    codes, scales = bytes_of(quantize(x, 448 * 6 / (x.abs().amax() / 100)[None]))
    assert scales.unique().tolist() == [126]
    assert (codes % 8).max() == 7
    assert torch.equal(codes >= 8, x.signbit())


@BOTH
def test_a_bfloat16_global_scale_is_its_value(quantize):
    x, scale = data(5, 48), scale_of(37.25, dtype=torch.bfloat16)
    assert same(quantize(x, scale), reference(x, scale.float()))


@BOTH
@LAYOUTS
def test_a_global_scale_for_each_expert(quantize, layout):
    x, scales = data(41, 48), torch.tensor([1.0, 100.0, 0.0, 7.0, 30.0])
    ids = torch.arange(41).remainder(8) - 1  # -1 to 6: three of no expert
    packed, table = quantize(x, scales, layout, expert_ids=ids.int())
    codes, linear = bytes_of((packed, unswizzle(table, 41, 3) if layout == "swizzled" else table))
    for expert in range(-1, 7):
        rows = (ids == expert).nonzero().flatten()
        if 0 <= expert < 5 and scales[expert] > 0:
            alone = bytes_of(reference(x[rows], scales[expert : expert + 1]))
            assert torch.equal(codes[rows], alone[0])
            assert torch.equal(linear[rows], alone[1])
        else:
            assert not codes[rows].any()
            assert not linear[rows].any()
    assert same(quantize(x, scales, layout, expert_ids=ids), (packed, table))  # int64


@pytest.mark.interpreter
@LAYOUTS
@DTYPES
@pytest.mark.parametrize(("rows", "columns"), [(0, 64), (1, 16), (3, 48), (127, 80), (128, 64), (129, 208), (300, 16)])
@pytest.mark.parametrize("scale", [1.0, 37.3, 2.0**-120, 2.0**127, 448 * 6 / 4])
def test_the_kernel_is_the_reference(rows, columns, dtype, layout, scale):
    x = data(rows, columns, dtype)
    x *= torch.randint(-20, 8, (rows, 1), generator=torch.Generator().manual_seed(1)).float().exp2().to(dtype)
    if rows > 2:
        x[0, 3], x[1, 5], x[2, :16] = NAN, INF, 0.0
    assert same(nvfp4_quantize(x, scale_of(scale), layout), reference(x, scale_of(scale), layout))


@pytest.mark.interpreter
@LAYOUTS
def test_the_kernel_writes_every_byte_and_takes_any_strides(layout):
    wide = data(70, 200)
    for x in (wide[:, 3:83], data(80, 70, seed=2).T, wide[::3, :64]):
        expected = reference(x.contiguous(), scale_of(50.0), layout)
        out = tuple(torch.full_like(part.view(torch.uint8), 0xA5) for part in expected)
        given = out[0], out[1].view(torch.float8_e4m3fn)
        assert nvfp4_quantize(x, scale_of(50.0), layout, out=given) is given
        assert same(given, expected)


@pytest.mark.interpreter
@DTYPES
@LAYOUTS
def test_fused_with_silu_exactly_where_silu_is_exact(dtype, layout):
    """silu(32) is 32 in float32; the products are rounded to the dtype, ties among them."""
    gate, up = torch.full((33, 96), 32.0), data(33, 96, dtype, seed=5).float() * 1.0001
    x = torch.cat([gate, up], dim=1).to(dtype)
    rounded = (32 * x[:, 96:].float()).to(dtype)
    got = nvfp4_quantize(x, scale_of(11.0), layout, activation="silu")
    assert same(got, reference(rounded, scale_of(11.0), layout))
    assert same(got, reference(x, scale_of(11.0), layout, activation="silu"))


@pytest.mark.interpreter
@DTYPES
def test_fused_with_silu_within_a_step_anywhere(dtype):
    x = data(200, 128, dtype, seed=6) * 4
    x[0, 3], x[1, 70], x[2, 5] = NAN, NAN, -200.0
    codes, scales = bytes_of(nvfp4_quantize(x, scale_of(11.0), activation="silu"))
    other, others = bytes_of(reference(x, scale_of(11.0), activation="silu"))
    assert (scales.int() - others.int()).abs().max() <= 1
    level = [torch.where(c < 8, c.int(), 8 - c.int()) for c in (codes, other)]
    assert (level[0] - level[1]).abs().max() <= 1
    assert (codes != other).float().mean() < 0.002


@BOTH
@pytest.mark.parametrize(("change", "words"), [
    ({"x": torch.zeros(2, 24)}, "multiple of 16"), ({"x": torch.zeros(2, 0)}, "multiple of 16"),
    ({"x": torch.zeros(16)}, "x must be"), ({"x": torch.zeros(2, 16, dtype=torch.float64)}, "x must be"),
    ({"global_scale": torch.tensor(1.0)}, "global_scale must be"),
    ({"global_scale": torch.ones(1, dtype=torch.float16)}, "global_scale must be"),
    ({"global_scale": torch.ones(2)}, "need expert_ids"), ({"layout": "tiled"}, "layout must be"),
    ({"expert_ids": torch.zeros(3, dtype=torch.int32)}, "expert_ids must be"),
    ({"expert_ids": torch.zeros(2)}, "expert_ids must be"), ({"activation": "gelu"}, "activation must be"),
    ({"out": (torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8))}, "out"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(quantize, change, words):
    arguments = {"x": torch.zeros(2, 16), "global_scale": torch.ones(1), **change}
    words = words.replace("multiple of 16", "multiple of (16|32)")
    with pytest.raises(ValueError, match=words):
        quantize(arguments.pop("x"), arguments.pop("global_scale"), **arguments)


def test_the_reference_has_no_triton():
    assert "triton" not in vars(nvfp4)
