"""Reports that are one document: rendered anew from what was told so far, and replaced on disk as a whole.

What lies under the name is always a complete document: the one before, while another is written or cannot be.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from moe_fuzz.campaign import events
from moe_fuzz.report.story import Story

PERIOD = 1.0  # seconds between two documents, at least; the last one is always written
_WORTH_WRITING = (events.CampaignStarted, events.FindingReported, events.FindingFixed, events.WorkerLost)


class Whole:
    """Written at the start, so that a job that is killed leaves one; at each finding; and at the end. Into a pipe, at
    the end alone: there is no replacing there."""

    def __init__(
        self, path: Path, render: Callable[[Story], str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises OSError where the file cannot be written; what is there stays until there is something to say."""
        self._path = path
        self._render = render
        self._clock = clock
        self._next = clock()
        self._story = Story()
        self._pending = False
        try_out(path)

    def handle(self, event: events.Event) -> None:
        self._story.take(event)
        self._pending = True
        if isinstance(event, events.CampaignFinished):
            self._write()
        elif isinstance(event, _WORTH_WRITING) and self._clock() >= self._next and not _special(self._path):
            with contextlib.suppress(OSError):  # of the last one it is told; by then there may be room again
                self._write()

    def close(self) -> None:
        if self._pending and self._story.started is not None:
            self._write()

    def _write(self) -> None:
        self._next = self._clock() + PERIOD
        replace_file(self._path, self._render(self._story))
        self._pending = False


def replace_file(path: Path, text: str) -> None:
    """Replaces the file as a whole; where the path is no file but a pipe or a terminal, writes to it. Raises OSError.
    """
    if _special(path):
        path.write_text(text, encoding="utf-8")
        return
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = _beside(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def try_out(path: Path) -> None:
    """Raises OSError where `replace_file` would, without touching what is there."""
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    if _special(path):
        return
    temporary = _beside(Path(os.path.realpath(path)))
    temporary.touch()
    temporary.unlink()


def _special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
