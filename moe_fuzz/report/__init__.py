"""Reports: each hears the events of a campaign and writes them down in its own way. The campaign does not know them.

A kind of report that is asked for with `--report` is one module here, which registers itself:

    @file_report("ndjson", "one JSON object a line for each event")
    def open_report(path: Path) -> Report: ...
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from moe_fuzz.campaign.events import Event
from moe_fuzz.config import did_you_mean
from moe_fuzz.errors import UsageError


class Report(Protocol):
    def handle(self, event: Event) -> None:
        """Takes one event; never two at a time. Raises OSError if it cannot be written."""
        ...

    def close(self) -> None:
        """Called once, after the last event or an error."""
        ...


@dataclass(frozen=True)
class Kind:
    """A kind of report. `open` raises OSError if the file cannot be written."""

    name: str
    help: str
    open: Callable[[Path], Report]
    default: Callable[[], Path] | None = None  # where it goes if no path is given; None: one must be


_KINDS: dict[str, Kind] = {}
_Opener = TypeVar("_Opener", bound=Callable[[Path], "Report"])


def file_report(name: str, help: str, default: Callable[[], Path] | None = None) -> Callable[[_Opener], _Opener]:
    """Registers what opens a report of this kind."""

    def register(opener: _Opener) -> _Opener:
        _KINDS[name] = Kind(name, help, opener, default)
        return opener

    return register


def kinds() -> Mapping[str, Kind]:
    """All kinds there are: every module of this package is loaded, so that a new one needs no list."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _KINDS


def open_report(kind: str, path: Path | None) -> Report:
    """The report of a kind. Raises UsageError for an unknown kind, a missing path, or a file that cannot be written:
    before a campaign begins, not after it."""
    known = kinds()
    if kind not in known:
        meant = did_you_mean(kind, known)
        raise UsageError(f"there is no report of kind {kind!r}{meant}", f"the kinds are {', '.join(sorted(known))}")
    default = known[kind].default
    if path is None and default is None:
        raise UsageError(f"the report {kind} needs a file", f"write --report {kind}=PATH")
    path = path or default()  # type: ignore[misc]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return known[kind].open(path)
    except OSError as error:
        hint = f"choose another place: --report {kind}=PATH"
        raise UsageError(f"{path} cannot be written: {error.strerror}", hint) from error


def open_reports(asked: Iterable[tuple[str, Path | None]], environ: Mapping[str, str]) -> dict[str, Report]:
    """The reports asked for, by the words that asked; inside a GitHub workflow, its annotations too. Raises UsageError,
    also for two of one file.
    """
    pairs = list(dict.fromkeys(asked))
    if environ.get("GITHUB_ACTIONS") == "true" and "github" not in dict(pairs):
        pairs.append(("github", None))
    names = {kind if path is None else f"{kind}={path}": (kind, path) for kind, path in pairs}
    _refuse_shared(names)
    return {name: open_report(kind, path) for name, (kind, path) in names.items()}


def _refuse_shared(names: Mapping[str, tuple[str, Path | None]]) -> None:
    """Raises UsageError where two reports would overwrite each other's file. What is no file, as a terminal, takes
    any number."""
    taken: dict[Path, str] = {}
    for name, (kind, path) in names.items():
        default = kinds()[kind].default if kind in kinds() else None
        place = path or (default() if default else None)
        if place is None or (place.exists() and not place.is_file()):
            continue
        other = taken.setdefault(place.resolve(), name)
        if other != name:
            raise UsageError(f"the reports {other} and {name} are one file, {place}", "give each a file of its own")


class Broadcast:
    """Hands every event to every report. One that can no longer write is dropped and told; the campaign goes on."""

    def __init__(self, reports: Mapping[str, Report], complain: Callable[[str], None]) -> None:
        self._reports = dict(reports)
        self._complain = complain
        self.failed: list[str] = []

    def __call__(self, event: Event) -> None:
        for name, report in list(self._reports.items()):
            self._guard(name, lambda report=report: report.handle(event))  # type: ignore[misc]

    def close(self) -> None:
        for name, report in list(self._reports.items()):
            self._guard(name, report.close)

    def _guard(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as error:
            self._reports.pop(name)
            self.failed.append(name)
            self._complain(f"the report {name} is incomplete: {error.strerror or error}")
