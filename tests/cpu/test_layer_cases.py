"""Cases of moe_layer: their space, the mode `ranks`, what its checks see, and what is told of padding and of stages."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from moe_fuzz import sequences, strategies
from moe_fuzz.campaign.tally import Tally
from moe_fuzz.case import RANKS, Case, Fault, Step, in_mode
from moe_fuzz.checks.families import FAMILIES
from moe_fuzz.checks.layer.padding import run_kind, statistics
from moe_fuzz.checks.layer.trail import describe
from moe_fuzz.contract import Capabilities, Contract, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.fence import open_arena
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space, load_case
from moe_fuzz.ops.layer.inputs import materialize
from moe_fuzz.ops.layer.space import rank_tokens
from moe_fuzz.reference.experts_bf16 import activate, experts_bf16
from moe_fuzz.reference.moe_layer import moe_layer, shard_bounds
from moe_fuzz.report.text import padding as padding_table
from moe_fuzz.verdict import PASS, Verdict

SPACE = get_space("moe_layer")
INFO = TargetInfo("moe_layer@builtin", "moe_layer", "builtin", contract=Contract(deterministic=True, isolated=True),
                  capabilities=Capabilities())  # fmt: skip
CONFIG = {**SPACE.simplest, "experts": "0-5", "top_k": 2, "hidden": 32, "is_padding": True}
FAMILY = FAMILIES["moe_layer"]


def case(*steps: Step, mode: str = "eager", **changes: object) -> Case:
    found = Case("moe_layer", {**CONFIG, **changes}, steps or (step(8, "6-7"),), 3, mode)
    SPACE.validate(found)
    return found


def step(tokens: int, padding: str = "", faults: tuple[object, ...] = ()) -> Step:
    return Step(Labels.range(tokens), Labels.parse(padding), faults)  # type: ignore[arg-type]


def observed(of: Case, index: int = 0, **changes: torch.Tensor):
    """The reference's answer as the checks see it, some of it changed."""
    inputs = materialize(of, index)

    def call(other):
        given = {**other.options, **{name: t for name, t in other.plain.items() if name not in
                                     ("hidden", "gate", "w13", "w2")}}  # fmt: skip
        top_k = given.pop("top_k")
        plain = [other.plain[name] for name in ("hidden", "gate", "w13", "w2")]
        return FAMILY.outputs(*moe_layer(*plain, top_k, **given))

    outputs = replace(call(inputs), **changes)
    return FAMILY.observe(of, index, INFO, inputs, outputs, call)


def violations(seen) -> dict[str, str]:
    from moe_fuzz.checks import CHECKS

    return {name: found[0].message for name in SPACE.checks if name in CHECKS["layer"]
            if (found := CHECKS["layer"][name](seen))}  # fmt: skip


# ---- the space ------------------------------------------------------------------------------------------------------


def test_the_grid_is_valid_and_has_every_kind_of_run():
    kinds = set()
    for one in strategies.grid(SPACE, INFO, "cpu", 1):
        load_case(one.dumps())
        kinds.add(run_kind(one).partition(" ")[0])
    assert kinds == {"eager", "sequence", "graph", "piecewise", "ranks"}


def test_several_ranks_are_for_the_mode_ranks_alone():
    assert in_mode(CONFIG, RANKS)["dp"] == 2
    assert in_mode({**CONFIG, "dp": 4}, RANKS)["dp"] == 4
    assert in_mode({**CONFIG, "dp": 4}, "graph")["dp"] == 1
    assert in_mode({"top_k": 1}, "graph") == {"top_k": 1}
    with pytest.raises(CaseError, match="dp: must be 1 in mode graph"):
        case(mode="graph", dp=2)
    with pytest.raises(CaseError, match="must be more than 1 in mode ranks"):
        case(mode="ranks", dp=1)
    with pytest.raises(CaseError, match="not as many for each of 3 ranks"):
        case(mode="ranks", dp=3)
    with pytest.raises(CaseError, match="8 shards of 6 experts"):
        case(ep=8)


def test_no_other_op_has_ranks():
    router = next(iter(strategies.grid(get_space("topk_softmax"), INFO, "cpu", 0)))
    with pytest.raises(CaseError, match="topk_softmax has no data-parallel ranks"):
        Case.from_json({key: value for key, value in replace(router, mode=RANKS).to_json().items() if key != "digest"})


@pytest.mark.parametrize("how", range(5))
def test_ranks_pad_to_the_largest(how):
    for seed in range(30):
        rows = Labels.range(4 * 6)
        padded = sequences.rank_padding(rows, 4, how, random.Random(seed))
        counts = rank_tokens(Step(rows, padded), 4)
        assert max(counts) == 6
        for rank, count in enumerate(counts):  # the padding of each rank is its tail
            assert [row in padded for row in range(6 * rank, 6 * rank + 6)] == [False] * count + [True] * (6 - count)
        assert how or counts == [6] * 4
        assert how not in (2, 4) or 0 in counts
        assert how != 3 or sorted(counts)[:3] in ([0] * 3, [1] * 3)


def test_the_reducer_can_take_ranks_and_rows_away():
    one = case(step(16, "2-3,6-7,9-11"), step(16, "0-3"), mode="ranks", dp=4)
    simpler = list(SPACE.simplify(one))
    for other in simpler:
        SPACE.validate(other)
    assert {other.mode for other in simpler} == {"eager", "graph", "piecewise", "ranks"}
    assert {other.config["dp"] for other in simpler if other.mode == "ranks"} == {2, 3, 4}
    assert {other.steps[0].tokens for other in simpler if other.mode == "ranks"} >= {4, 8, 12}
    assert "fault:zero_tokens" in SPACE.features(one)
    assert "fault:dp_skew" in SPACE.features(one)
    assert "fault:zero_tokens" not in SPACE.features(case())


@pytest.mark.parametrize(
    ("fault", "tensor"), [("transposed", "hidden"), ("noncontiguous", "gate"), ("transposed", "gate"),
                          ("noncontiguous", "bias"), ("noncontiguous", "is_padding")]
)  # fmt: skip
def test_layouts_for_targets_that_take_any_strides(fault, tensor):
    laid = case(step(8, "6-7", (Fault(fault, tensor),)), bias=True)
    inputs = materialize(laid, 0)
    with open_arena("cpu") as arena:
        placed = inputs.place(arena, Capabilities())
        assert [name for name, there in placed.items() if not there.is_contiguous()] == [tensor]
        assert torch.equal(placed[tensor].float(), materialize(case(bias=True), 0).plain[tensor].float())
    info = replace(INFO, capabilities=replace(INFO.capabilities, any_strides=True))
    assert SPACE.refusal(laid, INFO)
    assert not SPACE.refusal(laid, info)
    assert (fault, tensor) not in {(place.fault, place.tensor) for place in SPACE.places_for(laid.config, INFO)}
    drawn = list(itertools.islice(strategies.grid(SPACE, info, "cpu", 0), 800))
    assert any(Fault(fault, tensor) in one.steps[0].faults for one in drawn)


def test_many_experts_of_many_and_a_scale_that_no_16_bits_hold_are_drawn():
    drawn = list(itertools.islice(strategies.grid(SPACE, INFO, "cpu", 0), 800))
    assert {k for one in drawn if 10 < (k := int(one.config["top_k"])) < len(one.experts)} >= {12, 16, 22, 32}
    assert any(one.config["scale"] == 2.827 for one in drawn)


# ---- checks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [
    {}, {"ep": 4, "scoring": "sigmoid", "renormalize": True, "dialect": "minus_one"}, {"activation": "relu2"},
    {"activation": "swiglu_oai", "gate_layout": "interleaved", "expert_bias": "float32", "ep": 3, "bias": True},
    {"activation": "gelu", "gate_layout": "up_first", "dtype": "float16", "gate_dtype": "float32", "magnitude": 5},
    {"dialect": "zero_weight", "expert_bias": "dtype", "magnitude": -4},
])  # fmt: skip
def test_the_reference_is_right(config):
    seen = observed(case(**config))
    assert violations(seen) == {}
    assert FAMILY.binding(seen) == []
    assert 0 < seen.budget["bound"] < 1


@pytest.mark.parametrize(("recipe", "share"), [("integer", 0.5), ("fine", 0.2)])
def test_most_bits_of_whole_numbers_are_known(recipe, share):
    """And the reference has them, whatever is drawn beside."""
    known = []
    for seed in range(12):
        changes = {"activation": ("silu", "gelu", "relu2")[seed % 3], "ep": 1 + seed % 4, "top_k": (1, 2, 4)[seed % 3],
                   "scoring": ("softmax", "sigmoid")[seed % 2], "renormalize": seed % 4 < 2, "scale": 1.0,
                   "gate_layout": ("first", "up_first", "interleaved")[seed // 2 % 3], "bias": seed % 5 == 0,
                   "expert_bias": "float32" if recipe == "fine" else ("none", "dtype")[seed % 2],
                   "dtype": ("bfloat16", "float16")[seed // 3 % 2]}  # fmt: skip
        one = case(step(24, "20-23"), recipe=recipe, hidden=40, intermediate=24, **changes)
        seen = observed(replace(one, seed=seed))
        assert violations(seen) == {}
        assert FAMILY.binding(seen) == []
        known.append(float(seen.exact[1].double().mean()))
    assert sum(known) / len(known) > share, known


def test_a_shard_added_in_16_bits_shows_in_the_bits_alone():
    """Two sums of two are rounded as often as one of three is."""
    changes = {"recipe": "fine", "expert_bias": "float32", "scoring": "sigmoid", "top_k": 4, "experts": "0-7"}
    for shards, wrong in ((2, set()), (4, {"exact"})):
        one = case(step(40), ep=shards, hidden=64, **changes)
        right = observed(one)
        parts = []
        for first, last in shard_bounds(8, shards):
            own = (right.outputs.ids >= first) & (right.outputs.ids < last)
            given = right.inputs.plain
            parts.append(experts_bf16(
                right.hidden, given["w13"], given["w2"], right.outputs.weights,
                torch.where(own, right.outputs.ids, -1), b13=given["b13"], b2=given["b2"],
            ))  # fmt: skip
        total = torch.zeros_like(right.hidden)
        for part in parts:
            total = total + part
        # a second call is that of the reference, and has the right bits
        assert set(violations(observed(one, y=total))) - {"determinism", "isolation"} == wrong


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "changes", [{"top_k": 1}, {"top_k": 4, "renormalize": True}, {"top_k": 2, "ep": 3, "bias": True}]
)
def test_router_weights_in_16_bits_show_in_the_bits_alone(changes, dtype):
    """A router's weights have all bits of a float32: of their products with whole numbers most are stored as one number
    whatever float32 has made of them, and whoever weighs the activation instead, in float32, has these bits, too."""
    one = case(step(40), **{"recipe": "integer", "dtype": dtype, "hidden": 64, "scale": 2.827, **changes})
    right = observed(one)
    given, (_, weights, ids) = right.inputs.plain, vars(right.outputs).values()
    bounds = shard_bounds(6, right.inputs.options["shards"])
    assert float(right.exact[1].double().mean()) > 0.1

    def layer(weights, before=None):
        total = torch.zeros(right.hidden.shape, dtype=torch.float64)
        for first, last in bounds:
            own = torch.where((ids >= first) & (ids < last), ids, -1)
            total += (before or experts_bf16)(right.hidden, given["w13"], given["w2"], weights, own).double()
        return total.to(right.hidden.dtype)

    def weighed_before(x, w13, w2, weights, own):
        y = torch.zeros(x.shape)
        for token, slot in (own >= 0).nonzero().tolist():
            e = own[token, slot]
            h = activate(x[token].double() @ w13[e].double().t(), "silu", "first").to(x.dtype)
            y[token] += ((weights[token, slot] * h.float()) @ w2[e].float().t()).to(x.dtype).float()
        return y.to(x.dtype)

    def wrong(y):
        return set(violations(observed(one, y=y))) - {"determinism", "isolation"}

    assert wrong(layer(weights)) == wrong(layer(weights, weighed_before)) == set()
    assert "exact" in wrong(layer(weights.to(right.hidden.dtype).float()))


def test_a_logit_whose_sum_may_overflow_on_the_way_is_not_judged():
    """Its terms cancel; a float32 sum of them is infinite in one order, and small in another."""
    inputs = materialize(case(top_k=1), 0)
    hidden, gate = inputs.plain["hidden"].clone(), inputs.plain["gate"].clone()
    hidden[2, :4] = torch.tensor([3e38, 3e38, -3e38, -3e38], dtype=hidden.dtype)
    gate[:, :4] = 1.0
    seen = replace(observed(case(top_k=1)), inputs=inputs.replace(hidden=hidden, gate=gate), budget={})
    assert seen.logits[2].abs().max() < 100
    assert seen.defined.tolist() == [True, True, False, True, True, True, False, False]


@pytest.mark.parametrize("recipe", ["dense", "integer"])
@pytest.mark.parametrize("shards", [1, 3])
def test_what_a_wrong_row_would_be_right_for_is_told(recipe, shards):
    config = {"ep": shards, "recipe": recipe, "hidden": 64, "intermediate": 40, "renormalize": True,
              "scoring": "sigmoid"}  # fmt: skip
    right = observed(case(**config))
    inputs, (y, weights, ids) = right.inputs.plain, vars(right.outputs).values()

    def of(weights: torch.Tensor, ids: torch.Tensor) -> str:
        other = experts_bf16(right.hidden, inputs["w13"], inputs["w2"], weights, ids)
        found = violations(observed(case(**config), y=other))
        return found.get("bound") or found["exact"]

    assert "slot 1 is missing" in of(weights, torch.cat([ids[:, :1], torch.full_like(ids[:, 1:], -1)], dim=1))
    assert "the weights were ignored" in of(torch.ones_like(weights), ids)
    wrong = ids.clone()
    wrong[0, 0] = next(e for e in range(6) if e not in ids[0])
    assert f"slot 0 read expert {int(wrong[0, 0])}, not {int(ids[0, 0])}" in of(weights, wrong)
    turned = y.clone()
    turned[3] = y[2]
    of_others = case(step(8, "0"), **config)  # a row that is not judged comes before
    assert "got what token 2 should have" in violations(observed(of_others, y=turned))["bound"]


def test_wrong_answers_are_named():
    right = observed(case(ep=2))
    y, weights, ids = (getattr(right.outputs, name).clone() for name in ("y", "weights", "ids"))
    assert "router chose experts" in violations(observed(case(ep=2), y=y.roll(1, 0)))["bound"]
    assert "all zero" in violations(observed(case(ep=2), y=torch.zeros_like(y)))["bound"]
    assert "is NaN" in violations(observed(case(ep=2), y=torch.full_like(y, torch.nan)))["bound"]
    assert "weights" in violations(observed(case(ep=2), weights=weights * 1.01))
    twice = ids.clone()
    twice[3] = twice[3, 0]
    found = violations(observed(case(ep=2), ids=twice))["ids"]
    assert found.startswith("the router gave row 3 the ids [")
    broken = y.clone()
    broken[1] = 0
    told = violations(observed(case(ep=2), ids=twice, y=broken))["ids"]
    assert "the experts then broke another one: row 1: the router chose" in told


def test_a_near_tie_of_logits_may_fall_either_way_and_a_gap_may_not():
    """Two experts with the same gate row: which of them is taken is rounding. A clear winner is not."""
    inputs = materialize(case(top_k=1), 0)
    gate = inputs.plain["gate"].clone()
    gate[1] = gate[0]
    seen = observed(case(top_k=1))
    inputs = inputs.replace(gate=gate)
    decided = moe_layer(*(inputs.plain[name] for name in ("hidden", "gate", "w13", "w2")), 1)[2]
    row = int(((decided == 0) | (decided == 1)).any(dim=1).nonzero()[0])
    for other, wrong in ((1 - int(decided[row, 0]), False), ((int(decided[row, 0]) + 2) % 6, True)):
        ids = decided.clone()
        ids[row] = other
        tied = replace(seen, inputs=inputs, outputs=replace(seen.outputs, ids=ids), budget={})
        assert bool(violations(tied).get("selection")) is wrong


def test_logits_stay_within_their_error():
    """float32 products in any order, of rows that cancel, lie within the error that selection allows for."""
    for dtype in ("bfloat16", "float16"):
        seen = observed(case(step(64), dtype=dtype, hidden=512, intermediate=1, magnitude=5))
        x, gate = seen.hidden.float(), seen.inputs.plain["gate"].float()
        for order in (torch.arange(512), torch.arange(512).flip(0), torch.randperm(512)):
            total = torch.zeros(64, 6)
            for column in order.tolist():
                total += x[:, column : column + 1] * gate[:, column]
            assert bool(((total.double() - seen.logits).abs() <= seen.logit_error).all())


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_the_trail_names_what_the_router_gave():
    inputs = materialize(case(dialect="minus_one"), 0)
    weights = torch.full((8, 2), 0.5)
    ids = torch.tensor([[0, 1]] * 6 + [[-1, -1]] * 2, dtype=torch.int32)
    told = "the router gave padding row 6 the ids [-1, -1], as the dialect minus_one has it; then the experts began"
    assert describe(inputs, weights, ids) == told
    ids[5] = 0
    assert describe(inputs, weights, ids).startswith("the router gave row 5 the ids [0, 0], one expert twice")
    ids[4, 1] = 6
    assert "row 4 the ids [0, 6], of which one is no expert in [0, 6)" in describe(inputs, weights, ids)
    fine = torch.tensor([[0, 1]] * 8, dtype=torch.int32)
    assert "within its contract" in describe(materialize(case(), 0), weights, fine)
    assert "row 2 the weights [nan, 0.5]" in describe(
        materialize(case(), 0), weights.index_put((torch.tensor([2]), torch.tensor([0])), torch.tensor(torch.nan)), fine
    )


def test_padding_is_counted_by_kind_of_run():
    from moe_fuzz.case import Fault

    nan = (Fault("nan_rows", "hidden", Labels.parse("6-7")),)
    one = case(step(8, "2-3,6-7", nan), step(8), mode="ranks", dp=2, ep=2)
    tally = Tally()
    for index in range(2):
        stats = statistics(one, index, materialize(one, index))
        tally.count("t", Verdict(PASS, stats=stats))
    row = Tally.from_json(tally.to_json()).row("t", (), (), "")
    assert row.padding == {"ranks dp=2 +ep": {"steps": 1, "nan": 1, "inf": 0, "tokens": 4}}
    lines = padding_table(row)
    assert lines[2].split() == ["ranks", "dp=2", "+ep", "1", "1", "(100%)", "0", "(0%)", "4.0"]
    assert padding_table(replace(row, padding={})) == []


def test_few_interpreted_cases_have_no_tokens() -> None:
    """Where a budget leaves nothing but none, one token is taken all the same."""
    cases = list(itertools.islice(strategies.grid(SPACE, INFO, "cpu", seed=7), 300))
    empty = [one for one in cases if not any(step.tokens for step in one.steps)]
    assert 0 < len(empty) < 40
    assert sum(int(one.config["ep"]) == 8 for one in cases) > 20


def test_a_huge_row_that_changes_another_is_told_where_the_target_declares_it():
    one = case(step(8))
    seen = observed(one)
    assert violations(seen) == {}

    def call(inputs):
        y = seen.call(inputs)
        return replace(y, y=y.y.nextafter(torch.zeros_like(y.y))) if float(inputs.plain["hidden"].max()) > 1e30 else y

    wrong = replace(seen, call=call, budget={})
    assert "huge numbers in other rows changed this one" in violations(wrong)["isolation"]
    assert violations(replace(wrong, info=replace(INFO, contract=Contract(deterministic=True)))) == {}
    assert violations(replace(wrong, case=replace(one, seed=1 << 16))) == {}
