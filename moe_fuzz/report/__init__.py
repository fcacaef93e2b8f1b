"""Reports: each hears the events of a campaign and writes them down in its own way. The campaign does not know them.

A kind of report that goes to a file is one module here, which registers itself:

    @file_report("ndjson", "one JSON object a line for each event")
    def open_report(path: Path) -> Report: ...
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
    """A kind of report that goes to a file. `open` raises OSError if the file cannot be written."""

    name: str
    help: str
    open: Callable[[Path], Report]


_KINDS: dict[str, Kind] = {}


def file_report(name: str, help: str) -> Callable[[Callable[[Path], Report]], Callable[[Path], Report]]:
    """Registers what opens a report of this kind."""

    def register(opener: Callable[[Path], Report]) -> Callable[[Path], Report]:
        _KINDS[name] = Kind(name, help, opener)
        return opener

    return register


def kinds() -> Mapping[str, Kind]:
    """All kinds there are: every module of this package is loaded, so that a new one needs no list."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _KINDS


def open_report(kind: str, path: Path) -> Report:
    """The report of a kind, its file created. Raises UsageError for an unknown kind or a file that cannot be written:
    before a campaign begins, not after it."""
    known = kinds()
    if kind not in known:
        meant = did_you_mean(kind, known)
        raise UsageError(f"there is no report of kind {kind!r}{meant}", f"the kinds are {', '.join(sorted(known))}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return known[kind].open(path)
    except OSError as error:
        hint = f"choose another place: --report {kind}=PATH"
        raise UsageError(f"{path} cannot be written: {error.strerror}", hint) from error


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
