"""What grouped products share on the device once the sums are made: biases, activations, weights and rounding."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def biases_of(bias_ptr, expert, row, stride_e, stride_r):
    """The biases, float32, of these rows of an expert's weights."""
    at = expert.to(tl.int64) * stride_e + row.to(tl.int64) * stride_r
    return tl.load(bias_ptr + at).to(tl.float32)


@triton.jit
def scaled_back(sums, factor, shift):
    """sums * factor * shift, a power of two: a large factor times that would be infinite, and times no sum a NaN."""
    large = tl.abs(factor) >= 1.0
    return sums * tl.where(large, shift, factor * shift) * tl.where(large, factor, 1.0)


@triton.jit
def weighted(value, weight):
    """A weight of 0 beats NaN and infinity."""
    return tl.where(weight == 0.0, 0.0, value * weight)


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """silu, gelu or swiglu_oai of a gate, times the up-projection."""
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate)) * up
    if ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    gate = tl.where(gate > 7.0, 7.0, gate)  # comparisons keep a NaN, as tl.minimum does not
    up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
    return gate / (1.0 + tl.exp(-1.702 * gate)) * (up + 1.0)


@triton.jit
def relu2(sums):
    sums = tl.where(sums < 0.0, 0.0, sums)  # keeps a NaN, as tl.maximum does not
    return sums * sums


@triton.jit
def rounded(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """To the nearest, ties to even, in the interpreter too, whose own conversion to bfloat16 truncates."""
    if INTERPRETED and DTYPE.is_bf16():
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value != value, value, bits.to(tl.float32, bitcast=True))
    return value.to(DTYPE)
