"""Workers under targets that mean harm, callers that give up, and machines that are not as they should be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moe_fuzz.campaign.tally import Tally
from moe_fuzz.case import Case, Step
from moe_fuzz.errors import EnvironmentProblem, MoeFuzzError, UsageError
from moe_fuzz.labels import Labels
from moe_fuzz.options import RunOptions
from moe_fuzz.worker import autopsy
from moe_fuzz.worker.pool import Pool
from moe_fuzz.worker.watch import HISTORY, Worker

RUNNER = f"{Path(__file__).parent / 'worker_runner.py'}:Runner"
TARGET = "toy@here"
QUICK = RunOptions(deadline=0.3, first_deadline=0.4)
PATIENT = RunOptions(deadline=20.0, first_deadline=20.0)


def case(do: str, seed: int = 0, **config: str) -> Case:
    return Case("toy", {"do": do, **config}, (Step(Labels.range(1)),), seed)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody reaps does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], bool], seconds: float = 2.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with Pool(2, "cpu", log_dir=tmp_path_factory.mktemp("logs"), runner=RUNNER) as shared:
        yield shared


@pytest.fixture
def worker(pool: Pool) -> Iterator[Worker]:
    with pool.fresh() as fresh:
        yield fresh


@pytest.mark.parametrize(("do", "kind", "symptom", "site"), [
    ("fault_with_own_handler", "crash", "SIGSEGV", "in do_fault_with_own_handler"),
    ("terminate", "crash", "killed:SIGTERM", ""),
    ("write_to_socket", "crash", "garbled-pipe", ""),
    ("close_socket", "crash", "closed-pipe", ""),
    ("bad_alloc", "out-of-memory", "out-of-memory", ""),
    ("abort_of_cuda", "crash", "misaligned-access", "in do_abort_of_cuda"),
])
def test_a_hostile_case_gets_its_verdict_and_the_round_goes_on(worker, do, kind, symptom, site):
    verdicts = worker.run([case("pass"), case(do), case("pass"), case("violation")], TARGET, PATIENT)
    assert [v.kind for v in verdicts] == ["pass", kind, "pass", "violation"]
    assert verdicts[1].key[1] == symptom
    assert verdicts[0].detail.split()[0] != verdicts[2].detail.split()[0]  # the pids
    if verdicts[1].violations:
        assert verdicts[1].violations[0].site.endswith(site)
        assert bool(verdicts[1].violations[0].site) == bool(site)


def test_every_case_of_a_deadly_round_gets_a_verdict(worker):
    seen: list[tuple[int, str]] = []
    acts = ["segfault", "exit", "pass", "abort", "segfault"]
    verdicts = worker.run([case(do, 3) for do in acts], TARGET, PATIENT, lambda i, v, h: seen.append((i, v.key[1])))
    assert [v.kind for v in verdicts] == ["crash", "crash", "pass", "crash", "crash"]
    assert seen == [(0, "SIGSEGV"), (1, "exit:3"), (2, ""), (3, "SIGABRT"), (4, "SIGSEGV")]


def test_a_flood_of_output_does_not_bury_the_stack_of_a_hang(worker):
    verdicts = worker.run([case("flood"), case("pass")], TARGET, QUICK)
    assert [v.kind for v in verdicts] == ["hang", "pass"]
    assert verdicts[0].violations[0].site.endswith("in do_flood")
    assert "most recent call first" in verdicts[0].detail


def test_the_detail_of_a_crash_is_not_an_earlier_cases_output(worker):
    verdicts = worker.run([case("chatter"), case("exit", 3), case("segfault")], TARGET, PATIENT)
    assert verdicts[1].detail == ""
    assert verdicts[2].detail.startswith("Fatal Python error: Segmentation fault")
    assert worker.run([case("exit", 3)], TARGET, PATIENT)[0].violations[0].site == ""  # nor an earlier traceback


def test_the_log_of_a_talkative_target_begins_anew(worker):
    worker.run([case("chatter")] * 4, TARGET, PATIENT)
    assert worker.log.stat().st_size < 4 << 20  # one of four


@pytest.mark.parametrize("do", ["compile", "wait_for_a_compiler", "load"])
def test_the_clock_stands_still_while_a_case_compiles_or_loads(worker, do):
    verdicts = worker.run([case(do), case(do), case("spin")], TARGET, RunOptions(deadline=0.7, first_deadline=20.0))
    assert [v.kind for v in verdicts] == ["pass", "pass", "hang"]


@pytest.mark.parametrize(("do", "key", "seconds"), [
    ("spin", ("hang", "deadline"), 0.5),
    ("spin_after_compiling", ("hang", "deadline"), 0.6 + 0.5),
    ("compile_for_ever", ("hang", "compile"), 4.0),
    ("spin_when_called_by_the_judge", ("hang", "deadline"), 0.6 + 0.5),
    ("die_compiling", ("crash", "SIGSEGV"), 0.6),
])
def test_a_hang_costs_its_own_deadline_on_its_first_call_too(worker, do, key, seconds):
    worker.run([case("pass")], TARGET, PATIENT)
    started = time.monotonic()
    verdicts = worker.run([case(do), case("pass")], TARGET, RunOptions(deadline=0.5, first_deadline=4.0))
    assert [v.key for v in verdicts] == [key, ("pass", "")]
    assert seconds - 0.1 <= verdicts[0].seconds < seconds + 2.5  # below the other deadline
    assert time.monotonic() - started < seconds + 4.0
    assert verdicts[0].violations[0].site.endswith("in do_" + do)


@pytest.mark.parametrize("do", ["judge_for_ever", "judge_for_ever_the_first_of_a_config"])
def test_a_target_is_not_to_blame_for_our_own_judgement(worker, do):
    verdicts = worker.run([case(do), case("pass")], TARGET, RunOptions(deadline=0.5, first_deadline=2.0))
    assert [v.kind for v in verdicts] == ["rejected", "pass"]
    assert "was not judged within 2 s" in verdicts[0].detail
    tally = Tally()
    for verdict in verdicts:
        tally.count(TARGET, verdict)
    assert tally.row(TARGET, (), (), "").unjudged == 1
    assert f"in do_{do}" in verdicts[0].detail


def test_the_kernels_out_of_memory_killer_is_told_from_a_stranger(worker, monkeypatch):
    counts = iter(range(100))
    monkeypatch.setattr(autopsy, "oom_kills", lambda: next(counts))
    assert worker.run([case("killed")], TARGET, PATIENT)[0].kind == "out-of-memory"


def test_a_worker_that_died_idle_is_no_problem_of_the_next_target(pool):
    with pool.fresh() as worker:
        describe, exhibit = lambda: worker.describe(TARGET, 20.0).name, lambda: worker.exhibit(case("pass", 4), TARGET)
        for serve, expected in ((describe, TARGET), (exhibit, {"seed": 4})):
            worker.run([case("pass")], TARGET, PATIENT)
            before, pid = pool.stats.idle_deaths, worker.pid
            os.kill(pid, signal.SIGKILL)
            assert eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists())
            assert serve() == expected
            assert pool.stats.idle_deaths == before + 1


def test_two_that_answer_for_one_are_told_from_it(worker):
    """A copy of the worker's process, left by a fork, gives each verdict a second time."""
    verdicts = worker.run([case("fork_and_go_on"), case("nap")], TARGET, PATIENT)
    assert [v.kind for v in verdicts] == ["pass", "crash"]
    assert verdicts[1].key[1] == "garbled-pipe"
    assert "case 0 of the round" in verdicts[1].violations[0].message


def test_a_grandchild_that_holds_the_socket_hides_no_death(worker, tmp_path):
    marker = tmp_path / "pid"
    started = time.monotonic()
    verdicts = worker.run([case("runaway_grandchild", marker=str(marker)), case("pass")], TARGET, PATIENT)
    assert [v.key for v in verdicts] == [("crash", "exit:6"), ("pass", "")]
    assert time.monotonic() - started < 10
    os.kill(int(marker.read_text()), signal.SIGKILL)  # in a session of its own it lives until the pool closes


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_caller_that_gives_up_leaves_no_process_in_the_middle_of_a_round(worker, error):
    pids: list[int] = []

    def give_up(index: int, verdict: object, history: object) -> None:
        pids.append(worker.pid)
        raise error

    with pytest.raises(error):
        worker.run([case("pass"), case("nap")], TARGET, PATIENT, give_up)
    assert worker.pid is None
    assert not alive(pids[0])
    assert len(worker.run([case("pass")], TARGET, PATIENT)) == 1


def test_workers_run_the_parents_own_moe_fuzz(tmp_path, monkeypatch):
    (tmp_path / "moe_fuzz").mkdir()
    (tmp_path / "moe_fuzz" / "__init__.py").write_text("raise ImportError('another moe-fuzz')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Pool(1, "cpu", runner=RUNNER) as pool:
        assert pool._living().info()["moe_fuzz"] == str(Path(autopsy.__file__).parents[1])


def test_surroundings_of_a_worker(pool, worker):
    leader, stdin, descriptors = worker.run([case("surroundings")], TARGET, PATIENT)[0].detail.split()
    assert (leader, stdin) == ("True", "/dev/null")
    assert int(descriptors) == 8  # 0 1 2, log, traceback, trail, socket, and the one that lists them
    assert pool._living().info()["threads"] == 1
    assert set(pool.environment) == {"python", "torch", "triton", "numpy"}


def test_history_holds_the_last_cases(worker):
    histories: list[tuple[Case, ...]] = []
    cases = [case("pass", seed) for seed in range(HISTORY + 8)]
    for start in range(0, len(cases), 8):
        worker.run(cases[start : start + 8], TARGET, PATIENT, lambda i, v, h: histories.append(h))
    assert histories[-1] == tuple(replace(case, target=TARGET) for case in cases[7:-1])  # each says where it ran
    worker.restart()
    worker.run(cases[:1], TARGET, PATIENT, lambda i, v, h: histories.append(h))
    assert histories[-1] == ()


def test_a_lease_waits_for_its_turn(pool):
    got: list[int] = []

    def third() -> None:
        with pool.lease():
            got.append(1)

    with pool.lease():
        with pool.lease():
            thread = threading.Thread(target=third)
            thread.start()
            thread.join(0.1)
            assert got == []
        thread.join(10)
        assert got == [1]


def test_nothing_leaks_in_the_parent(pool):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    pool.describe(TARGET)
    before, logs = descriptors(), sorted(pool._logs.iterdir())
    for do in ("pass", "segfault", "exit", "write_to_socket"):
        with pool.fresh() as worker:
            worker.run([case(do)], TARGET, PATIENT)
    assert descriptors() == before
    assert sorted(pool._logs.iterdir()) == logs


def test_the_cases_of_a_dead_zygote_run_again_but_only_once(tmp_path):
    marker = str(tmp_path / "marker")
    with Pool(2, "cpu", runner=RUNNER) as pool, pool.lease() as first, pool.lease() as second:
        first.run([case("pass")], TARGET, PATIENT)
        second.run([case("pass")], TARGET, PATIENT)
        orphan = second.pid
        verdicts = first.run([case("pass"), case("kill_zygote", marker=marker), case("pass")], TARGET, PATIENT)
        assert [v.kind for v in verdicts] == ["pass"] * 3  # the case was not to blame
        assert orphan
        assert not alive(orphan)
        assert second.run([case("pass")], TARGET, PATIENT)[0].kind == "pass"
        assert pool.stats.zygotes == 2
        with pytest.raises(EnvironmentProblem, match="died again"):
            first.run([case("kill_zygote")], TARGET, PATIENT)


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # who is started in the background has it ignored
sys.path.insert(0, {tests!r})
from test_worker_hostile import RUNNER, TARGET, PATIENT, case
from moe_fuzz.worker.pool import Pool
with Pool(2, "cpu", runner=RUNNER) as pool, pool.lease() as idle, pool.lease() as busy:
    idle.run([case("pass")], TARGET, PATIENT)
    busy.run([case("pass")], TARGET, PATIENT)
    print(pool._living().pid, idle.pid, busy.pid, flush=True)
    busy.run([case("runaway_grandchild", marker={marker!r}), case("spin")], TARGET, PATIENT)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_parent_that_ends_leaves_no_process_not_even_a_runaway(tmp_path, number):
    marker = tmp_path / "pid"
    code = PARENT.format(tests=str(Path(__file__).parent), marker=str(marker))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          env=os.environ | {"TMPDIR": str(tmp_path)}) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        children = Path(f"/proc/{pids[0]}/task/{pids[0]}/children")
        assert eventually(lambda: marker.exists() and marker.read_text() != "", 10)
        runaway = marker.read_text()
        assert eventually(lambda: len(children.read_text().split()) == 3, 10)  # idle, the runaway, the second case's
        pids += map(int, children.read_text().split())
        assert int(runaway) in pids
        parent.send_signal(number)
        assert eventually(lambda: not any(map(alive, pids)))
        parent.wait(10)
    if number == signal.SIGINT:
        assert list(tmp_path.glob("moe-fuzz-*")) == []  # the temporary logs went too


def test_close_ends_who_runs_wakes_who_waits_and_may_be_called_again():
    pool = Pool(1, "cpu", runner=RUNNER)
    raised: list[str] = []

    def spin() -> None:
        try:
            with pool.lease() as worker:
                worker.run([case("spin")], TARGET, PATIENT)
        except MoeFuzzError as error:
            raised.append(error.message)

    with pool.fresh() as worker:
        worker.run([case("pass")], TARGET, PATIENT)
        pid, zygote = worker.pid, pool._living().pid
        threads = [threading.Thread(target=spin) for _ in range(2)]  # one runs, one waits
        for thread in threads:
            thread.start()
        assert eventually(lambda: pool.stats.forks == 2, 10)
        started = time.monotonic()
        pool.close()
        pool.close()
        assert time.monotonic() - started < 10  # it spins for 20
        for thread in threads:
            thread.join(10)
    assert raised == ["the pool of workers is closed"] * 2
    assert pid
    assert not alive(pid)
    assert not alive(zygote)
    with pytest.raises(MoeFuzzError, match="closed"), pool.lease():
        pass


@pytest.mark.parametrize(("source", "said", "hint"), [
    ("raise ModuleNotFoundError(\"No module named 'torch'\")", "No module named 'torch'", "install torch for"),
    ("import os; os.write(2, b'libcudart.so: cannot open'); os.abort()", "libcudart.so: cannot open", "doctor"),
    ("raise SystemExit(7)", "exit code 7", "doctor"),
])
def test_a_zygote_whose_imports_fail_says_why(tmp_path, monkeypatch, source, said, hint):
    (tmp_path / "numpy.py").write_text(source)
    root = str(Path(autopsy.__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), root]))
    with Pool(1, "cpu", log_dir=tmp_path / "logs") as pool, pytest.raises(EnvironmentProblem, match=said) as error:
        pool.describe(TARGET)
    assert hint in error.value.hint


def test_a_pool_that_cannot_start_leaves_no_logs(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="cannot be started"):
        Pool(1, "cpu", python="/no/such/python")
    assert list(tmp_path.iterdir()) == []


def test_a_runner_that_cannot_be_loaded_is_told_each_time():
    with Pool(1, "cpu", runner="no_such_module:Runner") as pool:
        with pytest.raises(MoeFuzzError, match="No module named 'no_such_module'"):
            pool.describe(TARGET)
        with pytest.raises(MoeFuzzError, match="No module named 'no_such_module'"), pool.lease() as worker:
            worker.run([case("pass")], TARGET, PATIENT)


@pytest.mark.parametrize(("arguments", "message"), [((0, "cpu"), "at least one"), ((1, "tpu"), "no device")])
def test_a_pool_refuses_nonsense(arguments, message):
    with pytest.raises(UsageError, match=message):
        Pool(*arguments)
