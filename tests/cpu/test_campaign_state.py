"""The state directory: locked, whole after whatever happens, and never the reason to lose a finding."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from moe_fuzz.campaign import events
from moe_fuzz.campaign.badcase import BadCase
from moe_fuzz.campaign.findings import load_findings
from moe_fuzz.campaign.state import FOLDERS, StateDir
from moe_fuzz.errors import EnvironmentProblem
from tests.cpu.campaign_fakes import GOOD, TARGET, Listener, always_good, bad, campaign, toy, when


def test_making_the_object_touches_nothing(tmp_path):
    StateDir(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_git_passes_over_a_new_one_and_one_that_was_there_is_left_as_it_is(tmp_path):
    for place in (tmp_path / "new" / "state", tmp_path):
        with StateDir(place):
            pass
    assert (tmp_path / "new" / "state" / ".gitignore").read_text() == "*\n"
    assert not (tmp_path / ".gitignore").exists()


def test_entering_creates_and_locks(tmp_path):
    with StateDir(tmp_path) as state:
        assert {entry.name for entry in tmp_path.iterdir()} >= set(FOLDERS)
        with pytest.raises(EnvironmentProblem, match=rf"process {os.getpid()}") as caught, StateDir(tmp_path):
            pass
        assert "--state-dir" in caught.value.hint
        with state:  # entered twice by the same owner
            pass
        with pytest.raises(EnvironmentProblem), StateDir(tmp_path):
            pass
    with StateDir(tmp_path):
        pass


def test_two_processes_do_not_share_one(tmp_path):
    script = (
        "import sys\nfrom moe_fuzz.campaign.state import StateDir\nfrom moe_fuzz.errors import EnvironmentProblem\n"
        "try:\n    StateDir(sys.argv[1]).__enter__()\nexcept EnvironmentProblem as e:\n    print(e.message)\n"
    )
    with StateDir(tmp_path):
        run = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(run, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert f"another campaign (process {os.getpid()}) is using" in done.stdout


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "state").write_text("mine")
    with pytest.raises(EnvironmentProblem, match="is a file") as caught, StateDir(tmp_path / "state"):
        pass
    assert caught.value.exit_code == 3
    with pytest.raises(EnvironmentProblem, match="Not a directory"), StateDir(tmp_path / "state" / "below"):
        pass
    assert (tmp_path / "state").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_directory_that_cannot_be_made(tmp_path, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(EnvironmentProblem, match=os.strerror(number)), StateDir(tmp_path / "state"):
        pass


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["os.write", "os.replace", "os.fsync", "os.open"])
def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch, call):
    with StateDir(tmp_path) as state:
        state.write_json("stats.json", {"old": 1})
        monkeypatch.setattr(call, full)
        with pytest.raises(EnvironmentProblem, match="No space left") as caught:
            state.write_json("stats.json", {"new": list(range(1000))})
        monkeypatch.undo()
        assert "run again" in caught.value.hint
        assert json.loads((tmp_path / "stats.json").read_text()) == {"old": 1}
        assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("call", ["os.write", "pathlib.Path.rename", "os.fsync"])
def test_a_full_disk_leaves_the_old_folder_whole(tmp_path, monkeypatch, call):
    with StateDir(tmp_path) as state:
        state.write_folder("findings/abc", {"case.json": "old", "gone.md": ""})
        monkeypatch.setattr(call, full)
        with pytest.raises(EnvironmentProblem, match="No space left"):
            state.write_folder("findings/abc", {"case.json": "new"})
        monkeypatch.undo()
        assert (tmp_path / "findings" / "abc" / "case.json").read_text() == "old"
        assert [entry.name for entry in (tmp_path / "findings").iterdir()] == ["abc"]
        state.write_folder("findings/abc", {"case.json": "new"})
        assert [entry.name for entry in (tmp_path / "findings" / "abc").iterdir()] == ["case.json"]


def test_a_disk_that_fills_up_in_a_campaign_ends_it_and_the_next_run_goes_on(tmp_path, monkeypatch):
    judge, real = when(lambda case: "nan_rows" in case.fault_names), os.write
    written = 0

    def filling(handle, data):
        nonlocal written
        written += len(data)
        return full() if written > 100_000 else real(handle, data)

    monkeypatch.setattr("os.write", filling)
    with pytest.raises(EnvironmentProblem, match="No space left"):
        campaign(tmp_path, judge, cases=2000).run()
    monkeypatch.undo()
    listener = Listener()
    summary = campaign(tmp_path, judge, listener, cases=2000).run()
    assert not [note for note in listener.of(events.Note) if "damaged" in note.message]
    assert summary.cases == 2000
    assert len(load_findings(StateDir(tmp_path))) == 1


@pytest.mark.parametrize("name", ["stats.json", "campaign.json"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 2}', '{"format": 1}', '{"format": 1, "targets": {"x": 3}}', "\x00\xff"]
)
def test_a_damaged_file_is_set_aside_and_told(tmp_path, name, text):
    tmp_path.joinpath(name).write_bytes(text.encode("latin-1"))
    listener = Listener()
    summary = campaign(tmp_path, always_good, listener, cases=5).run()
    assert summary.exit_code == 0
    [note] = listener.of(events.Note)
    assert f"set aside as {name}.damaged" in note.message
    assert (tmp_path / f"{name}.damaged").read_bytes() == text.encode("latin-1")
    assert json.loads((tmp_path / name).read_text())["format"] == 1


@pytest.mark.parametrize("before", ["nothing", "a file", "a folder"])
@pytest.mark.parametrize("now", ["a file", "a folder"])
def test_what_is_set_aside_takes_the_place_of_what_was_before(tmp_path, before, now):
    """Whatever lies in the place of a file: where it cannot be set aside, no campaign begins any more."""
    for path, what in ((tmp_path / "corpus" / "x.json.damaged", before), (tmp_path / "corpus" / "x.json", now)):
        path.parent.mkdir(exist_ok=True)
        if what == "a file":
            path.write_text("{")
        elif what == "a folder":
            path.mkdir()
            (path / "mine").write_text("{")
    listener = Listener()
    assert campaign(tmp_path, always_good, listener, cases=5).run().exit_code == 0
    [note] = listener.of(events.Note)
    assert "set aside as x.json.damaged" in note.message
    assert (tmp_path / "corpus" / "x.json.damaged").is_dir() == (now == "a folder")
    assert not (tmp_path / "corpus" / "x.json").exists()


@pytest.mark.parametrize("folder", ["pending", "inflight"])
@pytest.mark.parametrize("text", ["", "{}", '{"target": "toy@fake", "case": {}, "verdict": {}, "history": []}', "[1]"])
def test_damaged_work_is_set_aside_and_told(tmp_path, folder, text):
    with StateDir(tmp_path):
        (tmp_path / folder / "000001.json").write_text(text)
    listener = Listener()
    assert campaign(tmp_path, always_good, listener, cases=5).run().exit_code == 0
    assert len(listener.of(events.Note)) == 1
    assert [entry.suffix for entry in (tmp_path / folder).iterdir()] == [".damaged"]


def test_a_damaged_finding_is_set_aside_and_told(tmp_path):
    judge = when(lambda case: "nan_rows" in case.fault_names)
    [finding] = campaign(tmp_path, judge, cases=100).run().new
    (tmp_path / "findings" / finding.id / "case.json").write_text("{")
    notes: list[str] = []
    assert load_findings(StateDir(tmp_path, notes.append)) == []
    assert finding.id in notes[0]
    listener = Listener()
    summary = campaign(tmp_path, judge, listener, cases=100, seed=3).run()
    assert [f.id for f in summary.new] == [finding.id]
    assert (tmp_path / "findings" / f"{finding.id}.damaged").is_dir()


def test_rounds_left_in_flight_survive_two_starts(tmp_path):
    for slot in ("0", "1"):
        with StateDir(tmp_path) as state:
            state.begin_round(slot, TARGET, (toy(seed=int(slot)),))
    with StateDir(tmp_path) as state:
        left = list(state.left_rounds())
        assert [(target, cases[0].seed) for _, target, cases, _ in left] == [(TARGET, 0), (TARGET, 1)]
        for name, *_ in left:
            state.end_round(name)
        assert not list(state.left_rounds())


def test_pending_numbers_are_not_used_twice(tmp_path):
    item = BadCase(TARGET, toy(), bad(), (toy(seed=2),))
    with StateDir(tmp_path) as state:
        first = state.add_pending(item.to_json())
    with StateDir(tmp_path) as state:
        second = state.add_pending(item.to_json())
        assert first < second
        assert [found for _, found in state.pending(BadCase.from_json)] == [item, item]


def test_what_an_interrupted_write_left_is_swept(tmp_path):
    with StateDir(tmp_path):
        (tmp_path / ".tmp-1-stats.json").write_text("half")
        (tmp_path / "findings" / ".tmp-1-abc").mkdir()
        (tmp_path / "findings" / ".tmp-1-abc" / "case.json").write_text("half")
    with StateDir(tmp_path):
        assert not list(tmp_path.rglob(".tmp-*"))


def test_counters_add_up_over_campaigns(tmp_path):
    for seed in (1, 2, 3):
        campaign(tmp_path, lambda case, history, options: GOOD, cases=10, seed=seed).run()
    assert json.loads((tmp_path / "stats.json").read_text())["targets"][TARGET]["verdicts"] == {"pass": 30}
