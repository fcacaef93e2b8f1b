"""`replay`, `minimize` and `findings`, with workers that judge without running."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.findings import write_finding
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case, dumps_sequence
from moe_fuzz.verdict import BROKEN, CRASH, OOM, PASS, REJECTED, UNJUDGED, VIOLATION, Verdict, Violation

DUPLICATE = Verdict(
    VIOLATION, (Violation("ids", "duplicate-id", "twice", "ids", (5, 1), "distinct", "0", site="f.py:3"),)
)
STATE = Path(".moe-fuzz")


@pytest.fixture
def kept(finding: Finding) -> Finding:
    with StateDir(STATE) as state:
        write_finding(state, finding)
    return finding


def always(verdict: Verdict) -> Callable[..., Verdict]:
    return lambda cases, options: verdict


@pytest.mark.parametrize(
    ("verdict", "word", "code", "said"),
    [
        (Verdict(PASS), "FIXED", 0, "passes"),
        (DUPLICATE, "FAILED", 1, "ids duplicate-id at ids[5, 1]: twice"),
        (Verdict(REJECTED, detail="k is too large"), "ERROR", 3, "k is too large"),
        (Verdict(REJECTED, stats={UNJUDGED: 1}), "ERROR", 3, "was not judged in time"),
        (Verdict(OOM), "FAILED", 1, "out-of-memory"),
        (Verdict(CRASH, (Violation("crash", "killed:SIGKILL", ""),)), "ERROR", 3, "killed from outside (SIGKILL)"),
        (Verdict(CRASH, (Violation("crash", "SIGABRT", "died"),)), "FAILED", 1, "crash SIGABRT"),
        (Verdict(VIOLATION), "FAILED", 1, "FAILED"),
    ],
)
def test_the_three_words(
    call: Callable, pool: Any, case: Case, verdict: Verdict, word: str, code: int, said: str
) -> None:
    pool.judge = always(verdict)
    ran = call("replay", case.inline())
    assert (ran.code, ran.out.split()[0]) == (code, word)
    assert said in ran.out


def test_one_json_document(call: Callable, pool: Any, kept: Finding) -> None:
    pool.judge = always(DUPLICATE)
    ran = call("replay", kept.id, "--json")
    data = json.loads(ran.out)
    assert (ran.code, data["answer"], data["exit_code"], data["same_failure"]) == (1, "FAILED", 1, True)
    assert (data["finding"], data["target"], data["device"]) == (kept.id, kept.target, pool.made["device"])
    assert [verdict["kind"] for verdict in data["verdicts"]] == ["violation"]
    assert data["violations"][0]["symptom"] == "duplicate-id"
    assert Case.from_json(data["case"]) == kept.case
    pool.judge = always(Verdict(PASS))
    data = json.loads(call("replay", kept.case.inline(), "--json", "--times", "2").out)
    assert (data["answer"], data["finding"], data["same_failure"], len(data["verdicts"])) == ("FIXED", None, None, 2)
    pool.unavailable = (kept.target,)
    ran = call("replay", kept.id, "--json")
    data = json.loads(ran.out)
    assert (ran.code, data["answer"], data["verdicts"]) == (3, "ERROR", [])
    assert "is not installed" in data["explanation"][0]


def test_a_finding_is_replayed_inside_the_fence_it_needs(call: Callable, pool: Any, finding: Finding) -> None:
    with StateDir(STATE) as state:
        write_finding(state, replace(finding, own="off"))
    assert call("findings").code == 0
    call("replay", finding.id)
    call("replay", finding.id, "--fence", "torch")
    call("replay", finding.case.inline())
    assert [options.fence.own for options in pool.options] == ["off", "torch", "torch"]
    assert replace(finding, own="all").replay == f"{finding.replay} --fence all"
    ran = call("replay", finding.id, "--fence", "al")
    assert ran.code == 2


def test_an_unavailable_target_is_an_error(call: Callable, pool: Any, case: Case) -> None:
    pool.unavailable = (case.target,)
    ran = call("replay", case.inline())
    assert (ran.code, ran.out.split()[0]) == (3, "ERROR")
    assert "is not installed" in ran.out
    assert not pool.ran


@pytest.mark.parametrize("command", ["replay", "minimize"])
def test_an_error_of_our_own_is_no_answer(call: Callable, pool: Any, case: Case, command: str) -> None:
    detail = "RuntimeError: no such row (inputs.py:7 in rows)\nTraceback (most recent call last): …"
    pool.judge = lambda cases, options: Verdict(BROKEN, detail=detail)
    ran = call(command, case.inline())
    assert ran.code == 4
    assert "moe-fuzz itself failed on this case: RuntimeError: no such row (inputs.py:7 in rows)" in ran.err
    assert "Traceback" in ran.err


def test_another_target(call: Callable, pool: Any, case: Case) -> None:
    assert "topk_softmax@torch" in call("replay", case.inline(), "--target", "topk_softmax@torch").out
    assert call("replay", case.inline(), "--target", "topk_softmax").code == 2  # two of them
    assert call("replay", replace(case, target="").inline()).code == 2  # none
    assert call("replay", replace(case, target="").inline(), "--target", "topk_softmax@torch").code == 0


def test_a_file_of_another_machine(call: Callable, pool: Any, case: Case) -> None:
    ran = call("replay", replace(case, target="topk_softmax@/there/kernels.py:router").inline())
    assert (ran.code, "there is no file /there/kernels.py" in ran.err) == (2, True)
    assert "say which: --target path/to/kernels.py:router" in ran.err


def test_a_finding_by_the_beginning_of_its_id(call: Callable, pool: Any, kept: Finding) -> None:
    pool.judge = always(DUPLICATE)
    ran = call("replay", kept.id[:4])
    assert ran.code == 1
    assert f"the same failure as in finding {kept.id}" in ran.out
    pool.judge = always(Verdict(CRASH, (Violation("crash", "SIGABRT", ""),)))
    assert "another failure than in finding" in call("replay", kept.id).out
    ran = call("replay", kept.id[:-1] + "z")
    assert ran.code == 2
    assert f"did you mean {kept.id}?" in ran.err


def test_a_prefix_of_two_findings(call: Callable, pool: Any, kept: Finding) -> None:
    with StateDir(STATE) as state:
        write_finding(state, replace(kept, id=kept.id[:6] + "ffff"))
    ran = call("replay", kept.id[:6])
    assert ran.code == 2
    assert "begins the ids of 2 findings" in ran.err


def test_what_fails_sometimes_is_tried_again(call: Callable, pool: Any, finding: Finding) -> None:
    with StateDir(STATE) as state:
        write_finding(state, replace(finding, reproduces="sometimes 1/3"))
    verdicts = iter([Verdict(PASS), DUPLICATE])
    pool.judge = lambda cases, options: next(verdicts)
    ran = call("replay", finding.id)
    assert ran.code == 1
    assert "failed on try 2 of 3" in ran.out
    pool.judge = always(Verdict(PASS))
    assert "passed 3 times" in call("replay", finding.id).out


def test_a_sequence_runs_in_one_process(call: Callable, pool: Any, case: Case) -> None:
    before = replace(case, seed=case.seed + 1)
    Path("sequence.json").write_text(dumps_sequence([before, case]))
    pool.judge = lambda cases, options: DUPLICATE if cases == (before, case) else Verdict(PASS)
    assert call("replay", "sequence.json").code == 1
    assert pool.ran == [(before, case)]


def test_a_memory_fault_is_located(call: Callable, pool: Any, case: Case) -> None:
    crash = Verdict(CRASH, (Violation("crash", "SIGSEGV", "died"),))

    def judge(cases: tuple[Case, ...], options: Any) -> Verdict:
        fence = options.fence
        reads = fence.access == "any" and fence.sides in ("both", "right")
        return crash if reads and (fence.hard is None or "logits" in fence.hard) else Verdict(PASS)

    pool.judge = judge
    ran = call("replay", case.inline())
    assert ran.code == 1
    assert "fence logits:right:read" in ran.out


def test_minimize(call: Callable, pool: Any, case: Case) -> None:
    pool.judge = lambda cases, options: DUPLICATE if cases[-1].steps[0].tokens >= 2 else Verdict(PASS)
    ran = call("minimize", case.inline(), "--output", "small.json")
    assert ran.code == 0, ran.err
    small = Case.load(Path("small.json"))
    assert small.steps[0].tokens == 2
    assert not small.fault_names
    assert f"moe-fuzz replay {small.inline()}" in ran.out.splitlines()
    again = call("minimize", "small.json")
    assert "already minimal" in again.out


def test_what_does_not_fail_is_not_minimized(call: Callable, pool: Any, case: Case) -> None:
    assert call("minimize", case.inline()).code == 2
    pool.judge = always(Verdict(REJECTED))
    assert call("minimize", case.inline()).code == 3


def test_findings(call: Callable, kept: Finding, tmp_path: Path) -> None:
    ran = call("findings")
    assert ran.code == 0
    assert ran.out.splitlines()[1].split()[:7] == [
        kept.id, kept.target, "ids", "duplicate-id", "contract", "1", "2026-11-21T03:26",
    ]  # fmt: skip
    (data,) = json.loads(call("findings", "--json").out)
    assert Finding.from_json(data) == kept
    assert call("findings", "--state-dir", "elsewhere").out == "no findings in elsewhere\n"
    assert not (tmp_path / "elsewhere").exists()


def test_a_damaged_finding_is_told_and_left(call: Callable, kept: Finding) -> None:
    (STATE / "findings" / kept.id / "finding.json").write_text("{")
    ran = call("findings")
    assert ran.code == 0
    assert "is damaged" in ran.err
    assert call("show", STATE / "findings" / kept.id / "case.json").code == 0
