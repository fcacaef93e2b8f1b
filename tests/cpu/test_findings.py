"""Findings: the fingerprint is stable, the folder is whole, the report can be filed as it stands."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from moe_fuzz.campaign.finding import Finding, fingerprint, needed_features, place, simplest
from moe_fuzz.campaign.findings import find, load_findings, seen_again, write_finding
from moe_fuzz.campaign.issue import render_issue
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case, loads_sequence
from moe_fuzz.errors import UsageError
from moe_fuzz.ops import get_space
from moe_fuzz.verdict import VIOLATION, Verdict, Violation
from tests.cpu.campaign_fakes import SPACE, TARGET, toy

VIOLATION_SEEN = Violation(
    "ids", "duplicate-id", "expert 3 stands twice in row 0", "ids", (0, 1), "k distinct ids", "3, 3", 1.5,
    site="routing.py:9",
)  # fmt: skip


def finding(id_="0123456789", **changes):
    given = {
        "target": TARGET, "check": "ids", "symptom": "duplicate-id", "message": VIOLATION_SEEN.message,
        "finding_class": "contract", "clause": "README: ids are distinct", "case": toy(3, 1, 1, ["nan_rows"]),
        "verdict": Verdict(VIOLATION, (VIOLATION_SEEN,), detail="it said ``` here"), "raw": ("ids", "duplicate-id"),
        "features": ("fault:nan_rows",), "scope": (), "label": "toy T=1 E=3 k=1", "minimized_from": "toy T=33 E=61 k=8",
        "explain": ("rows: 33 → 1",), "env": {"torch": "2.9"}, "first_seen": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    return Finding(id_, **(given | changes))


# ---- fingerprint


def test_the_fingerprint_is_golden():
    """Ids stand in trackers and ledgers: they must not change from version to version."""
    assert fingerprint("toy@fake", "ids", "duplicate-id", "", ["fault:nan_rows"]) == "0874775757"


@pytest.mark.parametrize(
    "other",
    [
        ("toy@other", "ids", "duplicate-id", "", ["a"]),
        ("toy2@fake", "ids", "duplicate-id", "", ["a"]),
        ("toy@fake", "weights", "duplicate-id", "", ["a"]),
        ("toy@fake", "ids", "range", "", ["a"]),
        ("toy@fake", "ids", "duplicate-id", "routing.py in f", ["a"]),
        ("toy@fake", "ids", "duplicate-id", "", ["b"]),
        ("toy@fake", "ids", "duplicate-id", "", []),
    ],
)
def test_everything_in_it_counts(other):
    assert fingerprint(*other) != fingerprint("toy@fake", "ids", "duplicate-id", "", ["a"])


def test_order_and_line_numbers_do_not_count():
    one = fingerprint(TARGET, "crash", "SIGSEGV", "routing.py:12 in _kernel", ["a", "b"])
    assert one == fingerprint(TARGET, "crash", "SIGSEGV", "routing.py:99 in _kernel", ["b", "a", "a"])


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("routing.py:123 in _kernel", "routing.py in _kernel"),
        ("routing.py:123", "routing.py"),
        ("routing.py", "routing.py"),
        ("", ""),
        ("/a/b.py:7, c.py:8 in g", "/a/b.py, c.py in g"),
    ],
)
def test_a_site_without_its_lines(site, expected):
    assert place(site) == expected


def test_features_are_what_sets_a_case_apart_from_the_simplest():
    assert needed_features(SPACE, toy(1, 1, 1)) == ()
    assert needed_features(SPACE, toy(3, 2, 5)) == ()
    assert needed_features(SPACE, toy(4, 1, 0, dtype="float16")) == ("E even", "T=0", "dtype=float16")
    assert needed_features(SPACE, toy(3, 1, 1, ["ties"])) == ("fault:ties",)
    assert simplest(SPACE, toy(61, 8, 33, ["ties"])).steps[0].tokens == 1


def test_features_of_the_real_space_never_name_a_shape():
    space = get_space("topk_softmax")
    config = {"experts": "0-60", "top_k": 7, "dtype": "bfloat16", "renormalize": True, "bias": False, "scale": 1.0,
              "is_padding": False, "padding": "distinct", "edge": "right", "out": False, "magnitude": 2}  # fmt: skip
    case = replace(toy(), op="topk_softmax", config=config)
    space.validate(case)
    features = needed_features(space, case)
    assert "E not a power of two" in features
    assert not any("61" in feature or "7" in feature for feature in features)
    assert needed_features(space, simplest(space, case)) == ()


# ---- on disk


def test_what_is_written_is_read_again(tmp_path):
    with StateDir(tmp_path) as state:
        alone, after = finding(), finding("aaaaaaaaaa", sequence=(toy(seed=5),), first_seen="2026-02-01")
        path = write_finding(state, alone, lambda found: f"# repro of {found.id}\n")
        write_finding(state, after)
    assert sorted(os.listdir(path)) == ["case.json", "env.json", "finding.json", "report.md", "repro.py"]
    assert sorted(os.listdir(tmp_path / "findings" / "aaaaaaaaaa")) == [
        "case.json", "env.json", "finding.json", "report.md", "sequence.json",
    ]  # fmt: skip
    assert load_findings(StateDir(tmp_path)) == [alone, after]
    assert Case.load(path / "case.json") == alone.case
    sequence = (tmp_path / "findings" / "aaaaaaaaaa" / "sequence.json").read_text()
    assert loads_sequence(sequence) == (toy(seed=5), after.case)
    assert (path / "repro.py").read_text() == "# repro of 0123456789\n"
    assert Finding.from_json(json.loads(json.dumps(alone.to_json()))) == alone


def test_sightings_are_counted(tmp_path):
    with StateDir(tmp_path) as state:
        write_finding(state, finding())
        seen_again(state, finding(), 4)
    assert load_findings(StateDir(tmp_path))[0].times_seen == 5


def test_reading_needs_no_lock_and_makes_nothing(tmp_path):
    assert load_findings(StateDir(tmp_path / "none")) == []
    assert not (tmp_path / "none").exists()
    with StateDir(tmp_path) as state:
        write_finding(state, finding())
        assert len(load_findings(StateDir(tmp_path))) == 1


def test_a_finding_is_found_by_the_beginning_of_its_id(tmp_path):
    with StateDir(tmp_path) as state:
        for id_ in ("abc1111111", "abd2222222"):
            write_finding(state, finding(id_))
    state = StateDir(tmp_path)
    assert find(state, "abc").id == "abc1111111"
    with pytest.raises(UsageError, match="fits 2 findings"):
        find(state, "ab")
    for wrong in ("", "zz"):
        with pytest.raises(UsageError, match="no finding") as caught:
            find(state, wrong)
        assert "abc1111111, abd2222222" in caught.value.hint


@pytest.mark.parametrize("damage", ["case.json", "finding.json"])
def test_a_damaged_finding_is_told_and_the_others_are_read(tmp_path, damage):
    with StateDir(tmp_path) as state:
        write_finding(state, finding("1111111111"))
        write_finding(state, finding("2222222222"))
    (tmp_path / "findings" / "1111111111" / damage).write_text('{"id": 1}')
    notes = []
    assert [f.id for f in load_findings(StateDir(tmp_path, notes.append))] == ["2222222222"]
    assert len(notes) == 1
    assert "1111111111" in notes[0]


# ---- the report


def test_the_report_can_be_filed_as_it_stands():
    text = render_issue(finding(), repro=True)
    for needed in (
        "# toy@fake: ids duplicate-id", "expert 3 stands twice in row 0", "- Where: ids[0, 1]",
        "- Expected: k distinct ids", "- Got: 3, 3", "- Class: contract: README: ids are distinct",
        "- Site: routing.py:9",
        "toy T=1 E=3 k=1", "`fault:nan_rows`", "rows: 33 → 1", "toy T=33 E=61 k=8", "- torch: 2.9",
        f"\nmoe-fuzz replay {finding().case.inline()}\n", "`python repro.py`", "- Reproduces: always",
    ):  # fmt: skip
        assert needed in text
    assert text.count("```") % 2 == 0


def test_the_report_says_what_it_does_not_know():
    found = finding(minimal=False, finding_class="robustness", clause="", reproduces="sometimes 1/3")
    text = render_issue(found, repro=False)
    assert "a smaller input may exist" in text
    assert "never promised" in text
    assert "sometimes 1/3" in text
    assert "repro.py" not in text


def test_the_report_tells_what_else_is_wrong_on_the_input():
    """One flaw shows in many ways; which of them a finding is named after depends on the case that came first."""
    other = Violation("finite", "nan", "row 0 has a weight that is nan")
    found = finding(verdict=Verdict(VIOLATION, (VIOLATION_SEEN, other)))
    assert "- Also wrong on this input: `finite`: row 0 has a weight that is nan" in render_issue(found, repro=False)
    assert "Also wrong" not in render_issue(finding(), repro=False)


def test_the_report_of_a_sequence_names_culprit_and_victim():
    found = finding(sequence=(toy(seed=5),))
    text = render_issue(found, repro=False)
    assert "only after 1 other case ran in the same process" in text
    line = next(line for line in text.split("\n") if line.startswith("moe-fuzz replay "))
    assert [case.digest for case in loads_sequence(line.split()[-1])] == [
        case.digest for case in (*found.sequence, found.case)
    ]
