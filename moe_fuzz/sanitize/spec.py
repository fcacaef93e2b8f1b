"""What the parent asks of the process under the tool, and its answer: two JSON files in a fresh folder. Free of torch.

The answer is proof that the case ran. The exit code is none: the tool passes on its own, and a tool that never attached
exits with 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_fuzz.case import Case

SPEC, RESULT = "spec.json", "result.json"


@dataclass(frozen=True)
class Result:
    """What the process did. `steps` counts the calls that came to their end, of `planned`."""

    token: str
    steps: int
    planned: int
    error: str = ""  # what ended it early; a consequence, where the tool has a report

    @property
    def complete(self) -> bool:
        return self.steps == self.planned and not self.error


def write_spec(folder: Path, token: str, cases: Sequence[Case], target: str, device: str) -> None:
    data = {"token": token, "target": target, "device": device, "cases": [case.to_json() for case in cases]}
    (folder / SPEC).write_text(json.dumps(data), encoding="utf-8")


def read_spec(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    return data | {"cases": [Case.from_json(case) for case in data["cases"]]}


def write_result(folder: Path, result: Result) -> None:
    """Whole or not at all: the process may be ended while it writes."""
    temporary = folder / f".{RESULT}"
    temporary.write_text(json.dumps(vars(result)), encoding="utf-8")
    temporary.replace(folder / RESULT)


def read_result(folder: Path, token: str) -> Result | None:
    """The answer to this very question; None if there is none."""
    try:
        data = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        found = Result(str(data["token"]), int(data["steps"]), int(data["planned"]), str(data["error"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.token == token else None
