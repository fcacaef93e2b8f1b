"""The state directory: everything a campaign must not lose, written so that `kill -9` cannot tear it.

    .moe-fuzz/
      corpus/              cases worth running again (corpus.py)     replay.json   those this campaign began with
      findings/<id>/       finding.json case.json sequence.json report.md repro.py env.json
      pending/<n>.json     a bad case, on disk before it is confirmed and minimized, gone once it is judged
      inflight/<slot>.json the round that is running, on disk before it starts, gone once it has its verdicts
      campaign.json        how far the plan has come          stats.json   counters over all campaigns

A file is written beside its place and renamed into it, so what is on disk is always whole: the old or the new. Whatever
is damaged all the same (a disk that failed, a person's editor) is set aside as `*.damaged` and told, never fatal.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import filelock

from moe_fuzz.campaign.interfaces import Cases
from moe_fuzz.case import Case
from moe_fuzz.errors import EnvironmentProblem, MoeFuzzError

T = TypeVar("T")
FOLDERS = ("corpus", "findings", "pending", "inflight")
MAX_FILE = 64 << 20
_TEMPORARY = ".tmp-"
_ASIDE = "-old-"  # in the name of a folder that is being replaced
_HINT = "choose another directory with --state-dir"
_WAY_OUT = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}


class StateDir:
    """One campaign's directory. Making the object touches nothing; entering it creates and locks the directory."""

    def __init__(self, path: str | os.PathLike[str], note: Callable[[str], None] | None = None) -> None:
        self.path = Path(path)
        self.notes: list[str] = []  # what was said before anybody listened
        self.listener = note
        self._lock: filelock.BaseFileLock | None = None
        self._depth = 0
        self._next_pending = 0

    # ---- locking ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> StateDir:
        if self._depth == 0:
            self._open()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0 and self._lock is not None:
            self._lock.release()
            self._lock = None

    def _open(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise EnvironmentProblem(f"the state directory {self.path} is a file", _HINT)
        try:
            made = not self.path.exists()
            for name in FOLDERS:
                (self.path / name).mkdir(parents=True, exist_ok=True)
            if made:  # git is to pass over it, unless the project has made a place for it
                (self.path / ".gitignore").write_text("*\n")
            lock = filelock.FileLock(self.path / "lock")
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise EnvironmentProblem(
                f"another campaign{self._owner()} is using the state directory {self.path}",
                f"wait for it to end, or {_HINT}",
            ) from None
        except (OSError, NotImplementedError) as error:
            raise _problem(f"the state directory {self.path} cannot be used", error) from error
        self._lock = lock
        try:
            self._sweep()
            self.write_json("owner.json", {"pid": os.getpid()})
        except BaseException:
            lock.release()
            self._lock = None
            raise

    def _owner(self) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return f" (process {int(json.loads((self.path / 'owner.json').read_text())['pid'])})"
        return ""

    def _sweep(self) -> None:
        """Takes away what an interrupted write left, and keeps an interrupted run's rounds from being overwritten."""
        for old in self.path.glob(f"*/{_TEMPORARY}*{_ASIDE}*"):
            target = old.with_name(old.name.partition(_ASIDE)[2])
            if not target.exists():  # killed between the two renames of write_folder
                old.rename(target)
        for pattern in (f"{_TEMPORARY}*", f"*/{_TEMPORARY}*", f"findings/*/{_TEMPORARY}*"):
            for left in self.path.glob(pattern):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        inflight = self.path / "inflight"
        first = 1 + max((_number(f.stem.removeprefix("left-")) for f in inflight.glob("left-*.json")), default=0)
        fresh = (f for f in inflight.glob("*.json") if not f.name.startswith("left-"))
        for number, file in enumerate(sorted(fresh), start=first):
            file.rename(inflight / f"left-{number:06d}.json")
        self._next_pending = 1 + max((_number(f.stem) for f in (self.path / "pending").glob("*.json")), default=0)

    # ---- files ------------------------------------------------------------------------------------------------------

    def write_text(self, name: str, text: str, durable: bool = True) -> None:
        """Replaces a file as a whole. `durable` outlives the machine's death too, not just the process's."""
        target = self.path / name
        temporary = target.with_name(f"{_TEMPORARY}{os.getpid()}-{target.name}")
        try:
            _write(temporary, text.encode(), durable)
            os.replace(temporary, target)
            if durable:
                _sync(target.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise _problem(f"{target} cannot be written", error) from error

    def write_json(self, name: str, data: Any, durable: bool = True) -> None:
        self.write_text(name, json.dumps(data, indent=1) + "\n", durable)

    def write_folder(self, name: str, files: Mapping[str, str]) -> Path:
        """Replaces a folder as a whole: nobody ever sees half of it."""
        target = self.path / name
        temporary = target.with_name(f"{_TEMPORARY}{os.getpid()}-{target.name}")
        old = target.with_name(f"{_TEMPORARY}{os.getpid()}{_ASIDE}{target.name}")
        try:
            temporary.mkdir()
            for file, text in files.items():
                _write(temporary / file, text.encode(), durable=True)
            _sync(temporary)
            if target.exists():
                target.rename(old)
            temporary.rename(target)
            _sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not target.exists():
                old.rename(target)
            raise _problem(f"{target} cannot be written", error) from error
        return target

    def read(self, name: str, parse: Callable[[Any], T]) -> T | None:
        """The parsed JSON of a file; None if there is none, or if it is damaged: then it is set aside."""
        file = self.path / name
        try:
            if file.stat().st_size > MAX_FILE:
                raise ValueError(f"{file.stat().st_size} bytes are too many")
            return parse(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _problem(f"{file} cannot be read", error) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MoeFuzzError) as error:
            self.set_aside(name, str(error) or type(error).__name__)
            return None

    def set_aside(self, name: str, reason: str) -> None:
        """Renames what cannot be used to `*.damaged`, and tells."""
        file = self.path / name
        aside = file.with_name(f"{file.name}.damaged")
        try:
            if aside.is_dir():
                shutil.rmtree(aside)
            elif file.is_dir():  # which replaces no file: what was set aside before
                aside.unlink(missing_ok=True)
            os.replace(file, aside)
        except OSError as error:
            raise _problem(f"{file} cannot be set aside", error) from error
        self.note(f"{file} is damaged ({reason}); it was set aside as {aside.name}")

    def remove(self, name: str) -> None:
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise _problem(f"{self.path / name} cannot be removed", error) from error

    def note(self, message: str) -> None:
        if self.listener is None:
            self.notes.append(message)
        else:
            self.listener(message)

    # ---- rounds in flight, bad cases in line ------------------------------------------------------------------------

    def begin_round(self, slot: str, target: str, cases: Cases, attempts: int = 0) -> None:
        """Notes the round that is about to run. Not synced: a kernel may kill the process, hardly the machine."""
        data = {"target": target, "attempts": attempts, "cases": [case.to_json() for case in cases]}
        self.write_text(f"inflight/{slot}.json", json.dumps(data), durable=False)

    def end_round(self, slot: str) -> None:
        self.remove(f"inflight/{slot}.json")

    def left_rounds(self) -> Iterator[tuple[str, str, Cases, int]]:
        """What was running when an earlier campaign was killed: (slot, target, cases, how often the first of them was
        begun again, alone)."""
        for name in _names(self.path / "inflight", "left-*.json"):
            found = self.read(f"inflight/{name}", _round)
            if found is not None:
                yield (name.removesuffix(".json"), *found)

    def add_pending(self, data: Any) -> str:
        """Puts a bad case on disk; returns the name by which it goes."""
        name = f"{self._next_pending:06d}"
        self._next_pending += 1
        self.write_json(f"pending/{name}.json", data)
        return name

    def drop_pending(self, name: str) -> None:
        self.remove(f"pending/{name}.json")

    def pending(self, parse: Callable[[Any], T]) -> Iterator[tuple[str, T]]:
        for name in _names(self.path / "pending", "*.json"):
            found = self.read(f"pending/{name}", parse)
            if found is not None:
                yield name.removesuffix(".json"), found


def _round(data: Any) -> tuple[str, Cases, int]:
    return str(data["target"]), tuple(Case.from_json(case) for case in data["cases"]), int(data["attempts"])


def _names(folder: Path, pattern: str) -> list[str]:
    return sorted(file.name for file in folder.glob(pattern) if not file.name.startswith("."))


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _write(path: Path, data: bytes, durable: bool) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        if durable:
            os.fsync(handle)
    finally:
        os.close(handle)


def _sync(folder: Path) -> None:
    """Makes what was renamed into a folder outlive the machine's death: syncing the file alone does not."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such notion
            raise
    finally:
        os.close(handle)


def _problem(what: str, error: BaseException) -> EnvironmentProblem:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    hint = _HINT
    if isinstance(error, OSError) and error.errno in _WAY_OUT:
        hint = f"{_WAY_OUT[error.errno]}, or {_HINT}; what is on disk is whole, run again to go on"
    return EnvironmentProblem(f"{what}: {reason}", hint)
