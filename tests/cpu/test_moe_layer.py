"""The reference and the kernel of `moe_layer`: they agree, and padding, ranks and shards are what the contract says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from moe_fuzz.reference.experts_bf16 import experts_bf16
from moe_fuzz.reference.moe_layer import moe_layer, shard_bounds, shard_map

DIALECTS = ("distinct", "minus_one", "num_experts", "zero_weight", "garbage")


def layer(tokens: int = 8, experts: int = 6, hidden: int = 32, inter: int = 16) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen).bfloat16()

    return {"hidden": draw(tokens, hidden), "gate": draw(experts, hidden) / 4,
            "w13": draw(experts, 2 * inter, hidden) / 4, "w2": draw(experts, hidden, inter) / 4}  # fmt: skip


def test_shards_cover_all_experts_once() -> None:
    for experts in (1, 5, 8, 61):
        for shards in range(1, min(experts, 8) + 1):
            bounds = shard_bounds(experts, shards)
            assert [e for first, last in bounds for e in range(first, last)] == list(range(experts))
            sizes = [last - first for first, last in bounds]
            assert max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)
            maps = torch.stack([shard_map(experts, first, last, "cpu") for first, last in bounds])
            assert ((maps >= 0).sum(dim=0) == 1).all()


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_shards_sum_to_the_whole(shards: int) -> None:
    tensors = layer()
    whole, weights, ids = moe_layer(**tensors, top_k=3)
    y, weights_too, ids_too = moe_layer(**tensors, top_k=3, shards=shards)
    assert torch.equal(weights, weights_too)
    assert torch.equal(ids, ids_too)
    assert (y.double() - whole.double()).abs().max() <= 2.0**-7 * (shards + 1) * whole.double().abs().max()


def test_the_layer_is_its_two_halves() -> None:
    tensors = layer()
    seen = []
    y, weights, ids = moe_layer(**tensors, top_k=2, renormalize=True, observe=lambda w, i: seen.append((w, i)))
    assert torch.equal(y, experts_bf16(tensors["hidden"], tensors["w13"], tensors["w2"], weights, ids))
    assert torch.equal(seen[0][0], weights)
    assert torch.equal(seen[0][1], ids)
    assert torch.allclose(weights.sum(dim=1), torch.ones(8))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_padding_changes_no_real_row(dialect: str) -> None:
    tensors, padding = layer(), torch.tensor([False, False, True, True] * 2)
    call = {"top_k": 3, "is_padding": padding, "ranks": 2, "shards": 2, "dialect": dialect}
    poisoned = {**tensors, "hidden": tensors["hidden"].masked_fill(padding[:, None], torch.nan)}
    out = tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in
                (((8, 32), torch.bfloat16), ((8, 3), torch.float32), ((8, 3), torch.int32)))  # fmt: skip
    one, other = moe_layer(**tensors, **call), moe_layer(**poisoned, **call, out=out)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a[~padding], b[~padding])
    sentinel = {"minus_one": -1, "num_experts": 6, "zero_weight": 0}.get(dialect)
    if sentinel is not None:
        assert (other[2][padding] == sentinel).all()
        assert (other[1][padding] == 0).all()


@pytest.mark.parametrize(("change", "message"), [
    ({"ranks": 3}, "ranks must divide"), ({"shards": 7}, "shards must be"), ({"scoring": "tanh"}, "scoring must be"),
])  # fmt: skip
def test_what_is_outside_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe_layer(**layer(), top_k=2, **change)  # type: ignore[arg-type]


@pytest.mark.interpreter
def test_the_kernel_agrees_with_the_reference() -> None:
    program = """
import torch
from moe_fuzz.kernels.moe_layer import gate_logits, moe_layer
from moe_fuzz.reference import moe_layer as reference
gen = torch.Generator().manual_seed(1)
for tokens, experts, hidden, inter, k, shards, dtype, extra in [
    (6, 5, 40, 24, 2, 1, torch.bfloat16, {}), (12, 8, 72, 16, 3, 3, torch.float16, {"scoring": "sigmoid", "ranks": 3}),
    (4, 8, 32, 16, 8, 8, torch.bfloat16, {"renormalize": True}), (0, 4, 16, 8, 1, 2, torch.bfloat16, {}),
]:
    def draw(*shape): return torch.randn(shape, generator=gen).to(dtype)
    args = [draw(tokens, hidden), draw(experts, hidden) / 4, draw(experts, 2 * inter, hidden) / 4,
            draw(experts, hidden, inter) / 4, k]
    extra["is_padding"] = torch.arange(tokens) % 3 == 2
    extra["bias"] = torch.randn(experts, generator=gen)
    extra["b2"] = draw(experts, hidden)
    for dialect in ("distinct", "minus_one", "num_experts", "zero_weight"):
        got = moe_layer(*args, shards=shards, dialect=dialect, **extra)
        want = reference.moe_layer(*args, shards=shards, dialect=dialect, **extra)
        assert torch.equal(got[2], want[2]), (got[2], want[2])
        assert torch.allclose(got[1], want[1], rtol=1e-4, atol=1e-6)
        most = float(want[0].abs().amax()) if tokens else 0.0
        assert torch.allclose(got[0].float(), want[0].float(), rtol=0.1, atol=0.1 * most)
logits = gate_logits(draw(37, 100), draw(33, 100).float())
assert logits.shape == (37, 33)
x, g = draw(300, 70), draw(300, 70)
assert torch.allclose(gate_logits(x, g), x.float() @ g.float().T, rtol=1e-4, atol=1e-4)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=100)
