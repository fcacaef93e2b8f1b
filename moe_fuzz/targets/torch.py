"""Routers and a layer in plain PyTorch, as people write them in model code. Their projects promise nothing about padding rows."""

from __future__ import annotations

import torch

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.targets.torch_experts import experts_bf16

__all__ = ["experts_bf16", "grouped_topk", "topk_sigmoid", "topk_softmax"]


@declares(contract=Contract(deterministic=True, ordered=True), capabilities=Capabilities(alignment=1))
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


@declares(contract=Contract(deterministic=True, ordered=True), capabilities=Capabilities(alignment=1))
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
    capabilities=Capabilities(alignment=1, min_group_size=2, group_score_by_bias=True),
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


@declares(
    contract=Contract(deterministic=True, intermediate="float32", slot="none"), capabilities=Capabilities(alignment=1)
)
def moe_layer(
    hidden: torch.Tensor, gate: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, top_k: int, *,
    scoring: str = "softmax", renormalize: bool = False, bias: torch.Tensor | None = None, scale: float = 1.0,
    activation: str = "silu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Every expert on every token, in float32, weighed by a dense matrix: what a compiler is given to make it fast.

    hidden [T, H], gate [E, H], w13 [E, 2I, H], w2 [E, H, I] -> y [T, H], weights [T, k] float32, ids [T, k] int32.
    """
    route = topk_softmax if scoring == "softmax" else topk_sigmoid
    x = hidden.float()
    weights, ids = route(x @ gate.float().t(), top_k, renormalize, bias, scale)
    dense = x.new_zeros(len(hidden), len(gate)).scatter_(1, ids.long(), weights)  # [T, E]
    y = torch.zeros_like(x)
    for expert in range(len(gate)):
        a = x @ w13[expert].float().t()
        if activation == "relu2":
            h = a.relu().square()
        else:
            g, p = a.chunk(2, dim=-1)
            if activation == "swiglu_oai":
                g, p = g.clamp(max=7.0), p.clamp(-7.0, 7.0)
                h = g * torch.sigmoid(1.702 * g) * (p + 1)
            else:
                h = (torch.nn.functional.gelu(g) if activation == "gelu" else torch.nn.functional.silu(g)) * p
        weight = dense[:, expert : expert + 1]
        y += (h @ w2[expert].float().t() * weight).masked_fill(weight == 0, 0.0)
    return y.to(hidden.dtype), weights, ids
