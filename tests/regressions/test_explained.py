"""Each finding of the router campaigns, given again by a router with the flaw that explains it: docs/targets.md.

`benchmarks/results/h200-upstream-routers.json` holds what reports say of the released kernels' answers on a GPU. The
routers of `emulated.py`, written from the causes, must give all of that again, to the last digit that was told; none of
it on the simpler cases on which the reducer saw it go; and sound routers give nothing of the kind. So no finding is a
false alarm, and none is put down to a cause that does not explain it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz.campaign.confirm import holds
from moe_fuzz.case import Case
from moe_fuzz.execute.runner import Runner
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.targets import sglang, vllm
from tests.gpu.telling import told

HERE = Path(__file__).parent
RESULT = HERE.parents[1] / "benchmarks" / "results" / "h200-upstream-routers.json"
CAMPAIGNS = json.loads(RESULT.read_text(encoding="utf-8"))["campaigns"]
FOUND = {found["id"]: (campaign["target"], found) for campaign in CAMPAIGNS for found in campaign["findings"]}
EMPTY = {id_ for id_, (_, found) in FOUND.items() if found["check"] == "error"}
MINIMAL = sorted(id_ for id_, (_, found) in FOUND.items() if found["minimal"] and id_ not in EMPTY)
EACH = pytest.mark.parametrize("id_", sorted(FOUND.keys() - EMPTY))
#: What the libraries' operators take: the reducer tried nothing else.
TAKES = {
    "topk_softmax@vllm": vllm._CAPABILITIES,
    "topk_sigmoid@vllm": vllm._CAPABILITIES,
    "grouped_topk@vllm": vllm._GROUPED_CAPABILITIES,
    "topk_softmax@sglang": replace(sglang._CAPABILITIES, bias=False),
    "topk_sigmoid@sglang": sglang._CAPABILITIES,
    "grouped_topk@sglang": sglang._GATE_CAPABILITIES,
}
#: The numbers of groups that cases could have then: of no other one did the reducer see anything.
THEN = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64)
Seen = list[tuple[str, str, list[int], str]]


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner("cpu")


def emulated(target: str) -> str:
    op, _, provider = target.partition("@")
    return f"{op}@{HERE / 'emulated.py'}:{provider}_{op}"


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
    want = recorded(found)
    assert want
    assert answer(runner, case_of(found), emulated(target)) == want


@pytest.mark.parametrize("id_", MINIMAL)
def test_its_cause_goes_where_the_reducer_saw_it_go(id_: str, runner: Runner) -> None:
    """A finding is minimal: on no simpler case that its target takes did it fail in this way."""
    target, found = FOUND[id_]
    case, own = case_of(found), emulated(target)
    space, info = get_space(case.op), replace(runner.describe(own), capabilities=TAKES[target])
    simpler = [replace(one, target=own) for one in space.simplify(case)]
    simpler = [one for one in simpler if one.config.get("n_group", 1) in THEN]
    for one in (one for one in simpler if not space.refusal(one, info)):
        verdict = runner.run(one, own, RunOptions())
        assert not holds(verdict, (found["check"], found["symptom"])), told(verdict, one)


@EACH
@pytest.mark.interpreter
def test_a_sound_router_gives_another(id_: str, runner: Runner) -> None:
    target, found = FOUND[id_]
    seen = answer(runner, case_of(found), f"{target.partition('@')[0]}@builtin")
    assert not seen
