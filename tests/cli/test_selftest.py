"""The engine of the self-test, and its command, on bugs that the fake workers play."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign.selftest import draw, run_alone, run_planted
from moe_fuzz.case import Case
from moe_fuzz.cli.selftest import command, run_all, why_not
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import UsageError
from moe_fuzz.ops import get_space
from moe_fuzz.verdict import CRASH, OOM, PASS, REJECTED, VIOLATION, Verdict, Violation


@dataclass(frozen=True)
class Bug:
    name: str = "nan_argmax"
    op: str = "topk_softmax"
    check: str = "ids"
    upstream: str = "vllm#39391"
    symptom: str = ""
    only: bool = True
    fence: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    processes: int = 1

    @property
    def target(self) -> str:
        return f"{self.op}@planted.{self.name}"


CRASHED = Verdict(CRASH, (Violation("crash", "SIGSEGV", "died"),))


def duplicate_on_nan(cases: tuple[Case, ...], options: Any) -> Verdict:
    on = options.checks is None or "ids" in options.checks
    bad = on and "nan_rows" in cases[-1].fault_names
    return Verdict(VIOLATION, (Violation("ids", "duplicate-id", "twice"),)) if bad else Verdict(PASS)


def test_the_same_cases_for_the_same_seed() -> None:
    info = TargetInfo("topk_softmax@planted.x", "topk_softmax", "planted")
    first, again, other = (list(itertools.islice(draw("topk_softmax", info, "cpu", seed), 900)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(set(first)) == len(first) == 900
    grid = strategies.grid(get_space("topk_softmax"), info, "cpu", 0)
    assert first[:16] == list(itertools.islice(grid, 16))
    assert not set(first[16:32]) & {*grid}  # generated ones take turns with the grid


def test_generated_cases_are_of_many_configs() -> None:
    info = TargetInfo("topk_softmax@planted.x", "topk_softmax", "planted")
    generated = {*itertools.islice(draw("topk_softmax", info, "cpu", 0), 640)}
    generated -= {*strategies.grid(get_space("topk_softmax"), info, "cpu", 0)}
    configs = {tuple(case.config.items()) for case in generated}
    assert len(generated) == 320
    assert len(configs) > 120


def test_found_by_the_check_that_must(pool: Any) -> None:
    pool.judge = duplicate_on_nan
    outcome = run_planted(Bug(), pool, 0, 500, 30.0)
    assert outcome.found
    assert outcome.passed
    assert outcome.message == "twice"
    found = Case.loads(outcome.inline)
    assert found.target == "topk_softmax@planted.nan_argmax"
    assert "nan_rows" in found.fault_names
    assert outcome.cases < 500
    again = run_planted(Bug(), pool, 0, 500, 30.0)
    assert (again.cases, again.inline) == (outcome.cases, outcome.inline)


def test_the_symptom_counts_where_it_is_named(pool: Any) -> None:
    pool.judge = duplicate_on_nan
    assert run_planted(Bug(symptom="duplicate-id"), pool, 0, 300, 30.0).found
    assert not run_planted(Bug(symptom="out-of-range"), pool, 0, 100, 30.0).found


def test_running_out_of_memory_can_be_what_is_planted(pool: Any) -> None:
    pool.judge = lambda cases, options: Verdict(OOM)
    assert run_planted(Bug(check="oom"), pool, 0, 10, 30.0).found
    assert run_alone(Bug(check="oom"), pool, 0, 10, 30.0).silent


def test_another_check_is_not_enough(pool: Any) -> None:
    pool.judge = duplicate_on_nan
    outcome = run_planted(Bug(check="weights"), pool, 0, 200, 30.0)
    assert not outcome.found
    assert outcome.cases == 200
    assert outcome.others == ("ids",)


def test_a_fault_in_the_fence_is_found_by_the_fence(pool: Any) -> None:
    def judge(cases: tuple[Case, ...], options: Any) -> Verdict:
        fence = options.fence
        fenced = fence.hard is None or "logits" in fence.hard
        crash = Verdict(CRASH, (Violation("crash", "SIGSEGV", "died"),))
        return crash if fenced and cases[-1].steps[0].tokens > 2 else Verdict(PASS)

    pool.judge = judge
    outcome = run_planted(Bug("overread", check="fence"), pool, 0, 200, 30.0)
    assert outcome.found
    assert "logits" in outcome.message


class Told:
    """A pool of one worker that tells of verdicts as they come, as a real one does. `ran`: cases, by batch."""

    def __init__(self, judge: Callable[[Case], Verdict], seconds: float = 0.0) -> None:
        self.judge, self.seconds, self.leases = judge, seconds, 0
        self.ran: list[list[Case]] = []

    def describe(self, target: str) -> TargetInfo:
        return TargetInfo(target, target.partition("@")[0], "planted")

    @contextlib.contextmanager
    def lease(self, target: str = "") -> Iterator[Told]:
        self.leases += 1
        yield self

    def run(self, cases: Sequence[Case], target: str, options: Any, on_verdict: Any) -> list[Verdict]:
        self.ran.append([])
        verdicts = []
        for at, case in enumerate(cases):
            time.sleep(self.seconds)
            self.ran[-1].append(case)
            verdicts.append(self.judge(case))
            on_verdict(at, verdicts[-1], ())
        return verdicts


def test_nothing_is_run_behind_a_death_that_is_the_bug() -> None:
    pool = Told(lambda case: CRASHED if "nan_rows" in case.fault_names else Verdict(PASS))
    outcome = run_planted(Bug(check="crash"), pool, 0, 500, 30.0)
    assert outcome.found
    assert sum(map(len, pool.ran)) == outcome.cases
    assert pool.leases == 1


def test_behind_another_death_every_case_is_run_once_and_in_order() -> None:
    pool = Told(lambda case: CRASHED if "nan_rows" in case.fault_names else Verdict(PASS))
    outcome = run_planted(Bug(check="weights"), pool, 0, 200, 30.0)
    assert (outcome.found, outcome.cases, outcome.others) == (False, 200, ("crash",))
    cases = draw("topk_softmax", pool.describe(Bug().target), "cpu", 0)
    assert [*itertools.chain(*pool.ran)] == [*itertools.islice(cases, 200)]


def test_slow_cases_are_not_handed_over_by_the_dozen() -> None:
    pool = Told(lambda case: Verdict(PASS), seconds=0.1)
    run_planted(Bug(), pool, 0, 12, 30.0)
    assert {len(batch) for batch in pool.ran} == {1, 2}
    quick = Told(lambda case: Verdict(PASS))
    run_planted(Bug(), quick, 0, 100, 30.0)
    assert [len(batch) for batch in quick.ran[:5]] == [1, 2, 4, 8, 16]


def test_alone(pool: Any) -> None:
    pool.judge = duplicate_on_nan
    outcome = run_alone(Bug(), pool, 0, 300, 30.0)
    assert (outcome.found, outcome.silent, outcome.others) == (True, True, ())
    asked = {options.checks for options in pool.options}
    assert ("ids",) in asked
    assert all("ids" not in checks for checks in asked - {("ids",)})


def test_not_alone(pool: Any) -> None:
    pool.judge = lambda cases, options: Verdict(
        VIOLATION, tuple(Violation(check, "x", "") for check in ("ids", "finite") if check in options.checks)
    )
    outcome = run_alone(Bug(), pool, 0, 300, 30.0)
    assert (outcome.found, outcome.silent, outcome.others, outcome.passed) == (True, False, ("finite",), False)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    bugs = (Bug(), Bug("never", check="weights", only=False))
    monkeypatch.setattr("moe_fuzz.cli.selftest.PLANTED", bugs)


def test_the_table_and_the_exit_code(call: Callable, pool: Any, planted: None, tmp_path: Path) -> None:
    pool.judge = duplicate_on_nan
    assert call("selftest", "nan_argmax").code == 0
    ran = call("selftest", "--cases", "50", "--json", "out.json")
    assert ran.code == 1
    assert "1 of 2 planted bugs found" in ran.out
    assert "never: weights did not fire on 50 cases; ids fired" in ran.out
    data = json.loads((tmp_path / "out.json").read_text())
    assert [(row["name"], row["passed"]) for row in data] == [("nan_argmax", True), ("never", False)]
    assert call("selftest", "--only").code == 0


def test_a_bug_that_refuses_everything_is_missed(call: Callable, pool: Any, planted: None) -> None:
    pool.judge = lambda cases, options: Verdict(REJECTED)
    ran = call("selftest", "nan_argmax", "--cases", "20")
    assert ran.code == 1
    assert "refused all 20 cases" in ran.out


def test_unknown_bug(call: Callable, pool: Any, planted: None) -> None:
    ran = call("selftest", "nan_argmin")
    assert ran.code == 2
    assert "did you mean nan_argmax?" in ran.err


def test_what_was_found_is_kept_when_the_rest_is_interrupted() -> None:
    kept: list[list[str]] = []

    def one(bug: Bug) -> Any:
        if bug.name == "third":
            raise KeyboardInterrupt
        return bug

    bugs = [Bug(name) for name in ("first", "second", "third", "fourth")]
    with pytest.raises(KeyboardInterrupt):
        run_all(bugs, one, 1, lambda so_far: kept.append([bug.name for bug in so_far]))  # type: ignore[arg-type, misc]
    assert kept == [["first"], ["first", "second"]]


def test_what_cannot_be_seen_here_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_fuzz.cli.selftest.gpus", lambda: ("one",))
    assert why_not(Bug(), "cpu") == why_not(Bug(), "cuda") == ""
    assert why_not(Bug(devices=("cuda",)), "cpu") == "shows on cuda alone"
    assert why_not(Bug(processes=2), "cuda") == "needs 2 GPUs"
    assert why_not(Bug(processes=2), "cpu") == ""
    monkeypatch.setattr("moe_fuzz.cli.selftest.gpus", lambda: ("one", "two"))
    assert why_not(Bug(processes=2), "cuda") == ""


def test_only_what_cannot_be_seen_here_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="can be seen here: each shows on cuda alone"):
        command.main(["narrow_index", "--device", "cpu"], standalone_mode=False)
