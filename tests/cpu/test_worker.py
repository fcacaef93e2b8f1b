"""Workers: each way to die is a verdict, nothing is lost, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_fuzz.case import Case, Step
from moe_fuzz.errors import EnvironmentProblem, UsageError
from moe_fuzz.labels import Labels
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import BROKEN, CRASH, HANG, OOM, PASS, VIOLATION
from moe_fuzz.worker.pool import Pool

RUNNER = f"{Path(__file__).parent / 'worker_runner.py'}:Runner"
QUICK = RunOptions(deadline=0.5, first_deadline=0.5)
PATIENT = RunOptions(deadline=20.0, first_deadline=20.0)
GIB = 1 << 30


def case(do: str, seed: int = 0) -> Case:
    return Case("toy", {"do": do}, (Step(Labels.range(1)),), seed)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, "cpu", memory_limit=2 * GIB, runner=RUNNER) as made:
        yield made


def only(pool: Pool, do: str, options: RunOptions = PATIENT, seed: int = 0):
    """The verdict of the case in the middle of three; its neighbours must pass."""
    with pool.lease() as worker:
        before, verdict, after = worker.run([case("pass", 7), case(do, seed), case("pass", 8)], "toy@here", options)
    assert (before.kind, after.kind) == (PASS, PASS)
    assert (before.budget, after.budget) == (7.0, 8.0)
    return verdict


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], seconds: float = 2.0) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.mark.parametrize(
    ("do", "symptom", "site"),
    [
        ("segfault", "SIGSEGV", "do_segfault"),
        ("abort", "SIGABRT", "do_abort"),
        ("exit", "exit:3", ""),
        ("sys_exit", "exit:5", ""),
        ("killed", "killed:SIGKILL", ""),
    ],
)
def test_a_crash_is_a_verdict_that_names_its_site(pool: Pool, do: str, symptom: str, site: str) -> None:
    verdict = only(pool, do, seed=3)
    assert verdict.kind == CRASH
    assert (verdict.violations[0].check, verdict.violations[0].symptom) == ("crash", symptom)
    assert site in verdict.violations[0].site
    assert not site or verdict.violations[0].site.startswith("worker_runner.py:")


def test_a_process_that_lost_its_device_runs_no_other_case(pool: Pool) -> None:
    deaths = pool.stats.deaths
    with pool.lease() as worker:
        before, verdict, after = worker.run([case("pass"), case("told_crash"), case("pass")], "toy@here", PATIENT)
    assert (verdict.kind, verdict.key) == (CRASH, ("crash", "illegal-access"))
    assert (before.kind, after.kind) == (PASS, PASS)
    assert before.detail.split()[0] != after.detail.split()[0]  # another process
    assert pool.stats.deaths == deaths + 1


def test_a_process_that_is_spent_runs_no_other_case(pool: Pool) -> None:
    """Whatever the verdict that says so: a capture that failed may have left the allocator in the middle of it."""
    with pool.lease() as worker:
        before, spent, after = worker.run([case("pass"), case("told_spent"), case("pass")], "toy@here", PATIENT)
    assert (spent.kind, spent.key, spent.spent) == (VIOLATION, ("capture", "RuntimeError"), True)
    assert (before.kind, after.kind) == (PASS, PASS)
    assert after.detail.split()[0] != before.detail.split()[0]  # another process


@pytest.mark.parametrize("do", ["spin", "hold_the_gil"])
def test_a_hang_is_killed_at_its_deadline_and_shows_its_stack(pool: Pool, do: str) -> None:
    started = time.monotonic()
    verdict = only(pool, do, QUICK)
    assert verdict.kind == HANG
    assert (verdict.violations[0].check, verdict.violations[0].symptom) == ("hang", "deadline")
    assert f"do_{do}" in verdict.violations[0].site
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("do", ["hog", "told_oom"])
def test_out_of_memory_takes_one_process_and_not_the_machine(pool: Pool, do: str) -> None:
    with pool.lease() as worker:
        verdicts = worker.run([case(do), case("pass")], "toy@here", PATIENT)
    assert [v.kind for v in verdicts] == [OOM, PASS]


def test_memory_is_bounded_in_c_too(pool: Pool) -> None:
    verdict = only(pool, "hog_in_c")
    assert verdict.kind == CRASH  # malloc gives null at the limit, and the target writes to it
    assert verdict.violations[0].symptom == "SIGSEGV"


@pytest.mark.parametrize("do", ["chatter", "close_stdout"])
def test_what_a_target_does_to_its_streams_harms_nothing(pool: Pool, do: str) -> None:
    assert only(pool, do).kind == PASS


def test_a_violation_travels_whole(pool: Pool) -> None:
    verdict = only(pool, "violation")
    assert (verdict.kind, verdict.key) == (VIOLATION, ("ids", "duplicate"))


def test_a_failure_of_our_own_is_no_verdict_on_the_target(pool: Pool) -> None:
    with pool.lease() as worker:
        before, broken, after = worker.run([case("pass"), case("raise"), case("pass")], "toy@here", PATIENT)
        assert (before.kind, broken.kind, after.kind) == (PASS, BROKEN, PASS)
        assert broken.detail.startswith("RuntimeError: a fault of the harness (worker_runner.py:")
        assert "in do_raise" in broken.detail
        assert before.detail.split()[0] != after.detail.split()[0], "nobody knows what it left in that process"
        assert worker.run([case("pass")], "toy@here", PATIENT)[0].kind == PASS


def test_a_worker_killed_from_outside_between_and_during_cases(pool: Pool) -> None:
    with pool.lease() as worker:
        worker.run([case("pass")], "toy@here", PATIENT)
        first = worker.pid
        assert first
        os.kill(first, signal.SIGKILL)  # between two rounds: nobody's fault, nothing lost
        assert [v.kind for v in worker.run([case("pass")] * 3, "toy@here", PATIENT)] == [PASS] * 3
        second = worker.pid
        assert second
        assert second != first
        threading.Timer(0.3, os.kill, (second, signal.SIGKILL)).start()
        verdicts = worker.run([case("nap", n) for n in range(4)], "toy@here", PATIENT)
    assert len(verdicts) == 4
    lost = [v for v in verdicts if v.kind != PASS]
    assert [v.violations[0].symptom for v in lost] == ["killed:SIGKILL"]


def test_the_history_is_what_the_same_process_ran_before(pool: Pool) -> None:
    seen: list[tuple[int, list[int]]] = []

    def note(index: int, verdict: object, history: tuple[Case, ...]) -> None:
        seen.append((index, [c.seed for c in history]))

    cases = [case("pass", 1), case("pass", 2), case("segfault", 3), case("pass", 4), case("pass", 5)]
    with pool.fresh() as worker:
        worker.run(cases, "toy@here", PATIENT, note)
    assert seen == [(0, []), (1, [1]), (2, [1, 2]), (3, []), (4, [4])]


def test_a_fresh_worker_ran_nothing_before(pool: Pool) -> None:
    pids = set()
    for _ in range(3):
        with pool.fresh() as worker:
            pid, ran, threads = worker.run([case("pass")], "toy@here", PATIENT)[0].detail.split()
        assert (ran, threads) == ("1", "1")
        pids.add(pid)
    assert len(pids) == 3
    assert gone([int(pid) for pid in pids])


def test_several_threads_share_a_pool(pool: Pool) -> None:
    found: dict[int, list[float]] = {}

    def work(number: int) -> None:
        for part in range(3):
            with pool.lease() if number % 2 else pool.fresh() as worker:
                cases = [case("segfault" if n == 2 else "pass", 100 * number + 10 * part + n) for n in range(5)]
                verdicts = worker.run(cases, "toy@here", PATIENT)
            found.setdefault(number, []).extend(v.budget for v in verdicts if v.kind == PASS)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {n: [100.0 * n + 10 * p + i for p in range(3) for i in (0, 1, 3, 4)] for n in range(4)}


def test_describe(pool: Pool) -> None:
    assert pool.describe("toy@here").origin == "cpu 1"  # the interpreter is on before triton is imported
    with pytest.raises(EnvironmentProblem, match="not installed") as caught:
        pool.describe("toy@absent")
    assert caught.value.hint == "pip install it"
    with pytest.raises(UsageError, match="no such thing"):
        pool.describe("toy@nonsense")
    with pytest.raises(EnvironmentProblem, match="SIGSEGV"):
        pool.describe("toy@deadly")
    with pytest.raises(EnvironmentProblem, match=r"more than 0\.3 s"):
        pool.describe("toy@slow", timeout=0.3)


def test_exhibit(pool: Pool) -> None:
    with pool.lease() as worker:
        assert worker.exhibit(case("pass", 9), "toy@here", 10.0) == {"seed": 9}


def test_a_process_is_recycled_after_its_share() -> None:
    with Pool(1, "cpu", runner=RUNNER, recycle_after=4) as small:
        with small.lease() as worker:
            rounds = [worker.run([case("pass")] * 2, "toy@here", PATIENT) for _ in range(3)]
        assert small.stats.recycled == 1
        pids = [verdict.detail.split()[0] for verdicts in rounds for verdict in verdicts]
        assert len(set(pids[:4])) == 1
        assert len(set(pids)) == 2


def test_close_ends_everything_and_a_dead_zygote_is_replaced_once() -> None:
    with Pool(1, "cpu", runner=RUNNER) as small:
        with small.lease() as worker:
            worker.run([case("pass")], "toy@here", PATIENT)
            pid = worker.pid
            assert pid
            zygote = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(zygote, signal.SIGKILL)
            assert gone([pid]), "a worker outlived its zygote"
            verdicts = worker.run([case("grandchild"), case("pass")], "toy@here", PATIENT)
            assert [v.kind for v in verdicts] == [CRASH, PASS]
            pid = worker.pid
        assert small.stats.zygotes == 2
    assert pid
    assert gone([pid])
    assert "sleep 300" not in subprocess.run(["ps", "axo", "args"], capture_output=True, text=True, check=True).stdout
    small.close()


def ended_at_the_start(small: Pool, number: int) -> None:
    """Ends the zygote while it still imports what is slow to import."""
    [zygote] = small._zygotes.values()
    os.kill(zygote.pid, number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_zygote_that_somebody_ends_before_it_is_ready_is_replaced(number: int) -> None:
    """It says nothing about the target: a campaign that takes the target for unavailable does not run its cases."""
    with Pool(1, "cpu", runner=RUNNER) as small:
        ended_at_the_start(small, number)
        assert small.describe("toy@here").origin == "cpu 1"
        assert small.stats.zygotes == 2


def test_the_versions_are_asked_of_another_zygote_where_one_was_killed_at_the_start() -> None:
    with Pool(1, "cpu", runner=RUNNER) as small:
        ended_at_the_start(small, signal.SIGKILL)
        assert small.environment["python"]
        assert small.stats.zygotes == 2


def test_a_zygote_that_is_killed_at_every_start_is_given_up() -> None:
    with Pool(1, "cpu", runner=RUNNER) as small:
        ended_at_the_start(small, signal.SIGKILL)
        start = small._start

        def killed_again(*given: object) -> object:
            zygote = start(*given)  # type: ignore[arg-type]
            os.kill(zygote.pid, signal.SIGKILL)
            return zygote

        small._start = killed_again  # type: ignore[method-assign, assignment]
        with pytest.raises(EnvironmentProblem, match="died again") as caught:
            small.describe("toy@here")
        assert caught.value.hint
        assert small.stats.zygotes == 2


PARENT = """
import sys, threading
from tests_worker import case, PATIENT, RUNNER
from moe_fuzz.worker.pool import Pool
with Pool(2, "cpu", runner=RUNNER) as pool, pool.lease() as one, pool.lease() as two:
    for worker in (one, two):
        worker.run([case("pass")], "toy@here", PATIENT)
    print(one.pid, two.pid, flush=True)
    two.run([case("spin")], "toy@here", PATIENT)
"""


def test_no_process_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = PARENT.replace("from tests_worker import", "sys.path.insert(0, %r); from test_worker import")
    command = [sys.executable, "-c", program % str(Path(__file__).parent)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(alive, pids))
    parent.kill()
    parent.wait()
    assert gone(pids), "a worker outlived the parent"


@pytest.mark.parametrize(("python", "says"), [("/nonexistent/python", "cannot be started"), ("/bin/false", "died")])
def test_an_interpreter_that_cannot_serve_is_named(python: str, says: str) -> None:
    with pytest.raises(EnvironmentProblem, match=says) as caught, Pool(1, "cpu", python=python) as bad:
        bad.describe("toy@here")
    assert python in caught.value.message
    assert caught.value.hint
