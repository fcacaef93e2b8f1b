"""Several worker processes that run one case together, a rank each. Free of torch.

All get the same round, and all must give their verdict on a case; theirs become one. A rank that dies, or from which
nothing more is heard, ends the group: it is named, the others are killed with it, and the next case has a new group.
What a rank was doing stands in memory that they share (execute/meeting.py), so that the one which hangs can be told
from those that wait for it.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moe_fuzz.case import Case
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import BROKEN, CRASH, OOM, PASS, REJECTED, VIOLATION, Verdict, Violation
from moe_fuzz.worker import autopsy
from moe_fuzz.worker.clock import CaseClock, Reading
from moe_fuzz.worker.launch import START_SECONDS, Process
from moe_fuzz.worker.listen import Expired, TimeIsUp, log_size, next_event
from moe_fuzz.worker.protocol import ChannelClosed, Garbled, error_from_json
from moe_fuzz.worker.stats import Stats

RANK, RANKS, MEETING = "MOE_FUZZ_RANK", "MOE_FUZZ_RANKS", "MOE_FUZZ_MEETING"  # variables of execute/meeting.py
HISTORY = 32  # cases of a group that are remembered
_STATE_AT = 16  # bytes from the beginning of a rank's memory
_IDLE, _CALL, _DEVICE, _WAIT = range(4)
_DOING = ("between two calls", "in the target's code", "waiting for its device", "waiting for the others")
_SLICE = 0.05  # seconds between two looks at silent ranks
_STACK_SECONDS = 0.3  # what the ranks of a hanging group are given to write their stacks
_SEVERITY = (PASS, REJECTED, BROKEN, VIOLATION, OOM, CRASH)
#: Whoever stands there waits: for another, or for a kernel, which may wait for another.
_WAITING = ("torch/distributed/", "moe_fuzz/execute/meeting.py", "torch/cuda/__init__.py", "torch/cuda/streams.py")

Spawn = Callable[[int, Path, Mapping[str, str]], Process]  # rank, its log, variables of the group


class GroupGone(Exception):
    """The processes ended for a reason that is not the case's."""


class Group:
    """Processes of as many ranks, made when they are first needed. For one thread at a time."""

    def __init__(self, size: int, spawn: Spawn, log: Path, stats: Stats) -> None:
        """log: of the worker that the group belongs to; each rank has one beside it."""
        self.size, self._spawn, self._stats = size, spawn, stats
        self._logs = [log.with_name(f"{log.stem}-rank{rank}{log.suffix}") for rank in range(size)]
        self._processes: list[Process] = []
        self._place: Path | None = None
        self._target = ""
        self.past: deque[Case] = deque(maxlen=HISTORY)  # what these processes ran

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def run(
        self, cases: Sequence[Case], target: str, options: RunOptions, give: Callable[[Verdict], None]
    ) -> None:
        """Runs cases until they are done, or the group is. Each verdict goes to `give`.

        Raises GroupGone, TimeIsUp, and what a rank's runner raised: UsageError, EnvironmentProblem, MoeFuzzError.
        """
        self.ready(target)
        try:
            if not _Round(self._processes, self._logs, self._states, cases, options).run(target, give):
                self._stats.count("deaths")
                self.close()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kills all ranks and forgets where they met. Idempotent."""
        processes, self._processes = self._processes, []
        self.past.clear()
        for process in processes:
            process.signal_quietly(signal.SIGKILL)
        for process in processes:
            process.kill()
        if self._place is not None:
            shutil.rmtree(self._place, ignore_errors=True)
            self._place = None

    def discard(self) -> None:
        """Closes the group for good: its files go too."""
        self.close()
        for log in self._logs:
            for path in (log, autopsy.trace_of(log), autopsy.stages_of(log)):
                path.unlink(missing_ok=True)

    def ready(self, target: str) -> None:
        """Makes the processes where there are none that can run this target: those of another target are other ones,
        its provider may have another interpreter. Raises EnvironmentProblem, and what a rank's runner raised."""
        if self._processes and self._target == target and all(p.status() is None for p in self._processes):
            return
        self.close()
        self._place, self._target = Path(tempfile.mkdtemp(prefix="moe-fuzz-meeting-")), target
        started = time.monotonic()
        for rank, log in enumerate(self._logs):
            variables = {RANK: str(rank), RANKS: str(self.size), MEETING: str(self._place)}
            self._processes.append(self._spawn(rank, log, variables))
        for rank, process in enumerate(self._processes):
            try:
                event = next_event(process, CaseClock(START_SECONDS, START_SECONDS), self._logs[rank])
            except (ChannelClosed, Garbled, Expired) as error:
                self.close()
                raise EnvironmentProblem(
                    f"rank {rank} of a group does not come up ({type(error).__name__})",
                    f"its log says:\n{autopsy.read_log(self._logs[rank], 0)[-1500:].strip()}",
                ) from None
            if "error" in event:
                self.close()
                raise error_from_json(event["error"])
        self._stats.count("forks", self.size)
        self._stats.count("fork_seconds", time.monotonic() - started)

    def _states(self) -> list[int]:
        """What each rank is doing, as it told."""
        found = []
        for rank in range(self.size):
            state = _IDLE
            try:
                with open(Path(str(self._place)) / f"rank-{rank}", "rb") as file:
                    head = os.pread(file.fileno(), 8, _STATE_AT)
                state = struct.unpack("<q", head)[0] if len(head) == 8 else _IDLE
            except FileNotFoundError:
                pass  # it has not come so far
            found.append(state)
        return found


class _Round:
    """One round of cases in a living group."""

    def __init__(self, processes: list[Process], logs: list[Path], states: Callable[[], list[int]],
                 cases: Sequence[Case], options: RunOptions) -> None:  # fmt: skip
        self._processes, self._logs, self._states, self._cases = processes, logs, states, cases
        self._options, self._clock = options, CaseClock(options.deadline, options.first_deadline, options.until)
        self._readings = [Reading(process.pid) for process in processes]
        self._still = [""] * len(processes)
        self._offsets = [log_size(log) for log in logs]
        self._given: list[dict[int, Verdict]] = [{} for _ in processes]  # of each rank: case -> verdict
        self._done = [False] * len(processes)
        self._at = 0  # the case whose verdict is next
        self._begun = -1  # the last case that a rank has begun

    def run(self, target: str, give: Callable[[Verdict], None]) -> bool:
        """Whether the group can go on."""
        layout, kills = autopsy.Layout.of(self._processes[0].zygote.info()), autopsy.oom_kills()
        message = {"round": [case.to_json(digest=False) for case in self._cases], "target": target,
                   "options": self._options.to_json()}  # fmt: skip
        rank = 0
        try:
            for rank, process in enumerate(self._processes):  # noqa: B007 - whom an error is of
                process.channel.send(message)
            while self._at < len(self._cases) or not all(self._done):
                for rank, process in enumerate(self._processes):
                    while not self._done[rank] and (event := self._heard(process)) is not None:
                        self._take(rank, event)
                while self._at < len(self._cases) and all(self._at in given for given in self._given):
                    verdict = joined([given[self._at] for given in self._given])
                    self._at += 1
                    give(verdict)
                    if verdict.kind in (OOM, CRASH) or verdict.spent:
                        return False
                if (lost := self._lost()) is not None:
                    give(lost)
                    return False
                self._wait()
        except Expired:
            if self._clock.over:
                raise TimeIsUp from None
            give(self._hang(layout))
            return False
        except (ChannelClosed, Garbled) as error:
            if self._at >= len(self._cases) or self._begun < self._at:
                raise GroupGone from None  # between two cases: neither is to blame
            give(self._dead(rank, error, layout, autopsy.oom_kills() - kills))
            return False
        return True

    def _lost(self) -> Verdict | None:
        """The verdict of a rank whose device or memory is gone, or that we failed in: it never meets the others again,
        which wait for it."""
        for rank, given in enumerate(self._given):
            verdict = given.get(self._at)
            if verdict is not None and verdict.kind in (OOM, CRASH, BROKEN):
                return _named(verdict, f"rank {rank} of {len(self._processes)}")
        return None

    def _heard(self, process: Process) -> dict[str, object] | None:
        """The next event of a rank, if it has said something. Raises ChannelClosed, Garbled."""
        event = process.channel.receive(0)
        if event is None and process.status() is not None and (event := process.channel.receive(0)) is None:
            raise ChannelClosed("the process ended")
        return event

    def _take(self, rank: int, event: Mapping[str, object]) -> None:
        if "start" in event:
            number = int(str(event["start"]))
            self._offsets[rank] = int(str(event["log"]))
            if number > self._begun:
                self._begun = number
                self._clock.restart()
        elif "still" in event or "goes" in event:
            self._still[rank] = str(event.get("still", ""))
            self._clock.stand(max(self._still))
        elif "on" in event:
            pass  # one rank that goes on says nothing of another that hangs
        elif "verdict" in event:
            self._given[rank][int(str(event["verdict"]))] = Verdict.from_json(event["is"])  # type: ignore[arg-type]
        elif "done" in event:
            self._done[rank] = True
        else:
            raise error_from_json(event["error"])  # type: ignore[arg-type]

    def _wait(self) -> None:
        """Until a rank says something. Raises Expired."""
        if self._clock.over:
            raise Expired
        waiting = [p.channel.socket for rank, p in enumerate(self._processes) if not self._done[rank]]
        if waiting and not select.select(waiting, [], [], _SLICE)[0]:
            self._clock.look(any([reading.grew() for reading in self._readings]))
            if self._clock.expired:
                raise Expired

    def _dead(self, rank: int, error: Exception, layout: autopsy.Layout, kills: int) -> Verdict:
        """The verdict on a rank that ended, or wrote to the pipe."""
        process, log, offset = self._processes[rank], self._logs[rank], self._offsets[rank]
        if isinstance(error, Garbled):
            dead = autopsy.garbled(log, offset, self._clock.seconds, str(error))
        else:
            dead = autopsy.crash(process.status(1.0), log, offset, layout, kills, self._clock.seconds)
        return _named(dead, f"rank {rank} of {len(self._processes)}")

    def _hang(self, layout: autopsy.Layout) -> Verdict:
        """Asks all ranks for their stacks, and gives the verdict on the one that the others wait for."""
        states = self._states()
        for process in self._processes:
            process.signal(signal.SIGUSR1)
        until = time.monotonic() + _STACK_SECONDS
        while time.monotonic() < until and not all(autopsy.has_stack(autopsy.read_trace(log)) for log in self._logs):
            time.sleep(0.01)
        traces = [autopsy.read_trace(log) for log in self._logs]
        guilty = blamed([state if at not in self._finished else _WAIT for at, state in enumerate(states)], traces)
        rank = guilty[0]
        found = autopsy.hang(self._logs[rank], self._offsets[rank], layout, self._clock.limit, self._clock.seconds,
                             self._clock.still)  # fmt: skip
        name = f"rank{'s' * (len(guilty) > 1)} {', '.join(map(str, guilty))} of {len(states)}"
        doing = "; ".join(f"rank {at} is {_DOING[state]}" for at, state in enumerate(states))
        return _named(found, name, f" ({doing})")

    @property
    def _finished(self) -> set[int]:
        """Ranks that have given their verdict on the case in flight."""
        return {rank for rank, given in enumerate(self._given) if self._at in given}


def blamed(states: Sequence[int], traces: Sequence[str]) -> list[int]:
    """The ranks that the others wait for: in the target's code and in no call that waits; else those that do not wait;
    else all."""
    ranks = range(len(states))
    own = [rank for rank in ranks if states[rank] == _CALL and not _waits(traces[rank])]
    for found in (own, [r for r in ranks if states[r] == _IDLE], [r for r in ranks if states[r] == _DEVICE],
                  [r for r in ranks if states[r] == _CALL]):  # fmt: skip
        if found:
            return found
    return list(ranks)


def _waits(trace: str) -> bool:
    """Whether the innermost frame of the current thread's last traceback is one that waits."""
    _, _, last = trace.rpartition("(most recent call first):\n")
    innermost = last.split("\n", 1)[0]
    return any(part in innermost for part in _WAITING)


def joined(verdicts: Sequence[Verdict]) -> Verdict:
    """What all ranks say of a case as one verdict: the gravest kind, each rule broken once."""
    kind = max((verdict.kind for verdict in verdicts), key=lambda kind: _SEVERITY.index(kind))
    found: list[Violation] = []
    broken = [{(v.check, v.symptom) for v in verdict.violations} for verdict in verdicts]
    for rank, verdict in enumerate(verdicts):
        for violation in verdict.violations:
            key = violation.check, violation.symptom
            if key not in {(v.check, v.symptom) for v in found}:
                alone = not all(key in others for others in broken)
                found.append(replace(violation, message=f"rank {rank}: {violation.message}") if alone else violation)
    first_hand = [violation for violation in found if violation.symptom != "elsewhere"]
    worst = next(verdict for verdict in verdicts if verdict.kind == kind)
    return Verdict(
        kind,
        tuple(first_hand or found),
        seconds=max(verdict.seconds for verdict in verdicts),
        fence_seconds=max(verdict.fence_seconds for verdict in verdicts),
        compile_seconds=max(verdict.compile_seconds for verdict in verdicts),
        parity=all(verdict.parity for verdict in verdicts),
        budget=max(verdict.budget for verdict in verdicts),
        detail=worst.detail,
        stats=verdicts[0].stats,
        spent=any(verdict.spent for verdict in verdicts),
    )


def _named(verdict: Verdict, name: str, more: str = "") -> Verdict:
    """A verdict on one rank's process, with its name."""
    return replace(verdict, violations=tuple(
        replace(violation, message=f"{name}: {violation.message}{more}") for violation in verdict.violations
    ))


def refused(size: int, room: int) -> Verdict:
    """The verdict on a case of more ranks than there are devices."""
    return Verdict(REJECTED, detail=f"{size} ranks need as many GPUs, and there {'is' if room == 1 else 'are'} {room}")
