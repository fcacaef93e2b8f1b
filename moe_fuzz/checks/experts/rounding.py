"""Roundings: how much one may change a number, and what a number becomes when it is stored. In float64 throughout."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

U = 2.0**-24  # unit roundoff of float32
LARGEST = 2.0**127  # what float32 holds for certain
TINY = 2.0**-126  # the smallest normal number of float32 and of bfloat16: below it a result may be flushed to 0
#: Bits of the significand, the hidden one included: integers up to 2^that are exact.
PRECISION = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
_FRACTION_BITS = 52  # of a float64
_FRACTION, _EXPONENT = (1 << _FRACTION_BITS) - 1, 0x7FF << _FRACTION_BITS
_LEAST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}  # the smallest subnormal


def dtype_of(declared: str, stored: torch.dtype) -> torch.dtype:
    """The dtype that a contract names; "dtype" is that of x."""
    return stored if declared == "dtype" else getattr(torch, declared)


def unit(dtype: torch.dtype, truncates: bool = False) -> float:
    """The largest relative error of a store: half a step, a whole one where what does not fit is cut off."""
    return 2.0 ** -(PRECISION[dtype] - truncates)


def floor(dtype: torch.dtype, truncates: bool = False) -> float:
    """The largest absolute error of a store below the normal numbers. bfloat16 may be flushed to 0 there: it shares
    float32's exponents. float16 is not."""
    return TINY if dtype != torch.float16 else _LEAST[dtype] / (1 if truncates else 2)


def gamma(count: float, u: float = U) -> float:
    """The relative error of n operations one after another, each of which may cut off instead of rounding."""
    share = 2 * u * count
    return share / (1 - share) if share < 1 else torch.inf


def depth(terms: int) -> float:
    """Through how many operations a term of a sum goes at most, in any order, tensor cores' own alignment included:
    one a term, one a group of 16, and at the ends the weight, the bias and the store of the sum."""
    return terms + -(-terms // 16) + 3


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of `dtype` at |values|, float64."""
    steps = _power(values.view(torch.int64)).mul_(2.0 ** (1 - PRECISION[dtype]))
    return steps.clamp_(min=_LEAST[dtype], max=2.0**1000)  # of an infinity too a number, whose difference to it is none


def store(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float64 values rounded to nearest even as `dtype` has them, and whether nothing was lost, bool."""
    rounded = values.to(dtype).double()
    return rounded, rounded == values


def unit_of(values: Tensor) -> Tensor:
    """The largest power of two of which each value is a whole multiple; infinity for 0. Of float64 numbers, none of
    them subnormal. Of an infinity and of NaN it is infinity, too: what they go into is not finite, whatever its unit.
    """
    if values.device.type == "cpu":  # in numpy, whose operations on a few numbers cost a third of torch's
        there = values.numpy()
        found = _lowest(there, numpy)
        found[there == 0] = numpy.inf
        return torch.from_numpy(found)
    unit: Tensor = _lowest(values, torch).masked_fill_(values == 0, torch.inf)
    return unit


def _lowest(values: Any, of: Any) -> Any:
    """The lowest bit of each, but of 0. of: torch or numpy, whose the values are."""
    bits = values.view(of.int64)
    significand = (bits & _FRACTION) | (1 << _FRACTION_BITS)
    unit = (bits & _EXPONENT).view(of.float64) * 2.0**-_FRACTION_BITS
    unit *= significand & -significand
    return unit


def _power(bits: Tensor) -> Tensor:
    """The largest power of two that is no larger than each number of these bits; 0 for 0. Taken out of the bits, where
    frexp and ldexp take ten times as long."""
    return (bits & _EXPONENT).view(torch.float64)
