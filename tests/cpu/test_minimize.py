"""The reducer: it reaches the known minimum, never leaves the failure, ends, and keeps to its budget."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_fuzz.campaign.finding import needed_features
from moe_fuzz.campaign.minimize import Reducer, ddmin
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from tests.cpu.campaign_fakes import SPACE, TARGET, toy


def reduce(case, predicate, before=(), seconds=60.0, **options):
    tried = []

    def fails(cases):
        tried.append(cases)
        return predicate(cases)

    assert predicate((*before, case))
    result = Reducer(SPACE, fails, seconds, **options).run(case, before)
    assert predicate((*result.before, result.case)), "the reducer left the failure"
    assert len(set(tried)) == len(tried) == result.tries, "something was run twice"
    return result


def rows(case):
    return [str(step.rows) for step in case.steps]


BIG = Case(
    "toy",
    {"experts": "0-60", "top_k": 8, "dtype": "float16", "bias": True},
    (
        Step(Labels.range(257), Labels.parse("200-256"), (Fault("ties", "logits", Labels.parse("3")),)),
        Step(Labels.range(64), faults=(Fault("nan_rows", "logits", Labels.parse("40-50")), Fault("extreme", "bias"))),
        Step(Labels.range(1)),
    ),
    9,
    target=TARGET,
)


def has(case, name):
    return name in case.fault_names


@pytest.mark.parametrize(
    ("predicate", "minimum"),
    [
        (lambda c: True, {"rows": ["0"], "faults": (), "experts": "0", "top_k": 1, "dtype": "float32"}),
        (lambda c: has(c, "nan_rows"), {"rows": ["40"], "faults": ("nan_rows",), "experts": "0", "top_k": 1}),
        (lambda c: any(137 in s.rows for s in c.steps), {"rows": ["137"], "faults": ()}),
        (lambda c: any({3, 77} <= set(s.rows) for s in c.steps), {"rows": ["3,77"], "faults": ()}),
        (lambda c: any(s.tokens >= 17 for s in c.steps), {"tokens": [17]}),
        (lambda c: any(s.padding for s in c.steps), {"rows": ["200"], "padding": "200"}),
        (lambda c: has(c, "extreme") and c.config["bias"], {"rows": ["0"], "faults": ("extreme",), "bias": True}),
        (lambda c: len(c.experts) >= 5 and c.config["top_k"] >= 3, {"experts": "0-4", "top_k": 3}),
        (lambda c: c.config["dtype"] != "float32", {"dtype": "bfloat16", "experts": "0"}),
        (lambda c: len(c.steps) >= 2 and has(c, "ties"), {"rows": ["3", "0"], "faults": ("ties",)}),
        (lambda c: has(c, "ties") and has(c, "nan_rows"), {"rows": ["3", "40"], "faults": ("nan_rows", "ties")}),
    ],
)
def test_it_reaches_the_known_minimum(predicate, minimum):
    result = reduce(BIG, lambda cases: predicate(cases[-1]))
    case = result.case
    found = {"rows": rows(case), "faults": case.fault_names, "padding": str(case.steps[0].padding), **case.config}
    found["tokens"] = [step.tokens for step in case.steps]
    assert {key: found[key] for key in minimum} == minimum
    assert result.complete
    assert result.case.seed == BIG.seed


def test_it_says_what_was_taken_away():
    explain = reduce(BIG, lambda cases: has(cases[-1], "nan_rows")).explain
    assert "steps: 3 → 1" in explain
    assert "rows: 322 → 1" in explain
    assert "faults: extreme, nan_rows, ties → nan_rows" in explain
    assert "top_k: 8 → 1" in explain
    assert not any(line.startswith("cases before it") for line in explain)


def test_a_sequence_is_reduced_to_culprit_and_victim():
    before = tuple(toy(16, 4, 9, ["nan_rows"] if n == 13 else ["ties"], seed=n) for n in range(32))

    def stale(cases):
        return any(has(case, "nan_rows") for case in cases[:-1]) and len(cases[-1].experts) > 2

    result = reduce(toy(61, 8, 33, ["ties"]), stale, before)
    [culprit] = result.before
    assert culprit.seed == 13
    assert (culprit.fault_names, culprit.steps[0].tokens, len(culprit.experts)) == (("nan_rows",), 1, 1)
    assert (result.case.fault_names, result.case.steps[0].tokens, len(result.case.experts)) == ((), 1, 3)
    assert "cases before it: 32 → 1" in result.explain


def test_history_that_is_not_needed_goes():
    result = reduce(toy(), lambda cases: True, tuple(toy(seed=n) for n in range(9)))
    assert result.before == ()


def test_no_rows_becomes_one_row_unless_it_matters():
    empty = toy(rows=0)
    assert rows(reduce(empty, lambda cases: True).case) == ["0"]
    assert rows(reduce(empty, lambda cases: not cases[-1].steps[0].rows).case) == [""]


def test_the_budget_ends_it_with_the_best_so_far():
    now = 0.0

    def clock():
        return now

    def slow(cases):
        nonlocal now
        now += 1.0
        return has(cases[-1], "nan_rows")

    result = Reducer(SPACE, slow, 5.0, clock=clock).run(BIG)
    assert (result.complete, result.tries) == (False, 5)
    assert has(result.case, "nan_rows")
    assert result.case != BIG


def test_the_experts_that_matter_are_found_wherever_they_stand():
    def fails(cases):
        return {37, 158} <= set(cases[-1].experts)

    result = reduce(toy(experts=160, top_k=22), fails)
    assert str(result.case.experts) == "37,158"
    assert result.tries < 200


@pytest.mark.parametrize("target", ["experts_bf16@torch", "align@torch"])
def test_of_a_rich_config_only_what_is_needed_is_left_after_few_tries(target):
    """On a GPU a try takes two seconds, and what nobody had time to take away made one defect into several findings."""
    op = target.partition("@")[0]
    space = get_space(op)
    if op == "align":
        config = {"block_size": 256, "edge": "left", "expert_map": "permuted", "experts": "0-383", "ids_dtype": "int64",
                  "out": False, "top_k": 17}  # fmt: skip
    else:
        config = {"activation": "swiglu_oai", "bias": "float32", "dialect": "minus_one", "dtype": "float16",
                  "edge": "left", "expert_map": "permuted", "experts": "0-256", "gate_layout": "interleaved",
                  "hidden": 72, "intermediate": 1408, "magnitude": 7, "out": True, "recipe": "dense", "top_k": 9,
                  "weight_on_input": False, "weight_scale": -14}  # fmt: skip
    case = Case(op, config, (Step(Labels()),), 7, target=target)
    space.validate(case)
    result = Reducer(space, lambda cases: not cases[-1].steps[0].tokens, 60.0, tries=9).run(case)
    always = {"T=0", "slots<E"}  # the latter says the same of align
    assert set(needed_features(space, result.case)) <= always
    assert result.complete
    left = Reducer(space, lambda cases: cases[-1].config["edge"] == "left", 60.0, tries=16).run(case).case
    assert set(needed_features(space, left)) - always == {"edge=left"}


def test_the_config_does_not_lead_from_one_defect_to_another():
    """With one expert in place of 60, the rows of NaN would fail too, and might be what is left."""

    def fails(cases):
        return has(cases[-1], "ties") or (has(cases[-1], "nan_rows") and len(cases[-1].experts) == 1)

    case = reduce(toy(60, 8, 33, ["nan_rows", "ties"]), fails).case
    assert case.fault_names == ("ties",)


def test_an_invalid_candidate_is_never_run():
    class Sloppy(type(SPACE)):
        def simplify(self, case):
            yield case.with_config(experts="0")  # leaves top_k above the number of experts
            yield from super().simplify(case)

    def fails(cases):
        SPACE.validate(cases[-1])
        return int(cases[-1].config["top_k"]) >= 2

    assert Reducer(Sloppy(), fails, 60.0).run(BIG).case.config["experts"] == "0-1"
    with pytest.raises(CaseError):
        SPACE.validate(BIG.with_config(experts="0"))


def test_a_space_that_runs_in_circles_does_not_hang_it():
    class Circular(type(SPACE)):
        def simplify(self, case):
            yield case.with_config(bias=not case.config["bias"])

    result = Reducer(Circular(), lambda cases: True, 60.0).run(BIG)
    assert result.complete


def test_the_same_verdicts_take_the_same_way():
    def fails(cases):
        return sum(step.tokens for step in cases[-1].steps) % 3 == 1 or has(cases[-1], "nan_rows")

    runs = [reduce(BIG, fails) for _ in range(2)]
    assert runs[0] == runs[1]


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_it_never_leaves_any_predicate_and_ends_at_a_local_minimum(seed, density):
    """A predicate that holds here and there, as a flaky-looking but deterministic bug does."""

    def fails(cases):
        return cases[-1] == BIG or random.Random(f"{seed}{cases[-1].digest}").randrange(4) < density

    result = reduce(BIG, fails)
    assert result.complete
    for simpler in SPACE.simplify(result.case):
        assert not fails((simpler,)) or simpler == BIG


@given(st.sets(st.integers(0, 300), min_size=1), st.data())
def test_ddmin_finds_the_one_needed_subset(items, data):
    needed = data.draw(st.sets(st.sampled_from(sorted(items)), min_size=1, max_size=4))
    assert set(ddmin(sorted(items), lambda kept: needed <= set(kept))) == needed


def test_ddmin_costs_little_for_one_culprit():
    tries = 0

    def accept(kept):
        nonlocal tries
        tries += 1
        return 4242 in kept

    assert ddmin(range(8191), accept) == (4242,)
    assert tries <= 2 * 13


def test_ddmin_may_end_empty_only_if_told():
    assert ddmin((1, 2), lambda kept: True, may_be_empty=True) == ()
    assert len(ddmin((1, 2), lambda kept: True)) == 1
    assert ddmin((), lambda kept: True) == ()


def test_faults_follow_their_rows():
    step = replace(BIG.steps[1], faults=(Fault("nan_rows", "logits", Labels.parse("40-50")), Fault("extreme", "bias")))
    case = replace(BIG, steps=(step,))
    result = reduce(case, lambda cases: 45 in cases[-1].steps[0].rows and has(cases[-1], "nan_rows"))
    assert str(result.case.steps[0].faults[0].rows) == "45"
