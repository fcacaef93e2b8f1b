"""Routers in plain PyTorch, as people write them in model code. Their projects promise nothing about padding rows."""

from __future__ import annotations

import torch

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.targets.torch_align import align
from moe_fuzz.targets.torch_allreduce import allreduce_rmsnorm
from moe_fuzz.targets.torch_experts import experts_bf16, experts_nvfp4
from moe_fuzz.targets.torch_layer import moe_layer
from moe_fuzz.targets.torch_nvfp4 import nvfp4_quantize

__all__ = ["align", "allreduce_rmsnorm", "experts_bf16", "experts_nvfp4", "grouped_topk", "moe_layer", "nvfp4_quantize",
           "topk_sigmoid", "topk_softmax"]  # fmt: skip


@declares(
    contract=Contract(deterministic=True, ordered=True),
    capabilities=Capabilities(compiles=False, alignment=1, any_strides=True),
)
def topk_softmax(
    logits: torch.Tensor, top_k: int, renormalize: bool = False, bias: torch.Tensor | None = None, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax`, then `topk`: the router of most model files.

    logits [T, E], bias [E] float32 or None -> weights [T, k] float32, ids [T, k] int32.
    """
    scores = torch.softmax(logits, dim=-1, dtype=torch.float32)  # [T, E]
    choice = scores if bias is None else scores + bias
    ids = torch.topk(choice, top_k, dim=-1).indices  # [T, k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * scale, ids.to(torch.int32)


@declares(
    contract=Contract(deterministic=True, ordered=True),
    capabilities=Capabilities(compiles=False, alignment=1, any_strides=True),
)
def topk_sigmoid(
    logits: torch.Tensor, top_k: int, renormalize: bool = False, bias: torch.Tensor | None = None, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sigmoid`, a correction bias for the choice alone, then `topk`: as Llama 4 and MiniMax-M2 route.

    logits [T, E], bias [E] float32 or None -> weights [T, k] float32, ids [T, k] int32.
    """
    scores = torch.sigmoid(logits.float())  # [T, E]
    choice = scores if bias is None else scores + bias
    ids = torch.topk(choice, top_k, dim=-1).indices  # [T, k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * scale, ids.to(torch.int32)


@declares(
    contract=Contract(deterministic=True, ordered=True),
    capabilities=Capabilities(
        compiles=False, alignment=1, any_strides=True, min_group_size=2, group_score_by_bias=True
    ),
)
def grouped_topk(
    logits: torch.Tensor,
    top_k: int,
    renormalize: bool = False,
    n_group: int = 1,
    topk_group: int = 1,
    scoring: str = "softmax",
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grouped router of DeepSeek's model files, and of what serves them where no kernel fits.

    logits [T, E], bias [E] float32 or None -> weights [T, k] float32, ids [T, k] int32. A bias changes the rule of the
    groups: the sum of their two best instead of the best.
    """
    tokens, experts = logits.shape
    scores = torch.softmax(logits, dim=-1, dtype=torch.float32) if scoring == "softmax" else logits.float().sigmoid()
    choice = scores if bias is None else scores + bias  # [T, E]
    members = choice.view(tokens, n_group, experts // n_group)
    group_scores = members.amax(dim=-1) if bias is None else members.topk(2, dim=-1).values.sum(dim=-1)  # [T, G]
    groups = torch.topk(group_scores, topk_group, dim=-1).indices
    kept = torch.zeros_like(group_scores).scatter_(1, groups, 1).bool().repeat_interleave(experts // n_group, dim=1)
    ids = torch.topk(choice.masked_fill(~kept, float("-inf")), top_k, dim=-1).indices  # [T, k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * scale, ids.to(torch.int32)
