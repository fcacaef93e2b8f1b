"""An op of another shape than a router's runs through the same engine: three tensors in, one out, weights that stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import pytest
import torch

from moe_fuzz import checks, ops
from moe_fuzz.case import Case, Step
from moe_fuzz.checks import families
from moe_fuzz.checks.family import Family, answered
from moe_fuzz.checks.relations import differs
from moe_fuzz.contract import Capabilities, Contract, TargetInfo
from moe_fuzz.execute.exhibit_general import general_step
from moe_fuzz.execute.runner import Runner
from moe_fuzz.fence import FenceOptions
from moe_fuzz.labels import Labels
from moe_fuzz.ops.inputs import Inputs, Result
from moe_fuzz.options import RunOptions
from moe_fuzz.targets.bind import Target
from moe_fuzz.verdict import PASS, VIOLATION, Verdict, Violation

HIDDEN = 4


@dataclass
class ScaleInputs(Inputs):
    """y[t] = factor * table[ids[t]] * x[t]"""

    fluid: ClassVar[tuple[str, ...]] = ("x", "ids")
    note: str = ""  # a field of its own goes along

    @property
    def results(self) -> dict[str, Result]:
        return {"y": (tuple(self.plain["x"].shape), self.plain["x"].dtype)}


def materialize(case: Case, step_index: int, device: torch.device | str = "cpu") -> ScaleInputs:
    rows = torch.tensor(list(case.steps[step_index].rows), device=device).view(-1, 1)
    x = (rows + torch.arange(HIDDEN) + case.stream(step_index)).to(torch.bfloat16)
    ids = rows.flatten().to(torch.int32) % len(case.experts)
    table = torch.arange(1, len(case.experts) + 1, dtype=torch.float32)
    return ScaleInputs({"factor": 2}, {"x": x, "table": table, "ids": ids}, {}, "kept")


@dataclass(frozen=True)
class Outputs:
    y: torch.Tensor


@dataclass(frozen=True)
class Observation:
    case: Case
    step_index: int
    info: TargetInfo
    inputs: ScaleInputs
    outputs: Outputs
    call: Any
    eager: Any = None
    budget: dict[str, float] = field(default_factory=dict)

    @property
    def shaped(self) -> bool:
        return self.outputs.y.shape == self.inputs.plain["x"].shape

    @cached_property
    def right(self) -> torch.Tensor:
        return scale(**{name: self.inputs.plain[name] for name in ("x", "table", "ids")}, factor=2)


def scale(x: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, *, factor: int = 1, out: Any = None) -> torch.Tensor:
    y = (factor * table[ids.long()].view(-1, 1) * x).to(x.dtype)
    return y if out is None else out.copy_(y)


def remembers_ids(x: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, *, factor: int = 1, out: Any = None) -> Any:
    """As what was read on the host and baked into a graph."""
    kept = _KEPT.setdefault(ids.data_ptr(), ids.clone())
    return scale(x, table, kept, factor=factor, out=out)


_KEPT: dict[int, torch.Tensor] = {}


def no_tensor(x: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, *, factor: int = 1) -> Any:
    return x.tolist()


def writes_alone(x: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, *, factor: int = 1, out: Any = None) -> None:
    scale(x, table, ids, factor=factor, out=out)


class ScaleSpace:
    op, family = "toy_scale", "toy"
    checks: ClassVar = {"structure": "", "exact": "", "again": ""}

    def refusal(self, case: Case, info: TargetInfo) -> str:
        return ""

    def validate(self, case: Case) -> None: ...


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def structure(seen: Observation) -> list[Violation]:
        return [] if seen.shaped else [Violation("structure", "y:shape", "no")]

    def exact(seen: Observation) -> list[Violation]:
        wrong = differs(seen.outputs, Outputs(seen.right))
        return [Violation("exact", "y", "wrong", "y", (int(wrong.nonzero()[0]),))] if wrong.any() else []

    def again(seen: Observation) -> list[Violation]:
        assert seen.inputs.note == "kept"
        fewer = seen.inputs.replace(**{name: seen.inputs.plain[name][:1] for name in ("x", "ids")})
        assert fewer.note == "kept"
        other = seen.call(fewer)
        return [] if not differs(Outputs(seen.outputs.y[:1]), other).any() else [Violation("again", "y", "differs")]

    for name, function in (("structure", structure), ("exact", exact), ("again", again)):
        checks.check("toy", name, parity=name == "exact", relation=name == "again")(function)
    family = Family("toy", materialize, Outputs, Observation, lambda seen: [])
    monkeypatch.setattr(families, "FAMILIES", {**families.FAMILIES, "toy_scale": family})
    for module in ("steps", "exhibit_general", "exhibit_others"):
        monkeypatch.setattr(f"moe_fuzz.execute.{module}.FAMILIES", families.FAMILIES)
    monkeypatch.setattr(ops, "_SPACES", {**ops._SPACES, "toy_scale": ScaleSpace()})
    yield
    for registered in (checks.CHECKS, checks.PARITY, checks.RELATIONS):
        registered.pop("toy")


def run(function: Any, mode: str = "eager", out: bool = False, options: RunOptions | None = None) -> Verdict:
    runner = Runner("cpu")
    contract = Contract(deterministic=True, batch_invariant=True)
    info = TargetInfo("toy_scale@it", "toy_scale", "it", contract=contract, capabilities=Capabilities(out=True))
    runner._targets["toy_scale@it"] = Target(info, function, {"factor": "factor", "out": "out"}, ("x", "table", "ids"))
    steps = tuple(Step(Labels.parse(rows)) for rows in ("0-2", "4-6", "3-5"))
    case = Case("toy_scale", {"experts": "0-4", "edge": "right", "out": out}, steps, 7, mode)
    return runner.run(case, "toy_scale@it", options or RunOptions())


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("mode", ["eager", "graph", "piecewise"])
@pytest.mark.parametrize("out", [False, True])
def test_three_tensors_in_and_one_out(mode: str, out: bool) -> None:
    verdict = run(scale, mode, out)
    assert (verdict.kind, verdict.violations, verdict.parity) == (PASS, (), True)


@pytest.mark.usefixtures("toy")
def test_what_a_graph_keeps_of_an_integer_tensor_shows() -> None:
    _KEPT.clear()
    verdict = run(remembers_ids, "graph", options=RunOptions(fence=FenceOptions(own="off")))
    assert (verdict.kind, verdict.violations[0].check, verdict.violations[0].step) == (VIOLATION, "exact", 0)


@pytest.mark.usefixtures("toy")
def test_what_is_no_result_says_what_is() -> None:
    (found,) = run(no_tensor).violations
    assert (found.check, found.symptom, found.expected) == ("structure", "result", "y")
    assert found.message.endswith("the result is not a tensor y")
    (found,) = run(writes_alone, out=True).violations
    assert found.message.endswith("y, but None: what was written into `out` is returned, too")


@pytest.mark.usefixtures("toy")
def test_a_graph_of_any_op_has_what_its_script_needs() -> None:
    target = Target(TargetInfo("toy_scale@it", "toy_scale", "it"), scale, {}, ("x", "table", "ids"))
    case = Case("toy_scale", {"experts": "0-4", "edge": "right"}, (Step(Labels.range(1)),), 7, "graph")
    step = general_step(case, 0, target)
    assert step["fluid"] == ["x", "ids"]
    assert set(step["tensors"]) == set(materialize(case, 0).plain)
    assert set(step["blank"]) <= set(step["fluid"])
    assert list(step["results"]) == ["y"]


def test_what_was_computed_without_outputs_stays() -> None:
    case = Case("toy_scale", {"experts": "0-4"}, (Step(Labels.range(3)),), 7)
    inputs = materialize(case, 0)
    before = Observation(case, 0, TargetInfo("toy_scale@it", "toy_scale", "it"), inputs, None, None)  # type: ignore[arg-type]
    right = before.right
    after = answered(before, Outputs(right))
    assert after.right is right
    assert after.outputs.y is right
    assert replace(before).right is not right
