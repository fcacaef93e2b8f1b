"""`experts_bf16`: the reference against a naive loop, the Triton kernel against exact answers, in the interpreter."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch
from torch import Tensor

from moe_fuzz.kernels.experts_bf16 import experts_bf16, workspace_bytes
from moe_fuzz.kernels.experts_bf16.blocks import PLANS, Blocks, Plan, choose
from moe_fuzz.reference.experts_bf16 import ACTIVATIONS, GATE_LAYOUTS
from moe_fuzz.reference.experts_bf16 import experts_bf16 as reference
from tests.cpu import experts_layers
from tests.cpu.experts_layers import assert_near, drop_slots, shards, soiled, strided

# numpy mentions the NaN and the infinity that some tests are about
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

BOTH = pytest.mark.parametrize(
    "layer", [pytest.param(experts_bf16, marks=pytest.mark.interpreter), reference], ids=["kernel", "reference"]
)
BOTH_UNLAUNCHED = pytest.mark.parametrize("layer", [experts_bf16, reference], ids=["kernel", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
TILES = Plan(0, Blocks(16, 16, 16, 2, 4, 1), Blocks(16, 16, 32, 1, 4, 1))  # many tiles of small sizes


@dataclass
class Layer:
    """The arguments of a call."""

    x: Tensor
    w13: Tensor
    w2: Tensor
    weights: Tensor
    ids: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, layer: Any, **more: Any) -> Tensor:
        found = layer(self.x, self.w13, self.w2, self.weights, self.ids, **self.options, **more)
        assert isinstance(found, Tensor)
        return found


def integers(*sizes: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Layer:
    values, more = experts_layers.integers(*sizes, dtype=dtype, **options)
    return Layer(values.x, values.w13.to(dtype), values.w2.to(dtype), values.weights, values.ids, more)


def sources(*sizes: int, **options: Any) -> tuple[Layer, Tensor]:
    values, expected = experts_layers.sources(*sizes, **options)
    return Layer(values.x, values.w13.bfloat16(), values.w2.bfloat16(), values.weights, values.ids), expected


def randoms(seed: int = 0, activation: str = "silu", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows = 20 if activation == "relu2" else 40
    return Layer(
        draw(7, 33).to(dtype), (draw(4, rows, 33) / 2).to(dtype), (draw(4, 33, 20) / 4).to(dtype), draw(7, 3).abs(),
        torch.randint(0, 4, (7, 3), dtype=torch.int32, generator=generator), {"activation": activation, **options},
    )  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate_layout", GATE_LAYOUTS)
def test_the_reference_is_the_formula(activation, gate_layout):
    """One number at a time, with Python's own functions."""
    layer = randoms(activation=activation, gate_layout=gate_layout)
    b13, b2 = torch.randn(layer.w13.shape[:2]), torch.randn(layer.w2.shape[:2])
    for on_input in (False, True):
        got = layer.run(reference, b13=b13, b2=b2, apply_weight_on_input=on_input)
        for token in range(2):
            y = torch.zeros(33, dtype=torch.float64)
            for slot in range(3):
                e, weight = int(layer.ids[token, slot]), float(layer.weights[token, slot])
                a = layer.w13[e].double() @ (layer.x[token].double() * (weight if on_input else 1.0)) + b13[e]
                h = []
                for i in range(20):
                    places = {"first": (i, 20 + i), "up_first": (20 + i, i), "interleaved": (2 * i, 2 * i + 1)}
                    g, p = places[gate_layout]
                    if activation == "relu2":
                        h.append(max(float(a[i]), 0.0) ** 2)
                        continue
                    gate, up = float(a[g]), float(a[p])
                    if activation == "silu":
                        h.append(gate / (1 + math.exp(-gate)) * up)
                    elif activation == "gelu":
                        h.append(gate * (1 + math.erf(gate / math.sqrt(2))) / 2 * up)
                    else:
                        gate, up = min(gate, 7.0), max(min(up, 7.0), -7.0)
                        h.append(gate / (1 + math.exp(-1.702 * gate)) * (up + 1))
                out = layer.w2[e].double() @ torch.tensor(h).to(torch.bfloat16).double() + b2[e]
                y += (out * (1.0 if on_input else weight)).to(torch.bfloat16).double()
            assert_near(got[token][None], y[None].to(torch.bfloat16), 1.0)


@pytest.mark.interpreter
@DTYPES
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("activation", "gate_layout"),
    [("silu", "first"), ("silu", "interleaved"), ("gelu", "up_first"), ("relu2", "first")],
)
def test_exact_on_integers(activation, gate_layout, biased, dtype):
    layer = integers(9, 3, 5, 37, 21, activation=activation, gate_layout=gate_layout, dtype=dtype, biased=biased)
    expected = layer.run(reference)
    assert expected.unique().numel() > 50  # it is not an answer of zeros
    assert torch.equal(layer.run(experts_bf16), expected)
    assert torch.equal(layer.run(experts_bf16, apply_weight_on_input=True),
                       layer.run(reference, apply_weight_on_input=True))  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "inter"),
    [(1, 1, 1, 1, 1), (1, 4, 8, 40, 3), (5, 2, 3, 48, 33), (3, 7, 1, 17, 50), (23, 2, 1, 33, 16)],
)
@pytest.mark.parametrize("inline_slots", [0, 16])  # slots grouped by `align`, and by the programs
def test_exact_in_small_tiles(tokens, top_k, experts, hidden, inter, inline_slots):
    """Sizes that are no multiple of a block, several blocks of one expert, several tiles and steps."""
    layer = integers(tokens, top_k, experts, hidden, inter, biased=True, seed=tokens)
    if experts == 1:
        layer.ids[:] = 0  # more slots than a block holds: 2 of them, and 3
    plan = replace(TILES, inline_slots=inline_slots)
    assert torch.equal(layer.run(experts_bf16, plan=plan), layer.run(reference))


@pytest.mark.interpreter
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(4, 2, 3), (30, 3, 4)])  # grouped by the programs; by `align`
def test_every_value_comes_from_its_source(tokens, top_k, experts):
    layer, expected = sources(tokens, top_k, experts, 24)
    for run in (experts_bf16, reference):
        got = layer.run(run)
        assert torch.equal(got, expected), f"tokens {(got != expected).any(1).nonzero().flatten().tolist()}"


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
@DTYPES
def test_near_the_reference_on_random_data(activation, dtype):
    layer = randoms(activation=activation, dtype=dtype)
    assert_near(layer.run(experts_bf16), layer.run(reference), 1.0)


@BOTH
@pytest.mark.parametrize("tokens", [4, 12])
def test_a_dropped_slot_counts_for_nothing_whatever_it_holds(layer, tokens):
    """Ids on both sides of the range; NaN where only dropped slots would read it, and in the workspace."""
    clean, _ = sources(tokens, 3, 4, 16, seed=3)
    drop_slots(clean)
    expected = clean.run(reference)
    assert not expected[2].any()
    dirty = soiled(clean)
    out = torch.full_like(clean.x, math.nan)
    more: dict[str, Any] = {}
    if layer is experts_bf16:
        more["workspace"] = torch.full((workspace_bytes(tokens, 3, 16, 16, 4),), 0xFF, dtype=torch.uint8)
    assert torch.equal(dirty.run(layer, out=out, **more), expected)


@BOTH
def test_a_weight_of_zero_beats_infinity(layer):
    case, _ = sources(3, 2, 2, 16)
    case.x[1] = math.inf
    case.weights[1] = 0.0
    got = case.run(layer)
    assert not got[1].any()
    assert got[[0, 2]].isfinite().all()


@BOTH
def test_nan_stays_in_its_row_and_is_not_lost(layer):
    for activation in ACTIVATIONS:
        case = randoms(activation=activation)
        before = case.run(layer)
        case.x[3, 5] = math.nan
        after = case.run(layer)
        assert after[3].isnan().all()
        assert torch.equal(after[[0, 1, 2, 4, 5, 6]], before[[0, 1, 2, 4, 5, 6]])


@BOTH
def test_an_id_that_stands_twice_counts_twice(layer):
    for slots in (4, 20):  # 20 of one expert are more than a block, even in one row
        case, _ = sources(2, 2, 3, 16)
        case.x[:] = 3.0
        case.x[:, 0] = 1.0
        case = replace(case, ids=torch.ones(2, slots, dtype=torch.int32), weights=torch.ones(2, slots))
        once = replace(case, ids=case.ids[:, :1], weights=case.weights[:, :1])
        assert torch.equal(case.run(layer).double(), slots * once.run(layer).double())


@BOTH
@pytest.mark.parametrize("tokens", [4, 11])
def test_the_shards_of_ranks_sum_to_the_whole(layer, tokens):
    whole, expected = sources(tokens, 3, 6, 16)
    total = torch.zeros(tokens, 16)
    for here, expert_map in shards():
        shard = replace(whole, w13=whole.w13[here], w2=whole.w2[here])
        total += shard.run(layer, expert_map=expert_map).float()
    assert torch.equal(total.to(torch.bfloat16), expected)


@BOTH
def test_a_map_to_experts_that_do_not_exist_drops_the_slot(layer):
    case, _ = sources(4, 2, 3, 16)
    assert not case.run(layer, expert_map=torch.tensor([3, -1, 100], dtype=torch.int32)).any()


@BOTH_UNLAUNCHED
def test_no_tokens(layer):
    case, _ = sources(2, 2, 3, 16)
    empty = replace(case, x=case.x[:0], ids=case.ids[:0], weights=case.weights[:0])
    out = torch.empty(0, 16, dtype=torch.bfloat16)
    assert empty.run(layer, out=out) is out
    assert empty.run(layer).shape == (0, 16)


@pytest.mark.interpreter
@pytest.mark.parametrize("view", ["columns", "transposed", "expanded", "ids", "experts", "int64"])
def test_any_strides(view):
    layer = randoms(1)
    packed = layer
    if view == "expanded":
        layer = replace(layer, x=layer.x[:1].expand(7, 33))
        packed = replace(layer, x=layer.x.contiguous())
    elif view == "experts":
        layer = replace(layer, w13=layer.w13.permute(2, 0, 1).clone().permute(1, 2, 0), w2=layer.w2.mT.clone().mT)
    else:
        layer, packed = strided(layer, view)
    assert torch.equal(layer.run(experts_bf16), packed.run(experts_bf16))
    assert torch.equal(layer.run(reference), packed.run(reference))


@pytest.mark.interpreter
def test_a_workspace_serves_many_calls():
    workspace = torch.full((workspace_bytes(30, 3, 24, 24, 4) + 16,), 0x7F, dtype=torch.uint8)
    for tokens in (30, 1, 12):
        case, expected = sources(tokens, 3, 4, 24)
        assert torch.equal(case.run(experts_bf16, workspace=workspace), expected)
    with pytest.raises(ValueError, match="workspace must be at least"):
        case.run(experts_bf16, workspace=workspace[:1000])
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        case.run(experts_bf16, workspace=workspace[8:])


def test_the_table_has_a_plan_for_everything():
    assert [plan.up_to for plan in PLANS] == sorted({plan.up_to for plan in PLANS})
    assert choose(1, 8192) is PLANS[0]
    assert choose(1 << 20, 1) is PLANS[-1]
    with pytest.raises(ValueError, match="both products need the same m"):
        replace(TILES, down=replace(TILES.down, m=32))


@BOTH_UNLAUNCHED
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, "activation must be one of"),
        ({"gate_layout": "last"}, "gate_layout must be one of"),
        ({"x": torch.zeros(2, 16)}, "x must be"),
        ({"ids": torch.zeros(3, 2, dtype=torch.int32)}, "ids must be"),
        ({"weights": torch.zeros(2, 1)}, "weights must be"),
        ({"w13": torch.zeros(3, 16, 16, dtype=torch.bfloat16)}, "w13 must be"),
        ({"w2": torch.zeros(3, 16, 0, dtype=torch.bfloat16)}, "w2 must be"),
        ({"b13": torch.zeros(3, 16)}, "b13 must be"),
        ({"b2": torch.zeros(3, 16, dtype=torch.float16)}, "b2 must be"),
        ({"expert_map": torch.zeros(0, dtype=torch.int32)}, "expert_map must map"),
        ({"expert_map": torch.zeros(3)}, "expert_map must be"),
        ({"out": torch.zeros(16, 2, dtype=torch.bfloat16).t()}, "out must be contiguous"),
    ],
)
def test_refuses_what_it_cannot_take(layer, change, message):
    case, _ = sources(2, 2, 3, 16)
    arguments = {"x": case.x, "w13": case.w13, "w2": case.w2, "weights": case.weights, "ids": case.ids, **change}
    with pytest.raises(ValueError, match=message):
        layer(**arguments)
