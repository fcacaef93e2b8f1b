"""Reports that are one document: whole at any moment, and never worth less than what they replace."""

from __future__ import annotations

import errno
import os
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_fuzz.campaign import events
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.errors import UsageError
from moe_fuzz.report import open_report, whole
from moe_fuzz.report.story import Story
from tests.cli.campaign_told import CLOSED, LEDGER, told
from tests.cli.test_run import FakeCampaign, summary

KINDS = ("junit", "sarif", "html")


@pytest.fixture
def campaign(monkeypatch: pytest.MonkeyPatch, pool: object) -> FakeCampaign:
    fake = FakeCampaign()
    monkeypatch.setattr("moe_fuzz.cli.run.Campaign", fake)
    return fake


def render(story: Story) -> str:
    return f"{len(story.told)} findings, {'finished' if story.summary else 'cut'}"


def document(path: Path) -> whole.Whole:
    now = iter(range(1000))
    return whole.Whole(path, render, lambda: float(2 * next(now)))


def test_it_is_there_from_the_start_and_grows(finding: Finding, tmp_path: Path) -> None:
    path = tmp_path / "report"
    made = document(path)
    assert not path.exists()
    seen = []
    for event in told(finding):
        made.handle(event)
        if path.exists() and path.read_text() not in seen:
            seen.append(path.read_text())
    made.close()
    assert seen == ["0 findings, cut", "1 findings, cut", "2 findings, cut", "3 findings, cut", "3 findings, finished"]
    assert os.listdir(tmp_path) == ["report"]


def test_a_campaign_that_ends_in_an_error_leaves_what_it_had(finding: Finding, tmp_path: Path) -> None:
    made = document(tmp_path / "report")
    for event in told(finding, end=False):
        made.handle(event)
    made.close()
    assert (tmp_path / "report").read_text() == "3 findings, cut"


def test_what_was_there_stays_until_there_is_something_to_say(finding: Finding, tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.write_text("the last run's")
    made = document(path)
    made.close()  # a usage error, say
    assert path.read_text() == "the last run's"
    made.handle(told(finding)[1])
    assert path.read_text() == "0 findings, cut"


def test_a_full_disk_costs_the_new_document_alone(
    finding: Finding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report"
    made = document(path)
    made.handle(told(finding)[1])

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("moe_fuzz.report.whole.os.fsync", full)
        for event in told(finding)[2:-1]:
            made.handle(event)  # none of these is the last
        with pytest.raises(OSError, match="No space left"):
            made.handle(told(finding)[-1])
    assert path.read_text() == "0 findings, cut"
    assert os.listdir(tmp_path) == ["report"]
    made.close()  # there is room again
    assert path.read_text() == "3 findings, finished"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    whole.replace_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_pipe_gets_one_document(finding: Finding, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    made = document(tmp_path / "pipe")
    for event in told(finding):
        made.handle(event)
    made.close()
    assert reader.communicate(timeout=10)[0] == "3 findings, finished"


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_cannot_be_written_is_told_before_the_campaign(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "report"):
        with pytest.raises(UsageError, match="cannot be written") as caught:
            open_report(kind, path)
        assert f"--report {kind}=PATH" in caught.value.hint


@pytest.mark.parametrize("kind", [*KINDS, "github"])
def test_what_is_known_names_the_ledgers_entry_and_what_was_left_out_is_told(
    finding: Finding, tmp_path: Path, kind: str
) -> None:  # fmt: skip
    path = tmp_path / "report"
    report = open_report(kind, path)
    for event in told(finding):
        report.handle(event)
    report.close()
    said = path.read_text()
    assert LEDGER["name"] in said
    assert f"{LEDGER['tracker']} ({LEDGER['owner']})" in said
    assert CLOSED in said


@pytest.mark.parametrize("kind", KINDS)
def test_exit_codes(call: Callable, campaign: FakeCampaign, finding: Finding, kind: str) -> None:
    ran = call("run", "topk_softmax@builtin", "--report", f"{kind}=/dev/full")
    assert ran.code == 3
    assert f"the report {kind}=/dev/full is incomplete: No space left" in ran.err
    campaign.summary = summary(new=(finding,), exit_code=1)
    campaign.events = [events.FindingReported(finding, "new", "somewhere")]
    assert call("run", "topk_softmax@builtin", "--report", f"{kind}=/dev/full").code == 1  # a finding outranks it


def test_all_at_once_in_a_workflow(
    call: Callable, campaign: FakeCampaign, finding: Finding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    campaign.summary = summary(new=(finding,), exit_code=1)
    campaign.events = [events.FindingReported(finding, "new", "somewhere")]
    reports = [word for kind in KINDS for word in ("--report", f"{kind}=out/{kind}")]
    ran = call("run", "topk_softmax@builtin", *reports)
    assert ran.code == 1
    assert "::error title=" in ran.out
    assert finding.replay in (tmp_path / "step.md").read_text()
    assert all(finding.id in (tmp_path / "out" / kind).read_text() for kind in KINDS)
    assert ET.parse(tmp_path / "out" / "junit").getroot().get("failures") == "1"


def test_a_campaign_that_breaks_leaves_a_red_junit(call: Callable, campaign: FakeCampaign, tmp_path: Path) -> None:
    campaign.error = RuntimeError("oh")
    assert call("run", "topk_softmax@builtin", "--report", "junit=j.xml").code == 4
    assert ET.parse(tmp_path / "j.xml").getroot().get("errors") == "1"
