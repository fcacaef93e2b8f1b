"""A worker as the parent sees it: runs cases, watches the clock, and turns its death into a verdict. Free of torch."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import EnvironmentProblem, MoeFuzzError
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import CRASH, OOM, Verdict
from moe_fuzz.worker import autopsy
from moe_fuzz.worker.clock import CaseClock, Reading
from moe_fuzz.worker.group import GroupGone
from moe_fuzz.worker.launch import START_SECONDS, Demand, Process, ZygoteGone
from moe_fuzz.worker.listen import Expired, TimeIsUp, log_size, next_event
from moe_fuzz.worker.protocol import ALLOCATOR_VARIABLE, ChannelClosed, Garbled, error_from_json, provider_of
from moe_fuzz.worker.ranks import Groups, Ranks, next_part
from moe_fuzz.worker.stats import Stats

HISTORY = 128  # cases of a process that are remembered: a defect may take so many to show
OnVerdict = Callable[[int, Verdict, tuple[Case, ...]], None]

_STACK_SECONDS = 0.3  # what a hanging process is given to write its stack
_TRIES = 3  # workers in a row that may die before they begin a case


@dataclass(frozen=True)
class Limits:
    """When a worker's process is replaced."""

    memory: int | None = None  # bytes of writable private memory; more is refused to the process
    cases: int = 2000  # a process runs, then it is recycled
    growth: int = 2 << 30  # bytes a process may grow, then it is recycled; on a GPU one is 1 GiB larger when warm


class Worker:
    """A place where cases run, one process after the other. For one thread at a time; it comes from a Pool."""

    def __init__(
        self,
        spawn: Callable[[Path, Demand], Process],
        log: Path,
        stats: Stats,
        limits: Limits,
        environment: Mapping[str, str] | None = None,
        released: Callable[[], None] = lambda: None,
        groups: Groups | None = None,
        turn: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        """environment: variables of its processes alone. released: called when it gives up its place. groups: of the
        pool, for cases that take several processes at once. turn: around each round of a process of its own."""
        self._spawn, self._log, self._stats, self._limits = spawn, log, stats, limits
        self._turn = turn
        self._environment, self._released = dict(environment or {}), released
        self._process: Process | None = None
        self._demand = Demand()
        self._history: deque[Case] = deque(maxlen=HISTORY)
        self._ran = 0
        self._rss = 0
        self.ranks = Ranks(log, stats, groups)

    @property
    def pid(self) -> int | None:
        """The process that would run the next case; None before it is forked."""
        return self._process.pid if self._process is not None else None

    @property
    def log(self) -> Path:
        """What targets print to stdout and stderr."""
        return self._log

    @property
    def provider(self) -> str:
        """Whose interpreter the process runs in; empty before it is forked."""
        return self._demand.provider if self._process is not None else ""

    def run(
        self, cases: Sequence[Case], target: str, options: RunOptions, on_verdict: OnVerdict | None = None
    ) -> list[Verdict]:
        """Runs the cases in order and returns their verdicts. Blocks.

        A case that kills its process gets its verdict (crash, hang, out-of-memory), and the rest go on in a new one.
        on_verdict(i, verdict, history) is called at each verdict; history: what the same process ran before, oldest
        first, at most HISTORY cases. Where `options.until` comes before the end, the verdicts are fewer than the cases.

        Raises what the runner raised: UsageError, EnvironmentProblem, or MoeFuzzError for a failure of moe-fuzz itself.
        """
        verdicts: list[Verdict] = []

        def give(verdict: Verdict) -> None:
            index = len(verdicts)
            alone = cases[index].processes == 1  # those that ran in a group are not this process's past
            history = tuple(self._history if alone else self.ranks.past)
            verdicts.append(verdict)
            (self._history if alone else self.ranks.past).append(replace(cases[index], target=target))
            self._ran += 1
            self._stats.count("cases")
            if on_verdict is not None:
                on_verdict(index, verdict, history)

        fruitless = 0
        while len(verdicts) < len(cases):
            before = len(verdicts)
            size, part = next_part(cases[before:])
            try:
                if size > 1:
                    self.ranks.run(size, part, target, options, give)
                else:
                    process = self._ready(target, _own_of(options, part))
                    with self._turn():
                        self._round(process, part, target, options, give)
            except (ZygoteGone, _Killed, GroupGone):
                self.close()  # the case in flight is not to blame: it runs again
            except TimeIsUp:
                self.close()
                break
            except _Told as told:
                raise told.error from None
            except BaseException:
                self.close()  # Ctrl-C, or a failing on_verdict: nobody knows what the process is doing
                raise
            fruitless = 0 if len(verdicts) > before else fruitless + 1
            if fruitless >= _TRIES:
                raise EnvironmentProblem(f"{_TRIES} workers in a row died before they began a case of {target}",
                                         f"the log may tell: {self._log}")
        return verdicts

    def describe(self, target: str, timeout: float) -> TargetInfo:
        """What the target says of itself. Raises UsageError, EnvironmentProblem."""
        return TargetInfo.from_json(self._ask({"describe": target}, "info", target, timeout))

    def exhibit(self, case: Case, target: str, timeout: float = 60.0) -> dict[str, Any]:
        """The case's tensors and its call in plain values, see execute/exhibit.py. Raises as `describe` does."""
        return dict(self._ask({"exhibit": case.to_json(), "target": target}, "exhibit", target, timeout))

    def _ask(self, message: dict[str, Any], answer: str, target: str, timeout: float) -> Any:
        for _ in range(_TRIES):
            try:
                return self._ask_once(self._ready(target), message, target, timeout)[answer]
            except (ZygoteGone, _Killed):
                self.close()
            except _Told as told:
                raise told.error from None
            except BaseException:
                self.close()
                raise
        raise EnvironmentProblem(f"workers die again and again, or are killed, before {target} is loaded",
                                 "is the machine out of memory?")

    def restart(self) -> None:
        """The next case runs in a new process."""
        self.close()

    def rest(self) -> None:
        """Closes the worker and gives up its place on a GPU; a later run forks another where there is one."""
        self.close()
        self._released()

    def discard(self) -> None:
        """Closes the worker for good: its files go too."""
        self.close()
        for path in (self._log, autopsy.trace_of(self._log), autopsy.stages_of(self._log)):
            path.unlink(missing_ok=True)
        self._released()

    def close(self) -> None:
        """Kills the process and what it started. Idempotent; a later run forks another."""
        self.ranks.close()
        process, self._process = self._process, None
        self._history.clear()
        self._ran = 0
        if process is not None:
            process.kill()

    # ---- one process ------------------------------------------------------------------------------------------------

    def _ready(self, target: str, own: str | None = None) -> Process:
        """The living process, forked now if there is none that can run this target with this fence around its own
        memory; None: whichever fence."""
        demand = self._wanted(target, own)
        if self._process is not None:
            if self._process.status() is not None:
                self._stats.count("idle_deaths")  # whoever killed it, the next case did not
                self.close()
            elif self._demand == demand:
                return self._process
            else:
                self.close()
        started = time.monotonic()
        self._process, self._demand = self._spawn(self._log, demand), demand
        process = self._process
        try:
            event = next_event(process, CaseClock(START_SECONDS, START_SECONDS), self._log)
        except (ChannelClosed, Garbled, Expired) as error:
            status = process.status(1.0)
            self.close()
            if status is not None and autopsy.was_killed(status):
                raise _Killed from None
            raise EnvironmentProblem(f"a worker does not come up ({type(error).__name__}, wait status {status})",
                                     f"its log says:\n{autopsy.read_log(self._log, 0)[-1500:].strip()}") from None
        if "error" in event:
            self.close()
            raise _Told(error_from_json(event["error"]))
        self._rss = event["rss"]
        self._stats.count("forks")
        self._stats.count("fork_seconds", time.monotonic() - started)
        return process

    def _wanted(self, target: str, own: str | None) -> Demand:
        provider = provider_of(target)
        if own is None and self._process is not None and self._demand.provider == provider:
            return self._demand
        allocator = {ALLOCATOR_VARIABLE: own} if own == "all" else {}
        return Demand(provider, tuple(sorted({**self._environment, **allocator}.items())))

    def _ask_once(self, process: Process, message: dict[str, Any], target: str, timeout: float) -> dict[str, Any]:
        offset = log_size(self._log)
        try:
            process.channel.send(message)
            event = next_event(process, CaseClock(timeout, timeout), self._log)
        except Expired:
            found = self._hang(process, offset, timeout, timeout).violations[0]
            place = f"; it stands at {found.site}" if found.site else ""
            raise EnvironmentProblem(f"loading {target} takes more than {timeout:g} s{place}",
                                     "import it by hand to see what it waits for") from None
        except (ChannelClosed, Garbled):
            status = process.status(1.0)
            if status is not None and autopsy.was_killed(status):
                raise _Killed from None
            dead = autopsy.crash(status, self._log, offset, self._layout(process), 0, 0.0)
            cause = " at ".join(filter(None, (dead.key[1], dead.violations[0].site))) if dead.violations else dead.kind
            raise EnvironmentProblem(f"loading {target} ends the worker ({cause})",
                                     f"import it by hand to see why. The end of the log:\n{dead.detail}") from None
        if "error" in event:
            raise _Told(error_from_json(event["error"]))
        return event

    def _round(
        self, process: Process, cases: Sequence[Case], target: str, options: RunOptions, give: Callable[[Verdict], None]
    ) -> None:
        """Runs cases until they are done, or the process is. Each verdict goes to `give`."""
        layout, kills = self._layout(process), autopsy.oom_kills()
        current: Case | None = None
        clock = CaseClock(options.deadline, options.first_deadline, options.until)
        reading, offset, begun = Reading(process.pid), 0, 0
        try:
            process.channel.send({"round": [case.to_json(digest=False) for case in cases], "target": target,
                                  "options": options.to_json()})
            while True:
                event = next_event(process, clock, self._log, reading)
                if "start" in event:
                    if event["start"] != begun:  # a copy of the process speaks, too
                        raise Garbled(f"case {event['start']} of the round begins, and it is the turn of {begun}")
                    current, offset, begun = cases[begun], event["log"], begun + 1
                    clock.restart()
                elif "still" in event or "goes" in event:
                    clock.stand(str(event.get("still", "")))
                elif "on" in event:
                    clock.go_on()
                    if clock.slow or clock.over:
                        raise Expired
                elif "verdict" in event:
                    if current is None or event["verdict"] != begun - 1:
                        raise Garbled(f"a verdict on case {event['verdict']} of the round, which is not running")
                    current = None
                    verdict = Verdict.from_json(event["is"])
                    give(verdict)
                    if verdict.kind in (OOM, CRASH) or verdict.spent:  # what it left behind is no burden for the next
                        self._stats.count("deaths")
                        self.close()
                        return
                elif "done" in event:
                    self._recycle(event["rss"])
                    return
                else:
                    raise _Told(error_from_json(event["error"]))
        except Expired:
            if clock.over:
                raise TimeIsUp from None
            dead = self._hang(process, offset, clock.limit, clock.seconds, still=clock.still)
        except ChannelClosed:
            seconds, status = clock.seconds, process.status(1.0)
            dead = autopsy.crash(status, self._log, offset, layout, autopsy.oom_kills() - kills, seconds)
        except Garbled as said:
            dead = autopsy.garbled(self._log, offset, clock.seconds, str(said))
        if current is None:
            self._stats.count("idle_deaths")  # between two cases: neither is to blame
        else:
            self._stats.count("deaths")
            give(dead)
        self.close()

    def _hang(
        self, process: Process, offset: int, deadline: float, seconds: float, still: str = ""
    ) -> Verdict:
        """Asks the process for its stack, kills it, and gives the verdict."""
        process.signal(signal.SIGUSR1)
        until = time.monotonic() + _STACK_SECONDS
        seen, stack = "", autopsy.read_trace(self._log)
        while time.monotonic() < until and not (autopsy.has_stack(stack) and stack == seen):  # whole, and at rest
            time.sleep(0.01)
            seen, stack = stack, autopsy.read_trace(self._log)
        layout = self._layout(process)
        process.kill()
        self._process = None
        return autopsy.hang(self._log, offset, layout, deadline, seconds, still)

    def _recycle(self, rss: int) -> None:
        if self._ran >= self._limits.cases or rss - self._rss > self._limits.growth:
            self._stats.count("recycled")
            self.close()

    def _layout(self, process: Process) -> autopsy.Layout:
        return autopsy.Layout.of(process.zygote.info())


def _own_of(options: RunOptions, cases: Sequence[Case]) -> str:
    """How the target's own memory is fenced: a CUDA graph can only be captured over torch's own allocator."""
    graphs = any(case.mode != "eager" for case in cases)
    return "torch" if graphs and options.fence.own == "all" else options.fence.own


class _Killed(Exception):
    """Somebody else killed the process before it began; the next one may be left alone."""


class _Told(Exception):
    """The worker lives and told of an error, which goes to the caller."""

    def __init__(self, error: MoeFuzzError) -> None:
        super().__init__(str(error))
        self.error = error
