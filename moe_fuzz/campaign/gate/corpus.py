"""The cases that a gate replays first: files that are committed, never the state directory's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_fuzz.campaign.interfaces import Cases
from moe_fuzz.case import Case
from moe_fuzz.case_json import parse_json, read_member
from moe_fuzz.errors import UsageError
from moe_fuzz.ops import get_space


def read(folders: Sequence[Path]) -> tuple[Cases, list[str]]:
    """All cases below the folders, in the order of their paths, and what was left out and why. A file holds a case, or
    a record of one under the key `case`.

    Raises UsageError for a folder that is not there.
    """
    cases: list[Case] = []
    notes: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"there is no corpus {folder}", "name a folder of cases; without one, none is replayed")
        for file in sorted(folder.rglob("*.json")):
            try:
                cases += _cases(parse_json(read_member(file)))
            except (ValueError, UsageError) as error:
                notes.append(f"corpus: {file} is left out: {error}")
    return tuple(cases), notes


def _cases(data: object) -> Iterator[Case]:
    """Raises CaseError or ValueError where it is none."""
    record = data.get("case", data) if isinstance(data, dict) else data
    case = Case.loads(record) if isinstance(record, str) else Case.from_json(record)
    get_space(case.op).validate(case)
    yield case
