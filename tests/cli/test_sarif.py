from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz.campaign import events
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.ops import OPS, get_space
from moe_fuzz.report import github, junit, sarif
from moe_fuzz.report.story import Told
from tests.cli.campaign_told import findings, story, told

SCHEMA = Path(__file__).with_name("sarif-2.1.0-rtm.5.json")


@pytest.fixture
def errors() -> Callable[[Any], list[str]]:
    """What the schema has against a document."""
    jsonschema = pytest.importorskip("jsonschema", reason="needs the extra `test`: pip install -e '.[test]'")
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    checker = jsonschema.validators.validator_for(schema)(schema, format_checker=jsonschema.FormatChecker())
    return lambda document: [f"{list(error.path)}: {error.message}" for error in checker.iter_errors(document)]


def rendered(finding: Finding, **changes: Any) -> Any:
    return json.loads(sarif.render(story(told(finding, **changes))))


@pytest.mark.parametrize("end", [True, False])
def test_valid_against_the_schema(errors: Callable, finding: Finding, end: bool) -> None:
    document = rendered(finding, end=end)
    assert errors(document) == []
    broken = copy.deepcopy(document)
    broken["runs"][0]["results"][0]["level"] = "terrible"
    assert errors(broken), "the schema must be able to say no"


def test_valid_before_anything_happened(errors: Callable, finding: Finding) -> None:
    assert errors(json.loads(sarif.render(story(told(finding)[:2])))) == []


def test_what_fails_is_a_result_and_what_is_gone_is_none(finding: Finding) -> None:
    run = rendered(finding)["runs"][0]
    assert [(r["ruleId"], r["level"], r["baselineState"]) for r in run["results"]] == [
        ("routing/ids", "error", "new"), ("process/crash", "warning", "unchanged"),
    ]  # fmt: skip
    assert "suppressions" not in run["results"][0]
    assert run["results"][1]["suppressions"][0]["kind"] == "external"
    rules = run["tool"]["driver"]["rules"]
    assert all(rules[r["ruleIndex"]]["id"] == r["ruleId"] for r in run["results"])
    said = json.dumps(run["invocations"])
    for needed in ("2222222222", "align@vllm", "isolation", "killed:SIGKILL", "hang deadline"):
        assert needed in said
    assert run["invocations"][0]["executionSuccessful"] is True
    assert rendered(finding, end=False)["runs"][0]["invocations"][0]["executionSuccessful"] is False


@pytest.mark.parametrize("class_", ["contract", "robustness"])
@pytest.mark.parametrize("status", ["new", "base", "robustness"])
def test_a_result_is_an_error_where_the_campaign_is_red(
    finding: Finding, tmp_path: Path, class_: str, status: str
) -> None:
    """Of a target that promises nothing, findings of class robustness turn a gate red too."""
    stream = [*told(finding)[:2], events.FindingReported(replace(finding, finding_class=class_), status, "")]
    (result,) = json.loads(sarif.render(story(stream)))["runs"][0]["results"]
    lines: list[str] = []
    heard = github.Github(tmp_path / "step.md", lines.append)
    for event in stream:
        heard.handle(event)
    assert (result["level"] == "error") == (status == "new")
    assert ("<failure " in junit.render(story(stream))) == (status == "new")
    assert any(line.startswith("::error") for line in lines) == (status == "new")


@pytest.mark.parametrize("status", ["base", "flaky", "robustness", "known"])
def test_what_a_gate_tolerates_is_suppressed_and_needs_no_folder(
    errors: Callable, finding: Finding, status: str
) -> None:
    document = json.loads(sarif.render(story([*told(finding)[:2], events.FindingReported(finding, status, "")])))
    assert errors(document) == []
    (result,) = document["runs"][0]["results"]
    assert result["suppressions"]
    assert "physicalLocation" not in result["locations"][0]


def test_fingerprints_outlive_messages_lines_and_seeds(finding: Finding) -> None:
    def prints(one: Finding) -> Any:
        return rendered(one)["runs"][0]["results"][0]["partialFingerprints"]

    assert prints(finding) == {sarif.FINGERPRINT: finding.id, "primaryLocationLineHash": f"{finding.id}:1"}
    assert prints(replace(finding, message="another", times_seen=9)) == prints(finding)
    assert prints(replace(finding, id="4444444444")) != prints(finding)


def test_rules_are_the_same_whatever_was_found(finding: Finding) -> None:
    def rules(stream: list) -> list[str]:
        return [rule["id"] for rule in json.loads(sarif.render(story(stream)))["runs"][0]["tool"]["driver"]["rules"]]

    started = [event for event in told(finding) if event.kind in ("campaign-started", "target-unavailable")]
    assert rules(started) == rules(told(finding))
    assert {"routing/ids", "process/crash", "process/hang", "process/oom", "process/fence"} <= set(rules(started))


def test_every_check_has_a_rule_of_its_family() -> None:
    for op in OPS:
        for check in get_space(op).checks:
            family = "process" if check in sarif.ENDS else get_space(op).family
            assert sarif.rule_of(f"{op}@any", check) == f"{family}/{check}"


def place(one: Finding, root: Path) -> Any:
    text = sarif.render(story([*told(one)[:2], told(one)[11]]), root)
    return json.loads(text)["runs"][0]["results"][0]["locations"][0]["physicalLocation"]


def test_the_line_of_the_kernel(finding: Finding, tmp_path: Path) -> None:
    _, crash, _ = findings(finding)
    assert sarif.place_of(Told(crash, "new", "", 0.0)) == ("topk", "/opt/lib/kernels/routing.py", 40)

    def at(site: str) -> Finding:
        """As a sanitizer names it."""
        violation = replace(finding.verdict.violations[0], site=site)
        return replace(finding, verdict=replace(finding.verdict, violations=(violation,)))

    assert place(at(f"{tmp_path}/csrc/my topk.cu:77 in topk<float>".replace("my topk", "my_topk")), tmp_path) == {
        "artifactLocation": {"uri": "csrc/my_topk.cu", "uriBaseId": "SRCROOT"}, "region": {"startLine": 77},
    }  # fmt: skip
    elsewhere = place(at("/opt/a%b/topk.cu:5"), tmp_path)
    assert elsewhere["artifactLocation"] == {"uri": "file:///opt/a%25b/topk.cu"}
    nowhere = place(at("libtopk.so(+0x12f)"), tmp_path)
    assert nowhere["artifactLocation"]["uri"].endswith(f"findings/{finding.id}/report.md")
