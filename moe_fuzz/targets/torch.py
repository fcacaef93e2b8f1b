"""Routers in plain PyTorch, as people write them in model code. Their projects promise nothing about padding rows."""

from __future__ import annotations

import torch

from moe_fuzz.contract import Capabilities, Contract, declares


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
