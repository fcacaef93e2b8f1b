from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from moe_fuzz.campaign import events
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.report import junit
from tests.cli.campaign_told import OTHER, ROW, TARGET, story, summary, told

#: Element -> (attributes it must have, attributes it may have, elements it may hold), as Jenkins' junit-10.xsd has it.
GRAMMAR = {
    "testsuites": ((), ("name", "time", "tests", "failures", "errors"), ("testsuite",)),
    "testsuite": (
        ("name", "tests", "errors", "failures"), ("skipped", "time", "timestamp"), ("properties", "testcase"),
    ),
    "properties": ((), (), ("property",)),
    "property": (("name", "value"), (), ()),
    "testcase": (("name", "classname"), ("time",), ("skipped", "failure", "error", "system-out")),
    "skipped": ((), ("message", "type"), ()),
    "failure": ((), ("message", "type"), ()),
    "error": ((), ("message", "type"), ()),
    "system-out": ((), (), ()),
}  # fmt: skip
Results = dict[tuple[str, str], tuple[str, str]]


def read(text: str) -> Results:
    """(suite, test case) -> (outcome, what is said), as a reader of pytest's own files takes it; strict about the form.
    """
    root = ET.fromstring(text)
    assert root.tag == "testsuites"
    for element in root.iter():
        must, may, inside = GRAMMAR[element.tag]
        assert set(must) <= set(element.attrib) <= {*must, *may}, element.attrib
        assert {child.tag for child in element} <= set(inside), element.tag
    found: Results = {}
    for suite in root:
        cases = suite.findall("testcase")
        assert int(suite.get("tests", "")) == len(cases)
        for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.get(name, "")) == len(suite.findall(f"testcase/{tag}"))
        for case in cases:
            bad = [child for child in case if child.tag != "system-out"]
            assert len(bad) <= 1, "one outcome a test case"
            said = "\n".join(f"{child.get('message', '')}\n{child.text or ''}" for child in case)
            key = (str(suite.get("name")), str(case.get("name")))
            assert key not in found, "two test cases of one name"
            found[key] = (bad[0].tag if bad else "passed", said)
    return found


def test_each_thing_that_happened_is_a_test_case(finding: Finding) -> None:
    found = read(junit.render(story(told(finding))))
    outcomes = {key: outcome for key, (outcome, _) in found.items()}
    assert outcomes == {
        (TARGET, "campaign"): "passed",
        (TARGET, "ids duplicate-id [3fa9c1d2e0]"): "failure",
        (TARGET, "crash SIGSEGV [1111111111]"): "skipped",
        (TARGET, f"flaky: isolation bits ({finding.case.digest})"): "skipped",
        (TARGET, "worker killed: a case T=3"): "skipped",
        (TARGET, f"not examined: hang deadline ({finding.case.digest})"): "skipped",
        (OTHER, "campaign"): "passed",
        (OTHER, "ids out-of-range [2222222222]"): "passed",
        ("align@vllm", "campaign"): "skipped",
        ("moe-fuzz", "the campaign came to its end"): "passed",
    }
    assert finding.replay in found[TARGET, "ids duplicate-id [3fa9c1d2e0]"][1]
    assert finding.case.inline() in found[TARGET, "worker killed: a case T=3"][1]


def test_a_campaign_that_is_cut_is_red_and_keeps_what_it_had(finding: Finding) -> None:
    found = read(junit.render(story(told(finding, end=False))))
    assert found["moe-fuzz", "the campaign came to its end"][0] == "error"
    assert found[TARGET, "ids duplicate-id [3fa9c1d2e0]"][0] == "failure"
    assert found[TARGET, f"not examined: hang deadline ({finding.case.digest})"][0] == "error"


@pytest.mark.parametrize(
    ("changes", "red"),
    [
        ({"exit_code": 0, "new": ()}, False),
        ({"exit_code": 3, "new": (), "reason": "less ran than the floor"}, True),
        ({"exit_code": 1, "new": ()}, True),  # red for something that is no finding of ours to show
        ({"exit_code": 130, "new": (), "reason": "interrupted"}, True),
    ],
)
def test_red_is_what_the_exit_code_says(finding: Finding, changes: dict, red: bool) -> None:
    quiet = [event for event in told(finding, **changes)
             if not (isinstance(event, events.FindingReported) and event.status == "new")]  # fmt: skip
    outcomes = [outcome for outcome, _ in read(junit.render(story(quiet))).values()]
    assert ("error" in outcomes or "failure" in outcomes) is red


def test_a_target_of_which_nothing_ran_is_an_error(finding: Finding) -> None:
    refused = events.TargetRow(OTHER, 10, {"rejected": 10})
    missing = events.TargetRow("align@vllm", unavailable="vllm is not installed")
    stream = [*told(finding)[:-1], events.CampaignFinished(summary(finding, rows=(ROW, refused, missing)))]
    found = read(junit.render(story(stream)))
    assert found[OTHER, "campaign"][0] == "error"
    assert "nothing ran" in found[OTHER, "campaign"][1]
    assert found["align@vllm", "campaign"][0] == "error"  # it was asked for by name


def test_another_reader_understands_it(finding: Finding, tmp_path: Path) -> None:
    junitparser = pytest.importorskip("junitparser", reason="needs the extra `test`: pip install -e '.[test]'")
    file = tmp_path / "junit.xml"
    file.write_text(junit.render(story(told(finding))), encoding="utf-8")
    suites = list(junitparser.JUnitXml.fromfile(str(file)))
    assert [suite.name for suite in suites] == [TARGET, OTHER, "align@vllm", "moe-fuzz"]
    assert (suites[0].tests, suites[0].failures, suites[0].skipped) == (6, 1, 4)
