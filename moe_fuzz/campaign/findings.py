"""Findings on disk: one folder each, written whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_fuzz.campaign.finding import Face, Finding
from moe_fuzz.campaign.issue import render_issue
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case, dumps_sequence, loads_sequence
from moe_fuzz.case_json import read_text
from moe_fuzz.errors import EnvironmentProblem, UsageError

RenderRepro = Callable[[Finding], str]
_ELSEWHERE = ("case", "sequence", "env", "replay")  # fields with a file of their own beside finding.json


def folder(state: StateDir, finding: Finding) -> Path:
    return state.path / "findings" / finding.id


def write_finding(state: StateDir, finding: Finding, render_repro: RenderRepro | None = None) -> Path:
    """Writes a new finding's folder and returns it."""
    script = render_repro(finding) if render_repro is not None else ""
    files = {
        "case.json": finding.case.dumps(indent=1) + "\n",
        "finding.json": _dumps(_record(finding)),
        "env.json": _dumps(dict(finding.env)),
        "report.md": render_issue(finding, repro=_shows_it(script)),
    }
    if finding.sequence:
        files["sequence.json"] = dumps_sequence((*finding.sequence, finding.case)) + "\n"
    if script:
        files["repro.py"] = script
    return state.write_folder(f"findings/{finding.id}", files)


def seen_again(state: StateDir, finding: Finding, times: int = 1) -> Finding:
    """Counts further sightings of a finding that is on disk."""
    finding = replace(finding, times_seen=finding.times_seen + times)
    state.write_json(f"findings/{finding.id}/finding.json", _record(finding))
    return finding


def add_face(state: StateDir, finding: Finding, face: Face) -> Finding:
    """Adds another smallest case to a finding that is on disk, and counts the sighting."""
    finding = seen_again(state, replace(finding, faces=(*finding.faces, face)))
    repro = folder(state, finding) / "repro.py"
    shown = _shows_it(read_text(repro)) if repro.exists() else False
    state.write_text(f"findings/{finding.id}/report.md", render_issue(finding, repro=shown))
    return finding


def _shows_it(script: str) -> bool:
    """Not the one that says why there can be none: repro/none.py.j2."""
    return bool(script) and "There is no script for this finding" not in script


def load_findings(state: StateDir, set_aside: bool = False) -> list[Finding]:
    """All findings, oldest first. A damaged one is told through `state.note`, and set aside if `set_aside`."""
    found: list[Finding] = []
    root = state.path / "findings"
    try:
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise EnvironmentProblem(f"{root} cannot be read: {error.strerror}", "check --state-dir") from error
    for name in names:
        if name.startswith(".") or name.endswith(".damaged"):
            continue
        try:
            found.append(_load(root / name))
        except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            if set_aside:
                state.set_aside(f"findings/{name}", str(error) or type(error).__name__)
            else:
                state.note(f"{root / name} is damaged: {error}")
    return sorted(found, key=lambda finding: (finding.first_seen, finding.id))


def find(state: StateDir, prefix: str) -> Finding:
    """The finding whose id begins with `prefix`; UsageError if there is none, or more than one."""
    all_of_them = load_findings(state)
    matching = [finding for finding in all_of_them if prefix and finding.id.startswith(prefix)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        ids = ", ".join(finding.id for finding in matching)
        raise UsageError(f"{prefix!r} fits {len(matching)} findings: {ids}", "give more digits")
    ids = ", ".join(finding.id for finding in all_of_them) or "none"
    raise UsageError(f"no finding {prefix!r} in {state.path}", f"there are: {ids}; see `moe-fuzz findings`")


def _load(path: Path) -> Finding:
    data: dict[str, Any] = _json(path / "finding.json")
    sequence = path / "sequence.json"
    before = loads_sequence(read_text(sequence))[:-1] if sequence.exists() else ()
    data["case"] = Case.load(path / "case.json").to_json()
    data["sequence"] = [case.to_json() for case in before]
    data["env"] = _json(path / "env.json") if (path / "env.json").exists() else {}
    finding = Finding.from_json(data)
    if finding.id != path.name:
        raise ValueError(f"its finding.json is of {finding.id!r}")
    return finding


def _json(path: Path) -> Any:
    return json.loads(read_text(path))


def _record(finding: Finding) -> dict[str, Any]:
    return {key: value for key, value in finding.to_json().items() if key not in _ELSEWHERE}


def _dumps(data: Any) -> str:
    return json.dumps(data, indent=1) + "\n"
