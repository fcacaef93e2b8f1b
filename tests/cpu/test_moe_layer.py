"""The reference and the kernel of `moe_layer`: they agree, and padding, ranks and shards are what the contract says."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

from moe_fuzz.case import Case
from moe_fuzz.checks.experts.rounding import depth, gamma
from moe_fuzz.checks.layer import parity
from moe_fuzz.checks.layer.observation import LayerObservation, Outputs
from moe_fuzz.contract import Contract, TargetInfo
from moe_fuzz.ops.layer.inputs import LayerInputs
from moe_fuzz.reference.experts_bf16 import experts_bf16
from moe_fuzz.reference.moe_layer import moe_layer, shard_bounds, shard_map

DIALECTS = ("distinct", "minus_one", "num_experts", "zero_weight", "garbage")


def layer(tokens: int = 8, experts: int = 6, hidden: int = 32, inter: int = 16) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen).bfloat16()

    return {"hidden": draw(tokens, hidden), "gate": draw(experts, hidden) / 4,
            "w13": draw(experts, 2 * inter, hidden) / 4, "w2": draw(experts, hidden, inter) / 4}  # fmt: skip


def judge(found: tuple[torch.Tensor, ...], tensors: dict[str, torch.Tensor], **options: object) -> None:
    """Weights and y of an answer are within the bounds that are computed for its own decision."""
    given = {"renormalize": False, "scale": 1.0, "scoring": "softmax", "activation": "silu", "gate_layout": "first",
             "shards": 1, "dialect": "distinct", **options}  # fmt: skip
    more = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in given.items() if name not in more}
    inputs = LayerInputs(plain, {**tensors, **more})
    info = TargetInfo("moe_layer@builtin", "moe_layer", "builtin", contract=Contract())
    seen = LayerObservation(Case("moe_layer", {}, (), 0), 0, info, inputs, Outputs(*found), lambda _: Outputs(*found))
    if seen.tokens:
        assert len(seen.rows) == int((~seen.flagged).sum())
    for check in (parity.selection, parity.weights, parity.bound):
        assert check(seen) == []
    if seen.tokens:
        assert seen.expected.bound.isfinite().all()
        size = seen.expected.y.abs().amax()
        assert seen.expected.bound.amax() < 0.1 * size  # it says something


def logits_within(got: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> None:
    """A product of float32 sums, within the bound of any order of summation."""
    x, gate = x.double(), gate.double()
    assert got.shape == (len(x), len(gate))
    assert ((got.double() - x @ gate.t()).abs() <= gamma(depth(x.shape[1])) * (x.abs() @ gate.abs().t())).all()


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
    judge((whole, weights, ids), tensors, top_k=3)
    judge((y, weights, ids), tensors, top_k=3, shards=shards)
    with pytest.raises(AssertionError):  # off by two per cent
        judge((y - 0.02 * y.sign(), weights, ids), tensors, top_k=3, shards=shards)


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
from tests.cpu.test_moe_layer import judge, logits_within
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
        tensors = dict(zip(("hidden", "gate", "w13", "w2"), args))
        judge(got, tensors, top_k=k, shards=shards, dialect=dialect, **extra)
        judge(want, tensors, top_k=k, shards=shards, dialect=dialect, **extra)
for x, gate in ((draw(37, 100), draw(33, 100).float()), (draw(300, 70), draw(300, 70))):
    logits_within(gate_logits(x, gate), x, gate)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=100)


@pytest.mark.parametrize("module", ["moe_fuzz.kernels.moe_layer", "moe_fuzz.reference.moe_layer"])
def test_shards_are_summed_in_float32_or_better(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bound can tell it from the roundings of each shard: in bfloat16 nothing that is below half a step is left of
    seven shards of eight."""
    under_test = importlib.import_module(module)
    parts = iter((256.0, *[1.0] * 7))

    def shard(hidden: torch.Tensor, *_: object, **given: object) -> torch.Tensor:
        return torch.full_like(hidden, next(parts))

    place = under_test if module.startswith("moe_fuzz.kernels") else under_test.experts
    monkeypatch.setattr(place, "experts_bf16", shard)
    y, *_ = under_test.moe_layer(**layer(tokens=3, experts=8), top_k=2, shards=8)
    assert (y == 264).all(), "263, to the even one of its neighbours"
