"""What a person means by CASE: a file, a finding's id, the inline form, or `-` for standard input."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.findings import load_findings
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case, loads_sequence
from moe_fuzz.case_json import INLINE_PREFIX, MAX_BYTES, read_text, unpacked
from moe_fuzz.cli import params
from moe_fuzz.config import did_you_mean
from moe_fuzz.errors import CaseError, UsageError
from moe_fuzz.ops import get_space
from moe_fuzz.options import FenceOptions, RunOptions

CASE_HELP = (
    "CASE is the inline form `mfz1:…` that every finding prints, a file (case.json or sequence.json), "
    "a finding's id or the beginning of one, or `-` for standard input."
)


@dataclass(frozen=True)
class Source:
    """The cases to run in one process, oldest first; the last one is the case that is meant."""

    cases: tuple[Case, ...]
    origin: str  # for a person: where they came from
    finding: Finding | None = None

    @property
    def case(self) -> Case:
        return self.cases[-1]

    def options(self, fence: str | None, device: str, deadline: float) -> RunOptions:
        """How to run it: as the finding was seen, unless told otherwise."""
        own, _ = params.pick_fence(fence or (self.finding.own if self.finding else None), device)
        return RunOptions(fence=FenceOptions(own=own), deadline=deadline)

    def _elsewhere(self) -> str:
        """How the target may be called on this machine."""
        place, _, function = self.case.target.partition("@")[2].rpartition(":")
        return f"path/to/{Path(place).name}:{function}" if place.endswith(".py") else f"{self.case.op}@builtin"

    def target(self, asked: str | None) -> str:
        """The target to run on: the one asked for, else the one the case names."""
        from moe_fuzz.targets.registry import resolve

        name = asked or self.case.target
        if not name:
            raise UsageError("the case names no target", f"say which: --target {self.case.op}@builtin")
        try:
            targets = resolve(name, self.case.op)
        except UsageError as error:
            if not asked:  # a file or a target of the machine that the case was found on
                error.hint = f"the case names it; where it is another here, say which: --target {self._elsewhere()}"
            raise
        if len(targets) != 1:
            raise UsageError(f"{name!r} means {len(targets)} targets", f"name one of {', '.join(targets)}")
        if targets[0].partition("@")[0] != self.case.op:
            raise UsageError(f"the case is one of {self.case.op}, but {targets[0]} is another op's target")
        return targets[0]


def load(text: str, state_dir: Path) -> Source:
    """Reads and validates what the person named. Raises UsageError; nothing is executed."""
    if text.startswith(INLINE_PREFIX):
        return Source(_cases(text, "the inline case"), "the inline case")
    if text == "-":
        return Source(_cases(sys.stdin.read(MAX_BYTES * 64), "standard input"), "standard input")
    path = Path(text)
    if not _exists(path):
        return _by_id(text, state_dir)
    if path.is_dir():
        return _folder(path)
    if not (path.is_file() or path.is_fifo()):  # /dev/zero has no end, and would be read until the memory is full
        raise UsageError(f"{path} is a device, not a file", "write - to read standard input")
    return _file(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a NUL: no file has it
        return False


def _by_id(text: str, state_dir: Path) -> Source:
    findings = {finding.id: finding for finding in load_findings(StateDir(state_dir))}
    found = [name for name in findings if name == text] or [name for name in findings if text and name.startswith(text)]
    if len(found) > 1:
        hint = f"write more of one: {', '.join(found[:5])}"
        raise UsageError(f"{text!r} begins the ids of {len(found)} findings", hint)
    if not found:
        what = f"there is neither a file nor a finding {_short(text)!r}{did_you_mean(text, findings)}"
        hint = f"`moe-fuzz findings` lists those in {state_dir}" if findings else f"no findings are in {state_dir}"
        raise UsageError(what, f"{hint}; an inline case begins with {INLINE_PREFIX}")
    finding = findings[found[0]]
    cases = (*finding.sequence, finding.case)
    _validate(cases)
    return Source(cases, f"finding {finding.id}", finding)


def _folder(path: Path) -> Source:
    """A finding's folder, wherever it was copied to: its sequence if the failure needs one, else its case."""
    sequence, case = path / "sequence.json", path / "case.json"
    if not sequence.exists() and not case.exists():
        raise UsageError(f"{path} holds neither a case.json nor a sequence.json", "name a case or a finding")
    return _file(sequence if sequence.exists() else case)


def _file(path: Path) -> Source:
    with _hinting(str(path)):
        text = read_text(path)
    return Source(_cases(text, str(path)), str(path))


def _cases(text: str, origin: str) -> tuple[Case, ...]:
    with _hinting(origin):
        cases = loads_sequence(text) if _is_sequence(unpacked(text.strip())) else (Case.loads(text),)
        if not cases:
            raise CaseError("cases", "the sequence is empty")
        _validate(cases)
    return cases


@contextlib.contextmanager
def _hinting(origin: str) -> Iterator[None]:
    """Gives an error that has no way out the one there always is."""
    try:
        yield
    except UsageError as error:
        error.hint = error.hint or f"correct {origin} or copy it anew; `moe-fuzz show ID --json` prints a case as it is"
        raise


def _validate(cases: tuple[Case, ...]) -> None:
    for case in cases:
        get_space(case.op).validate(case)
        if not case.target.isprintable():
            raise CaseError("target", "holds a character that cannot be shown")
        if case.target not in ("", cases[-1].target) and case.target.partition("@")[0] != case.op:
            raise CaseError("target", f"a case of {case.op} cannot run on {case.target}")
        if case.op != cases[-1].op and not case.target:
            raise CaseError("cases", f"one of {case.op} before the case of {cases[-1].op} must name its target")


def _is_sequence(text: str) -> bool:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return False  # not a sequence; what it is instead, Case.loads says
    return isinstance(data, dict) and "moe_fuzz_sequence" in data


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
