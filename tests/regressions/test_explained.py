"""Each finding of the router campaigns, given again by a router with the flaw that explains it: docs/targets.md.

`benchmarks/results/h200-upstream-routers.json` holds what the released kernels answered on a GPU. The routers of
`emulated.py`, written from the causes, must answer the same to the last digit, and sound ones otherwise; so no finding
is a false alarm, and none is put down to a cause that it does not have.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz.case import Case
from moe_fuzz.execute.runner import Runner
from moe_fuzz.options import RunOptions
from tests.gpu.telling import told

HERE = Path(__file__).parent
RESULT = HERE.parents[1] / "benchmarks" / "results" / "h200-upstream-routers.json"
CAMPAIGNS = json.loads(RESULT.read_text(encoding="utf-8"))["campaigns"]
FOUND = {found["id"]: (campaign["target"], found) for campaign in CAMPAIGNS for found in campaign["findings"]}
EMPTY = {id_ for id_, (_, found) in FOUND.items() if found["check"] == "error"}
EACH = pytest.mark.parametrize("id_", sorted(FOUND.keys() - EMPTY))
Seen = list[tuple[str, str, list[int], str]]


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner("cpu")


def case_of(found: dict[str, Any]) -> Case:
    return Case.loads(found["replay"])


def recorded(found: dict[str, Any]) -> Seen:
    return sorted((v["check"], v["symptom"], v["where"], v["got"]) for v in found["violations"])


def answer(runner: Runner, case: Case, target: str) -> Seen:
    verdict = runner.run(replace(case, target=target), target, RunOptions())
    assert verdict.kind in ("pass", "violation"), told(verdict, case)
    return sorted((v.check, v.symptom, list(v.where or ()), v.got) for v in verdict.violations)


def test_there_are_findings_of_each_router() -> None:
    assert len({target for target, _ in FOUND.values()}) == len(CAMPAIGNS) == 6
    assert len(FOUND) >= 50


def test_those_that_raise_have_no_tokens() -> None:
    assert len(EMPTY) == 8
    assert all(case_of(FOUND[id_][1]).steps[0].tokens == 0 for id_ in EMPTY)


@EACH
def test_its_cause_gives_the_same_answer(id_: str, runner: Runner) -> None:
    target, found = FOUND[id_]
    op, _, provider = target.partition("@")
    want = recorded(found)
    assert want
    assert answer(runner, case_of(found), f"{op}@{HERE / 'emulated.py'}:{provider}_{op}") == want


@EACH
@pytest.mark.interpreter
def test_a_sound_router_gives_another(id_: str, runner: Runner) -> None:
    target, found = FOUND[id_]
    seen = answer(runner, case_of(found), f"{target.partition('@')[0]}@builtin")
    assert not seen
