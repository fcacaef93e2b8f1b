"""The routing checks: silent on the reference's answers, loud on every wrong one, and vacuity is noticed."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from moe_fuzz import checks as registry
from moe_fuzz import strategies
from moe_fuzz.case import Case, Step
from moe_fuzz.checks import binding, metamorphic, routing, structural  # noqa: F401 - they register
from moe_fuzz.checks.observation import Outputs, RoutingObservation
from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.routing.inputs import Inputs, materialize
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.reference.routing import topk_softmax
from moe_fuzz.verdict import Violation

SPACE = get_space("topk_softmax")
STRICT = Contract(
    deterministic=True, batch_invariant=True, ties="lowest_index_first", ordered=True, padding=PADDING_DIALECTS
)
INFO = TargetInfo("topk_softmax@reference", "topk_softmax", "reference", contract=STRICT,
                  capabilities=Capabilities(alignment=1))  # fmt: skip
CHECKS = registry.CHECKS["routing"]


def reference(inputs: Inputs) -> Outputs:
    plain = inputs.plain
    weights, ids = topk_softmax(plain["logits"], inputs.top_k, bias=plain.get("bias"),
                                is_padding=plain.get("is_padding"), **inputs.options)  # fmt: skip
    return Outputs(weights, ids)


def observe(case: Case, call=reference) -> RoutingObservation:
    inputs = materialize(case, 0)
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
    assert set(SPACE.checks) == set(CHECKS) | by_worker


def test_no_alarm_on_the_reference_over_the_whole_grid():
    proved = 0
    for case in islice(strategies.grid(SPACE, INFO, "cpu", 5), 400):
        seen = observe(case)
        found = judge(seen)
        if case.config["is_padding"] and case.config["padding"] == "garbage":
            found.pop("finite", None), found.pop("ids", None)  # the reference leaves such rows as they were
        assert not found, f"{SPACE.label(case)}: {found}"
        proved += not binding.binding(seen)
    assert proved > 200


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
    assert binding.binding(seen) == ["all zero", "stale", "two experts swapped"]


def test_a_case_without_defined_rows_proves_nothing():
    case = plain_case()
    inputs = materialize(case, 0)
    inputs.plain["logits"][:] = float("nan")
    seen = RoutingObservation(case, 0, INFO, inputs, reference(inputs), reference)
    assert not judge(seen)
    assert binding.binding(seen) == ["no row is defined"]
