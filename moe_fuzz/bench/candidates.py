"""Candidates that exist for the benchmark alone: what NaN safety costs, by leaving it out and by a pass in front."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.kernels import grouped_topk as grouped
from moe_fuzz.kernels import routing
from moe_fuzz.targets import torch as plain

_ORDERED = Contract(deterministic=True, ordered=True)


@declares(contract=_ORDERED, capabilities=Capabilities(out=True, is_padding=False, alignment=1))
def topk_softmax_unsafe(
    logits: torch.Tensor,
    top_k: int,
    renormalize: bool = False,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our kernel without the operations that NaN and +inf need."""
    return routing._topk(False, logits, top_k, renormalize, bias, scale, None, "distinct", out, nan_safe=False)


@declares(contract=_ORDERED, capabilities=Capabilities(out=True, is_padding=False, alignment=1))
def topk_sigmoid_unsafe(
    logits: torch.Tensor,
    top_k: int,
    renormalize: bool = False,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our kernel without the operations that NaN and +inf need."""
    return routing._topk(True, logits, top_k, renormalize, bias, scale, None, "distinct", out, nan_safe=False)


@declares(
    contract=_ORDERED,
    capabilities=Capabilities(out=True, is_padding=False, alignment=1, expert_map=False),
)
def grouped_topk_unsafe(
    logits: torch.Tensor,
    top_k: int,
    *,
    n_group: int,
    topk_group: int,
    scoring: str = "softmax",
    group_score: str = "max",
    renormalize: bool = False,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    n_shared: int = 0,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our kernel without the operations that NaN and +inf need, where groups are whole lanes: all models' are."""
    return grouped._grouped_topk(logits, top_k, n_group, topk_group, scoring, group_score, renormalize, bias, scale,
                                 None, "distinct", n_shared, None, out, nan_safe=False)  # fmt: skip


def _after_nan_to_num(router: str) -> Callable[..., Any]:
    @declares(contract=_ORDERED, capabilities=Capabilities(alignment=1))
    def route(
        logits: torch.Tensor,
        top_k: int,
        renormalize: bool = False,
        bias: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        function = getattr(plain, router)
        weights, ids = function(torch.nan_to_num(logits), top_k, renormalize=renormalize, bias=bias, scale=scale)
        return weights, ids

    return route


topk_softmax_nan_to_num = _after_nan_to_num("topk_softmax")
topk_sigmoid_nan_to_num = _after_nan_to_num("topk_sigmoid")
