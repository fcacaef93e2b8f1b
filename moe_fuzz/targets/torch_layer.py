"""A layer in plain PyTorch, as one writes it for a compiler. Its project promises nothing about padding rows."""

from __future__ import annotations

import torch

from moe_fuzz.contract import Capabilities, Contract, declares


@declares(
    contract=Contract(deterministic=True, intermediate="float32", slot="none"),
    capabilities=Capabilities(compiles=False, alignment=1, any_strides=True),
)
def moe_layer(
    hidden: torch.Tensor, gate: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, top_k: int, *,
    scoring: str = "softmax", renormalize: bool = False, bias: torch.Tensor | None = None, scale: float = 1.0,
    activation: str = "silu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Every expert on every token, in float32, weighed by a dense matrix: what a compiler is given to make it fast.

    hidden [T, H], gate [E, H], w13 [E, 2I, H], w2 [E, H, I] -> y [T, H], weights [T, k] float32, ids [T, k] int32.
    """
    x = hidden.float()
    logits = x @ gate.float().t()
    scores = torch.softmax(logits, dim=-1) if scoring == "softmax" else torch.sigmoid(logits)  # [T, E]
    ids = torch.topk(scores if bias is None else scores + bias, top_k, dim=-1).indices  # [T, k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    weights, ids = weights * scale, ids.to(torch.int32)
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
