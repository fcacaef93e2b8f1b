"""A campaign that is interrupted or killed: nothing is lost, and the next run goes on."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import shutil
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from moe_fuzz.campaign import engine, events, leftover, triage
from moe_fuzz.campaign.code import edited_since
from moe_fuzz.campaign.progress import Plan
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.errors import EnvironmentProblem
from tests.cpu.campaign_fakes import (
    GOOD,
    TARGET,
    FakePool,
    Listener,
    always_good,
    bad,
    campaign,
    nan_on_odd,
    ran,
    settings,
    toy,
    when,
)


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


def test_an_interrupt_saves_and_the_next_run_goes_on(tmp_path):
    whole = campaign(tmp_path / "whole", when(nan_on_odd), cases=600)
    whole.run()

    def cut(event):
        if isinstance(event, events.Progress) and event.cases >= 150 and not cut.done:
            cut.done = True
            raise KeyboardInterrupt

    cut.done = False
    listener = Listener()
    first = campaign(tmp_path / "cut", when(nan_on_odd), cut, cases=600)
    first_summary = _run_interrupted(first)
    second = campaign(tmp_path / "cut", when(nan_on_odd), listener, cases=600)
    summary = second.run()
    assert listener.of(events.CampaignStarted)[0].resumed
    assert summary.cases == 600
    assert set(ran(whole)) <= set(ran(first)) | set(ran(second))
    assert len(second.pool.leased) < 600
    assert summary.exit_code == 1  # what the first part found is still this campaign's news
    assert first_summary is None or first_summary.exit_code == 130
    third = Listener()
    campaign(tmp_path / "cut", always_good, third, cases=600).run()
    assert not third.of(events.CampaignStarted)[0].resumed


def _run_interrupted(made):
    try:
        return made.run()
    except KeyboardInterrupt:
        return None


def test_ctrl_c_in_the_main_thread_gives_a_summary_and_130(tmp_path, monkeypatch):
    listener = Listener()
    made = campaign(tmp_path, when(nan_on_odd), listener, cases=100_000)


    class Interrupting(engine.Triage):
        def work(self, seconds):
            if len(made.pool.leased) > 100:
                raise KeyboardInterrupt
            return False

    monkeypatch.setattr(engine, "Triage", Interrupting)
    summary = made.run()
    assert (summary.exit_code, summary.interrupted) == (130, True)
    assert listener.of(events.CampaignFinished)[0].summary == summary
    assert summary.unexamined == len(list((tmp_path / "pending").iterdir()))


def test_a_kill_while_a_finding_is_examined_loses_nothing(tmp_path):
    def killer(event):
        if isinstance(event, events.FindingConfirming):
            raise Killed

    with pytest.raises(Killed):
        campaign(tmp_path, when(nan_on_odd), killer, cases=100).run()
    assert list((tmp_path / "pending").glob("*.json"))
    listener = Listener()
    # The cases of this run never fail, so the finding can only come from what was pending.
    pool = FakePool(when(nan_on_odd))
    summary = campaign(tmp_path, always_good, listener, pool=pool, cases=1, seed=99).run()
    assert listener.of(events.PhaseStarted)[0].name == "resume"
    assert [finding.features for finding in summary.new] == [("fault:nan_rows",)]
    assert not list((tmp_path / "pending").iterdir())


@pytest.mark.parametrize("moment", ["os.replace", "pathlib.Path.rename", "emit"])
def test_a_finding_is_news_until_a_campaign_has_ended_with_it(tmp_path, monkeypatch, moment):
    """Killed at any moment after it was found, the campaign that goes on reports it as new."""

    def killer(event):
        if moment == "emit" and isinstance(event, events.FindingReported):
            raise Killed

    def kill(*paths):
        if "findings" in str(paths):
            raise Killed
        return real(*paths)

    if moment != "emit":
        real = {"os.replace": os.replace, "pathlib.Path.rename": Path.rename}[moment]
        monkeypatch.setattr(moment, kill)
    try:
        campaign(tmp_path, when(nan_on_odd), killer, cases=300).run()
    except Killed:
        monkeypatch.undo()
    summary = campaign(tmp_path, when(nan_on_odd), cases=300).run()
    assert (summary.exit_code, len(summary.new)) == (1, 1)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_while_a_finding_is_written_leaves_it_to_the_next_run(tmp_path, monkeypatch, moment):
    """Drivers go on for a moment, and count what they meet as seen again: of a folder that may not be there."""
    real = triage.write_finding

    def interrupted(state, finding, render):
        if moment == "after":
            real(state, finding, render)
        made._triage._sightings[finding.id] += 3
        raise KeyboardInterrupt

    monkeypatch.setattr(triage, "write_finding", interrupted)
    made = campaign(tmp_path, when(nan_on_odd), cases=300)
    summary = made.run()
    assert (summary.exit_code, summary.interrupted) == (130, True)
    assert summary.unexamined == len(list((tmp_path / "pending").glob("*.json"))) > 0
    assert len(summary.new) == len(list((tmp_path / "findings").iterdir())) == (moment == "after")
    monkeypatch.undo()
    summary = campaign(tmp_path, when(nan_on_odd), cases=300).run()
    assert (summary.exit_code, len(summary.new)) == (1, 1)


def test_killed_while_the_reports_are_written_the_same_campaign_goes_on(tmp_path):
    def judge(case, history, options):
        return bad() if case.config["bias"] else GOOD

    def cut(event):
        if isinstance(event, events.CampaignFinished):
            raise Killed

    with pytest.raises(Killed):
        campaign(tmp_path, judge, cut, cases=60).run()
    listener = Listener()
    summary = campaign(tmp_path, judge, listener, cases=60).run()
    assert listener.of(events.CampaignStarted)[0].resumed
    assert (summary.cases, summary.exit_code, len(summary.new)) == (60, 1, 1)  # news, until somebody was told


def test_a_round_in_flight_when_killed_is_run_first(tmp_path):
    victim = toy(61, 4, 7, ["nan_rows"])
    with StateDir(tmp_path) as state:
        state.begin_round("0", TARGET, (toy(), victim))
    made = campaign(tmp_path, when(nan_on_odd), cases=1, seed=99)
    summary = made.run()
    assert made.pool.leased[:2] == [toy(), victim]
    assert summary.cases == 1  # what was replayed is not counted
    assert len(summary.new) == 1
    assert not list((tmp_path / "inflight").iterdir())


def test_a_case_that_keeps_killing_the_campaign_is_left_out_and_told(tmp_path):
    """It alone: what else its round holds is run, and the campaign comes to its end."""

    def judge(case, history, options):
        if case == deadly:
            os._exit(9)
        return GOOD

    whole = campaign(tmp_path / "whole", always_good, cases=100)
    whole.run()
    times = ran(whole)  # drivers draw at once: the simplest round, with which each unit begins, may stand anywhere
    deadly, neighbour = [
        pair for pair in pairwise(whole.pool.leased)
        if pair[0].config == pair[1].config and all(times[case.digest] == 1 for case in pair)
    ][20]  # fmt: skip
    for _ in range(leftover.MAX_REPLAYS + 1):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                campaign(tmp_path / "state", judge, cases=100).run()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    listener = Listener()
    made = campaign(tmp_path / "state", when(lambda case: case == neighbour), listener, cases=100)
    summary = made.run()
    assert deadly not in made.pool.leased
    assert neighbour in made.pool.leased
    assert (summary.cases, len(summary.new)) == (99, 1)
    [note] = [event.message for event in listener.of(events.Note) if "died 2 times" in event.message]
    assert note.endswith(f"moe-fuzz replay {deadly.inline()}")
    assert not list((tmp_path / "state" / "inflight").iterdir())
    again = campaign(tmp_path / "state", always_good, cases=100, seed=8)
    assert not again.run().exit_code  # another campaign, which knows nothing of it


def test_two_kills_from_outside_during_a_round_take_no_case_away(tmp_path):
    """They come while it runs, each time in another of its cases."""
    round_ = tuple(toy(seed=seed) for seed in range(8))
    with StateDir(tmp_path) as state:
        state.begin_round("0", TARGET, round_)
    for at in (2, 5):

        def judge(case, history, options, at=at):
            if case == round_[at]:
                raise Killed
            return GOOD

        with pytest.raises(Killed):
            campaign(tmp_path, judge, cases=1).run()
    listener = Listener()
    made = campaign(tmp_path, when(lambda case: case == round_[5]), listener, cases=1)
    assert len(made.run().new) == 1
    assert made.pool.leased[:3] == list(round_[5:])
    assert not [event for event in listener.of(events.Note) if "died" in event.message]


def test_a_campaign_that_finds_no_target_is_still_to_be_gone_on_with(tmp_path):
    """Where no target can be had for once, what was run before is not thrown away."""

    def killer(event):
        if isinstance(event, events.FindingReported):
            raise Killed

    with pytest.raises(Killed):
        campaign(tmp_path, when(nan_on_odd), killer, cases=300).run()
    gone = FakePool(always_good, unavailable=(TARGET,))
    assert campaign(tmp_path, always_good, pool=gone, cases=300).run().exit_code == 3
    listener = Listener()
    summary = campaign(tmp_path, when(nan_on_odd), listener, cases=300).run()
    assert listener.of(events.CampaignStarted)[0].resumed
    assert (summary.cases, summary.exit_code, len(summary.new)) == (300, 1, 1)


@pytest.mark.parametrize("end", [KeyboardInterrupt, EnvironmentProblem("the disk is full", "make room")])
def test_what_ends_a_campaign_in_order_counts_against_no_case(tmp_path, end):
    with StateDir(tmp_path) as state:
        state.begin_round("0", TARGET, (toy(),))

    def judge(case, history, options):
        raise end

    for _ in range(leftover.MAX_REPLAYS + 1):
        with contextlib.suppress(EnvironmentProblem):
            campaign(tmp_path, judge, cases=1).run()
    made = campaign(tmp_path, always_good, cases=1)
    made.run()
    assert made.pool.leased[0] == toy()


def test_an_interrupted_campaign_keeps_its_random_seed(tmp_path):
    def killer(event):
        if isinstance(event, events.Progress):
            raise Killed

    with pytest.raises(Killed):
        campaign(tmp_path, always_good, killer, seed=None).run()
    seed = json.loads((tmp_path / "campaign.json").read_text())["seed"]
    assert campaign(tmp_path, always_good, seed=None).run().seed == seed
    assert campaign(tmp_path, always_good, seed=None).run().seed != seed


def _drivers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("driver-")]


def test_no_driver_goes_on_in_a_directory_that_is_given_up(tmp_path):
    begun = threading.Event()

    def slow(case, history, options):
        begun.set()
        time.sleep(0.2)
        return GOOD

    def full_disk(event):
        if isinstance(event, events.PhaseStarted) and event.name != "resume":
            return
        if isinstance(event, events.Progress):
            assert begun.wait(10)
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        campaign(tmp_path, slow, full_disk, cases=100).run()
    assert begun.is_set()
    assert not _drivers()


@pytest.mark.parametrize("patient", [True, False], ids=["soon_done", "too_long"])
def test_the_round_that_an_interrupt_meets_is_counted_or_runs_again(tmp_path, monkeypatch, patient):
    """Its one case is bad, and the last of its unit: whichever way it goes, it is told in the end."""
    running, release = threading.Event(), threading.Event()

    def judge(case, history, options):
        running.set()
        assert release.wait(10)
        return bad()

    class Interrupting(engine.Triage):
        def work(self, seconds):
            assert running.wait(10)
            if patient:
                threading.Timer(0.1, release.set).start()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "Triage", Interrupting)
        if not patient:
            patch.setattr(engine, "PATIENCE", 0.05)
        summary = campaign(tmp_path, judge, cases=1).run()
    assert (summary.exit_code, summary.interrupted) == (130, True)
    assert summary.unexamined == patient
    release.set()
    for thread in _drivers():
        thread.join(10)
    assert len(list((tmp_path / "inflight").glob("*.json"))) == (not patient)
    listener = Listener()
    again = campaign(tmp_path, lambda *given: bad(), listener, cases=1).run()
    assert listener.of(events.CampaignStarted)[0].resumed
    assert listener.of(events.PhaseStarted)[0].name == "resume"
    assert len(again.new) == 1


def _cut(tmp_path, pool):
    def interrupt(event):
        if isinstance(event, events.Progress):
            raise KeyboardInterrupt

    _run_interrupted(campaign(tmp_path, always_good, interrupt, pool=pool, cases=600))


@pytest.mark.parametrize(("release", "goes_on"), [("0.0", True), ("0.1", False)])
def test_another_release_is_not_gone_on_with(tmp_path, release, goes_on):
    _cut(tmp_path, FakePool(always_good))
    pool = FakePool(always_good)
    pool.versions = lambda target: {"torch": release}
    listener = Listener()
    campaign(tmp_path, always_good, listener, pool=pool, cases=600).run()
    [started] = listener.of(events.CampaignStarted)
    assert started.resumed == goes_on
    assert any("toy@fake runs with other releases since it began" in note for note in started.notes) != goes_on


@pytest.mark.parametrize("edited", ["mine.py", "helper.py", "other.py", ""])
def test_what_was_edited_since_is_not_gone_on_with(tmp_path, edited):
    """mine.py imports helper.py, and nothing imports other.py."""
    for name, text in (("mine.py", "import helper\n\n\ndef router(logits, top_k):\n    return helper.pick(logits)\n"),
                       ("helper.py", "def pick(logits): ...\n"), ("other.py", "")):  # fmt: skip
        (tmp_path / name).write_text(text)
    given = settings(targets=(f"topk_softmax@{tmp_path / 'mine.py'}:router",))
    began = time.time() + 1  # file systems count in ticks
    state = StateDir(tmp_path / "state")
    with state:
        Plan.open(given, state, began).save(given, state, [], finished=False)
        if edited:
            os.utime(tmp_path / edited, (began + 1, began + 1))
        plan = Plan.open(given, state, began + 2, {given.targets[0]: ""})
    touched = edited in ("mine.py", "helper.py")
    assert plan.resumed != touched
    assert (plan.seed, plan.began) == (given.seed, began + 2 if touched else began)
    why = f"{given.targets[0]} is made of {tmp_path / edited}, which was written"
    assert plan.superseded == (why if touched else "")


def test_our_own_kernels_count_and_what_is_installed_does_not(monkeypatch, tmp_path):
    assert edited_since("align@builtin", 0.0) is not None
    assert edited_since("align@builtin", time.time() + 1e6) is None
    assert edited_since("toy@fake", 0.0) is None
    installed = tmp_path / "site-packages" / "acme"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("def router(logits, top_k): ...\n")
    monkeypatch.syspath_prepend(str(installed.parent))
    assert edited_since("topk_softmax@acme:router", 0.0) is None
    monkeypatch.syspath_prepend(str(shutil.copytree(installed.parent, tmp_path / "src")))
    importlib.invalidate_caches()
    assert edited_since("topk_softmax@acme:router", 0.0) == tmp_path / "src" / "acme" / "__init__.py"
