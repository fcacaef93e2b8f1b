"""NVFP4 beside the libraries that people check it with: where they agree to the bit, and where not. docs/numerics.md
names the differences that are asserted here."""

from __future__ import annotations

import numpy
import pytest
import torch

from moe_fuzz.reference.nvfp4 import E2M1, E4M3, codes_of, dequantize, nearest, nvfp4_quantize, pack, row_scale, unpack

_REASON = "the extra `test` has it: pip install 'moe-fuzz[test]'"


@pytest.fixture(scope="module")
def ml_dtypes():
    return pytest.importorskip("ml_dtypes", reason=_REASON)


@pytest.fixture(scope="module")
def compressed_tensors():
    return pytest.importorskip("compressed_tensors.quantization", reason=_REASON, exc_type=ImportError)


def around(table):
    """What is in the table, each middle, and the float32 before and after each of them."""
    points = torch.cat([table, (table[1:] + table[:-1]) / 2])
    return torch.cat([points, torch.nextafter(points, points - 1), torch.nextafter(points, points + 1)]).clamp(min=0)


def test_the_tables_are_those_of_ml_dtypes(ml_dtypes):
    codes, scales = numpy.arange(16, dtype=numpy.uint8), numpy.arange(127, dtype=numpy.uint8)
    assert codes.view(ml_dtypes.float4_e2m1fn).astype(numpy.float32)[:8].tolist() == E2M1.tolist()
    assert codes.view(ml_dtypes.float4_e2m1fn).astype(numpy.float32)[9:].tolist() == (-E2M1[1:]).tolist()
    assert scales.view(ml_dtypes.float8_e4m3fn).astype(numpy.float32).tolist() == E4M3.tolist()


def test_rounding_is_that_of_ml_dtypes_up_to_the_largest(ml_dtypes):
    for table, dtype in ((E2M1, ml_dtypes.float4_e2m1fn), (E4M3, ml_dtypes.float8_e4m3fn)):
        values = around(table).clamp(max=float(table[-1]))
        theirs = values.numpy().astype(dtype).view(numpy.uint8)
        assert nearest(values, table).tolist() == theirs.tolist()


def test_beyond_the_largest_ml_dtypes_gives_nan_where_we_saturate(ml_dtypes):
    assert numpy.array([480.0], numpy.float32).astype(ml_dtypes.float8_e4m3fn).view(numpy.uint8).tolist() == [0x7F]
    x = torch.full((1, 16), 480.0)
    assert nvfp4_quantize(x, torch.tensor([6.0]))[1].view(torch.uint8).tolist() == [[0x7E]]
    nan = numpy.array([numpy.nan], numpy.float32).astype(ml_dtypes.float4_e2m1fn)
    assert nan.view(numpy.uint8).tolist() == [8]  # -0; our code is 0


def test_rounding_to_e4m3_is_that_of_torch_up_to_448():
    values = around(E4M3).clamp(max=448.0)
    assert nearest(values, E4M3).tolist() == values.to(torch.float8_e4m3fn).view(torch.uint8).tolist()


def theirs(module, x, scale):
    """The scales and values of compressed-tensors for one row of blocks: float32 [B], [B, 16]."""
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA, QuantizationArgs
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True,
                            scale_dtype=torch.float8_e4m3fn)  # fmt: skip
    blocks = x.view(-1, 16)
    scales, _ = calculate_qparams(blocks.amin(1), blocks.amax(1), args, global_scale=scale)
    scaled = blocks / (scales.float() / scale)[:, None]
    return scales, FP4_E2M1_DATA.cast_to_fp4(scaled.clamp(-6, 6))


def test_compressed_tensors_gives_the_same_on_random_data_but_for_neighbours(compressed_tensors):
    """It computes global_scale * (amax / 6) where we compute amax * (global_scale / 6), and divides by the scale where
    we multiply by its inverse."""
    x = torch.randn(1, 16 * 20000, generator=torch.Generator().manual_seed(0))
    scale = 448 * 6 / x.abs().amax()[None]
    scales, values = theirs(compressed_tensors, x, scale)
    codes, ours = nvfp4_quantize(x, scale)
    steps = (ours.view(torch.uint8)[0].int() - scales.to(torch.float8_e4m3fn).view(torch.uint8).int()).abs()
    assert steps.max() <= 1
    assert (steps != 0).float().mean() < 1e-3
    got = unpack(codes).view(-1, 16)
    value = E2M1[got.long() % 8] * torch.where(got < 8, 1.0, -1.0)
    differ = (value != values)[steps == 0].float().mean()
    assert differ < 2e-3


def test_compressed_tensors_has_another_scale_where_ours_is_zero(compressed_tensors):
    x = torch.tensor([[0.0] * 16 + [1e-9] * 16])
    scales, values = theirs(compressed_tensors, x, torch.tensor([1.0]))
    assert scales.float().tolist() == [0.125, 0.125]
    assert not values.any()
    codes, ours = nvfp4_quantize(x, torch.tensor([1.0]))
    assert not codes.any()
    assert not ours.view(torch.uint8).any()


def test_compressed_tensors_loses_the_sign_of_a_zero(compressed_tensors):
    x = torch.tensor([[6.0, -0.0, -0.1] + [0.0] * 13])
    _, values = theirs(compressed_tensors, x, torch.tensor([1.0]))
    assert values[0, :3].signbit().tolist() == [False, False, True]
    assert unpack(nvfp4_quantize(x, torch.tensor([1.0]))[0])[0, :3].tolist() == [7, 8, 8]


def test_packing_is_that_of_compressed_tensors(compressed_tensors):
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8

    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 2)
    value = E2M1[codes.long() % 8] * torch.where(codes < 8, 1.0, -1.0)
    packed = pack_fp4_to_uint8(value.bfloat16())
    assert torch.equal(packed.view(torch.uint8), pack(codes))
    ours = dequantize(pack(codes), torch.full((2, 2), 0x38, dtype=torch.uint8), torch.ones(1))
    assert torch.equal(unpack_fp4_from_uint8(packed, 2, 32, dtype=torch.float32), ours)


def test_codes_under_another_scale_than_the_best_are_still_the_nearest():
    """What a target with a scale byte of its own is judged by."""
    x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(2))
    for byte in (0x30, 0x38, 0x3C):
        scales = torch.full((3, 2), byte, dtype=torch.uint8)
        codes = codes_of(x, scales, row_scale(torch.ones(1), 3, None))
        value = E2M1[codes.long() % 8] * torch.where(codes < 8, 1.0, -1.0) * E4M3[byte]
        reachable = torch.cat([E2M1, -E2M1]) * E4M3[byte]
        best = (x[..., None] - reachable).abs().amin(dim=-1)
        assert torch.allclose((x - value).abs(), best, atol=1e-6, rtol=0)
