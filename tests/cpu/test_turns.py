"""A group of ranks has its GPUs for itself, whichever programs there are, and whoever waits comes next."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from moe_fuzz.case import RANKS, Case, Step
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.labels import Labels
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import PASS, Verdict
from moe_fuzz.worker import ranks as ranks_of_workers
from moe_fuzz.worker.gpus import SLOT_BYTES, Gpu
from moe_fuzz.worker.leases import Leases, default_directory
from moe_fuzz.worker.pool import Pool
from moe_fuzz.worker.ranks import Groups, Ranks
from moe_fuzz.worker.stats import Stats
from moe_fuzz.worker.turns import beside, turn

RUNNER = f"{Path(__file__).parent / 'worker_runner.py'}:Runner"
CARDS = [Gpu("small", 6 * SLOT_BYTES, 6 * SLOT_BYTES, uuid) for uuid in ("GPU-a", "GPU-b")]


class Line:
    """Threads that take a turn each, in the order in which they are begun; `order` is who had it when."""

    def __init__(self, place: Path) -> None:
        self._place, self.order = place, list[str]()

    def begin(self, name: str, uuids: Sequence[str], seconds: float = 0.0) -> threading.Thread:
        def run() -> None:
            with turn(self._place, uuids, 20.0):
                self.order.append(name)
                time.sleep(seconds)

        thread = threading.Thread(target=run)
        thread.start()
        return thread


def test_one_at_a_time_on_each_gpu(tmp_path: Path) -> None:
    line = Line(tmp_path)
    with turn(tmp_path, ["GPU-b", "GPU-a"]):
        both, other = line.begin("a and c", ["GPU-c", "GPU-a"]), line.begin("d", ["GPU-d"])
        other.join(10)
        both.join(0.3)
        assert line.order == ["d"]
    both.join(10)
    assert line.order == ["d", "a and c"]


def test_no_circle_of_those_that_want_several(tmp_path: Path) -> None:
    line, ring = Line(tmp_path), ["GPU-a", "GPU-b", "GPU-c"]
    threads = [line.begin(str(at), (ring[at % 3], ring[(at + 1) % 3]), 0.01) for at in range(12)]
    for thread in threads:
        thread.join(30)
    assert sorted(line.order, key=int) == [str(at) for at in range(12)]


def test_whoever_waits_comes_before_whoever_had_it(tmp_path: Path) -> None:
    line = Line(tmp_path)
    waiting: list[threading.Thread] = []
    for at in range(3):
        with turn(tmp_path, ["GPU-a"]):
            line.order.append("again")
            waiting.append(line.begin(f"waited {at}", ["GPU-a"]))
            time.sleep(0.2)  # it stands in line by now
    for thread in waiting:
        thread.join(10)
    assert line.order == ["again", "waited 0", "again", "waited 1", "again", "waited 2"]


def test_workers_share_and_a_group_that_waits_is_not_overtaken(tmp_path: Path) -> None:
    line = Line(tmp_path)

    def late() -> None:
        with beside(tmp_path, "GPU-a"):
            line.order.append("late worker")

    with beside(tmp_path, "GPU-a"), beside(tmp_path, "GPU-a"):
        group = line.begin("group", ["GPU-a"], 0.2)
        time.sleep(0.2)  # it stands in line by now
        worker = threading.Thread(target=late)
        worker.start()
        worker.join(0.3)
        assert line.order == []
        with beside(tmp_path, "GPU-b"):
            line.order.append("elsewhere")
    worker.join(10)
    group.join(10)
    assert line.order == ["elsewhere", "group", "late worker"]


def test_a_dead_program_has_no_turn(tmp_path: Path) -> None:
    program = f"""if True:
        import os, signal
        from pathlib import Path
        from moe_fuzz.worker.turns import beside, turn
        with turn(Path({str(tmp_path)!r}), ["GPU-a"]):
            os.kill(os.getpid(), signal.SIGKILL)"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    with turn(tmp_path, ["GPU-a"], 0.0):
        pass


def test_patience_ends_and_so_does_a_pool(tmp_path: Path) -> None:
    with turn(tmp_path, ["GPU-a"]):
        with pytest.raises(EnvironmentProblem, match="have had GPU-a for 0 s"), turn(tmp_path, ["GPU-a"], 0.0):
            pass
        with pytest.raises(EnvironmentProblem, match="was closed"), turn(tmp_path, ["GPU-a"], 9.0, lambda: True):
            pass
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="cannot be taken"), turn(tmp_path / "file", ["GPU-a"]):
        pass


def test_groups_of_two_programs_do_not_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program has its slots already when it waits for its turn, so that none waits for the other's."""
    at_once, most = [], [0]

    class Recorded:
        def __init__(self, *_: object) -> None:
            pass

        def run(self, cases: Sequence[Case], *_: object) -> None:
            at_once.append(1)
            most[0] = max(most[0], len(at_once))
            time.sleep(0.05)
            at_once.pop()
            _[-1](Verdict(PASS))  # type: ignore[operator]

        def ready(self, target: str) -> None:
            pass

        def discard(self) -> None:
            pass

    monkeypatch.setattr(ranks_of_workers, "Group", Recorded)
    case, verdicts = Case("allreduce_rmsnorm", {"ranks": 2}, (Step(Labels.range(1)),), 0, RANKS), list[Verdict]()

    def program() -> None:
        leases = Leases(CARDS, tmp_path)
        leases.take()  # of a worker of its own, which it keeps
        mine = Ranks(tmp_path / "log", Stats(), Groups(leases, lambda *_: None, threading.Lock()))  # type: ignore[arg-type, return-value]
        for _ in range(4):
            mine.run(2, [case], "allreduce_rmsnorm@builtin", RunOptions(), verdicts.append)
        mine.close()
        leases.close()

    threads = [threading.Thread(target=program) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(verdicts), most) == (8, [1])


def test_no_worker_runs_a_round_while_a_group_has_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    card, verdicts = Gpu("small", 6 * SLOT_BYTES, 6 * SLOT_BYTES, "GPU-a"), list[Verdict]()
    case = Case("toy", {"do": "variables"}, (Step(Labels.range(1)),), 0)
    with Pool(1, "cuda", gpus=[card], runner=RUNNER) as pool, pool.lease() as worker:
        worker.run([case], "toy@here", RunOptions())  # it is there from now on
        thread = threading.Thread(target=lambda: verdicts.extend(worker.run([case], "toy@here", RunOptions())))
        with turn(default_directory(), ["GPU-a"]):
            thread.start()
            thread.join(0.5)
            assert verdicts == []
        thread.join(20)
    assert [verdict.kind for verdict in verdicts] == [PASS]
