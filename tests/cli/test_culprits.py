"""A campaign over several targets that share a process: what one leaves behind, another may answer for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from moe_fuzz.case import Case, Step, loads_sequence, targets_of
from moe_fuzz.labels import Labels
from moe_fuzz.ops.routing.space import SIMPLEST

#: One workspace for two functions, as a serving library has: `sig` leaves something in it, `soft` adds it.
SHARED = '''
import torch
from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.reference.routing import topk_sigmoid, topk_softmax

LEFT = vars(torch).setdefault("_left_by_the_tests", [])  # this file is loaded once for each function
CAN = declares(Contract(), Capabilities(bias=False, is_padding=False, scale=False))

@CAN
def soft(logits, top_k, *, renormalize=False):
    weights, ids = topk_softmax(logits, top_k, renormalize=renormalize)
    if LEFT and weights.numel():
        weights = weights + LEFT.pop()
    return weights, ids

@CAN
def sig(logits, top_k, *, renormalize=False):
    LEFT.append(0.25)
    return topk_sigmoid(logits, top_k, renormalize=renormalize)
'''


def test_the_culprit_is_of_another_target(call: Callable, tmp_path: Path) -> None:
    file = tmp_path / "shared.py"
    file.write_text(SHARED)
    victim, culprit = f"topk_softmax@{file}:soft", f"topk_sigmoid@{file}:sig"
    ran = call("run", victim, culprit, "--device", "cpu", "--workers", "1", "--seed", "1", "--cases", "80",
               "--minimize-time", "20", "--state-dir", "state")  # fmt: skip
    assert ran.code == 1, ran.err
    folder = min((tmp_path / "state" / "findings").iterdir())
    assert json.loads((folder / "finding.json").read_text())["target"] == victim
    before, case = loads_sequence((folder / "sequence.json").read_text())
    assert (before.target, case.target) == (culprit, victim)
    assert ([step.tokens for step in before.steps], len(before.experts)) == ([1], 1)  # by the rules of its own op
    report = (folder / "report.md").read_text()
    assert f"fails after its culprit, {before.op} T=1 E=1 k=1" in report
    assert f" of {culprit}" in report
    assert "`python repro.py`" not in report
    assert "a script calls one target" in (folder / "repro.py").read_text()

    again = call("replay", str(folder), "--device", "cpu")
    assert (again.code, again.out.split()[0]) == (1, "FAILED"), again.err
    assert f"on {culprit}" in call("show", str(folder)).out
    assert targets_of((before, case), "topk_softmax@torch") == (culprit, "topk_softmax@torch")


def test_where_cases_that_share_a_process_run() -> None:
    def on(*names: str) -> tuple[Case, ...]:
        config = {**SIMPLEST, "experts": "0", "top_k": 1}
        return tuple(Case("topk_softmax", config, (Step(Labels.range(1)),), 1, target=name) for name in names)

    assert targets_of(on("a", "b", "", "a"), "a") == ("a", "b", "a", "a")
    assert targets_of(on("a", "b", "a"), "c") == ("c", "b", "c")  # a replay elsewhere moves what stood beside it
    assert targets_of(on("b", ""), "c") == ("b", "c")
    assert targets_of((), "c") == ()


def test_a_case_of_another_op_must_say_where_it_runs(call: Callable, tmp_path: Path) -> None:
    file = tmp_path / "sequence.json"
    case = {"moe_fuzz": 1, "op": "topk_sigmoid", "mode": "eager", "seed": 1, "steps": [{"rows": "0"}], "config": {
        "bias": False, "dtype": "float32", "edge": "right", "experts": "0", "is_padding": False, "magnitude": 0,
        "out": False, "padding": "distinct", "renormalize": False, "scale": 1.0, "top_k": 1}}  # fmt: skip
    for target, code in (("", 2), ("align@torch", 2), ("topk_sigmoid@torch", 0)):
        last = {**case, "op": "topk_softmax", "target": "topk_softmax@torch"}
        cases = [{**case, **({"target": target} if target else {})}, last]
        file.write_text(json.dumps({"moe_fuzz_sequence": 1, "cases": cases}))
        ran = call("replay", str(file), "--device", "cpu")
        assert ran.code == code, ran.err
        assert ("must name its target" in ran.err) is (not target)
        assert ("cannot run on align@torch" in ran.err) is (target == "align@torch")
