"""Values of layers for the tests of the experts kernels, whatever their weights are stored in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor


class Values(NamedTuple):
    """x and ids as they are passed; the weights of the experts before they are stored."""

    x: Tensor
    w13: Tensor
    w2: Tensor
    weights: Tensor
    ids: Tensor


class Layer(Protocol):
    """The arguments of a call, of a kernel of any format."""

    x: Any
    weights: Any
    ids: Any


L = TypeVar("L", bound=Any)


def integers(
    tokens: int, top_k: int, experts: int, hidden: int, inter: int, *, activation: str = "silu",
    gate_layout: str = "first", dtype: torch.dtype = torch.bfloat16, biased: bool = False, seed: int = 0,
) -> tuple[Values, dict[str, Any]]:  # fmt: skip
    """Values and options. Every sum is an integer times a power of two, so that its bits do not depend on the order of
    summation.

    The gate is 32 (with weights on the input 16 to 64), where silu and gelu are the identity but for 1e-7.
    """
    options: dict[str, Any] = {"activation": activation, "gate_layout": gate_layout}
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).double()

    x = draw(-1, 1, tokens, hidden)
    x[:, 0] = 1
    up = draw(-1, 1, experts, inter, hidden) * (torch.rand(experts, inter, hidden, generator=generator) < 3 / hidden)
    gate = torch.zeros(experts, inter, hidden, dtype=torch.float64)
    gate[:, :, 0] = 32
    w13 = {"first": torch.cat([gate, up], 1), "up_first": torch.cat([up, gate], 1),
           "interleaved": torch.stack([gate, up], 2).flatten(1, 2)}[gate_layout]  # fmt: skip
    if activation == "relu2":
        w13 = up
    w2 = draw(-2, 2, experts, hidden, inter)
    if biased:
        b13 = draw(-1, 1, experts, w13.shape[1])
        if activation != "relu2":  # none on the gate
            gates = {"first": slice(0, inter), "up_first": slice(inter, None), "interleaved": slice(0, None, 2)}
            b13[:, gates[gate_layout]] = 0
        options |= {"b13": b13.float(), "b2": draw(-8, 8, experts, hidden).to(dtype)}
    weights = 2.0 ** draw(-1, 1, tokens, top_k).float()
    ids = torch.randint(-1, experts + 1, (tokens, top_k), dtype=torch.int32, generator=generator)
    return Values(x.to(dtype), w13, w2, weights, ids), options


def sources(tokens: int, top_k: int, experts: int, width: int, seed: int = 0) -> tuple[Values, Tensor]:
    """Experts that move columns about, each its own way, and the answer: every value names where it came from."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(width, generator=generator) for _ in range(experts)])  # [E, H]
    x = torch.arange(tokens * width).reshape(tokens, width) % 61 + 1.0
    x[:, 0] = 1
    w13 = torch.zeros(experts, 2 * width, width)
    w13[:, :width, 0] = 32
    w13[:, width:] = torch.eye(width)
    w2 = torch.nn.functional.one_hot(order, width) / 32.0
    ids = torch.randint(0, experts, (tokens, top_k), generator=generator)
    expected = torch.stack([x[t][order[ids[t]]].sum(0) for t in range(tokens)])
    assert expected.max() <= 256
    layer = Values(x.to(torch.bfloat16), w13, w2, torch.ones(tokens, top_k), ids.int())
    return layer, expected.to(torch.bfloat16)


def assert_near(got: Tensor, expected: Tensor, ulps: float) -> None:
    """Within so many steps of the dtype at each row's largest value."""
    step = torch.finfo(expected.dtype).eps * expected.double().abs().amax(dim=1, keepdim=True)
    assert ((got.double() - expected.double()).abs() <= ulps * step).all()


def drop_slots(layer: Layer) -> None:
    """Ids on both sides of the range in slot 1 of every token, and in all slots of token 2."""
    layer.ids[:, 1] = torch.tensor([-1, 4, 2**31 - 1, -(2**31)]).int().repeat(len(layer.ids) // 4)
    layer.ids[2] = torch.tensor([-1, 4, 7])
    layer.weights[:, 1] = 0.0


def soiled(layer: L) -> L:
    """The same with NaN where only the slots that `drop_slots` drops would read it."""
    dirty = replace(layer, x=layer.x.clone(), weights=layer.weights.clone())
    dirty.x[2] = math.nan
    dirty.weights[2] = math.nan
    dirty.weights[:, 1] = math.nan
    return dirty


def shards() -> Iterator[tuple[list[int], Tensor]]:
    """Three ranks with 3, 2 and 1 of 6 experts, each in an order of its own: its experts, and its expert_map."""
    for here in ([4, 0, 2], [5, 1], [3]):
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[torch.tensor(here)] = torch.arange(len(here), dtype=torch.int32)
        yield here, expert_map


def strided(layer: L, view: str) -> tuple[L, L]:
    """A layer whose x, weights or ids are such a view, and one of the same meaning whose tensors are packed."""
    packed = layer
    if view == "columns":
        layer = replace(layer, x=layer.x.repeat_interleave(3, dim=1)[:, ::3], weights=layer.weights.t().clone().t())
    elif view == "transposed":
        layer = replace(layer, x=layer.x.t().clone().t())
    elif view == "ids":
        layer = replace(layer, ids=torch.stack([layer.ids, layer.ids - 9], 2)[:, :, 0])
    else:
        assert view == "int64", view
        layer = replace(layer, ids=layer.ids.long() + (layer.ids == 2) * 2**32)  # out of range, not expert 2
        packed = replace(packed, ids=torch.where(packed.ids == 2, -1, packed.ids))
    return layer, packed
