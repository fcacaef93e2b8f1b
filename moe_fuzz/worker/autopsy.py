"""What a dead worker died of: its wait status and its log become a verdict. Free of torch.

faulthandler wrote the traceback into a file of its own beside the log, where nothing that a target prints can bury it.
The site of a crash is the innermost frame that belongs to neither the libraries nor our own machinery.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moe_fuzz.verdict import CRASH, HANG, OOM, REJECTED, UNJUDGED, Verdict, Violation
from moe_fuzz.worker.protocol import EXIT_PIPE

_TAIL = 1 << 16  # bytes of the log that are looked at
_DETAIL = 2000  # characters of output, and of traceback, that go into a verdict
_BLOCK = re.compile(r"^(.*)\(most recent call first\):\n((?:  (?:File .*|\.\.\.)\n)+)", re.MULTILINE)
_FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')
_OUT_OF_MEMORY = re.compile(r"std::bad_alloc|can't allocate memory|Cannot allocate memory|\bMemoryError\b")
_DEVICE_FAULT = re.compile(r"CUDA error: (an illegal memory access|device-side assert|misaligned address|"
                           r"an illegal instruction|unspecified launch failure)")  # fmt: skip
_DEVICE_SYMPTOMS = {"an illegal memory access": "illegal-access", "device-side assert": "device-assert",
                    "misaligned address": "misaligned-access", "an illegal instruction": "illegal-instruction",
                    "unspecified launch failure": "launch-failure"}  # fmt: skip
_TARGETS = ("kernels", "reference", "planted")  # rooms of moe_fuzz that are code under test, not machinery


@dataclass(frozen=True)
class Layout:
    """Where the child's interpreter keeps what is not a target's code."""

    library: tuple[str, ...]  # the standard library, whose site-packages do not count
    packages: tuple[str, ...]  # numpy, torch, triton
    moe_fuzz: str

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Layout:
        return cls(tuple(info["library"]), tuple(info["packages"]), info["moe_fuzz"])

    def is_target(self, file: str) -> bool:
        if file.startswith("<"):  # frozen, or made by `exec`: a dataclass's `__init__`, say. Its caller has a file
            return False
        if any(_inside(file, package) for package in self.packages):
            return False
        if _inside(file, self.moe_fuzz):
            return file[len(self.moe_fuzz) + 1 :].partition("/")[0] in _TARGETS
        installed = "/site-packages/" in file or "/dist-packages/" in file
        return installed or not any(_inside(file, library) for library in self.library)


def crash(status: int | None, log: Path, offset: int, layout: Layout, oom_kills: int, seconds: float) -> Verdict:
    """The verdict on a case whose worker ended with the raw wait `status` (None: it lives, but closed its socket).

    offset: where the case's output begins in the log. oom_kills: how often the kernel ran out of memory meanwhile.
    """
    trace, text = read_trace(log), read_log(log, offset)
    if not has_stack(trace) and has_stack(text):
        trace = text  # the target directed faulthandler to stderr
    detail = _detail(log, offset, trace)
    name = "" if status is None or not os.WIFSIGNALED(status) else signal_name(os.WTERMSIG(status))
    if name == "SIGKILL" and oom_kills > 0:
        return Verdict(OOM, seconds=seconds, detail="the kernel's out-of-memory killer ended the worker")
    if name == "SIGABRT" and _OUT_OF_MEMORY.search(text):
        return Verdict(OOM, seconds=seconds, detail=detail)
    device = _DEVICE_FAULT.search(text) if name == "SIGABRT" else None
    if device is not None:  # C++ that met the broken context where it could not raise
        symptom, message = _DEVICE_SYMPTOMS[device[1]], f"a kernel broke the CUDA context: {device[0]}"
    elif name in ("SIGKILL", "SIGTERM"):
        symptom, message = f"killed:{name}", f"the worker was ended from outside by {name}"
    elif name:
        symptom, message = name, f"the worker died of {name}"
    elif status is None or os.waitstatus_to_exitcode(status) == EXIT_PIPE:
        symptom, message = "closed-pipe", "the target closed the worker's socket"
    else:
        symptom = f"exit:{os.waitstatus_to_exitcode(status)}"
        message = f"the target ended the worker's process ({symptom})"
    violation = Violation("crash", symptom, message, site=site(trace, layout), after=read_stages(log))
    return Verdict(CRASH, (violation,), seconds=seconds, detail=detail)


def was_killed(status: int) -> bool:
    """Whether a raw wait status is that of a process ended from outside."""
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGTERM)


def garbled(log: Path, offset: int, seconds: float, said: str) -> Verdict:
    """The verdict on a case that wrote onto the worker's socket."""
    violation = Violation("crash", "garbled-pipe", f"the target wrote to the worker's socket: {said}")
    return Verdict(CRASH, (violation,), seconds=seconds, detail=_detail(log, offset, ""))


def hang(
    log: Path, offset: int, layout: Layout, deadline: float, seconds: float, still: str = ""
) -> Verdict:
    """The verdict on a case that gave none within `deadline` seconds, and was then asked for its stack. still: why its
    clock stood still then."""
    stack = read_trace(log)
    if still == "judge":  # the target has answered
        detail = f"its answer was not judged within {deadline:g} s, which is no fault of the target's\n"
        return Verdict(REJECTED, seconds=seconds, detail=detail + _detail(log, offset, stack), stats={UNJUDGED: 1})
    if still == "interpret":
        detail = f"its kernels were still interpreted, a program after the other, after {deadline:g} s: too slow here\n"
        return Verdict(REJECTED, seconds=seconds, detail=detail + _detail(log, offset, stack), stats={UNJUDGED: 1})
    compiling = bool(still)
    message = f"no verdict within {deadline:g} s{' of compiling' * compiling}; the worker was killed"
    found = site(stack, layout)
    violation = Violation("hang", "compile" if compiling else "deadline", message, site=found, after=read_stages(log))
    return Verdict(HANG, (violation,), seconds=seconds, detail=_detail(log, offset, stack))


def site(text: str, layout: Layout) -> str:
    """`routing.py:123 in _kernel`: the innermost frame of the target in the last traceback; empty when there is none.
    """
    blocks = _BLOCK.findall(text)
    current = [frames for head, frames in blocks if not head.startswith("Thread ")]
    for frames in current[-1:] or [frames for _, frames in blocks[-1:]]:
        for file, line, name in _FRAME.findall(frames):
            if layout.is_target(file):
                return f"{os.path.basename(file)}:{line} in {name}"
    return ""


def stages_of(log: Path) -> Path:
    """The file beside the log in which a target of several stages stands as far as it has come."""
    return log.with_suffix(".stages")


def read_stages(log: Path) -> str:
    """What the present process said last of the target at hand; empty if nothing."""
    try:
        return stages_of(log).read_text(encoding="utf-8", errors="replace")[:_DETAIL].strip()
    except FileNotFoundError:
        return ""


def has_stack(text: str) -> bool:
    """Whether a whole traceback is in the text."""
    return _BLOCK.search(text) is not None


def trace_of(log: Path) -> Path:
    """The file beside the log that takes faulthandler's tracebacks, those of the present process alone."""
    return log.with_suffix(".trace")


def read_trace(log: Path) -> str:
    """The tracebacks of the present process, the frame that died first."""
    try:
        with trace_of(log).open("rb") as file:
            return file.read(_TAIL).decode(errors="replace")
    except FileNotFoundError:
        return ""  # the process died before it made the file


def _detail(log: Path, offset: int, trace: str) -> str:
    """For a person: the end of what the case printed, and the beginning of the traceback."""
    parts = (read_log(log, offset)[-_DETAIL:].strip(), trace.partition("\nExtension modules:")[0][:_DETAIL].strip())
    return "\n".join(part for part in parts if part)


def read_log(log: Path, offset: int) -> str:
    """The end of the log from `offset` on; from its beginning when it was cut since."""
    try:
        with log.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = offset if offset <= size else 0
            file.seek(max(start, size - _TAIL))
            return file.read(_TAIL).decode(errors="replace")
    except FileNotFoundError:
        return ""  # the log directory went away: there is nothing to tell


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"  # a real-time signal


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory: in our control group, else on the machine."""
    for path in _memory_events():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
    return 0


@cache
def _memory_events() -> list[Path]:
    candidates = [Path("/proc/vmstat")]
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "memory":
            candidates.insert(0, Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control"))
        elif not controllers:
            candidates.insert(0, Path(f"/sys/fs/cgroup{path}/memory.events"))
    return [path for path in candidates if os.access(path, os.R_OK)]


def _inside(file: str, directory: str) -> bool:
    return file.startswith(directory + os.sep)
