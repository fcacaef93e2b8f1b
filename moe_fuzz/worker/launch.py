"""The parent's side of the zygote: starts it, has it fork, signal and report. Free of torch."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import moe_fuzz
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.worker.protocol import RUNNER_VARIABLE, VERSION, Channel, ChannelClosed, Garbled

START_SECONDS = 120.0  # a cold file system takes long to give torch
_FORK_SECONDS = 30.0
_SLICE = 0.05  # seconds one thread may hold the control channel before another gets a look
_STDERR_LINES = 12
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)  # exit codes of a process that somebody else ended

#: The zygote's program. `-c` puts the current directory first on the path, where anything may lie; `-P` would not, but
#: Python 3.10, which serving images still have, does not know it.
_PROGRAM = "import sys; sys.path[:] = [p for p in sys.path if p]; from moe_fuzz.worker.zygote import main; main()"

#: N workers use N cores: none of them starts threads of its own.
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


_T = TypeVar("_T")


@dataclass(frozen=True)
class Demand:
    """What a process must be forked with to run a case; one that was forked with another is replaced."""

    provider: str = ""  # whose interpreter
    environment: tuple[tuple[str, str], ...] = ()  # variables of the process


class ZygoteGone(Exception):
    """The zygote died; so did its workers. What they were running says nothing about the cases, nor does its death say
    anything about what it was to load."""


class Process:
    """One forked worker process."""

    def __init__(self, zygote: Zygote, identity: int, pid: int, channel: Channel) -> None:
        self.zygote = zygote
        self.pid = pid
        self.channel = channel
        self._identity = identity

    def signal(self, number: int) -> None:
        """Raises ZygoteGone."""
        self.zygote.signal(self._identity, number)

    def signal_quietly(self, number: int) -> None:
        """The same; nothing where nobody is there to pass it on."""
        with contextlib.suppress(ZygoteGone):
            self.signal(number)

    def status(self, timeout: float = 0.0) -> int | None:
        """The raw wait status, or None while the process lives. Raises ZygoteGone."""
        return self.zygote.status(self._identity, timeout)

    def kill(self, timeout: float = 5.0) -> int | None:
        """Kills the process group and returns the wait status; None when it did not end in time, or nobody knows."""
        try:
            self.signal(signal.SIGKILL)
            return self.status(timeout)
        except ZygoteGone:
            if not self.zygote.ended_well:  # the kernel took the worker; this takes its children
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
            return None
        finally:
            self.channel.close()


class Zygote:
    """One zygote process. Safe for use by several threads."""

    def __init__(
        self, python: str, device: str, log: Path, runner: str | None = None, extra: Mapping[str, str] | None = None
    ) -> None:
        """Starts it; `info` waits until it is ready. `log` takes what it writes to stdout and stderr. `extra`:
        variables for its environment.

        Raises EnvironmentProblem when `python` cannot be executed.
        """
        self._python, self._log = python, log
        self._lock = threading.RLock()
        self._next = 0
        self._forked: dict[int, dict[str, Any]] = {}
        self._exits: dict[int, int] = {}
        self._info: dict[str, Any] | None = None
        self._gone = False
        ours, theirs = socket.socketpair()
        lent = None if python == sys.executable else log.parent / "lent"
        arguments, environment = environment_of(device, runner, extra or {}, lent)
        try:
            with log.open("ab") as output:
                self._popen = subprocess.Popen(
                    [python, "-c", _PROGRAM, str(theirs.fileno()), *arguments],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
                    pass_fds=(theirs.fileno(),), start_new_session=True,  # Ctrl-C is for the parent alone
                )
        except OSError as error:
            ours.close()
            raise EnvironmentProblem(f"the workers' interpreter {python} cannot be started: {error.strerror}",
                                     "name a Python >= 3.10 that has torch, triton and numpy") from error
        finally:
            theirs.close()
        self._control = Channel(ours)
        atexit.register(self.close)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def ended_well(self) -> bool:
        """Whether it was closed, and so killed every process group itself."""
        return self._popen.returncode == 0

    @property
    def gone(self) -> bool:
        return self._gone

    def info(self, timeout: float = START_SECONDS) -> dict[str, Any]:
        """What it said when it was ready: versions, seconds, threads, library, packages, moe_fuzz (see zygote.main).

        Raises EnvironmentProblem with the last lines of its stderr when it did not come up, ZygoteGone when somebody
        else ended it before it did.
        """
        with self._lock:
            if self._info is None:
                try:
                    said = self._control.receive(timeout)
                except (ChannelClosed, Garbled):
                    self.close()
                    if self._popen.returncode in _FROM_OUTSIDE:
                        raise ZygoteGone from None
                    raise self._problem(f"died (exit code {self._popen.returncode}) before it was ready") from None
                if said is None:
                    self.close()
                    raise self._problem(f"was not ready after {timeout:g} seconds")
                if said.get("ready") != VERSION:
                    self.close()
                    raise self._problem("runs another version of moe-fuzz", "install the same version on both sides")
                self._info = said
            return self._info

    def spawn(self, log: Path, memory: int | None, environment: Mapping[str, str] | None = None) -> Process:
        """Forks a worker, whose stdout and stderr are appended to `log`. `environment`: variables that are its alone,
        set before it touches a device. Raises ZygoteGone, EnvironmentProblem."""
        self.info()
        ours, theirs = socket.socketpair()
        try:
            with self._lock:
                self._next += 1
                identity = self._next
                request = {"fork": identity, "log": str(log), "memory": memory, "environment": environment or {}}
                self._send(request, (theirs.fileno(),))
            theirs.close()  # before the wait: the worker's death must end the stream
            answer = self._await(self._forked, identity, _FORK_SECONDS)
            if answer is None:
                raise EnvironmentProblem(f"no worker was forked in {_FORK_SECONDS:g} s", "is the machine stalled?")
            if "error" in answer:
                raise EnvironmentProblem(f"a worker cannot be forked: {answer['error']}",
                                         "use fewer workers, or raise the limit on processes (ulimit -u)")
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Process(self, identity, answer["pid"], Channel(ours))

    def signal(self, identity: int, number: int) -> None:
        with self._lock:
            self._send({"signal": identity, "number": int(number)})

    def status(self, identity: int, timeout: float) -> int | None:
        return self._await(self._exits, identity, timeout)

    def close(self) -> None:
        """Ends the zygote, which takes every worker with it. Idempotent."""
        atexit.unregister(self.close)
        with self._lock:
            self._gone = True
            self._control.close()  # the zygote kills every group and exits
        try:
            self._popen.wait(5.0)
        except subprocess.TimeoutExpired:
            self._popen.kill()  # the kernel kills the workers
            self._popen.wait()

    def _await(self, answers: dict[int, _T], identity: int, timeout: float) -> _T | None:
        until = time.monotonic() + timeout
        while True:
            with self._lock:
                if identity in answers:
                    return answers.pop(identity) if answers is self._forked else answers[identity]
                self._pump(min(_SLICE, max(0.0, until - time.monotonic())))
                if identity not in answers and time.monotonic() >= until:
                    return None

    def _pump(self, timeout: float) -> None:
        """Takes in what it said, waiting for `timeout` seconds when that is nothing. Under the lock."""
        try:
            while not self._gone and (message := self._control.receive(timeout)) is not None:
                if "forked" in message:
                    self._forked[message["forked"]] = message
                elif "exited" in message:
                    self._exits[message["exited"]] = message["status"]
                timeout = 0.0
        except (ChannelClosed, Garbled):
            self._gone = True
        if self._gone:
            raise ZygoteGone

    def _send(self, message: Mapping[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        try:
            if not self._gone:
                self._control.send(message, descriptors)
        except ChannelClosed:
            self._gone = True
        if self._gone:
            raise ZygoteGone

    def _problem(self, what: str, hint: str = "") -> EnvironmentProblem:
        lines = self._log.read_text(errors="replace").strip().splitlines()[-_STDERR_LINES:]
        last = lines[-1] if lines else ""
        if not hint and "No module named" in last:
            package = last.rpartition(" ")[2].strip("'\"").partition(".")[0]
            hint = f"install {package.replace('moe_fuzz', 'moe-fuzz')} for {self._python}"
        text = "\n  ".join(["", *lines])
        return EnvironmentProblem(f"the process that workers are forked from ({self._python}) {what}{text}",
                                  hint or "`moe-fuzz doctor` looks at the interpreter")


def environment_of(
    device: str, runner: str | None, extra: Mapping[str, str], lent: Path | None
) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of the zygote. lent: the directory in which another interpreter is shown this very
    package, and none of those that are installed beside it."""
    environment = dict(os.environ) | dict(extra)
    environment |= dict.fromkeys(_ONE_THREAD, "1")
    environment |= {"MOE_FUZZ_DEVICE": device, "PYTHONHASHSEED": "0"}
    for name in (RUNNER_VARIABLE, "TRITON_INTERPRET"):
        environment.pop(name, None)
    if runner is not None:
        environment[RUNNER_VARIABLE] = runner
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported
    root = Path(str(moe_fuzz.__file__)).parent.parent
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if not (root / "pyproject.toml").exists():
        if lent is None:
            return [], environment
        lent.mkdir(exist_ok=True)
        (lent / "moe_fuzz").unlink(missing_ok=True)  # an earlier campaign's, of a moe-fuzz that may lie elsewhere
        (lent / "moe_fuzz").symlink_to(root / "moe_fuzz")
        root = lent
    # A checkout, perhaps found through the current directory, which `-P` takes away. First, so that the
    # workers' moe-fuzz is this one, not another that is installed.
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *(path for path in paths if path != str(root))])
    return [] if str(root) in paths else ["--drop-path", str(root)], environment


