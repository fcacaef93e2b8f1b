"""The planted bugs that show under CUDA graphs alone: their cases can show them, which is known without a GPU.

Two were chosen by their sizes once, and passed on the first GPU: whole numbers give the same sums in any order, and a
scale that is a power of two the same blocks by any arithmetic.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_fuzz.case import Case
from moe_fuzz.planted.entry import Planted
from moe_fuzz.verdict import PASS, VIOLATION
from tests.gpu.telling import told
from tests.regressions.captured import DIVISION, verdict_of
from tests.regressions.test_upstream import DEVICE, TWINS, bug_of, case_of, is_it

GRAPHS = [stem for stem, record in TWINS.items()
          if record.get("case", {}).get("mode") in ("graph", "piecewise")
          and (stem in DEVICE or bug_of(record).capabilities.get("one_host_path"))]  # fmt: skip
#: Those that take another way while they are captured, and are right on both.
BRANCHES = [stem for stem in GRAPHS if TWINS[stem]["upstream"] == "flashinfer#4841"]


def of(stem: str, **config: object) -> tuple[Planted, Case]:
    record = TWINS[stem]
    case = case_of(record, record["twin"])
    return bug_of(record), replace(case, config={**case.config, **config})  # type: ignore[arg-type]


def test_there_are_such_cases() -> None:
    assert len(GRAPHS) >= 12
    assert len(BRANCHES) == 4


@pytest.mark.parametrize("division", DIVISION)
@pytest.mark.parametrize("stem", GRAPHS)
def test_its_case_shows_the_bug(stem: str, division: str) -> None:
    verdict = verdict_of(*of(stem), division)
    assert is_it(TWINS[stem], verdict), told(verdict, of(stem)[1])


@pytest.mark.parametrize("division", DIVISION)
@pytest.mark.parametrize("stem", BRANCHES)
def test_each_of_its_steps_does(stem: str, division: str) -> None:
    bug, case = of(stem)
    for step in (step for step in case.steps if not any(fault.name == "stale_rows" for fault in step.faults)):
        verdict = verdict_of(bug, replace(case, steps=(step,)), division)
        assert is_it(TWINS[stem], verdict), told(verdict, replace(case, steps=(step,)))


@pytest.mark.parametrize("stem", BRANCHES)
def test_it_is_the_branch_that_shows_it(stem: str) -> None:
    verdict = verdict_of(*of(stem), told=False)
    assert verdict.kind == PASS, told(verdict)


@pytest.mark.parametrize(("name", "config"), [
    ("other-order", {"recipe": "integer"}), ("reciprocals", {"global_scale": "power"}),
])  # fmt: skip
def test_a_case_that_cannot_show_it_is_told_from_one_that_can(name: str, config: dict[str, object]) -> None:
    stem = f"flashinfer-4841-{name}-in-a-graph"
    assert verdict_of(*of(stem)).kind == VIOLATION
    assert verdict_of(*of(stem, **config)).kind == PASS
