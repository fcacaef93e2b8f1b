"""Starts compute-sanitizer on a case and judges what it gave. Free of torch.

What counts is a report of the tool, or the result file of the process under it; never an exit code. A tool that is not
there, refuses the device, or never attached says nothing about the case, and that is what is told.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe_fuzz.case import Case
from moe_fuzz.sanitize import log, spec
from moe_fuzz.sanitize.log import Report

NAME = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")  # in this order: what names most defects comes first
SECONDS = 120.0  # for one tool: starting torch and compiling under it take most of that
_LIMIT = 50  # reports that the tool writes
_FLAGS = {"racecheck": ("--racecheck-report", "analysis")}

REPORTS, CLEAN, ABSENT, REFUSED, FAILED, TIMEOUT = "reports", "clean", "absent", "refused", "failed", "timeout"
#: The tool could look, and did.
ANSWERED = (REPORTS, CLEAN)


@dataclass(frozen=True)
class Outcome:
    """What one tool gave. `message` says why there is no answer, or what ended the process that has one."""

    tool: str
    kind: str
    reports: tuple[Report, ...] = ()
    message: str = ""
    seconds: float = 0.0

    @property
    def line(self) -> str:
        if self.kind == REPORTS:
            more = f", and {len(self.reports) - 1} more" if len(self.reports) > 1 else ""
            return self.reports[0].sentence + more
        return f"{self.tool}: {self.kind}{f': {self.message}' if self.message else ''}"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "reports": [report.to_json() for report in self.reports]}


class Places(Protocol):
    """A pool (worker/pool.py), as far as this lane knows it."""

    def place(self, target: str) -> AbstractContextManager[tuple[str, dict[str, str]]]: ...


def find(environment: Mapping[str, str] | None = None) -> str | None:
    """The tool: on the PATH, or where a CUDA toolkit or its package for Python has it."""
    environment = os.environ if environment is None else environment
    found = shutil.which(NAME, path=environment.get("PATH"))
    roots = [environment[name] for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    folders = (Path(root) / part for root in roots for part in ("bin", "compute-sanitizer"))
    return found or next((str(folder / NAME) for folder in folders if os.access(folder / NAME, os.X_OK)), None)


def sanitize(
    pool: Places, cases: Sequence[Case], target: str, device: str, tools: Sequence[str] = TOOLS,
    seconds: float = SECONDS, told: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[Outcome, ...]:  # fmt: skip
    """Runs the cases, in order and in one process, under each of the tools. `told` hears each outcome."""
    executable = find()
    outcomes = []
    with pool.place(target) as (python, environment):
        for tool in tools:
            outcome = Outcome(tool, ABSENT, message=f"{NAME} is not on the PATH, nor in CUDA_HOME")
            if executable is not None:
                outcome = _run(executable, tool, cases, target, device, python, environment, seconds)
            outcomes.append(outcome)
            told(outcome)
    return tuple(outcomes)


def _run(
    executable: str, tool: str, cases: Sequence[Case], target: str, device: str, python: str,
    environment: Mapping[str, str], seconds: float,
) -> Outcome:  # fmt: skip
    token, started = secrets.token_hex(8), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moe-fuzz-sanitize-") as temporary:
        folder = Path(temporary)
        spec.write_spec(folder, token, cases, target, device)
        # The compiler that Triton starts is nobody's kernel: only the process itself is looked at.
        command = [executable, "--tool", tool, *_FLAGS.get(tool, ()), "--target-processes", "application-only",
                   "--print-limit", str(_LIMIT), "--log-file", str(folder / "log"),
                   python, "-m", "moe_fuzz.sanitize.child", str(folder)]  # fmt: skip
        late, said = _execute(command, folder, environment, seconds)
        text = _read(folder / "log")
        result = spec.read_result(folder, token)
        kind, reports, message = judge(tool, text, result, late, said)
    return Outcome(tool, kind, reports, message, round(time.monotonic() - started, 3))


def judge(
    tool: str, text: str, result: spec.Result | None, late: bool, said: str
) -> tuple[str, tuple[Report, ...], str]:  # fmt: skip
    """(kind, reports, message) of what the tool wrote, what the process under it answered, whether it was ended for
    taking too long, and what it said on its way."""
    reports = log.parse(text, tool)
    ended = ""
    if result is None:
        ended = "the process under it ended without its answer"
    elif not result.complete:
        ended = f"{result.error or 'it stopped'} after {result.steps} of {result.planned} calls"
    if reports:
        return REPORTS, reports, ended
    refused = log.refusal(text) or log.refusal(said)
    if refused:
        return REFUSED, (), refused
    if late:
        return TIMEOUT, (), "it did not end in time"
    if not log.has_banner(text) and not log.has_banner(said):
        return REFUSED, (), f"the tool wrote nothing{_tail(said)}"
    if ended:
        return FAILED, (), ended + (_tail(said) if result is None else "")
    errors = log.counted(text)
    if errors is None:
        return REFUSED, (), "the tool did not come to its summary"
    if errors:
        return FAILED, (), f"the tool counts {errors} errors of a kind that is not known here{_tail(text)}"
    return CLEAN, (), ""


def _execute(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float
) -> tuple[bool, str]:  # fmt: skip
    """Whether it had to be ended, and the end of what it printed."""
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    # Segments that grow are false alarms to the tool (pytorch#196209).
    dropped = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    whole = {name: value for name, value in environment.items() if name not in dropped} | own
    output = folder / "output"
    with output.open("wb") as file:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=whole, start_new_session=True
            )
        except OSError as error:
            return False, f"{command[0]} cannot be started: {error.strerror}"
        try:
            process.wait(seconds)
            late = False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # the process under the tool too, whatever state it is in
            process.wait()
    return late, _read(output)


def _read(file: Path, most: int = 4 << 20) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(most).decode("utf-8", "replace")
    except OSError:
        return ""


def _tail(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()][-3:]
    return f": {' | '.join(lines)[-300:]}" if lines else ""
