"""Starts the process that times, asks it for one point after another, and survives it. Free of torch.

A candidate that crashes or hangs is a line that says so: the point is measured again without it, in a fresh process.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import moe_fuzz
from moe_fuzz.bench.points import Candidate, Point
from moe_fuzz.errors import EnvironmentProblem

_PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from moe_fuzz.bench import child
sys.path.remove({root!r})  # else the folder beside this package would be everyone's `kernels`
sys.exit(child.serve())
"""
START_SECONDS = 180.0  # importing torch and a serving library


@dataclass
class Result:
    """One point, measured: samples in microseconds a launch, by label; and who was not timed, and why."""

    point: Point
    times: dict[str, list[float]] = field(default_factory=dict)
    cold: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    floor: dict[str, Any] = field(default_factory=dict)
    moved: int = 0  # bytes
    left_out: dict[str, tuple[str, str]] = field(default_factory=dict)  # label -> status, reason


class Gone(Exception):
    """The process ended or fell silent, `during` whose work ("" where it was nobody's)."""

    def __init__(self, during: str, status: str, reason: str) -> None:
        super().__init__(reason)
        self.during, self.status, self.reason = during, status, reason


class Timer:
    """The process on the GPU. Its `environment` is known once it has started."""

    def __init__(self, command: Sequence[str] | None = None, patience: float = 120.0) -> None:
        """command: another program that speaks the protocol of bench/child.py, for tests.
        patience: seconds of silence after which it counts as hung; a first call compiles."""
        root = str(Path(moe_fuzz.__file__).parents[1])
        self._command = list(command or [sys.executable, "-P", "-c", _PROGRAM.format(root=root)])
        self._patience = patience
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.environment: dict[str, Any] = {}

    def measure(self, point: Point, candidates: Sequence[Candidate], rounds: int, launches: int) -> Result:
        """All candidates at one point, interleaved. Raises EnvironmentProblem where nothing can be timed."""
        result = Result(point)
        left = list(candidates)
        while left:
            try:
                self._ask(result, left, rounds, launches)
                return result
            except Gone as gone:
                self.close()
                if gone.during:
                    result.left_out.setdefault(gone.during, (gone.status, gone.reason))
                remaining = [c for c in left if c.label not in result.left_out]
                if len(remaining) == len(left):
                    raise EnvironmentProblem(f"the timing process is lost: {gone.reason}",
                                             "its own messages are above") from gone  # fmt: skip
                left = remaining
        return result

    def close(self) -> None:
        """Ends the process with all it has started. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            process.wait()

    def __enter__(self) -> Timer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Starts the process and waits until it is ready. Raises EnvironmentProblem."""
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(process, lines), daemon=True).start()
        self._process, self._lines = process, lines
        try:
            said = self._next("", START_SECONDS)
        except Gone as gone:
            self.close()
            raise EnvironmentProblem(f"the timing process does not start: {gone.reason}",
                                     "`moe-fuzz doctor` looks at the machine") from gone  # fmt: skip
        if said["kind"] != "ready":
            self.close()
            raise EnvironmentProblem(str(said.get("reason", said)), str(said.get("hint", "")))
        self.environment = {"machine": said["machine"], "versions": said["versions"]}

    def _ask(self, result: Result, candidates: Sequence[Candidate], rounds: int, launches: int) -> None:
        if self._process is None:
            self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        request = {"point": result.point.to_json(), "candidates": [asdict(c) for c in candidates],
                   "rounds": rounds, "launches": launches}  # fmt: skip
        during = ""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise Gone("", "crash", "it ended before it was asked") from error
        while True:
            said = self._next(during, self._patience)
            if said["kind"] == "doing":
                during = said["label"]
            elif said["kind"] == "candidate":
                result.left_out[said["label"]] = (said["status"], said["reason"])
            elif said["kind"] == "times":
                result.times, result.cold, result.facts = said["times"], said["cold"], said["facts"]
                result.floor, result.moved = said["floor"], said["bytes"]
                return

    def _next(self, during: str, patience: float) -> Mapping[str, Any]:
        try:
            line = self._lines.get(timeout=patience)
        except queue.Empty:
            raise Gone(during, "hang", f"no answer in {patience:.0f} s") from None
        if line is None:
            assert self._process is not None
            code = self._process.wait()
            end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise Gone(during, "crash", f"the process ended with {end}")
        said: Mapping[str, Any] = json.loads(line)
        return said


def measure_all(
    timer: Timer,
    points: Sequence[Point],
    candidates: Sequence[Candidate],
    rounds: int,
    launches: int,
    done: Callable[[Result], None],
) -> list[Result]:
    """Every point, each handed to `done` as soon as it is there. Who crashed or hung twice is not tried again."""
    results = []
    strikes: dict[str, int] = {}
    for point in points:
        able = [c for c in candidates if strikes.get(c.label, 0) < 2]
        result = timer.measure(point, able, rounds, launches)
        for label, (status, _) in result.left_out.items():
            strikes[label] = strikes.get(label, 0) + (status in ("crash", "hang"))
        for candidate in candidates:
            if candidate not in able:
                result.left_out[candidate.label] = ("left out", "it ended the process at two points before")
        results.append(result)
        done(result)
    return results


def _pump(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)
