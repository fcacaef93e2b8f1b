"""What steps compute together is what each would compute alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.checks.experts.family import FAMILY
from moe_fuzz.checks.experts.observation import ExpertsObservation
from moe_fuzz.checks.experts.together import together
from moe_fuzz.contract import Capabilities, TargetInfo
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.options import RunOptions

from .experts_seen import STEADY, case_of, fp4_case_of

_NAMES = ("expert", "kept", "sound", "real", "random", "claimed", "hopeless")


def _steps(case: Case, *faults: tuple[str, str]) -> Case:
    """Three steps of other tokens: as they are, with a flagged row, and with a fault each on some rows."""
    some = Labels.range(4).last(2)
    laid = tuple(Fault(name, tensor, some if tensor in ("x", "weights", "ids") else None) for name, tensor in faults)
    each = [(Labels.range(6), Labels.range(0), ()), (Labels.range(9), Labels.range(9).last(2), ()),
            (Labels.range(4), Labels.range(0), laid)]  # fmt: skip
    return replace(case, mode="graph", steps=tuple(Step(rows, padding, found) for rows, padding, found in each))


def _alone(case: Case, index: int, info: TargetInfo) -> ExpertsObservation:
    inputs = FAMILY.materialize(case, index, "cpu")
    seen: ExpertsObservation = FAMILY.observe(case, index, info, inputs, None, None, None)
    return seen


def _info(case: Case) -> TargetInfo:
    return TargetInfo(f"{case.op}@x", case.op, "x", contract=STEADY, capabilities=Capabilities(alignment=1))


_CASES = {
    "dense": _steps(case_of()),
    "nan and inf": _steps(case_of(recipe="dense"), ("nan_rows", "x"), ("inf_rows", "x")),
    "integer": _steps(case_of(recipe="integer"), ("nan_rows", "x")),
    "one-hot": _steps(case_of(recipe="one_hot", bias="dtype")),
    "weight on input": _steps(case_of(recipe="integer", weight_on_input=True)),
    "nvfp4": _steps(fp4_case_of(activations="nvfp4")),
}


@pytest.mark.parametrize("name", _CASES)
def test_each_step_has_what_it_would_have_alone(name: str) -> None:
    case = _CASES[name]
    info = _info(case)
    found = together(case, info, [FAMILY.materialize(case, index, "cpu") for index in range(3)])  # type: ignore[misc]
    assert all(found)
    for index, known in enumerate(found):
        seen = _alone(case, index, info)
        for part in _NAMES:
            assert torch.equal(known[part], getattr(seen, part)), part
        if seen.inputs.exact:
            assert torch.equal(known["exact"][1], seen.exact[1])
            assert torch.equal(known["exact"][0][seen.exact[1]], seen.exact[0][seen.exact[1]])
        numbers: Any = known["numbers"]
        torch.testing.assert_close(numbers.value, seen.numbers.value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(numbers.bound, seen.numbers.bound, rtol=1e-6, atol=1e-30)
        rows = seen.random
        if bool(rows.any()):
            torch.testing.assert_close(numbers.variance[rows], seen.numbers.variance[rows], rtol=1e-6, atol=0.0)
            torch.testing.assert_close(numbers.spread[rows], seen.numbers.spread[rows], rtol=1e-6, atol=0.0)
        assert torch.equal(numbers.open, seen.numbers.open)


def test_a_step_with_other_weights_stands_alone() -> None:
    case = _steps(fp4_case_of(scale_layout="swizzled"), ("poison_scales", "w13_scales"))
    inputs = [FAMILY.materialize(case, index, "cpu") for index in range(3)]
    found = together(case, _info(case), inputs)  # type: ignore[arg-type]
    assert [bool(known) for known in found] == [True, True, False]


def test_the_small_unit_of_another_token_leaves_known_bits_known() -> None:
    """Rows of one step are judged together with those of others: what is known of a row hangs on that row."""
    case = _steps(case_of(recipe="integer"))
    inputs = [FAMILY.materialize(case, index, "cpu") for index in range(3)]
    inputs[2].plain["x"] = inputs[2].plain["x"] * 2.0**-20
    known = together(case, _info(case), inputs)[0]["exact"][1]  # type: ignore[arg-type]
    assert torch.equal(known, _alone(case, 0, _info(case)).exact[1])
    assert known.any()


def test_replays_are_judged_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound of nothing, given to all steps at once, is what a replay is judged by."""
    asked: list[int] = []

    def nothing(case: Case, info: TargetInfo, steps: Any) -> Any:
        asked.append(len(steps))
        found = together(case, info, steps)
        return [{**known, "limits": tuple(limit - 1e3 for limit in known["limits"])} for known in found]

    case, runner = _CASES["dense"], Runner("cpu")
    assert runner.run(case, "experts_bf16@torch", RunOptions()).kind == "pass"
    monkeypatch.setitem(FAMILY.__dict__, "together", nothing)
    verdict = runner.run(case, "experts_bf16@torch", RunOptions())
    assert asked == [3]
    assert verdict.key == ("bound", "off")
