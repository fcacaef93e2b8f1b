"""The corpus: passing cases worth running again, a file each, named by what is in it.

    <folder>/<digest>.json    {"moe_fuzz_corpus": 1, "made_by": "0.1.0", "case": {…}, "budget": 0.31, "reason": ""}

`budget` is the largest error over bound that the case's target was seen to use. `reason` is a person's; such an entry
is pinned: pruning never takes it away. A folder may also hold plain cases, and records of one under the key `case` (as
tests/regressions/ does): they are read as pinned entries and never rewritten.

What this version cannot read is kept where it is and told: it may be another version's, and somebody else's to judge.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_fuzz._version import __version__
from moe_fuzz.campaign import lattice
from moe_fuzz.campaign.interfaces import Space
from moe_fuzz.case import FORMAT as CASE_FORMAT
from moe_fuzz.case import Case
from moe_fuzz.case_json import parse_json, read_member
from moe_fuzz.errors import CaseError, EnvironmentProblem, UsageError

FORMAT = 1
MAX_FILES = 1 << 16  # that are read of one folder
_KEY = "moe_fuzz_corpus"

GetSpace = Callable[[str], Space]


@dataclass(frozen=True)
class Entry:
    """A case of the corpus."""

    case: Case
    budget: float = 0.0  # largest error over bound seen; 0: unknown, or nothing is judged against a bound
    reason: str = ""  # why a person put it there; pins it
    made_by: str = __version__
    file: Path | None = None  # where it was read; None: it is new
    own: bool = True  # the file is an entry's: it may be rewritten and removed

    @property
    def digest(self) -> str:
        return self.case.digest

    @property
    def pinned(self) -> bool:
        return bool(self.reason) or not self.own

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {_KEY: FORMAT, "made_by": self.made_by, "case": self.case.to_json()}
        return data | {"budget": self.budget, "reason": self.reason}


@dataclass
class Corpus:
    """A folder of cases as it was read. `foreign` and `damaged`: files that stay as they are, and why."""

    folder: Path
    entries: dict[str, Entry] = field(default_factory=dict)  # by digest
    foreign: dict[Path, str] = field(default_factory=dict)  # of another version
    damaged: dict[Path, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What a person should be told of it."""
        kinds = (("another version's", self.foreign), ("damaged", self.damaged))
        said = [f"{file} is {kind} ({why}); it was left as it is" for kind, of in kinds for file, why in of.items()]
        return ["".join(char if char.isprintable() else ascii(char)[1:-1] for char in line) for line in said]

    def put(self, entry: Entry) -> bool:
        """Writes an entry, unless the folder has all of it; whether it was new. Two entries of one case become one."""
        known = self.entries.get(entry.digest)
        if known is not None:
            entry = replace(known, budget=max(known.budget, entry.budget), reason=known.reason or entry.reason)
            if entry == known or not known.own:
                return False
        file = self.folder / f"{entry.digest}.json"
        _replace(file, json.dumps(entry.to_json(), indent=1) + "\n")
        self.entries[entry.digest] = replace(entry, file=file)
        self.damaged.pop(file, None)  # content-addressed: what stood there is here again
        return known is None

    def remove(self, entry: Entry) -> None:
        assert entry.own
        assert entry.file is not None
        try:
            entry.file.unlink(missing_ok=True)
        except OSError as error:
            raise _problem(f"{entry.file} cannot be removed", error) from error
        del self.entries[entry.digest]


def load(folder: Path, get_space: GetSpace, limit: int = MAX_FILES) -> Corpus:
    """Reads a folder and those below it. Raises EnvironmentProblem where it cannot be read."""
    corpus = Corpus(folder)
    try:
        files = sorted(file for file in folder.rglob("*.json") if not file.name.startswith("."))
    except OSError as error:
        raise _problem(f"{folder} cannot be read", error) from error
    for file in files[:limit]:
        try:
            entry = read(read_member(file), get_space)
        except _Foreign as error:
            corpus.foreign[file] = str(error)
        except UsageError as error:
            corpus.damaged[file] = error.message
        else:
            if entry.own and file.stem != entry.digest:
                corpus.damaged[file] = f"it holds {entry.digest}, which is not its name"
            else:
                corpus.entries.setdefault(entry.digest, replace(entry, file=file))
    return corpus


def read(text: str, get_space: GetSpace) -> Entry:
    """The entry in a file's text. Raises CaseError where it is damaged, or another version's (then also _Foreign)."""
    data = parse_json(text)
    if not isinstance(data, dict):
        raise CaseError("", "it is no case and no entry of a corpus")
    own = _KEY in data
    if own and data[_KEY] != FORMAT:
        raise _Foreign(f"corpus format {data[_KEY]!r}, here {FORMAT}")
    inner = data.get("case", data)
    if isinstance(inner, dict) and inner.get("moe_fuzz", CASE_FORMAT) != CASE_FORMAT:
        raise _Foreign(f"case format {inner['moe_fuzz']!r}, here {CASE_FORMAT}")
    case = Case.loads(inner) if isinstance(inner, str) else Case.from_json(inner)
    made_by = str(data.get("made_by", ""))
    try:
        get_space(case.op).validate(case)
    except UsageError as error:  # whole and well-formed, and not a case of this version's op
        raise _Foreign(f"{f'made by {made_by}: ' if made_by else ''}{error.message}") from error
    budget, reason = data.get("budget", 0.0), data.get("reason") or data.get("cause") or ""
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 <= budget < float("inf"):
        raise CaseError("budget", f"must be a number of at least 0, not {budget!r}")
    if not isinstance(reason, str):
        raise CaseError("reason", f"must be a string, not {reason!r}")
    return Entry(case, float(budget), reason, made_by or __version__, own=own)


def prune(corpus: Corpus, get_space: GetSpace) -> tuple[list[Entry], list[Entry]]:
    """(what stays, what can go): the fewest entries that cover all that the corpus covers. Nothing is removed."""
    items = {
        digest: lattice.cells(get_space(entry.case.op), entry.case, entry.budget)
        for digest, entry in corpus.entries.items()
    }

    def size(digest: str) -> tuple[float, float]:
        case, budget = corpus.entries[digest].case, corpus.entries[digest].budget
        return sum(step.tokens + 1 for step in case.steps) * (1 + len(case.fault_names)), -budget  # then the nearest

    pinned = [digest for digest, entry in sorted(corpus.entries.items()) if entry.pinned]
    kept = set(lattice.cover(items, pinned, size))
    ordered = sorted(corpus.entries.items())
    return [e for digest, e in ordered if digest in kept], [e for digest, e in ordered if digest not in kept]


def merge(into: Corpus, sources: Iterable[Corpus]) -> int:
    """Takes over the entries of other corpora; how many were new. Their files stay."""
    new = 0
    for source in sources:
        for entry in source.entries.values():
            new += into.put(replace(entry, file=None, own=True))
    return new


def summary(entries: Iterable[Entry], get_space: GetSpace) -> Mapping[str, tuple[int, int]]:
    """target (or op, for cases that are nobody's) -> entries, points of the lattice."""
    of: dict[str, list[Entry]] = {}
    for entry in entries:
        of.setdefault(entry.case.target or entry.case.op, []).append(entry)
    return {
        name: (len(some), len(set().union(*(lattice.cells(get_space(e.case.op), e.case, e.budget) for e in some))))
        for name, some in sorted(of.items())
    }


class _Foreign(CaseError):
    """Not this version's."""

    def __init__(self, why: str) -> None:
        super().__init__("", why)


def _replace(file: Path, text: str) -> None:
    """Whole or not at all: another process may read the folder."""
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise _problem(f"{file} cannot be written", error) from error


def _problem(what: str, error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(f"{what}: {error.strerror}", "choose another folder with --corpus")
