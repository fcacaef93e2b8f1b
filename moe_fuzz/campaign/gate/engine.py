"""The gate's engine: threads take rounds of the plan in order, this thread judges what they gave in the same order."""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from moe_fuzz._version import __version__
from moe_fuzz.campaign import events
from moe_fuzz.campaign.available import available
from moe_fuzz.campaign.badcase import BadCase
from moe_fuzz.campaign.broken import Broken, Watched
from moe_fuzz.campaign.confirm import killed, rerun
from moe_fuzz.campaign.coverage import Coverage
from moe_fuzz.campaign.events import EntryResult, Summary
from moe_fuzz.campaign.examine import Examiner
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.findings import RenderRepro
from moe_fuzz.campaign.gate.entries import absent, judge_entry, not_run, stray, without_case
from moe_fuzz.campaign.gate.judge import Judge
from moe_fuzz.campaign.gate.ledger import Entry
from moe_fuzz.campaign.gate.plan import FixedPlan, Round, bare, fixed_plan, quotas
from moe_fuzz.campaign.gate.settings import GateSettings
from moe_fuzz.campaign.gate.summary import summarize, turns_red
from moe_fuzz.campaign.interfaces import Cases, Pool, Sanitize, Sources, own_sources
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.campaign.tally import Tally
from moe_fuzz.contract import TargetInfo
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import Verdict

CASES_SHARE = 0.75  # of the time: after it no case begins behind the first bad one, which is examined
QUIET_SHARE = 0.9  # where nothing was bad, no round: what is left is for those under way, which it cuts at its end
UNBOUNDED = 3600.0  # seconds of a reduction that tries bound: more than they ever take, unless each try is a hang
PROGRESS_EVERY = 0.25  # seconds
PATIENCE = 3.0  # seconds an interrupt waits for the rounds that are running


@dataclass
class _Running:
    """A round that a worker took."""

    ran: list[tuple[Verdict, Cases]] = field(default_factory=list)  # of each case, and what its process had run before
    over: bool = False  # nothing more will come, though time may have cut it


class _TimeIsUp(Exception):
    """In the midst of a round: kernels that hang, or that are compiled, make one last for minutes."""


class Gate:
    """`emit` hears one event at a time, all of them from the thread that calls `run`."""

    def __init__(
        self, settings: GateSettings, pool: Pool, state: StateDir, emit: Callable[[events.Event], None], *,
        base: Pool | None = None, sources: Sources | None = None, render_repro: RenderRepro | None = None,
        sanitize: Sanitize | None = None, health: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:  # fmt: skip
        """base: workers of the build that the change is made to. sanitize: names the line of a kernel, for findings
        about memory. health: what the pool counts of its processes."""
        self._settings = settings
        self._pool = pool
        self._state = state
        self._emit = emit
        self._base = base
        self._sources = sources or own_sources()
        self._render = render_repro
        self._options = settings.options()
        self._today = settings.today or datetime.date.today()
        self._tally = Tally()  # of what is judged
        self._seen = Tally()  # of what ran, which waits while a round before it compiles
        self._coverage = Coverage()
        self._broken = Broken(self._emit)
        self._sanitize = sanitize
        self._health = health
        self._changed = threading.Condition()
        self._running: dict[int, _Running] = {}  # by the order of the round; those that are judged are gone
        self._next = 0  # round that nobody took yet
        self._stop = False
        self._bad: int | None = None  # the first round in the plan's order that met anything bad
        self._cut = False  # all rounds, each at its next verdict: the time was up, and nothing had been bad
        self._error: BaseException | None = None
        self._results: dict[tuple[str, str], EntryResult] = {}
        self._unheard: dict[str, frozenset[str]] = {}  # name of an entry -> packages in its `versions`
        self._last_progress = 0.0
        self._start = time.monotonic()

    def run(self) -> Summary:
        """Raises MoeFuzzError where no gate is possible; an interrupt ends in a Summary with 130."""
        self._start = time.monotonic()  # what a plan takes, half a minute of a large one, is of the gate's time too
        with self._state:
            for message in self._state.notes:
                self._emit(events.Note(message))
            self._state.notes.clear()
            found = available(self._settings.targets, self._pool, self._sources.space, self._settings.device)
            self._targets, self._unavailable = found.known, found.problems
            for entry in self._settings.strays:
                self._results[entry.name, entry.pattern] = stray(entry, self._today)
            self._in_force = {name: tuple(self._entries_of(info)) for name, (info, _) in self._targets.items()}
            self._plan = self._make_plan()
            settings = self._settings
            watched = Watched(self._pool, self._broken)
            self._judge = Judge(
                self._state,
                {name: Examiner(watched, info, space, self._options, settings.device, settings.profile.tries, False,
                                self._sanitize)
                 for name, (info, space) in self._targets.items()},
                self._emit, self._in_force, self._turns_red, self._base, self._render,
            )  # fmt: skip
            self._header()
            interrupted = False
            try:
                self._run_plan()
            except KeyboardInterrupt:
                interrupted = True
            return self._finish(interrupted)

    # ---- before the first case --------------------------------------------------------------------------------------

    def _entries_of(self, info: TargetInfo) -> Iterator[Entry]:
        versions = self._pool.versions(info.name)
        for entry in self._settings.entries:
            if entry.is_of(info.name) and not (entry.cases and entry.cases[-1].op != info.op):
                unheard = entry.unheard_of(info, versions)
                self._unheard[entry.name] = self._unheard.get(entry.name, unheard) & unheard
                why = entry.absent(info, versions, self._settings.arch)
                if why:
                    self._results[entry.name, info.name] = absent(entry, info, why, self._today)
                else:
                    yield entry

    def _make_plan(self) -> FixedPlan:
        settings = self._settings
        each = quotas(tuple(self._targets), settings.cases, settings.profile.cases[settings.device])
        return fixed_plan(
            tuple(self._targets.values()), self._sources, settings.device, settings.seed, each, settings.corpus,
            self._in_force,
        )  # fmt: skip

    def _turns_red(self, finding: Finding) -> bool:
        return self._settings.strict or turns_red(finding, self._targets[finding.target][0])

    def _header(self) -> None:
        settings, infos = self._settings, tuple(info for info, _ in self._targets.values())
        notes = (f"gate, profile {settings.profile.name}, plan {self._plan.digest}", *settings.notes)
        if self._plan.held_back:
            notes = (*notes, f"{self._plan.held_back} cases are held back: known findings take their process down")
        for name, packages in self._unheard.items():
            for package in sorted(packages):
                said = "nothing is known of such a package here, so the entry counts as in force"
                notes = (*notes, f"ledger: {name}: versions names {package}: {said}")
        self._emit(
            events.CampaignStarted(
                __version__, infos, settings.device, settings.workers, settings.seed, self._plan.cases,
                settings.seconds, str(self._state.path), False, notes, self._plan.digest,
            )
        )  # fmt: skip
        for target, problem in self._unavailable.items():
            self._emit(events.TargetUnavailable(target, problem.message, problem.hint))

    # ---- the plan ---------------------------------------------------------------------------------------------------

    def _run_plan(self) -> None:
        threads = [threading.Thread(target=self._work, name=f"gate-{number}", daemon=True)
                   for number in range(self._settings.workers)]  # fmt: skip
        for thread in threads:
            thread.start()
        try:
            self._judge_all(threads)
        finally:
            with self._changed:
                self._stop = True
            for thread in threads:
                thread.join(PATIENCE / len(threads))
        if self._error is not None:
            raise self._error

    def _judge_all(self, threads: list[threading.Thread]) -> None:
        """Every case in the plan's order, as soon as its verdict is known, up to the first that will never run."""
        begun: set[str] = set()
        for part in self._plan.rounds:
            for at in range(len(part.cases)):
                one = self._wait_for(part, at, threads)
                if one is None:
                    return
                if part.phase not in begun:
                    begun.add(part.phase)
                    self._emit(events.PhaseStarted(part.phase, self._plan.cases_of(part.phase)))
                self._judge_one(part, at, *one)
            self._running.pop(part.order)

    def _wait_for(self, part: Round, at: int, threads: list[threading.Thread]) -> tuple[Verdict, Cases] | None:
        """What a case of the round gave, as soon as it is known; None if it will never run."""
        while True:
            with self._changed:
                alive = any(thread.is_alive() for thread in threads)
                running = self._running.get(part.order)
                if running is not None and at < len(running.ran):
                    return running.ran[at]
                if self._error is not None or not alive or (running is not None and running.over):
                    return None
                self._changed.wait(0.1)
            self._progress()

    def _work(self) -> None:
        try:
            while (part := self._take()) is not None:
                running = self._running[part.order]

                def on_verdict(
                    _at: int, verdict: Verdict, history: Cases, part: Round = part, running: _Running = running
                ) -> None:
                    with self._changed:
                        running.ran.append((verdict, history))
                        if part.phase != "ledger":
                            self._seen.count(part.target, verdict)
                        self._changed.notify_all()
                        if verdict.bad and (self._bad is None or part.order < self._bad):
                            self._bad = part.order
                        # Not a round before the first bad one: what is judged ends with the round that is cut.
                        self._cut |= self._bad is None and self._later_than(1.0)
                        behind = self._bad is not None and part.order >= self._bad and self._later_than(CASES_SHARE)
                    if behind or (self._cut and part.phase != "ledger"):
                        raise _TimeIsUp

                with (
                    contextlib.suppress(_TimeIsUp),
                    self._pool.fresh() if part.alone else self._pool.lease(part.target) as worker,
                ):
                    worker.run(part.cases, part.target, self._options_for(part), on_verdict)
                with self._changed:
                    running.over = True
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which raises it
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _take(self) -> Round | None:
        with self._changed:
            late = self._later_than(QUIET_SHARE if self._bad is None else CASES_SHARE)
            if self._stop or late or self._error is not None or self._next >= len(self._plan.rounds):
                return None
            part = self._plan.rounds[self._next]
            self._next += 1
            self._running[part.order] = _Running()
            return part

    def _options_for(self, part: Round) -> RunOptions:
        own = part.entry.fence if part.phase == "ledger" and part.entry else "torch"
        return replace(self._options, fence=replace(self._options.fence, own=own))

    # ---- judging ----------------------------------------------------------------------------------------------------

    def _judge_one(self, part: Round, at: int, verdict: Verdict, history: Cases) -> None:
        info, space = self._targets[part.target]
        if part.phase == "ledger" and part.entry is not None:
            self._broken.saw(part.target, part.cases[at], verdict)
            if at == len(part.cases) - 1:  # the others lead up to it
                self._judge_entry(part, part.entry, verdict)
            return
        case = part.cases[at]
        self._tally.count(part.target, verdict)
        self._coverage.count(part.target, space, case, verdict)
        self._broken.saw(part.target, case, verdict)
        check, symptom = verdict.key if verdict.bad else ("", "")
        self._emit(
            events.CaseJudged(
                part.phase, part.target, bare(case), space.label(case), verdict.kind, check, symptom,
                verdict.seconds, part.alone,
            )
        )  # fmt: skip
        if verdict.bad:
            if killed(verdict):
                self._emit(events.WorkerLost(part.target, verdict.key[1], case, space.label(case)))
            self._judge.bad_case(BadCase(info.name, case, verdict, history), part.entry, self._reducer_seconds())
        self._progress()

    def _judge_entry(self, part: Round, entry: Entry, verdict: Verdict) -> None:
        info, space = self._targets[part.target]
        options = self._options_for(part)

        def fresh(cases: Cases) -> Verdict:
            return rerun(self._pool, cases, info.name, options)

        def bad_case(bad: BadCase) -> None:
            self._judge.bad_case(bad, None, self._reducer_seconds())

        result = judge_entry(entry, info, space, verdict, fresh, self._today, self._emit, bad_case)
        self._results[entry.name, info.name] = result
        self._emit(events.EntryJudged(result))

    def _reducer_seconds(self) -> float:
        return UNBOUNDED if self._settings.seconds is None else self._settings.seconds - self._seconds

    # ---- telling ----------------------------------------------------------------------------------------------------

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _later_than(self, share: float) -> bool:
        """Whether more than this share of the time is over."""
        return self._settings.seconds is not None and self._seconds > self._settings.seconds * share

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self._last_progress < PROGRESS_EVERY:
            return
        self._last_progress = now
        with self._changed:
            done, verdicts, planned = self._seen.cases, self._seen.verdicts(), self._plan.cases
        rate = done / max(self._seconds, 1e-9)
        etas = [(planned - done) / rate] if rate and done < planned else []  # how long examining takes nobody knows
        if self._settings.seconds is not None:
            etas.append(max(0.0, self._settings.seconds - self._seconds))
        self._emit(
            events.Progress(
                done, planned, self._seconds, rate, verdicts, len(self._judge.new), 0,
                min(etas, default=None),
            )
        )  # fmt: skip

    def _finish(self, interrupted: bool) -> Summary:
        for name, entries in self._in_force.items():
            info, _ = self._targets[name]
            for entry in entries:
                if (entry.name, name) in self._results:
                    continue
                if entry.cases and not entry.expired(self._today):
                    result = not_run(entry, info, "the time was up before its case ran")
                else:
                    result = without_case(entry, info, self._judge.seen[entry.name], self._today)
                self._results[entry.name, name] = result
                self._emit(events.EntryJudged(result))
        results = tuple(replace(one, seen=self._judge.seen[name]) for (name, _), one in self._results.items())
        summary = summarize(
            self._settings, self._plan, self._targets, self._unavailable, self._tally, self._judge, results,
            self._seconds, self._broken.count, interrupted,
        )  # fmt: skip
        self._emit(events.CoverageCounted(self._coverage.cells()))
        if self._health is not None:
            self._emit(events.WorkersCounted(self._health()))
        self._emit(events.CampaignFinished(summary))
        return summary
