"""Reference of `allreduce_rmsnorm`, in float64. The docstring is the contract of the op."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Where an implementation may round to the dtype of x before it goes on; `residual_out` and `normed` always are.
ROUNDS = ("sum", "residual", "normed")


def allreduce_rmsnorm(
    x: Tensor,  # [R, T, H] bfloat16 | float16 | float32: any strides; what each of R >= 1 ranks holds; T >= 0, H >= 1
    residual: Tensor | None,  # [T, H], dtype of x, any strides, the same on every rank
    gamma: Tensor,  # [H] bfloat16 | float16 | float32
    eps: float = 1e-6,  # > 0
    *,
    rounds: Collection[str] = ("residual",),
) -> tuple[Tensor, Tensor]:  # normed [T, H], residual_out [T, H], dtype of x
    """The sum over ranks, the residual added to it, and RMSNorm of that: what every rank gets, the same bits on each.

    s[t]            = x[0][t] + x[1][t] + … + x[R-1][t], in this order, sums in float32 or better; a target may round
                      each of them to the dtype of x, as NCCL does, and declares it
    residual_out[t] = s[t] + residual[t], rounded to the dtype of x; s[t] where there is no residual
    normed[t]       = residual_out[t] / sqrt(mean(residual_out[t]^2) + eps) * gamma

    `rounds` says which values are rounded to the dtype of x before they are used further:
        "sum"       s, before the residual is added: an all-reduce that was written out
        "residual"  residual_out, before its norm is taken; without it the norm is of the sum that was not rounded yet
        "normed"    the normed value, before gamma multiplies it
    A sum of zeros is -0 only where all of them are. No row changes another, whatever it holds, on any rank. A row with
    NaN or infinite values, or whose sum of squares overflows float32, is anything, the same on every rank.

    Implementations take `group` besides: who the ranks are. A group with all ranks in one process takes x [R, T, H] and
    gives what each rank has got, [R, T, H]; a rank with a process of its own takes its x [T, H] and gives [T, H].
    Who takes `out` may take the residual itself as the buffer of residual_out, and declares it: in a group with all
    ranks in one process the residual then has a part for each rank, [R, T, H].

    Raises ValueError for anything outside these shapes, dtypes and names.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [R, T, H], not {list(x.shape)}")
    check(x[0] if len(x) else x.new_empty(0), residual, gamma, eps)
    if unknown := set(rounds) - set(ROUNDS):
        raise ValueError(f"rounds may name {', '.join(ROUNDS)}, not {', '.join(sorted(unknown))}")

    def rounded(value: Tensor, where: str) -> Tensor:
        return value.to(x.dtype).double() if where in rounds else value

    total = x[0].double()
    for part in x[1:]:
        total = total + part.double()
    total = rounded(total, "sum")
    if residual is not None:
        total = total + residual.double()
    total = rounded(total, "residual")
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (rounded(normed, "normed") * gamma.double()).to(x.dtype), total.to(x.dtype)


def check(x: Tensor, residual: Tensor | None, gamma: Tensor, eps: float) -> None:
    """ValueError for what one rank must not be given; x is [T, H]."""
    if x.dim() != 2 or x.dtype not in DTYPES or not x.shape[-1]:
        raise ValueError("x must be [T, H] of each rank in bfloat16, float16 or float32 with H >= 1, "
                         f"not {list(x.shape)} {x.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual must be {list(x.shape)} {x.dtype}, not {list(residual.shape)} {residual.dtype}")
    if gamma.shape != x.shape[-1:] or gamma.dtype not in DTYPES:
        raise ValueError(f"gamma must be [{x.shape[-1]}] in bfloat16, float16 or float32, "
                         f"not {list(gamma.shape)} {gamma.dtype}")
    if not eps > 0:
        raise ValueError(f"eps must be greater than 0, not {eps}")
