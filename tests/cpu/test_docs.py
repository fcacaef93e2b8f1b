"""The documentation names what exists: checks, planted bugs, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_fuzz.ops import OPS, get_space
from moe_fuzz.planted.catalog import PLANTED

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
#: The workers' own verdicts on a process that died, beside the checks that run in it.
DEATHS = {"crash", "hang", "oom"}


def rows() -> list[list[str]]:
    """The cells of the tables in bugs.md, from the reference on."""
    lines = (ROOT / "docs" / "bugs.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in cells if row[0] not in ("reference",)]


def test_bugs_name_each_planted_bug_with_its_check_and_issue() -> None:
    told = {
        (row[-1].strip("`"), row[-2].strip("`"), issue)
        for row in rows() if row[-1] for issue in row[0].lower().split(", ")
    }  # fmt: skip
    assert told == {(bug.name, bug.check, bug.upstream.lower()) for bug in PLANTED}


def test_bugs_name_only_checks_that_exist() -> None:
    checks = {check for op in OPS for check in get_space(op).checks} | DEATHS
    named = {row[-2].strip("`") for row in rows() if not row[-2].startswith("*planned*") and row[-2] != "binding"}
    assert named
    assert named <= checks


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    named = re.findall(r"`((?:[\w.]+/)*[\w]+\.(?:py|toml|txt))(?:::\w+)?`", document.read_text())
    folders = ("", "moe_fuzz", "moe_fuzz/ops/routing", "moe_fuzz/targets", "moe_fuzz/planted")
    for name in named:
        assert any((ROOT / folder / name).exists() for folder in folders), name
