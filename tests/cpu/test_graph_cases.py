"""Cases of several steps: what is drawn for graph modes, what their JSON says, what a step keeps when others go."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_fuzz import sequences, strategies
from moe_fuzz.campaign.finding import features_of
from moe_fuzz.campaign.minimize import Reducer
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.inputs import element_bits
from moe_fuzz.ops.routing.inputs import materialize
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.ops.space import Means
from moe_fuzz.restriction import RestrictedSpace, Restriction
from moe_fuzz.sequences import Move, Plan

SPACE = get_space("topk_softmax")
INFO = TargetInfo("topk_softmax@all", "topk_softmax", "all", contract=Contract(padding=PADDING_DIALECTS),
                  capabilities=Capabilities(out=True, alignment=1))  # fmt: skip
CONFIG = {**SIMPLEST, "experts": "0-7", "top_k": 2}
relaxed = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


def step(tokens: int, padding: int = 0, *faults: Fault, stream: int | None = None) -> Step:
    rows = Labels.range(tokens)
    return Step(rows, rows.last(padding), faults, stream)


def case(*steps: Step, mode: str = "graph", **config: object) -> Case:
    made = Case("topk_softmax", CONFIG | config, steps, 7, mode)  # type: ignore[operator]
    SPACE.validate(made)
    return made


# ---- what is drawn --------------------------------------------------------------------------------------------------


@relaxed
@given(data=st.data())
def test_a_tail_holds_what_the_buffer_held(data: st.DataObject) -> None:
    """Replayed by hand: rows that a step does not write, nor a fault, are those of the replay before, bit for bit."""
    cases = data.draw(strategies.rounds(SPACE, INFO, "cuda"))
    for drawn in cases:
        if drawn.mode == "eager":
            continue
        assert Case.loads(drawn.dumps()) == drawn
        assert len(drawn.buckets) <= 2
        buffers: dict[int, torch.Tensor] = {}
        for index, one in enumerate(drawn.steps):
            if one.tokens * len(drawn.experts) > 1 << 15:
                break
            held = materialize(drawn, index).plain["logits"]
            before = buffers.get(one.tokens, torch.zeros_like(held))
            written = Labels()
            for fault in one.faults:  # of a layer before, on the whole tail
                if one.padding and fault.name in sequences.TAILS and one.padding.issubset(fault.rows):
                    written = one.padding
            stale = (one.padding - written).positions(one.rows)
            assert torch.equal(element_bits(held)[stale], element_bits(before)[stale])
            buffers[one.tokens] = held


def test_buckets_tails_modes_and_lengths_are_all_drawn() -> None:
    seen: Counter[object] = Counter()
    for drawn in strategies.grid(SPACE, INFO, "cuda", 5):
        seen[drawn.mode] += 1
        seen["several steps", drawn.mode] += len(drawn.steps) > 1
        if drawn.mode == "eager":
            continue
        seen["two buckets"] += len(drawn.buckets) == 2
        seen["odd bucket"] += any(size in sequences.ODD_BUCKETS for size in drawn.buckets)
        seen["serving bucket"] += any(size in sequences.BUCKETS for size in drawn.buckets)
        seen["real count changes"] += len({(s.tokens, len(s.padding)) for s in drawn.steps}) > len(drawn.buckets)
        seen["stale tail"] += any(f.stream is not None for s in drawn.steps for f in s.faults)
        for one in drawn.steps:
            seen.update(f.name for f in one.faults if f.rows and f.rows.issubset(one.padding))
    wanted = ["eager", "graph", "piecewise", ("several steps", "eager"), ("several steps", "graph"), "two buckets",
              "odd bucket", "serving bucket", "real count changes", "stale tail", "nan_rows", "inf_rows",
              "neg_inf_rows", "huge_rows", "zero_rows"]  # fmt: skip
    assert [what for what in wanted if seen[what] < 5] == []


def test_who_promises_no_graphs_is_given_none() -> None:
    info = replace(INFO, contract=Contract(graph=False))
    drawn = list(strategies.grid(SPACE, info, "cpu", 5))
    assert {one.mode for one in drawn} == {"eager"}
    assert any(len(one.steps) > 1 for one in drawn)


def test_restrictions_hold_for_steps_too() -> None:
    """Of modes, eager may be the one that is not asked for; a tail holds no fault that is not."""
    only = RestrictedSpace(SPACE, Restriction(modes=("graph",), faults=("nan_rows",)))
    drawn = list(strategies.grid(only, INFO, "cuda", 5))
    assert {one.mode for one in drawn} == {"graph"}
    assert {name for one in drawn for name in one.fault_names} == {"nan_rows"}
    assert any(fault.rows == one.padding for made in drawn for one in made.steps for fault in one.faults)


def test_an_interpreted_case_is_cut_to_what_it_may_cost() -> None:
    plan = Plan((40,), tuple(Move(0, n % 4, 0, ()) for n in range(8)))
    config = CONFIG | {"experts": "0-511", "top_k": 8}
    on_cpu = sequences.make(SPACE, config, "graph", plan, 3, INFO.name, Means("cpu"))
    on_cuda = sequences.make(SPACE, config, "graph", plan, 3, INFO.name, Means("cuda"))
    assert 1 <= len(on_cpu.steps) < len(on_cuda.steps) == 8
    assert on_cpu.steps == on_cuda.steps[: len(on_cpu.steps)]
    assert SPACE.affordable(on_cpu, Means("cpu"))


def test_a_layout_belongs_to_the_buffer_and_a_bias_to_the_model() -> None:
    places = {place.fault: place for place in SPACE.places}
    moves = (Move(0, 0, 0, ((places["transposed"], 0),)), Move(0, 1, 0, ()),
             Move(0, 1, 0, ((places["extreme_bias"], 0),)))  # fmt: skip
    made = sequences.make(SPACE, CONFIG | {"bias": True}, "graph", Plan((8,), moves), 3, INFO.name, Means("cuda"))
    for one in made.steps:
        assert {"transposed", "extreme_bias"} <= {f.name for f in one.faults}
    lies = [materialize(made, index).lies for index in range(3)]
    assert lies[0] == lies[1] == lies[2]


# ---- what a step keeps ----------------------------------------------------------------------------------------------


def test_a_step_keeps_its_values_when_others_are_taken_away() -> None:
    stale = Fault("stale_rows", "logits", Labels.parse("6-7"), 0)
    whole = case(step(8), step(8, 2, stale), step(4))
    assert [whole.stream(index) for index in range(3)] == [0, 1, 2]
    kept = whole.keep_steps([1, 2])
    assert [kept.stream(index) for index in range(2)] == [1, 2]
    for before, after in ((1, 0), (2, 1)):
        assert torch.equal(materialize(whole, before).plain["logits"], materialize(kept, after).plain["logits"])
    assert torch.equal(materialize(kept, 0).plain["logits"][6:], materialize(whole, 0).plain["logits"][6:])
    assert Case.loads(kept.dumps()) == kept
    assert whole.keep_steps([0, 1, 2]) == whole


def test_a_stream_is_written_only_where_the_place_does_not_say_it() -> None:
    """So the digest of a case file from before there were streams stays what it was."""
    assert "stream" not in case(step(8), step(8)).dumps()
    assert case(step(8, stream=0), step(8, stream=1)) == case(step(8), step(8))
    assert case(step(8, stream=0), step(8, stream=1)).digest == case(step(8), step(8)).digest
    old = ('{"moe_fuzz": 1, "op": "topk_softmax", "mode": "eager", "seed": 7, "config": {}, "steps": [{"rows": "0-6"}],'
           ' "digest": "98c3f099ec89"}')  # fmt: skip
    assert Case.loads(old).steps == (Step(Labels.range(7)),)


@pytest.mark.parametrize(("stream", "where"), [(-1, "steps[0].stream"), (64, "steps[0].stream"), (True, "steps[0]")])
def test_a_stream_is_a_small_number(stream: object, where: str) -> None:
    data = case(step(8)).to_json()
    data["steps"][0]["stream"] = stream
    del data["digest"]
    with pytest.raises(CaseError) as caught:
        Case.from_json(data)
    assert caught.value.where.startswith(where)


def test_only_stale_rows_are_of_another_step() -> None:
    with pytest.raises(CaseError, match="only stale_rows"):
        case(step(8, 2, Fault("nan_rows", "logits", Labels.parse("6-7"), 0)))


def test_the_words_for_it() -> None:
    stale = Fault("stale_rows", "logits", Labels.parse("6-7"), 0)
    made = case(step(8), step(8, 2, stale), step(4))
    assert SPACE.label(made) == (
        "topk_softmax graph T=8 T=8 (2 padding) T=4 E=8 k=2 float32; step 1: stale_rows on logits rows 6-7 of step 0"
    )
    assert {"mode=graph", "several steps", "several buckets"} <= features_of(SPACE, made)
    assert "several buckets" not in features_of(SPACE, replace(made, mode="eager"))
    assert made.buckets == (8, 4)


# ---- the reducer ----------------------------------------------------------------------------------------------------


def test_the_reducer_drops_steps_first_and_keeps_what_the_failure_needs() -> None:
    """The failure: in a graph mode, a tail that holds the values of stream 1 behind a replay of the same bucket."""
    stale = Fault("stale_rows", "logits", Labels.parse("4-7"), 1)
    nan = Fault("nan_rows", "logits", Labels.parse("14-15"))
    whole = case(step(8), step(8), step(4), step(8, 4, stale), step(16, 2, nan), mode="piecewise", renormalize=True)
    tried: list[Case] = []

    def fails(cases: tuple[Case, ...]) -> bool:
        tried.append(cases[-1])
        steps = cases[-1].steps
        return cases[-1].mode != "eager" and any(
            one.tokens == steps[at].tokens and any(f.stream == 1 for f in steps[at].faults)
            for at in range(1, len(steps)) for one in steps[:at]
        )  # fmt: skip

    small = Reducer(SPACE, fails, 60.0).run(whole).case
    assert (small.mode, len(small.steps), small.steps[0].tokens) == ("graph", 2, 1)
    assert [f.name for one in small.steps for f in one.faults] == ["stale_rows"]
    assert not small.config["renormalize"]
    assert len(tried[0].steps) < len(whole.steps)
    assert SPACE.affordable(small, Means("cpu"))


def test_simplify_leads_out_of_graph_modes() -> None:
    made = case(step(8), step(8, 2, Fault("stale_rows", "logits", Labels.parse("6-7"), 0)), mode="piecewise")
    simpler = list(SPACE.simplify(made.keep_steps([1])))
    for one in simpler:
        SPACE.validate(one)
    assert [one.mode for one in simpler[:2]] == ["eager", "graph"]
    assert any(one.steps[0].stream is None for one in simpler)
    assert any(one.steps[0].faults[0].stream is None for one in simpler if one.steps[0].faults)


def test_plans_are_a_function_of_their_seed() -> None:
    def made(seed: int) -> Case:
        plan = sequences.random_plan((1, 2, 3, 8, 40), (), 1, "any", random.Random(seed))
        return sequences.make(SPACE, CONFIG, "graph", plan, seed, INFO.name, Means("cuda"))

    assert made(3) == made(3)
    assert len({made(seed).digest for seed in range(8)}) == 8


def test_show_tells_the_mode_and_where_rows_come_from() -> None:
    from moe_fuzz.cli.show import describe
    from moe_fuzz.cli.source import Source

    made = case(step(8), step(8, 2, Fault("stale_rows", "logits", Labels.parse("6-7"), 0)), step(4))
    lines = describe(Source((made.keep_steps([0, 1]),), "here"))
    mode = next(line for line in lines if line.startswith("mode"))
    assert mode.startswith("mode     graph (buckets of 8 tokens, each captured once")
    assert any(line.startswith("  fault  stale_rows in logits rows 6-7 from step 0: ") for line in lines)
    alone = describe(Source((made.keep_steps([1]),), "here"))
    assert "step 0   8 tokens (rows 0-7), of them 2 padding (rows 6-7), values of stream 1" in alone
    assert any(line.startswith("  fault  stale_rows in logits rows 6-7 from stream 0: ") for line in alone)
