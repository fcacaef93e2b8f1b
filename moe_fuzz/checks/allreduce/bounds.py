"""Both outputs in float64 with a bound on what rounding may change, elementwise: docs/numerics.md."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fuzz.checks.experts.rounding import LARGEST, TINY, U, depth, floor, gamma, unit
from moe_fuzz.contract import Contract


@dataclass(frozen=True)
class Bounded:
    """float64: `value` and `bound`, infinite where an overflow on the way leaves nothing to say."""

    value: Tensor
    bound: Tensor


def stored(value: Tensor, error: Tensor, dtype: torch.dtype, truncates: bool) -> Tensor:
    """The error once more, after a store of what is within `error` of value."""
    error = error + unit(dtype, truncates) * (value.abs() + error) + floor(dtype, truncates)
    return error.masked_fill(~(value.abs() + error < torch.finfo(dtype).max), torch.inf)


def bounded_sum(x: Tensor, residual: Tensor | None, contract: Contract) -> tuple[Bounded, Bounded]:
    """The sum of x [R, T, H] and residual [T, H], in float64, as it is before and after it is stored.

    Before: float32 sums in any order, through R - 1 operations and one more for the residual. Where no order is
    promised and the sum is not stored before, the residual is a part like those of the ranks: it may be the first.
    With `reduce: dtype` each addition rounds to the dtype of x, as those of NCCL do.
    """
    parts, anywhere = x.double(), contract.sum_order != "rank" and "sum" not in contract.rounds
    if residual is not None and anywhere:
        parts, residual = torch.cat([parts, residual.double()[None]]), None
    value, size = parts.sum(dim=0), parts.abs().sum(dim=0)
    if contract.reduce == "dtype":  # each addition is stored
        error = gamma(len(parts), unit(x.dtype, contract.truncates)) * size
        error = error + len(parts) * floor(x.dtype, contract.truncates)
        error = error.masked_fill(~(size + error < torch.finfo(x.dtype).max), torch.inf)
    else:
        error = gamma(len(parts)) * size + TINY
    if "sum" in contract.rounds:
        error = stored(value, error, x.dtype, contract.truncates)
    if residual is not None:
        value = value + residual.double()
        size = size + residual.double().abs()
        error = error + 2 * U * (value.abs() + error) + TINY
    error = error.masked_fill(~(size < LARGEST), torch.inf)
    return Bounded(value, error), Bounded(value, stored(value, error, x.dtype, contract.truncates))


def bounded_norm(n: Bounded, weight: Tensor, eps: float, dtype: torch.dtype, contract: Contract) -> Bounded:
    """normed of n [.., T, H], which a target may know within its bound only; weight [H].

    An error of n moves the mean of the squares, that moves its inverse root, and both move the product. The square root
    and its inverse may be approximate: 4 units.
    """
    size = n.value.abs() + n.bound
    mean = n.value.square().mean(dim=-1, keepdim=True)
    moved = (2 * n.value.abs() * n.bound + n.bound.square()).mean(dim=-1, keepdim=True)
    summed = gamma(depth(n.value.shape[-1])) * size.square().mean(dim=-1, keepdim=True)
    under = mean + eps
    off = moved + summed + 2 * U * (under + moved + summed) + TINY
    root = under.rsqrt()
    least = under - off
    grown = torch.where(least > 0, least, torch.nan).rsqrt() - root
    root_error = grown.nan_to_num(nan=torch.inf) + 4 * U * root
    value = n.value * root
    error = n.bound * (root + root_error) + n.value.abs() * root_error + 2 * U * value.abs() + TINY
    if "normed" in contract.rounds:
        error = stored(value, error, dtype, contract.truncates)
    scale = weight.double()
    product = value * scale
    error = scale.abs() * error + 4 * U * (product.abs() + scale.abs() * error) + TINY
    overflow = size.square().sum(dim=-1, keepdim=True)
    error = stored(product, error, dtype, contract.truncates)
    return Bounded(product, error.masked_fill(~(overflow < LARGEST), torch.inf))
