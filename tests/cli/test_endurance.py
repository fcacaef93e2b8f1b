"""The endurance scripts in short, and what their long forms have found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moe_fuzz
from moe_fuzz.campaign import events
from moe_fuzz.campaign.findings import load_findings
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.verdict import CRASH, Verdict
from tests.cpu.campaign_fakes import GOOD, FakePool, Judge, Listener, bad, campaign, crash, when

SCRIPTS = Path(__file__).resolve().parents[1] / "endurance"
TARGET = "topk_softmax@planted.int64_ids"
KILLED = crash("killed:SIGKILL")


def script(name: str, *arguments: object, code: int = 0) -> str:
    """What an endurance script prints; it must end with this exit code."""
    root = str(Path(str(moe_fuzz.__file__)).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_killed_campaign_loses_nothing() -> None:
    out = script("kill_parent.py", "--kills", 2, "--cases", 24, "--targets", TARGET)
    assert "2 kills, " in out


def test_a_kill_at_any_operation_on_the_disk_loses_nothing() -> None:
    assert script("kill_every_write.py", "--every", 60).count("kinds of operations") == 2


@pytest.mark.slow
def test_a_full_or_closed_disk_is_told_and_the_next_run_goes_on() -> None:
    out = script("full_disk.py", "--rounds", 1, "--limits", 1, "--cases", 16, "--targets", TARGET)
    assert "No space left" in out or "SKIPPED full and read-only disks" in out
    assert "File too large" in out


@pytest.mark.slow
def test_everything_at_once_loses_nothing() -> None:
    out = script("chaos.py", "--minutes", 0.25, "--cases", 16, "--targets", TARGET)
    assert '"problems": []' in out


@pytest.mark.slow
@pytest.mark.parametrize(("leak", "code"), [((), 0), (("--leak",), 1)], ids=["as it is", "keeps each event"])
def test_the_memory_of_a_parent_is_flat_and_a_leak_is_seen(leak: tuple[str, ...], code: int) -> None:
    told = json.loads(script("parent_memory.py", "--cases", 4200, *leak, code=code))
    assert bool(told["problems"]) == bool(code)
    assert told["cases"] > 4000


def test_broken_files_are_refused() -> None:
    assert "152 broken files" in script("broken_cases.py", "--files", 152, "--processes", 3)


@pytest.mark.interpreter
def test_workers_killed_from_outside_are_nobodys_fault() -> None:
    assert "correct" in script("kill_workers.py", "--seconds", 3, "--every", 0.2, "--cases", 32, "--only", "correct")


# ---- what they have found -------------------------------------------------------------------------------------------


def test_a_finding_whose_folder_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    judge = when(lambda case: "nan_rows" in case.fault_names)
    [finding] = campaign(tmp_path, judge, cases=60).run().new
    folder = tmp_path / "findings" / finding.id
    folder.rename(folder.with_name(f".tmp-77-old-{finding.id}"))  # killed between the two renames
    folder.with_name(f".tmp-77-{finding.id}").mkdir()
    with StateDir(tmp_path):
        assert load_findings(StateDir(tmp_path)) == [finding]
    assert not list(tmp_path.rglob(".tmp-*"))


def test_half_a_file_inside_a_finding_is_swept(tmp_path: Path) -> None:
    judge = when(lambda case: "nan_rows" in case.fault_names)
    [finding] = campaign(tmp_path, judge, cases=60).run().new
    (tmp_path / "findings" / finding.id / ".tmp-77-finding.json").write_text("{")
    with StateDir(tmp_path):
        assert not list(tmp_path.rglob(".tmp-*"))
        assert load_findings(StateDir(tmp_path)) == [finding]


def test_the_limit_on_the_size_of_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*arguments: object) -> int:
        raise OSError(27, "File too large")

    with StateDir(tmp_path) as state:
        monkeypatch.setattr("os.write", too_large)
        with pytest.raises(EnvironmentProblem, match="File too large") as caught:
            state.write_json("stats.json", {})
    assert "ulimit -f" in caught.value.hint


def killing(*numbers: int, then: Judge = lambda case, history, options: GOOD) -> tuple[FakePool, Judge]:
    """A pool in which somebody kills the workers that run the cases of these numbers, counted over everything."""
    asked = 0

    def judge(case: Case, history: tuple[Case, ...], options: Any) -> Verdict:
        nonlocal asked
        asked += 1
        return KILLED if asked in numbers else then(case, history, options)

    return FakePool(judge), judge


def test_killed_again_while_it_is_confirmed(tmp_path: Path) -> None:
    """Two kills in a row are no finding, nor are thirty in all."""
    pool, judge = killing(*range(20, 80, 2), 81, 82)
    listener = Listener()
    summary = campaign(tmp_path, judge, listener, pool=pool, cases=100).run()
    assert (summary.exit_code, summary.new, summary.unexamined) == (0, (), 0)
    assert summary.cases == 100
    assert summary.flaky == summary.verdicts[CRASH] == len(listener.of(events.WorkerLost))


def test_a_case_that_was_killed_is_judged_by_what_it_gives_then(tmp_path: Path) -> None:
    def judge(case: Case, history: tuple[Case, ...], options: Any) -> Verdict:
        if not case.config["bias"]:
            return GOOD
        return bad() if pool.confirming else KILLED

    class Watched(FakePool):
        @property
        def confirming(self) -> bool:
            return bool(getattr(self._local, "fresh", False))

    pool = Watched(judge)
    [finding] = campaign(tmp_path, judge, pool=pool, cases=100).run().new
    assert (finding.check, finding.symptom) == bad().key
    assert finding.features == ("bias",)


def test_a_finding_is_not_gone_because_its_replay_was_killed(tmp_path: Path) -> None:
    judge = when(lambda case: "nan_rows" in case.fault_names)
    [finding] = campaign(tmp_path, judge, cases=60).run().new
    pool, judge = killing(1, 2, then=judge)
    summary = campaign(tmp_path, judge, pool=pool, cases=60, seed=3).run()
    assert ([f.id for f in summary.known], summary.fixed) == ([finding.id], ())


@pytest.mark.parametrize("device", ["/dev/full", "/dev/zero"])
def test_a_device_is_no_case(call: Callable, device: str) -> None:
    ran = call("show", device)
    assert ran.code == 2
    assert "is a device" in ran.err


def test_a_hostile_file_does_not_steer_the_terminal(call: Callable, case: Case, tmp_path: Path) -> None:
    data = case.to_json() | {"\x1b[2J\x1b]0;mine\x07": 1}
    del data["digest"]
    (tmp_path / "case.json").write_text(json.dumps(data))
    ran = call("show", "case.json")
    assert ran.code == 2
    assert "\\x1b[2J" in ran.err
    assert "\x1b" not in ran.err
    hostile = Case(case.op, case.config, case.steps, case.seed, target="topk_softmax@\x1b[2J")
    ran = call("show", hostile.inline())
    assert ran.code == 2
    assert "\x1b" not in ran.out + ran.err
