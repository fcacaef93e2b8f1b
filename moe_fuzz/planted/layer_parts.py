"""The parts of a layer without a flaw, of which the planted ones are made: float32, plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from moe_fuzz.mirror import uploaded

MAX = torch.finfo(torch.float32).max


def gate_logits(hidden: Tensor, gate: Tensor) -> Tensor:
    return hidden.float() @ gate.float().t()


def route(hidden: Tensor, gate: Tensor, top_k: int, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """weights [T, k] float32, ids [T, k] int32, by the op's own arguments."""
    return route_by(gate_logits(hidden, gate), top_k, given)


def route_by(logits: Tensor, top_k: int, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`route` with these logits [T, E], float32."""
    x = logits.nan_to_num(nan=-MAX, posinf=MAX, neginf=-MAX)
    scores = x.sigmoid() if given["scoring"] == "sigmoid" else (x - x.amax(dim=1, keepdim=True)).softmax(dim=1)
    bias, padding, dialect = given.get("bias"), given.get("is_padding"), given["dialect"]
    key = x if bias is None and given["scoring"] == "softmax" else scores if bias is None else scores + bias
    ids = key.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    weights = scores.gather(1, ids)
    if given["renormalize"]:
        weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-30)
    weights = weights * given["scale"]
    if padding is not None and dialect in ("minus_one", "num_experts", "zero_weight"):
        sentinel = {"minus_one": -1, "num_experts": logits.shape[1], "zero_weight": 0}[dialect]
        weights, ids = weights.masked_fill(padding[:, None], 0.0), ids.masked_fill(padding[:, None], sentinel)
    return weights, ids.int()


def finish(given: Mapping[str, Any], weights: Tensor, ids: Tensor) -> None:
    """The decision is made; whoever asked is told."""
    if given.get("observe") is not None:
        given["observe"](weights, ids)


def shard_bounds(experts: int, shards: int) -> list[tuple[int, int]]:
    """The experts [first, last) of each shard: the first of them have one more."""
    each, more = divmod(experts, shards)
    ends = [each * s + min(s, more) for s in range(shards + 1)]
    return list(pairwise(ends))


def local_slots(ids: Tensor, first: int, last: int) -> Tensor:
    """The ids as a shard numbers its experts, or -1."""
    return torch.where((ids >= first) & (ids < last), ids - first, -1)


def by_expert(ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Of ids [T, k], each expert that is named, ascending, and its slots t * k + j, int64, ascending; ids below 0 name
    none. The device is waited for once for all of them: asked expert by expert, a layer of hundreds waits as often, and
    where several processes share a GPU each wait is a turn."""
    named, order = ids.cpu().flatten().long().sort(stable=True)
    experts, counts = named.unique_consecutive(return_counts=True)
    slots, end = uploaded(order, ids.device), 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        end += count
        if expert >= 0:
            yield expert, slots[end - count : end]


def experts_sum(
    hidden: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, given: Mapping[str, Any], first: int = 0,
    products: Tensor | None = None, scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Each token's weighted sum over its slots, float32 [T, H]. ids: of the experts in w13, of which number 0 is expert
    `first` of the layer's biases. products [T, k, 2I]: hidden @ w13.T, where it is there. scale: of hidden."""
    y = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    top_k = ids.shape[1]
    chosen = by_expert(ids.masked_fill(ids >= len(w13), -1))
    with _disable_current_modes():  # a fence of each of these small tensors would cost as much as all the rest
        for expert, slots in chosen:
            token, slot = slots // top_k, slots % top_k
            a = hidden[token].float() @ w13[expert].float().t() if products is None else products[token, slot]
            part = _after(a if scale is None else a * scale, expert, w2, given, first)
            weight = weights[token, slot, None]
            y.index_add_(0, token, (part * weight).masked_fill(weight == 0, 0.0))
    return y


def whole(hidden: Tensor, expert: int, w13: Tensor, w2: Tensor, given: Mapping[str, Any]) -> Tensor:
    """What one expert makes of these rows, float32."""
    return _after(hidden.float() @ w13[expert].float().t(), expert, w2, given, 0)


def _after(a: Tensor, expert: int, w2: Tensor, given: Mapping[str, Any], first: int) -> Tensor:
    """From the first product to the end of an expert. given["stored"]: the dtype of the activation's result."""
    b13, b2, activation = given.get("b13"), given.get("b2"), given["activation"]
    if b13 is not None:
        a = a + b13[first + expert].float()
    if activation == "relu2":
        h = a.relu().square()
    else:
        if given["gate_layout"] == "interleaved":
            gate, up = a[:, ::2], a[:, 1::2]
        else:
            gate, up = a.chunk(2, dim=1) if given["gate_layout"] == "first" else a.chunk(2, dim=1)[::-1]
        if activation == "swiglu_oai":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1.0
            h = gate * (1.702 * gate).sigmoid() * up
        else:
            h = (torch.nn.functional.silu if activation == "silu" else torch.nn.functional.gelu)(gate) * up
    y = h.to(given.get("stored", torch.float32)).float() @ w2[expert].float().t()
    return y if b2 is None else y + b2[first + expert].float()
