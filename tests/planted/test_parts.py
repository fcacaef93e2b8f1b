"""What planted layers are made of: right, and without a wait for each expert."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_fuzz.planted import experts_layer, layer_parts, routing_sigmoid

#: What makes the host wait for a device: results whose shape, or value, the host must know.
WAITS = ("nonzero", "_local_scalar_dense", "unique", "bincount", "masked_select", "index.Tensor_mask")


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(str(function))
        return function(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        return sum(any(name in call for name in WAITS) for call in self.calls)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (7, 3), (64, 8)])
def test_slots_by_expert(shape: tuple[int, int], dtype: torch.dtype) -> None:
    ids = torch.randint(-2, 9, shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = dict(layer_parts.by_expert(ids))
    assert list(found) == [e for e in ids.unique().tolist() if e >= 0]
    for expert, slots in found.items():
        assert torch.equal(slots, (ids.flatten() == expert).nonzero().flatten())


def waits_of(experts: int) -> tuple[int, int]:
    """Of both layers that planted bugs are made of, where each expert has a slot."""
    ids = torch.arange(experts, dtype=torch.int32)[:, None]
    x, w13, w2 = torch.ones(experts, 4), torch.ones(experts, 6, 4), torch.ones(experts, 4, 3)
    weights = torch.ones(experts, 1)
    with Counted() as one:
        experts_layer.Layer.run(x, w13, w2, weights, ids)
    with Counted() as other:
        layer_parts.experts_sum(x, w13, w2, weights, ids, {"activation": "silu", "gate_layout": "first"})
    return one.waits, other.waits


def test_more_experts_are_no_more_waits() -> None:
    assert waits_of(4) == waits_of(64)
    assert max(waits_of(4)) < 8


@pytest.mark.parametrize(
    ("scale", "expected"), [(0.5, 6.0), (0.0, 3.0), (torch.inf, 3.0), (torch.nan, 3.0), (None, 3.0)]
)
def test_a_factor_is_no_wait(scale: float | None, expected: float) -> None:
    none, alphas = torch.zeros(2, 16, 8, dtype=torch.uint8), torch.tensor([1.0, 3.0])
    given = None if scale is None else torch.tensor([scale])
    layer = experts_layer.Fp4Layer(torch.ones(1, 16), none, none, torch.ones(1, 1), torch.zeros(1, 1), none, none,
                                   alphas, alphas, x_global=given, h_global=None)  # fmt: skip
    with Counted() as counted:
        found = layer.factor("w13", 1)
    assert (float(found), found.dtype, counted.waits) == (expected, torch.float32, 0)


def test_a_scan_of_many_experts_is_no_more_launches() -> None:
    def launches(experts: int) -> int:
        with Counted() as counted:
            routing_sigmoid.sigmoid_nan_fallback(torch.zeros(5, experts), 3)
        return len(counted.calls)

    assert launches(7) == launches(63)


def test_the_scan_ends_where_a_loop_over_experts_does() -> None:
    """The flaw itself: beside a NaN no expert is larger, so it is expert 0, k times."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1.0, 2.0, -3.0])
    logits = values[torch.randint(0, len(values), (400, 7), generator=torch.Generator().manual_seed(5))]
    _, ids = routing_sigmoid.sigmoid_nan_fallback(logits, 4)
    for row, found in zip(logits.sigmoid().tolist(), ids.tolist(), strict=True):
        left, chosen = list(row), []
        for _ in range(4):
            best = 0
            for expert in range(1, len(left)):
                best = expert if left[expert] > left[best] else best
            chosen.append(best)
            left[best] = -float("inf")
        assert found == chosen
