"""The routing checks: silent on the reference's answers, loud on every wrong one, and vacuity is noticed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import torch

from moe_fuzz import checks as registry
from moe_fuzz import strategies
from moe_fuzz.case import Case, Step
from moe_fuzz.checks.families import FAMILIES
from moe_fuzz.checks.routing import binding
from moe_fuzz.checks.routing.observation import REFERENCES, Outputs, RoutingObservation
from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.inputs import Inputs
from moe_fuzz.ops.routing.inputs import materialize
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.verdict import Violation

SPACE = get_space("topk_softmax")
GROUPED = get_space("grouped_topk")
STRICT = Contract(
    deterministic=True, batch_invariant=True, ties="lowest_index_first", ordered=True, padding=PADDING_DIALECTS
)
INFO = TargetInfo("topk_softmax@reference", "topk_softmax", "reference", contract=STRICT,
                  capabilities=Capabilities(alignment=1))  # fmt: skip
CHECKS = registry.CHECKS[FAMILIES["topk_softmax"].name]


def answer(op: str, inputs: Inputs) -> Outputs:
    arguments = {**inputs.plain, **inputs.options}
    return Outputs(*REFERENCES[op](arguments.pop("logits"), arguments.pop("top_k"), **arguments))


def reference(inputs: Inputs) -> Outputs:
    return answer("topk_softmax", inputs)


def observe(case: Case, call=None) -> RoutingObservation:
    inputs, call = materialize(case, 0), call or partial(answer, case.op)
    return RoutingObservation(case, 0, INFO, inputs, call(inputs), call)


def judge(seen: RoutingObservation) -> dict[str, Violation]:
    return {name: found[0] for name, check in CHECKS.items() if (found := check(seen))}


def plain_case(rows: int = 6, experts: int = 16, top_k: int = 4, seed: int = 3, **config: object) -> Case:
    whole = {**SIMPLEST, "experts": str(Labels.range(experts)), "top_k": top_k} | config
    case = Case("topk_softmax", whole, (Step(Labels.range(rows), Labels.range(rows).last(2)),), seed)
    SPACE.validate(case)
    return case


def test_the_spaces_checks_are_the_registered_ones():
    by_worker = {"error", "capture", "fence", "canary"}  # seen where the target runs, not by looking at its outputs
    assert set(GROUPED.checks) == set(CHECKS) | by_worker
    assert set(SPACE.checks) == set(GROUPED.checks) - {"shared", "expert_map"}


@pytest.mark.parametrize("op", sorted(REFERENCES))
def test_no_alarm_on_the_reference_over_the_whole_grid(op):
    proved, space = 0, get_space(op)
    for case in islice(strategies.grid(space, replace(INFO, op=op), "cpu", 5), 100):
        seen = observe(case)
        found = judge(seen)
        if case.config["is_padding"] and case.config["padding"] == "garbage":
            for name in ("finite", "ids", "shared", "expert_map"):  # the reference leaves such rows as they were
                found.pop(name, None)
        assert not found, f"{space.label(case)}: {found}"
        proved += not binding.binding(seen)
    assert proved > 45


def grouped_case(seed: int = 3, **config: object) -> Case:
    groups = {"n_group": 4, "topk_group": 2, "n_shared": 2, "expert_map": True}
    whole = {**GROUPED.simplest, "experts": "0-15", "top_k": 4, **groups} | config
    case = Case("grouped_topk", whole, (Step(Labels.range(12)),), seed)
    GROUPED.validate(case)
    return case


def test_wrong_slots_and_wrong_ids_are_named():
    seen = observe(grouped_case())
    weights, ids = seen.outputs.weights, seen.outputs.ids
    assert not judge(seen)

    def found(weights=weights, ids=ids) -> set[str]:
        return set(judge(seen.with_outputs(Outputs(weights, ids)))) - {"determinism", "isolation", "batch_invariance"}

    def changed(tensor, slot, value):
        other = tensor.clone()
        other[3, slot] = value
        return other

    assert found(ids=changed(ids, 4, 15)) == {"shared"}
    assert found(weights=changed(weights, 5, 0.5)) == {"shared"}
    assert found(ids=changed(ids, 0, int(seen.ids[3, 0]))) == {"expert_map"}
    assert found(ids=changed(ids, 1, ids[3, 0])) == {"ids"}
    assert found(weights=changed(weights, 5, float("nan"))) == {"finite"}


def test_groups_ignored_are_a_wrong_selection():
    symptoms = set()
    for seed in range(20):
        seen = observe(grouped_case(seed))
        free = seen.right_answer(topk_group=4)
        if torch.equal(free.ids, seen.outputs.ids):
            continue
        violation = judge(seen.with_outputs(free))["selection"]
        symptoms.add(violation.symptom)
        assert "groups ignored" in dict(binding.wrong_answers(seen))
        assert not binding.binding(seen)
    assert symptoms == {"group"}


def test_an_inversion_inside_a_group_that_stays_is_told_as_such():
    case = grouped_case(n_shared=0, expert_map=False, top_k=3)
    inputs = materialize(case, 0)
    inputs.plain["logits"][:] = torch.tensor([4.0, 3.0, 2.0, 1.0, 3.5, 0.0, -1.0, -2.0] + [-5.0] * 8)
    right = answer(case.op, inputs)
    assert right.ids[0].tolist() == [0, 4, 1]
    for ids, symptom in (([0, 4, 2], "inversion"), ([0, 4, 8], "inversion"), ([0, 1, 2], "group")):
        wrong = Outputs(right.weights, torch.tensor([ids] * 12, dtype=torch.int32))
        seen = RoutingObservation(case, 0, INFO, inputs, wrong, partial(answer, case.op))
        assert judge(seen)["selection"].symptom == symptom


@pytest.mark.parametrize("tied", [False, True])
def test_ties_across_groups_fall_to_the_lowest_group_where_declared(tied):
    """Groups 0 to 3 hold the same but for one value in group 2; taking groups 1 and 3 is a choice that ties allow."""
    case = grouped_case(n_shared=0, expert_map=False, topk_group=1, top_k=2)
    inputs = materialize(case, 0)
    inputs.plain["logits"][:] = torch.tensor([3.0, 2.0, 1.0, 0.0] * 4)
    if not tied:
        inputs.plain["logits"][:, 1] -= 0.5  # of the two best, only one is the same

    def call(inputs: Inputs) -> Outputs:
        scores = torch.softmax(inputs.plain["logits"], dim=1)
        return Outputs(scores[:, 4:6], torch.tensor([[4, 5]] * len(scores), dtype=torch.int32))

    seen = RoutingObservation(case, 0, INFO, inputs, call(inputs), call)
    assert set(judge(seen)) == ({"ties"} if tied else set())


WRONG = {
    "structure": lambda o: Outputs(o.weights.double(), o.ids),
    "ids": lambda o: Outputs(o.weights, torch.zeros_like(o.ids)),
    "finite": lambda o: Outputs(o.weights * float("nan"), o.ids),
    "weights": lambda o: Outputs(o.weights * 1.00001, o.ids),
    "selection": lambda o: Outputs(o.weights, (o.ids + 1) % 16),
    "order": lambda o: Outputs(o.weights.flip(1), o.ids.flip(1)),
}


@pytest.mark.parametrize("name", sorted(WRONG))
@pytest.mark.parametrize("renormalize", [False, True])
def test_wrong_answers_are_named(name, renormalize):
    seen = observe(plain_case(renormalize=renormalize))
    assert not judge(seen)
    assert name in judge(seen.with_outputs(WRONG[name](seen.outputs)))


def test_one_bound_away_is_tolerated_and_two_are_not():
    seen = observe(plain_case(experts=8))
    score, error = seen.gather(seen.scores), seen.gather(seen.error)
    for factor, alarm in ((0.9, False), (2.0, True)):
        outputs = Outputs((score + factor * error).float(), seen.outputs.ids)
        assert ("weights" in judge(seen.with_outputs(outputs))) == alarm


@pytest.mark.parametrize("dialect", ["minus_one", "num_experts", "zero_weight"])
def test_each_dialect_is_asked_for(dialect):
    seen = observe(plain_case(is_padding=True, padding=dialect))
    assert not judge(seen)

    def blind(inputs: Inputs) -> Outputs:  # to padding flags
        return reference(inputs.replace(is_padding=torch.zeros_like(inputs.plain["is_padding"])))

    assert set(judge(observe(seen.case, blind))) == {"padding"}
    heavy = Outputs(seen.outputs.weights.clone(), seen.outputs.ids)
    heavy.weights[-1, 0] = 1e-30
    assert judge(seen.with_outputs(heavy))["padding"].symptom == "weight"


def test_ties_fall_either_way_unless_declared():
    case = plain_case()
    inputs = materialize(case, 0)
    inputs.plain["logits"].fill_(1.0)

    def highest(inputs: Inputs) -> Outputs:
        rows = len(inputs.plain["logits"])
        return Outputs(torch.full((rows, 4), 1 / 16), torch.arange(15, 11, -1, dtype=torch.int32).repeat(rows, 1))

    seen = RoutingObservation(case, 0, INFO, inputs, highest(inputs), highest)
    assert set(judge(seen)) == {"ties"}


def test_a_near_tie_may_be_inverted_and_a_clear_one_not():
    case = plain_case(experts=2, top_k=1, rows=2)
    for gap, alarm in ((2.0**-24, False), (2.0**-12, True)):
        inputs = materialize(case, 0)
        inputs.plain["logits"][:] = torch.tensor([1.0 + gap, 1.0])
        answer = Outputs(torch.full((2, 1), 0.5), torch.ones(2, 1, dtype=torch.int32))
        seen = RoutingObservation(
            case,
            0,
            INFO,
            inputs,
            answer,
            lambda i, answer=answer: Outputs(
                answer.weights[: len(i.plain["logits"])], answer.ids[: len(i.plain["logits"])]
            ),
        )
        assert ("selection" in judge(seen)) == alarm


def test_isolation_and_determinism_are_told_apart():
    case = plain_case(is_padding=True, padding="minus_one")

    def leaky(inputs: Inputs) -> Outputs:  # what stands in padding reaches the last bit of every weight
        outputs = reference(inputs)
        nudge = 1 + 2.0**-23 * bool(inputs.plain["logits"][inputs.plain["is_padding"]].sum() > 0)
        return Outputs(outputs.weights * nudge, outputs.ids)

    calls = iter(range(10_000))

    def moody(inputs: Inputs) -> Outputs:
        outputs = reference(inputs)
        return Outputs(outputs.weights * (1 + 2.0**-23 * (next(calls) % 3 == 0)), outputs.ids)

    found = [judge(observe(Case(case.op, case.config, case.steps, seed), leaky)) for seed in range(8)]
    assert "isolation" in {name for names in found for name in names}
    assert "determinism" not in {name for names in found for name in names}
    moods = {name for seed in range(8) for name in judge(observe(Case(case.op, case.config, case.steps, seed), moody))}
    assert moods == {"determinism"}


def test_a_judge_that_accepts_anything_is_noticed(monkeypatch):
    """The planted bug of binding: a tolerance so loose that an all-zero answer passes."""
    seen = observe(plain_case(renormalize=False, experts=16))
    assert binding.binding(seen) == []

    def loose(seen: RoutingObservation) -> list[Violation]:
        expected = seen.gather(seen.scores)
        return [] if torch.allclose(seen.weights, expected, atol=1.0) else [Violation("weights", "off", "off")]

    for name in ("ids", "selection"):
        monkeypatch.setitem(CHECKS, name, lambda seen: [])
    monkeypatch.setitem(CHECKS, "weights", loose)
    assert binding.binding(seen) == ["all zero", "rows exchanged", "two experts swapped"]


def test_a_case_without_defined_rows_proves_nothing():
    case = plain_case()
    inputs = materialize(case, 0)
    inputs.plain["logits"][:] = float("nan")
    seen = RoutingObservation(case, 0, INFO, inputs, reference(inputs), reference)
    assert not judge(seen)
    assert binding.binding(seen) == ["no row is defined"]
