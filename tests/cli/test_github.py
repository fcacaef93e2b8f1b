from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moe_fuzz import report
from moe_fuzz.campaign import events
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.errors import UsageError
from moe_fuzz.report import github
from tests.cli.campaign_told import HOSTILE, story, told


def hear(stream: list[events.Event], path: Path) -> list[str]:
    lines: list[str] = []
    heard = github.Github(path, lines.append)
    for event in stream:
        heard.handle(event)
    heard.close()
    return lines


def test_new_findings_are_errors_and_flaky_ones_warnings(finding: Finding, tmp_path: Path) -> None:
    lines = hear(told(finding), tmp_path / "step.md")
    assert [line.split(" ")[0] for line in lines] == ["::error", "::warning"]
    assert lines[0].startswith("::error title=topk_softmax@builtin%3A ids duplicate-id::3fa9c1d2e0")
    assert finding.replay in lines[0]
    assert all("\n" not in line for line in lines)


def test_nothing_that_a_target_said_can_give_a_command() -> None:
    line = github.command("error", HOSTILE, "a:b,c", file="x,y")
    assert line.startswith("::error file=x%2Cy,title=a%3Ab%2Cc::")
    assert "\n" not in line
    assert "%250A" in line  # it was an escape already


def test_no_more_annotations_than_github_shows(finding: Finding, tmp_path: Path) -> None:
    many = [events.FindingReported(replace(finding, id=f"{n:010}"), "new", "there") for n in range(30)]
    stream = told(finding)
    lines = hear([*stream[:2], *many, *stream[2:]], tmp_path / "step.md")
    errors = [line for line in lines if line.startswith("::error")]
    assert len(errors) == 10
    assert "22 more new findings" in errors[-1]


def test_the_summary_is_added_to_what_the_step_said_before(finding: Finding, tmp_path: Path) -> None:
    path = tmp_path / "step.md"
    path.write_text("# before\n")
    hear(told(finding), path)
    text = path.read_text()
    assert text.startswith("# before\n## moe-fuzz: 100 cases in 5.0 s, 1 new finding")
    told_of = ("| `topk_softmax@builtin` | 90 |", finding.replay, "1111111111", "flaky", "killed:SIGKILL", "align@vllm")
    assert [needed for needed in told_of if needed not in text] == []
    assert "<script>" not in text
    assert hear(told(finding, end=False), path)[-1].startswith("::error title=moe-fuzz::the campaign did not come")
    assert "not finished, 1 new finding so far" in path.read_text()


def test_the_summary_never_grows_past_what_github_takes(finding: Finding) -> None:
    long = replace(finding, label="x" * 5000)
    many = [events.FindingReported(replace(long, id=f"{n:010}"), "new", "there") for n in range(400)]
    text = github.markdown(story([*told(finding)[:2], *many, *told(finding)[2:]]))
    assert len(text.encode()) < github.LIMIT
    assert "did not fit" in text
    assert "flaky" in text


def test_it_is_on_by_itself_in_a_workflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(github.SUMMARY, str(tmp_path / "step.md"))
    assert list(report.open_reports((), {"GITHUB_ACTIONS": "true"})) == ["github"]
    assert list(report.open_reports((), {})) == []
    assert list(report.open_reports((("github", None),), {"GITHUB_ACTIONS": "true"})) == ["github"]
    named = report.open_reports((("github", tmp_path / "mine.md"),), {"GITHUB_ACTIONS": "true"})
    assert list(named) == [f"github={tmp_path / 'mine.md'}"]


def test_a_summary_that_cannot_be_written_is_an_error(
    call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a green step without one."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    for place in (tmp_path, Path("/proc/nowhere/step.md")):
        monkeypatch.setenv(github.SUMMARY, str(place))
        for words in (("run",), ("gate",)):
            ran = call(*words, "topk_softmax@torch", "--device", "cpu", "--cases", "4")
            assert (ran.code, f"{place} cannot be written" in ran.err) == (2, True), ran.err


def test_two_reports_of_one_file_are_refused(call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for one, other in (("junit=r.xml", "sarif=r.xml"), ("html=r", f"html={tmp_path}/r"), ("ndjson=a/../r", "github=r")):
        for command in ("run", "gate"):
            ran = call(command, "topk_softmax@torch", "--device", "cpu", "--report", one, "--report", other)
            assert (ran.code, f"the reports {one} and {other} are one file" in ran.err) == (2, True), ran.err
    assert not list(tmp_path.glob("r*"))
    monkeypatch.setenv(github.SUMMARY, "step.md")
    with pytest.raises(UsageError, match=r"are one file, step\.md"):
        report.open_reports((("ndjson", Path("step.md")), ("github", None)), {})
    twice = (("junit", Path("r.xml")), ("junit", Path("r.xml")))
    assert list(report.open_reports(twice, {})) == ["junit=r.xml"]
    assert len(report.open_reports((("ndjson", Path("/dev/null")), ("github", Path("/dev/null"))), {})) == 2


def test_only_github_needs_no_path(call: Callable) -> None:
    with pytest.raises(UsageError, match="the report junit needs a file"):
        report.open_report("junit", None)
    ran = call("run", "topk_softmax@builtin", "--report", "junit=")
    assert ran.code == 2
    assert "KIND=PATH" in ran.err
