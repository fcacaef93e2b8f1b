"""The sum over ranks, a residual and RMSNorm in plain PyTorch, as model code has them without a fused kernel."""

from __future__ import annotations

from typing import Any

import torch

from moe_fuzz.contract import Capabilities, Contract, declares


@declares(
    contract=Contract(deterministic=True, isolated=True, rounds=("residual",), sum_order="rank"),
    capabilities=Capabilities(
        compiles=False, alignment=1, any_strides=True, launches=("phases", "single"), processes=("cpu", "cuda")
    ),
)
def allreduce_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor | None, gamma: torch.Tensor, eps: float, *, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Everybody's x, summed up in float32 from rank 0 on; the norm of the residual as it is stored.

    x [R, T, H] -> normed, residual_out [R, T, H] where all ranks are in this process; else x [T, H] -> [T, H].
    """
    parts = list(x) if group.rank is None else gathered(x, group)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    if residual is not None:
        total = total + residual.float()
    residual_out = total.to(x.dtype)
    value = residual_out.float()
    normed = value * torch.rsqrt(value.square().mean(dim=-1, keepdim=True) + eps) * gamma.float()
    normed = normed.to(x.dtype)
    if group.rank is None:
        return normed.repeat(len(x), 1, 1), residual_out.repeat(len(x), 1, 1)
    return normed, residual_out


def gathered(x: torch.Tensor, group: Any) -> list[torch.Tensor]:
    """x [T, H] of every rank."""
    import torch.distributed as dist

    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.world)]
    if x.numel():
        # As bytes: gloo knows no bfloat16 in some releases.
        dist.all_gather([part.view(torch.uint8) for part in parts], x.contiguous().view(torch.uint8),
                        group=group.process_group)  # fmt: skip
    return parts
