"""The tensors of an experts case: functions of labels, by recipes that keep what they promise."""

from __future__ import annotations

import hashlib

import pytest
import torch

from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.contract import Capabilities
from moe_fuzz.fence import open_arena
from moe_fuzz.labels import Labels
from moe_fuzz.ops.experts.fields import BIASES, bias_dtypes
from moe_fuzz.ops.experts.inputs import benign_rows, materialize
from moe_fuzz.ops.inputs import element_bits
from moe_fuzz.reference.align import expert_of_slot
from moe_fuzz.reference.experts_bf16 import activate, experts_bf16

CONFIG = {
    "experts": "0-7", "hidden": 24, "intermediate": 20, "top_k": 2, "dtype": "bfloat16", "activation": "silu",
    "gate_layout": "first", "bias": "float32", "weight_on_input": False, "expert_map": "none", "recipe": "dense",
    "dialect": "minus_one", "edge": "right", "out": False, "magnitude": 2, "weight_scale": -3,
}  # fmt: skip
RECIPES = ("dense", "integer", "one_hot", "ladder", "fine", "curve", "cancel")


def case(rows="0-6", padding="", faults=(), seed=5, **config):
    step = Step(Labels.parse(rows), Labels.parse(padding), tuple(faults))
    return Case("experts_bf16", {**CONFIG, **config}, (step,), seed)


def same(one, other):
    return one.shape == other.shape and torch.equal(element_bits(one), element_bits(other))


def hashed(inputs):
    found = hashlib.sha256()
    for name in sorted(inputs.plain):
        found.update(name.encode() + element_bits(inputs.plain[name]).numpy().tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize(
    ("recipe", "golden"),
    [("dense", "7d2deac8badfd7c1"), ("integer", "855f3efc794ba690"), ("one_hot", "5fd7303f3c1fdbf1"),
     ("ladder", "110f1aab0f127bc5"), ("fine", "4465e11ed5b8556b"), ("curve", "e704aee3a5295d23"),
     ("cancel", "034fedcbf80412d5")],
)  # fmt: skip
def test_the_bits_of_a_case_never_change(recipe, golden):
    faults = [Fault("extreme_weights", "weights", Labels.parse("1")), Fault("nan_rows", "x", Labels.parse("6"))]
    assert hashed(materialize(case(padding="5-6", faults=faults, recipe=recipe, expert_map="shard"), 0)) == golden


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_row_taken_away_leaves_the_others(recipe):
    whole, less = materialize(case(recipe=recipe), 0), materialize(case("0-2,4-6", recipe=recipe), 0)
    kept = [0, 1, 2, 4, 5, 6]
    for name in ("x", "weights", "ids"):
        assert same(whole.plain[name][kept], less.plain[name])
    for name in ("w13", "w2", "b13", "b2"):
        assert same(whole.plain[name], less.plain[name])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", ["first", "up_first", "interleaved"])
def test_an_expert_taken_away_leaves_the_others(recipe, layout):
    whole = materialize(case(recipe=recipe, gate_layout=layout), 0)
    less = materialize(case(recipe=recipe, gate_layout=layout, experts="0-2,4-7"), 0)
    kept = [0, 1, 2, 4, 5, 6, 7]
    for name in ("w13", "w2", "b13", "b2"):
        assert same(whole.plain[name][kept], less.plain[name])
    unnamed = ~(whole.plain["ids"] == 3).any(dim=1)  # a row that had not named it names the same experts still
    assert unnamed.any()
    assert not unnamed.all()
    assert torch.equal(torch.tensor(kept)[less.plain["ids"].long()][unnamed], whole.plain["ids"].long()[unnamed])


@pytest.mark.parametrize("recipe", ["dense", "integer", "ladder"])
def test_hidden_and_intermediate_shrink_as_prefixes(recipe):
    whole, less = materialize(case(recipe=recipe), 0), materialize(case(recipe=recipe, hidden=17, intermediate=9), 0)
    assert same(whole.plain["x"][:, :17], less.plain["x"])
    gate, up = whole.plain["w13"].chunk(2, dim=1)
    assert same(torch.cat([gate[:, :9, :17], up[:, :9, :17]], dim=1), less.plain["w13"])
    assert same(whole.plain["w2"][:, :17, :9], less.plain["w2"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_two_experts_and_no_two_rows_are_alike(recipe):
    inputs = materialize(case(recipe=recipe, hidden=64, intermediate=48), 0)
    x, w13, w2 = inputs.plain["x"], inputs.plain["w13"][:, 48:], inputs.plain["w2"]
    for tensor in (x, w13.flatten(1), w2.flatten(1)):
        assert len(tensor.float().unique(dim=0)) == len(tensor)
    if recipe in ("dense", "ladder"):
        assert len(w13.flatten(0, 1).float().unique(dim=0)) == w13.shape[0] * w13.shape[1]


def test_dense_values_are_a_tent():
    inputs = materialize(case("0-499", hidden=200, magnitude=0), 0)
    x = inputs.plain["x"].double()
    assert x.abs().max() <= 1
    assert abs(x.mean()) < 5e-3
    assert abs(x.var() * 6 - 1) < 2e-2
    rows, columns = torch.corrcoef(x), torch.corrcoef(x.t())
    for table, others in ((rows, 200), (columns, 500)):  # no row or column tells another
        assert (table - torch.eye(len(table))).abs().max() < 6.5 / others**0.5


@pytest.mark.parametrize("recipe", ["integer", "one_hot"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2"])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_any_order_of_summation_gives_the_bits_of_an_exact_recipe(recipe, activation, on_input, dtype):
    inputs = materialize(case("0-3", recipe=recipe, activation=activation, weight_on_input=on_input, dtype=dtype,
                              bias="dtype", hidden=200, intermediate=90, top_k=2), 0)  # fmt: skip
    assert inputs.exact
    x, w13, w2, weights, ids = (inputs.plain[name] for name in ("x", "w13", "w2", "weights", "ids"))
    b13, b2 = inputs.plain.get("b13"), inputs.plain.get("b2")
    chosen, order = torch.Generator().manual_seed(1), torch.randperm

    def product(a, w):  # in float32, in shuffled parts; and the budget that makes it exact
        parts = order(a.shape[1], generator=chosen).split(37)
        terms = (a.double().abs() @ w.double().abs().t()).max()
        units = a.double()[a != 0].abs().min() * w.double()[w != 0].abs().min() / 8  # mantissas are multiples of 1/8
        assert terms / units < 2**24
        return sum(a[:, part].float() @ w[:, part].float().t() for part in parts)

    y = torch.zeros(x.shape)
    for slot in (1, 0):
        for token in range(len(x)):
            e, weight = int(ids[token, slot]), weights[token, slot]
            a = product(x[token : token + 1], w13[e]) * (weight if on_input else 1) + (0 if b13 is None else b13[e])
            h = activate(a, activation, "first").to(x.dtype)
            s = (product(h, w2[e]) + (0 if b2 is None else b2[e])) * (1 if on_input else weight)
            y[token] += s[0].to(x.dtype).float()
    y = y.to(x.dtype)
    assert y.isfinite().all()
    assert (y != 0).any(dim=1).all()
    assert same(experts_bf16(**inputs.plain, **inputs.options), y)


def test_no_gate_makes_swiglu_oai_exact():
    assert not materialize(case(recipe="one_hot", activation="swiglu_oai"), 0).exact
    assert not materialize(case(recipe="dense"), 0).exact


@pytest.mark.parametrize("dialect", ["distinct", "minus_one", "num_experts", "zero_weight", "garbage"])
@pytest.mark.parametrize("expert_map", ["none", "shard"])
def test_padding_rows_hold_what_their_dialect_says(dialect, expert_map):
    plain = materialize(case(padding="", expert_map=expert_map), 0)
    inputs = materialize(case(padding="4-6", dialect=dialect, expert_map=expert_map), 0)
    ids, weights = inputs.plain["ids"], inputs.plain["weights"]
    assert inputs.padding.tolist() == [False] * 4 + [True] * 3
    assert same(ids[:4], plain.plain["ids"][:4])
    assert same(weights[:4], plain.plain["weights"][:4])
    said = {"minus_one": -1, "num_experts": 8, "zero_weight": 0}
    if dialect in said:
        assert (ids[4:] == said[dialect]).all()
        assert (weights[4:] == 0).all()
    elif dialect == "distinct":
        assert same(ids, plain.plain["ids"])
    else:
        assert (ids[4:] != plain.plain["ids"][4:]).any()


def test_only_dropped_slots_get_nan_weights():
    everywhere = Labels.parse("0-6")
    faults = [Fault("sentinel_ids", "ids", everywhere), Fault("nan_dropped", "weights", everywhere)]
    for expert_map in ("none", "shard"):
        inputs = materialize(case(padding="6", faults=faults, expert_map=expert_map), 0)
        kept = expert_of_slot(inputs.plain["ids"], len(inputs.plain["w13"]), inputs.plain.get("expert_map")) >= 0
        assert torch.equal(inputs.plain["weights"].isnan(), ~kept)
        assert not kept.all()
    assert not materialize(case(faults=faults[1:]), 0).plain["weights"].isnan().any()


def test_a_shard_has_some_experts_and_a_permutation_all():
    whole = materialize(case(expert_map="none"), 0)
    for seed in range(6):
        shard = materialize(case(expert_map="shard", seed=seed), 0).plain
        here = (shard["expert_map"] >= 0).nonzero().flatten()
        assert shard["expert_map"][here].tolist() == list(range(len(here)))
        assert 1 <= len(here) == len(shard["w13"])
    permuted = materialize(case(expert_map="permuted"), 0).plain
    assert sorted(permuted["expert_map"].tolist()) == list(range(8))
    assert same(permuted["ids"], whole.plain["ids"])
    assert same(permuted["w13"][permuted["expert_map"].long()], whole.plain["w13"])
    one = experts_bf16(**whole.plain, **whole.options)
    assert same(experts_bf16(**permuted, **whole.options), one)


def test_rows_with_faults_on_values_are_not_ordinary():
    faults = [Fault("nan_rows", "x", Labels.parse("1")), Fault("extreme_weights", "weights", Labels.parse("2")),
              Fault("all_to_one", "ids", Labels.parse("3")), Fault("stale_rows", "x", Labels.parse("4"))]  # fmt: skip
    inputs = materialize(case(faults=faults), 0)
    assert inputs.ordinary.tolist() == [True, False, False, True, True, True, True]
    assert not same(inputs.plain["x"][4], materialize(case(), 0).plain["x"][4])


def test_steps_share_their_weights_and_nothing_else():
    steps = (Step(Labels.range(3)), Step(Labels.range(3)))
    both = Case("experts_bf16", CONFIG, steps, 1)
    one, other = materialize(both, 0), materialize(both, 1)
    assert all(one.plain[name] is other.plain[name] for name in ("w13", "w2", "b13", "b2"))
    assert not any(same(one.plain[name], other.plain[name]) for name in ("x", "weights"))
    again = Step(Labels.range(3), Labels(), (Fault("stale_rows", "x", Labels.range(3), 0),))
    stale = materialize(Case("experts_bf16", CONFIG, (steps[0], again), 1), 1)
    assert same(stale.plain["x"], one.plain["x"])


def test_benign_rows_are_of_the_recipe():
    x = benign_rows(case(recipe="integer"), 0, [1, 3])
    assert x.shape == (2, 24)
    assert (x[:, 0] == 1).all()
    assert x.abs().max() == 1


@pytest.mark.parametrize("tensor", ["x", "w13", "w2", "weights", "ids"])
@pytest.mark.parametrize("fault", ["noncontiguous", "misaligned", "transposed", "int32_boundary"])
def test_layouts_keep_the_values(tensor, fault):
    if (fault, tensor) in {("int32_boundary", "weights"), ("int32_boundary", "ids")}:
        pytest.skip(f"{fault} cannot be laid into {tensor}: the space has no such place")
    inputs = materialize(case(faults=[Fault(fault, tensor)]), 0)
    with open_arena("cpu") as arena:
        placed = inputs.place(arena, Capabilities(alignment=1))
        there = placed[tensor]
        assert same(there.clone(), inputs.plain[tensor])
        if fault == "int32_boundary":
            assert there.stride(0) * (there.shape[0] - 1) > 2**31 - 1
            assert there.stride()[1:] == (
                inputs.plain[tensor].stride()[1:]
            )
        elif fault == "misaligned":
            assert there.storage_offset() == inputs.lies[tensor].offset in (1, 2, 3)
        else:
            assert not there.is_contiguous()
        assert all(placed[name].is_contiguous() for name in placed if name != tensor)


@pytest.mark.parametrize(
    ("tensor", "fault"),
    [("b13", "noncontiguous"), ("b2", "noncontiguous"), ("b13", "transposed"), ("b2", "transposed"),
     ("expert_map", "noncontiguous")],
)  # fmt: skip
def test_biases_and_maps_that_are_not_packed(tensor, fault):
    whole = case(faults=[Fault(fault, tensor)], bias="dtype", expert_map="permuted")
    inputs = materialize(whole, 0)
    with open_arena("cpu") as arena:
        placed = inputs.place(arena, Capabilities())
        there = placed[tensor]
        assert same(there.clone(), inputs.plain[tensor])
        assert same(there.clone(), materialize(case(bias="dtype", expert_map="permuted"), 0).plain[tensor])
        assert there.stride() == inputs.lies[tensor].strides(there.shape) != there.contiguous().stride()
        assert (there.stride(0) == 1) is (fault == "transposed")
        assert all(placed[name].is_contiguous() for name in placed if name != tensor)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_a_bias_may_stand_alone_and_have_a_dtype_of_its_own(recipe, activation):
    """What a case has keeps its bits, whatever the other bias is."""
    if (activation, recipe) == ("relu2", "curve"):
        return
    said = {"none": None, "dtype": torch.bfloat16, "float32": torch.float32}
    config = {"recipe": recipe, "activation": activation}
    together = {dtype: materialize(case(bias=dtype, **config), 0).plain for dtype in said}
    for bias in BIASES:
        plain = materialize(case(bias=bias, **config), 0).plain
        for name, dtype in zip(("b13", "b2"), bias_dtypes(bias), strict=True):
            assert (plain[name].dtype if name in plain else None) == said[dtype]
            assert name not in plain or same(plain[name], together[dtype][name])


@pytest.mark.parametrize("kind", ["permuted", "shard"])
def test_a_map_names_each_expert_here_once(kind):
    """What another one does is nobody's promise."""
    for seed in range(20):
        plain = materialize(case(seed=seed, experts="0-12", expert_map=kind), 0).plain
        there = plain["expert_map"][plain["expert_map"] >= 0]
        assert int(plain["expert_map"].min()) >= -1
        assert there.sort().values.tolist() == list(range(len(plain["w13"])))


def test_the_last_experts_are_named_and_none_of_them_twice():
    for experts, top_k, first in ((64, 2, 56), (64, 12, 52), (8, 2, 6), (3, 3, 0)):
        whole = case(rows="0-39", experts=f"0-{experts - 1}", top_k=top_k, faults=[Fault("last_experts", "ids")])
        ids = materialize(whole, 0).plain["ids"]
        assert ids.unique().tolist() == list(range(first, experts))
        assert all(len(row.unique()) == top_k for row in ids)


def test_an_expert_has_exactly_so_many_rows():
    found = set()
    for seed in range(40):
        inputs = materialize(case(rows="0-39", seed=seed, faults=[Fault("exact_count", "ids")]), 0)
        ids = inputs.plain["ids"]
        assert all(len(set(row)) == 2 for row in ids.tolist())
        counts = ids.flatten().bincount(minlength=8).tolist()
        found |= {counts[one] for one in range(8) if counts[one] and (ids[: counts[one]] == one).any(dim=1).all()}
    assert found & {15, 16, 17}
    assert found & {31, 32, 33}


def test_many_rows_of_a_weight_do_not_stand_so_far_apart_that_looking_between_them_takes_seconds():
    widest = 0
    for seed in range(12):
        large = case(faults=[Fault("noncontiguous", "w13")], seed=seed, experts="0-95", intermediate=2048, hidden=3)
        lie = materialize(large, 0).lies["w13"]
        widest = max(widest, lie.gap)
        assert lie.gap * 96 * 2 * 2048 <= 1 << 24
    assert widest > 12


def test_a_graph_is_captured_on_distinct_experts():
    inputs = materialize(case(faults=[Fault("int64_ids", "ids")], top_k=3), 0)
    blank = inputs.blank()
    assert inputs.plain["ids"].dtype == blank.plain["ids"].dtype == torch.int64
    assert blank.plain["ids"].tolist() == [[0, 1, 2]] * 7
    assert not blank.plain["x"].any()
    assert blank.plain["w13"] is inputs.plain["w13"]
