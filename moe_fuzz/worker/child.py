"""The loop on the device: reads rounds, has the runner run them, writes events. Runs in a fork of the zygote.

Descriptors 1 and 2 go to the worker's log, never to the parent: what a target prints cannot harm the protocol.
faulthandler's tracebacks, by which the parent names the site of a crash or a hang, go to a file beside it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import importlib
import importlib.util
import os
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, Protocol

from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import MoeFuzzError, UsageError
from moe_fuzz.execute import clock, trail
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import BROKEN, CRASH, OOM, Verdict
from moe_fuzz.worker import protocol
from moe_fuzz.worker.autopsy import stages_of, trace_of
from moe_fuzz.worker.protocol import (
    EXIT_INTERNAL,
    EXIT_PIPE,
    Channel,
    ChannelClosed,
    encode,
    error_to_json,
)

MAX_LOG = 1 << 20  # bytes; a longer log starts anew before the next case
_HIGH = 100  # our descriptors lie above this number, out of the way of a target that closes the low ones


class RunnerLike(Protocol):
    """What a worker runs: moe_fuzz.execute.runner.Runner, or a test's own."""

    def describe(self, target: str) -> TargetInfo: ...
    def run(self, case: Case, target: str, options: RunOptions) -> Verdict: ...
    def exhibit(self, case: Case, target: str) -> dict[str, Any]: ...


class Log:
    """The worker's log file, on descriptors 1 and 2."""

    def __init__(self, path: Path) -> None:
        self.descriptor = _open_high(path)
        self._identity = self._stat()[:2]
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        self._attach()
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]

    def mark(self) -> int:
        """The offset at which the next case's output begins. Repairs what the case before did to the streams."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed or replaced by the target
                stream.flush()
        self._attach()
        size = self._stat()[2]
        if size > MAX_LOG:
            os.ftruncate(self.descriptor, 0)
            size = 0
        return size

    def _stat(self, descriptor: int | None = None) -> tuple[int, int, int]:
        found = os.fstat(self.descriptor if descriptor is None else descriptor)
        return found.st_dev, found.st_ino, found.st_size

    def _attach(self) -> None:
        for descriptor in (1, 2):
            try:
                attached = self._stat(descriptor)[:2] == self._identity
            except OSError:
                attached = False
            if not attached:
                os.dup2(self.descriptor, descriptor)


def _open_high(path: Path, flags: int = 0) -> int:
    opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | flags, 0o644)
    high = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    os.close(opened)
    return high


def main(descriptor: int, log_path: Path, memory: int | None) -> int:
    """Serves rounds until the parent closes the socket. Returns the process's exit code.

    memory: bytes of writable private memory this process may have, interpreter and libraries included.
    """
    log = Log(log_path)
    trace = _open_high(trace_of(log_path), os.O_TRUNC)
    faulthandler.enable(trace, all_threads=True)
    faulthandler.register(signal.SIGUSR1, trace, all_threads=False, chain=False)
    trail.keep(_open_high(stages_of(log_path), os.O_TRUNC))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is not None:
        # DATA, not AS: fences reserve address space without memory, and that must cost nothing.
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    os.close(descriptor)
    channel = Channel(socket.socket(fileno=high))
    try:
        _serve(channel, log)
    except ChannelClosed:
        return EXIT_PIPE
    except SystemExit as error:  # a target's: it leaves the way it asked to
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - the last frame of the process; the parent reads the log
        traceback.print_exc()
        return EXIT_INTERNAL
    return 0


def load_runner(name: str, device: str) -> RunnerLike:
    """The runner named "module:Class" or "file.py:Class"."""
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None:
            raise UsageError(f"{place} cannot be loaded as Python")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    runner: RunnerLike = getattr(module, attribute)(device)
    return runner


def _serve(channel: Channel, log: Log) -> None:
    try:
        runner = load_runner(os.environ.get(protocol.RUNNER_VARIABLE) or protocol.DEFAULT_RUNNER,
                             os.environ.get("MOE_FUZZ_DEVICE", "cpu"))
    except Exception as error:  # noqa: BLE001 - the parent tells it to a person
        channel.send({"error": _error(error)})
        return
    channel.send({"ready": protocol.VERSION, "rss": _rss()})
    while True:
        message = channel.receive()
        if message is None:  # cannot be: it waits for ever
            continue
        log.mark()
        try:
            if "describe" in message:
                channel.send({"info": runner.describe(message["describe"]).to_json()})
            elif "exhibit" in message:
                channel.send({"exhibit": runner.exhibit(Case.from_json(message["exhibit"]), message["target"])})
            else:
                _round(channel, log, runner, message)
        except ChannelClosed:
            raise
        except Exception as error:  # noqa: BLE001 - a fault of the harness, or bad input; the parent raises it again
            channel.send({"error": _error(error)})


def _round(channel: Channel, log: Log, runner: RunnerLike, message: dict[str, Any]) -> None:
    cases = [Case.from_json(case) for case in message["round"]]
    target, options = message["target"], RunOptions.from_json(message["options"])
    told = b""  # a verdict travels together with what follows it: one write and one wake-up a case
    for index, case in enumerate(cases):
        channel.send_lines(told + encode({"start": index, "log": log.mark()}))
        try:
            with clock.heard(channel.send):
                verdict = runner.run(case, target, options)
        except Exception as error:
            if isinstance(error, MoeFuzzError):  # bad input: of no case more than of another
                raise
            verdict = Verdict(OOM, detail=f"{type(error).__name__}: {error}")
            if not _memory_ended(error):  # nobody knows what it left behind in this process
                verdict = Verdict(BROKEN, detail=_told(error), spent=True)
        told = encode({"verdict": index, "is": verdict.to_json()})
        if verdict.kind in (OOM, CRASH) or verdict.spent:
            break  # this process may hold what the case filled, or has lost its device: the parent forks another
    channel.send_lines(told + encode({"done": len(cases), "rss": _rss()}))


def _memory_ended(error: Exception) -> bool:
    """torch raises a RuntimeError then; it may be our own tensors that no longer fit."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _error(error: Exception) -> dict[str, Any]:
    if isinstance(error, MoeFuzzError):
        return error_to_json(error)
    first, _, text = _told(error).partition("\n")
    return error_to_json(MoeFuzzError(f"the worker failed inside moe-fuzz: {first}",
                                      f"please report it with this traceback:\n{text}"))  # fmt: skip


def _told(error: Exception) -> str:
    """What an error of our own is and where, in a line, and its traceback."""
    traceback.print_exc()
    text = "".join(traceback.format_exception(error)).strip()
    frame = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" ({Path(frame.filename).name}:{frame.lineno} in {frame.name})" if frame else ""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{what}{where}\n{text[-4000:]}"


def _rss() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
