"""Reference of `moe_layer`, in float64. The docstring is the contract of the op."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from moe_fuzz.reference import experts_bf16 as experts
from moe_fuzz.reference import routing

Observer = Callable[[Tensor, Tensor], None]


def moe_layer(
    hidden: Tensor,  # [T, H] bfloat16 | float16, any strides; T = ranks * rows of a rank, T >= 0
    gate: Tensor,  # [E, H], dtype of hidden or float32, any strides
    w13: Tensor,  # [E, 2I, H] (relu2: [E, I, H]), dtype of hidden
    w2: Tensor,  # [E, H, I], dtype of hidden
    top_k: int,  # 1 <= top_k <= min(E, 32)
    *,
    is_padding: Tensor | None = None,  # [T] bool
    ranks: int = 1,  # data-parallel ranks; divides T
    shards: int = 1,  # expert-parallel ranks, at most E
    dialect: str = "distinct",  # what the router says of padding, and the experts must understand
    scoring: str = "softmax",  # "softmax" | "sigmoid"
    renormalize: bool = False,
    bias: Tensor | None = None,  # [E] float32, of the router
    scale: float = 1.0,
    activation: str = "silu",
    gate_layout: str = "first",
    b13: Tensor | None = None,  # [E, 2I] (relu2: [E, I]), dtype of hidden or float32
    b2: Tensor | None = None,  # [E, H], dtype of hidden or float32
    observe: Observer | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,  # (y, weights, ids) as below, contiguous
) -> tuple[Tensor, Tensor, Tensor]:  # y [T, H] dtype of hidden, weights [T, k] float32, ids [T, k] int32
    """A layer of experts as it is served: gate, routing, and experts spread over ranks, whose results are combined.

    Batch: each of `ranks` data-parallel ranks pads its tokens to the largest count among them, at its tail; `hidden` is
        what they gather, rank by rank. Rows flagged in `is_padding` are those tails, a rank without tokens is all tail.
        What a padding row holds is anything at all: attention leaves NaN there, or an earlier step's rows (vllm#37758).
    Gate: logits[t] = gate @ hidden[t], sums in float32 or better, and kept in float32, unless a target declares that
        they are rounded to the dtype of hidden.
    Routing: `topk_softmax` or `topk_sigmoid` on those logits, with their contracts (reference/routing.py). (weights,
        ids) are the decision as it was made; padding rows follow `dialect`. Logits that a float32 sum cannot tell apart
        may fall either way (docs/numerics.md).
    Experts: shard s of S holds E // S neighbouring experts, the first E % S shards one more. Each computes
        `experts_bf16` of the whole batch with its own experts, and its slots alone: the expert's biases are added where
        the expert is. A padding row's slots go nowhere, or to whom its ids name; they touch nothing else.
    Combine: y is the sum of the shards' results in float32 or better, each rounded to the dtype of hidden before, and
        the sum once more. A target may sum in the dtype of hidden, and declares it.
    Rows: no row changes another, whatever it holds, on this rank or another. y of a padding row is anything. y of a row
        with NaN or infinite hidden states is anything, too; its ids are k distinct ones in [0, E), its weights finite.
        ids and weights of no row may be used to access memory outside of what is the layer's.
    `observe`, where given, is called with (weights, ids) when the decision is made and before any expert is run, so
        that a fault of the second half can be told from one of the first. It is not given while a graph is captured.

    Raises ValueError for anything outside these shapes, dtypes and names.
    """
    check(hidden, gate, w13, w2, ranks, shards, scoring)
    logits = (hidden.double() @ gate.double().t()).float()  # [T, E]
    route = routing.topk_softmax if scoring == "softmax" else routing.topk_sigmoid
    weights, ids = route(
        logits, top_k, renormalize=renormalize, bias=bias, scale=scale, is_padding=is_padding, padding=dialect,
        out=None if out is None else (out[1], out[2]),
    )  # fmt: skip
    if observe is not None:
        observe(weights, ids)
    y = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for first, last in shard_bounds(len(gate), shards):
        part = slice(first, last)
        y += experts.experts_bf16(
            hidden, w13[part], w2[part], weights, ids, expert_map=shard_map(len(gate), first, last, hidden.device),
            activation=activation, gate_layout=gate_layout,
            b13=None if b13 is None else b13[part], b2=None if b2 is None else b2[part],
        ).double()  # fmt: skip
    result = y.to(hidden.dtype)
    return (result if out is None else out[0].copy_(result)), weights, ids


def shard_bounds(num_experts: int, shards: int) -> list[tuple[int, int]]:
    """The experts [first, last) of each shard."""
    each, more = divmod(num_experts, shards)
    ends = [each * s + min(s, more) for s in range(shards + 1)]
    return list(pairwise(ends))


def shard_map(num_experts: int, first: int, last: int, device: torch.device | str) -> Tensor:
    """int32 [E]: where the shard with the experts [first, last) keeps each expert, or -1."""
    found = torch.full((num_experts,), -1, dtype=torch.int32, device=device)
    torch.arange(last - first, dtype=torch.int32, device=device, out=found[first:last])
    return found


def check(hidden: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, ranks: int, shards: int, scoring: str) -> None:
    """ValueError for what the router and the experts do not ask themselves."""
    if hidden.dim() != 2 or hidden.dtype not in experts.DTYPES or not hidden.shape[1]:
        raise ValueError("hidden must be [T, H] in bfloat16 or float16 with H >= 1, "
                         f"not {list(hidden.shape)} {hidden.dtype}")
    width = hidden.shape[1]
    if gate.dim() != 2 or gate.shape[1] != width or gate.dtype not in (hidden.dtype, torch.float32):
        raise ValueError(f"gate must be [E, {width}] in {hidden.dtype} or float32, "
                         f"not {list(gate.shape)} {gate.dtype}")
    if not len(gate) == len(w13) == len(w2):
        raise ValueError(f"gate, w13 and w2 must be of as many experts, not {len(gate)}, {len(w13)} and {len(w2)}")
    if scoring not in routing.SCORES:
        raise ValueError(f"scoring must be one of {', '.join(routing.SCORES)}, not {scoring!r}")
    if ranks < 1 or len(hidden) % ranks:
        raise ValueError(f"ranks must divide the {len(hidden)} rows of hidden, not {ranks}")
    if not 1 <= shards <= len(gate):
        raise ValueError(f"shards must be from 1 to the {len(gate)} experts, not {shards}")
