"""The campaign: resume what was cut, replay what is known, run the plan, examine what is bad, sum up.

    inflight, pending → known findings → corpus → grid → generation

Drivers, in threads, run the plan and offer bad verdicts; this thread examines them, one after the other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from moe_fuzz._version import __version__
from moe_fuzz.campaign import events
from moe_fuzz.campaign.available import available
from moe_fuzz.campaign.badcase import BadCase
from moe_fuzz.campaign.broken import Broken, Watched
from moe_fuzz.campaign.budget import Budget
from moe_fuzz.campaign.code import releases
from moe_fuzz.campaign.confirm import killed
from moe_fuzz.campaign.coverage import Coverage
from moe_fuzz.campaign.drive import Enough, derive_seed
from moe_fuzz.campaign.drivers import Drivers
from moe_fuzz.campaign.events import Summary
from moe_fuzz.campaign.examine import Examiner
from moe_fuzz.campaign.findings import RenderRepro
from moe_fuzz.campaign.harvest import Harvest
from moe_fuzz.campaign.interfaces import Cases, Pool, Sanitize, Sources, own_sources
from moe_fuzz.campaign.leftover import MAX_REPLAYS, Leftover
from moe_fuzz.campaign.locate import DEVICE_FAULTS
from moe_fuzz.campaign.pace import progress
from moe_fuzz.campaign.plan import Settings, Unit, corpus_limit, units
from moe_fuzz.campaign.progress import Plan
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.campaign.stats import Stats
from moe_fuzz.campaign.summary import summarize
from moe_fuzz.campaign.tally import CUT, TOO_SLOW, Tally
from moe_fuzz.campaign.triage import Triage
from moe_fuzz.case import Case
from moe_fuzz.verdict import BROKEN, CRASH, Verdict

PROGRESS_EVERY = 0.25  # seconds
POLL = 0.1  # seconds
PATIENCE = 3.0  # seconds an interrupt waits for the rounds that are running
DOUBTFUL = 2  # faults of the device that no case brings back, from which on the device is doubted
_DOUBT = (
    f"{DOUBTFUL} cases met a fault of the GPU that comes back neither alone nor after what ran before them. Is the GPU "
    "sound? `nvidia-smi -q -d ECC` and Xid errors in `dmesg` tell; try another GPU, or one worker on it"
)

_SUSPECTS = "the time is over; what is suspect is still confirmed and made small"

__all__ = ["Campaign", "Settings", "Summary"]


class Campaign:
    """One budgeted run of many cases. `emit` hears one event at a time, from any thread."""

    def __init__(
        self, settings: Settings, pool: Pool, state: StateDir, emit: Callable[[events.Event], None], *,
        sources: Sources | None = None, render_repro: RenderRepro | None = None,
        sanitize: Sanitize | None = None, health: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:  # fmt: skip
        """health: what the pool counts of its processes, for the reports."""
        self._settings = settings
        self._pool = pool
        self._state = state
        self._listener = emit
        self._sources = (sources or own_sources()).restricted(settings.restriction)
        self._render = render_repro
        self._sanitize = sanitize
        self._options = settings.options()
        self._lock = threading.RLock()
        self._emitting = threading.RLock()
        self._stop = threading.Event()
        self._interrupted = False
        self._left = False  # the drivers were waited for long enough: what comes now comes of the pool's closing
        self._error: BaseException | None = None
        self._tally = Tally()  # of this run
        self._coverage = Coverage()
        self._health = health
        self._unit_tallies: dict[Unit, Tally] = {}
        self._phase = ""
        self._last_progress = 0.0
        self._told_late = False
        self._device_faults = 0  # that did not come back
        self._start = time.monotonic()

    def run(self) -> Summary:
        """Runs it all. Raises MoeFuzzError where no campaign is possible; an interrupt ends in a Summary with 130."""
        with self._state:
            return self._run()

    def _run(self) -> Summary:
        settings = self._settings
        self._state.listener = lambda message: self._emit(events.Note(message))
        for message in self._state.notes:
            self._emit(events.Note(message))
        self._state.notes.clear()
        began = time.time()
        found = available(settings.targets, self._pool, self._sources.space, settings.device, settings.restriction)
        self._targets, self._unavailable, self._left_out = found.known, found.problems, found.left_out
        made_of = {target: releases(info, self._pool.versions(target)) for target, (info, _) in self._targets.items()}
        self._plan = Plan.open(settings, self._state, began, made_of)
        self._budget = Budget(settings, self._plan, self._targets)
        self._stats = Stats(self._state)
        self._broken = Broken(self._emit)
        self._harvest = Harvest(self._state, self._targets, self._sources.space)
        watched = Watched(self._pool, self._broken)
        examiners = {
            target: Examiner(watched, info, space, self._options, settings.device, sanitize=self._sanitize)
            for target, (info, space) in self._targets.items()
        }
        save = partial(self._save, finished=False)
        self._triage = Triage(self._state, examiners, self._emit, self._flaky, save, self._render)
        self._header()
        try:
            self._save(finished=False)
            self._campaign()
        except KeyboardInterrupt:
            self._interrupted = True
        finally:
            self._stop.set()
            self._left = True
        return self._finish()

    def _header(self) -> None:
        settings, infos = self._settings, tuple(info for info, _ in self._targets.values())
        notes = settings.notes
        if self._plan.superseded:
            notes = (*notes, f"the campaign that was cut is not gone on with: {self._plan.superseded} since it began")
        if settings.device == "cpu" and any(info.triton for info in infos):
            notes = (*notes, "device cpu: Triton kernels run in its interpreter, and graphs are acted out")
        notes = (*notes, *(f"{info.name} is {info.narrowed}" for info in infos if info.narrowed))
        self._emit(
            events.CampaignStarted(
                __version__, infos, settings.device, settings.workers, self._plan.seed, settings.cases,
                settings.seconds, str(self._state.path), self._plan.resumed, notes,
            )
        )  # fmt: skip
        for target, problem in self._unavailable.items():
            self._emit(events.TargetUnavailable(target, problem.message, problem.hint))

    # ---- the phases -------------------------------------------------------------------------------------------------

    def _campaign(self) -> None:
        if not self._targets:
            return
        # Known findings come before whatever an earlier run left, so that what they explain is not examined again.
        self._triage.replay_known(self._plan.new, self._stop.is_set)
        self._resume()
        self._units = self._plan_units()
        drivers = Drivers(
            self, self._pool, self._state, self._sources, self._budget.bounded(self._options), self._plan.seed,
            self._settings.device, self._targets,
        )  # fmt: skip
        self._drivers = drivers
        drivers.start(self._settings.workers + 1)
        try:
            while not self._enough():
                drivers_done = not drivers.alive  # asked before the line is, so that a last offer is not missed
                if self._error is not None:
                    raise self._error
                if not self._triage.work(self._budget.reducer_seconds):
                    if drivers_done:
                        break
                    drivers.join(POLL)  # no longer than they live: a short campaign is over when they are
                self._progress()
            self._stop.set()
            drivers.join(2 * self._settings.first_deadline)
        except BaseException as error:
            # Whatever ends it (an interrupt, a full disk): no driver may go on in a directory that is given up.
            self._stop.set()
            drivers.join(PATIENCE)
            if not isinstance(error, KeyboardInterrupt):
                raise
            self._interrupted = True
        if self._error is not None:
            raise self._error

    def _resume(self) -> None:
        """Runs again what was running when an earlier campaign was killed, and puts its bad cases back in line."""
        rounds = [left for left in self._state.left_rounds() if left[1] in self._targets]
        waiting = self._triage.resume()
        if rounds or waiting:
            self._emit(events.PhaseStarted("resume", len(rounds) + waiting))
        leftover = Leftover(
            self._pool, self._state, self._plan, self._triage, self._options, self._broken,
            partial(self._save, finished=False),
        )  # fmt: skip
        for left in rounds:
            leftover.replay(*left)

    def _plan_units(self) -> Iterator[Unit]:
        def grid(target: str) -> Iterator[Case]:
            info, space = self._targets[target]
            return self._sources.grid(space, info, self._settings.device, derive_seed(self._plan.seed, target, "grid"))

        settings = self._settings
        replayed = self._harvest.replayed(self._plan.resumed, corpus_limit(settings), settings.restriction)
        done = self._plan.is_done
        planned = units(settings, tuple(self._targets), grid, replayed, self._budget.phase_over, done)
        return (unit for unit in planned if not done(unit))

    # ---- what the drivers ask and tell (drivers.Host) ---------------------------------------------------------------

    def next_unit(self) -> Unit | None:
        with self._lock:
            for unit in self._units:
                if self._over_all():
                    self._tell_late()
                    return None
                if self.over(unit):
                    continue
                self._unit_tallies[unit] = Tally()
                if unit.phase != self._phase:
                    self._phase = unit.phase
                    self._emit(events.PhaseStarted(unit.phase, self._settings.cases))
                return unit
            return None

    def _tell_late(self) -> None:
        """What goes on after the time, if anything does."""
        if self.late() and self._triage.busy and not self._told_late:
            self._told_late = True
            self._emit(events.Note(_SUSPECTS))

    def left_out(self, unit: Unit, case: Case) -> bool:
        return self._plan.is_aside(unit.target, case)

    def too_slow(self, unit: Unit, case: Case) -> bool:
        slow = self._budget.too_slow(unit, case)
        if slow:
            self._count(unit, TOO_SLOW)
        return slow

    def late(self) -> bool:
        return self._budget.late()

    def given_up(self, unit: Unit) -> None:
        self._count(unit, CUT)

    def _count(self, unit: Unit, what: str) -> None:
        self._tally.count_other(unit.target, what)
        self._unit_tallies[unit].count_other(unit.target, what)

    def over(self, unit: Unit) -> bool:
        return self._budget.phase_over(unit.phase) or self._over_all()

    def verdict(self, unit: Unit, at: int, cases: Cases, verdict: Verdict, history: Cases) -> None:
        if self._left:  # what the closing pool does to its workers is no verdict: the round stays in flight
            raise Enough
        self._tally.count(unit.target, verdict)
        self._unit_tallies[unit].count(unit.target, verdict)
        self._harvest.consider(unit.target, cases[-1], verdict)
        self._broken.saw(unit.target, cases[-1], verdict)
        self._budget.learn(unit.target, cases[-1], verdict)
        self._coverage.count(unit.target, self._targets[unit.target][1], cases[-1], verdict)
        if verdict.bad:
            if killed(verdict):
                label = self._targets[unit.target][1].label(cases[-1])
                self._emit(events.WorkerLost(unit.target, verdict.key[1], cases[-1], label))
            self._triage.offer((unit.order, at), BadCase(unit.target, cases[-1], verdict, history))
        self._progress()

    def finished(self, unit: Unit) -> None:
        with self._lock:
            self._plan.done(unit, self._unit_tallies.pop(unit))
            self._save(finished=False)

    def failed(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._stop.set()

    # ---- budgets ----------------------------------------------------------------------------------------------------

    def _over_all(self) -> bool:
        return self._stop.is_set() or self.late()

    def _enough(self) -> bool:
        most = self._settings.max_findings
        return most is not None and len(self._triage.new) >= most

    # ---- telling and saving -----------------------------------------------------------------------------------------

    def _emit(self, event: events.Event) -> None:
        with self._emitting:
            self._listener(event)

    def _progress(self) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._last_progress < PROGRESS_EVERY:
                return
            self._last_progress = now
        total = Tally()
        total.merge(self._plan.before)
        total.merge(self._tally)
        self._emit(
            progress(
                self._settings, total, self._plan.seconds, self._tally.cases / max(now - self._start, 1e-9),
                len(self._triage.new), self._triage.waiting,
            )
        )  # fmt: skip

    def _flaky(self, bad: BadCase) -> None:
        self._tally.count_flaky(bad.target)
        self._stats.flaky(bad)
        self._emit(events.FlakySeen(bad.target, bad.case, bad.verdict))
        if bad.key[0] == CRASH and bad.key[1] in DEVICE_FAULTS:
            self._device_faults += 1
            if self._device_faults == DOUBTFUL:
                self._emit(events.Note(_DOUBT))

    def _save(self, finished: bool) -> None:
        self._plan.save(self._settings, self._state, list(self._triage.new), finished)
        self._stats.save(self._tally)

    def _finish(self) -> Summary:
        self._triage.leave()
        self._triage.flush()
        for target, case in self._plan.aside:
            died = f"{target}: the campaign died {MAX_REPLAYS} times while this case ran, which is not run any more"
            self._emit(events.Note(f"{died}: moe-fuzz replay {replace(case, target=target).inline()}"))
        with self._lock:
            self._save(finished=False)
        total = Tally()
        total.merge(self._plan.before)
        total.merge(self._tally)
        reasons = {target: problem.message for target, problem in self._unavailable.items()}
        # A restriction that leaves some targets nothing is what was asked for; one that leaves nothing at all is not.
        targets = tuple(t for t in self._settings.targets if t not in self._left_out) or self._settings.targets
        settings = replace(self._settings, targets=targets)
        broken = self._broken.count + self._plan.before.verdicts().get(BROKEN, 0)
        summary = summarize(settings, self._plan, total, self._triage, reasons, broken, self._interrupted)
        self._emit(events.CoverageCounted(self._coverage.cells()))
        if self._health is not None:
            self._emit(events.WorkersCounted(self._health()))
        self._emit(events.CampaignFinished(summary))
        if not self._interrupted and self._targets:  # with no target at hand nothing of the plan has come to its end
            self._save(finished=True)  # last: who is killed before the reports are whole goes on with this campaign
        return summary

