"""Bad verdicts in line: what a finding explains already is only counted, the rest is examined, one after the other.

Drivers offer bad cases from their threads; each is on disk before anything else happens to it. One thread examines them
while generation goes on: of each kind one, then of each another, and in the plan's order among these. A loud kind has
eight in line before a rare one has its first, and there may be time for ten.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from moe_fuzz.campaign import events
from moe_fuzz.campaign.badcase import BadCase, Bucket
from moe_fuzz.campaign.confirm import killed
from moe_fuzz.campaign.examine import Examiner
from moe_fuzz.campaign.faces import face_of
from moe_fuzz.campaign.finding import Finding, features_of
from moe_fuzz.campaign.findings import RenderRepro, add_face, folder, load_findings, seen_again, write_finding
from moe_fuzz.campaign.known import explains, promoted, widened
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case

MAX_MINIMIZED = 6  # of a bucket, be it to findings known already; what comes after them counts as a duplicate
MAX_FLAKY = 20  # of a bucket; what comes after them stays unexamined
MAX_WAITING = 8  # of a bucket
MINIMIZING_EVERY = 0.5  # seconds between two events of one reduction

Order = tuple[int, int]  # (unit, case): the place in the plan


@dataclass(frozen=True)
class _Item:
    order: Order
    name: str  # in pending/; unique
    bad: BadCase


class Triage:
    """The line, and the findings of this campaign. `new`, `known` and `fixed` are by id; `save` notes who is new."""

    def __init__(
        self, state: StateDir, examiners: Mapping[str, Examiner], emit: Callable[[events.Event], None],
        flaky: Callable[[BadCase], None], save: Callable[[], None], render_repro: RenderRepro | None = None,
    ) -> None:  # fmt: skip
        self.new: dict[str, Finding] = {}
        self.known: dict[str, Finding] = {}
        self.fixed: dict[str, Finding] = {}
        self.duplicates = 0
        self.unexamined = 0  # bad cases given up on, or left for the next run
        self._state = state
        self._examiners = examiners
        self._emit = emit
        self._flaky = flaky
        self._save = save
        self._render = render_repro
        self._lock = threading.RLock()
        self._line: list[_Item] = []
        self._examining = False
        self._waiting: Counter[Bucket] = Counter()
        self._minimized: Counter[Bucket] = Counter()
        self._flakies: Counter[Bucket] = Counter()
        self._sightings: Counter[str] = Counter()
        self._told: set[Bucket] = set()

    # ---- before the plan --------------------------------------------------------------------------------------------

    def replay_known(self, also_new: frozenset[str], stop: Callable[[], bool]) -> None:
        """Runs the findings that are on disk. `also_new`: those that this very campaign found before it was cut."""
        found = [f for f in load_findings(self._state, set_aside=True) if f.target in self._examiners]
        if found:
            self._emit(events.PhaseStarted("known", len(found)))
        for finding in found:
            if stop():
                return
            path = str(folder(self._state, finding))
            if self._examiners[finding.target].still_fails(finding):
                new = finding.id in also_new
                (self.new if new else self.known)[finding.id] = finding
                self._emit(events.FindingReported(finding, "new" if new else "known", path))
            else:
                self.fixed[finding.id] = finding
                self._emit(events.FindingFixed(finding, path))

    def resume(self) -> int:
        """Puts back in line what an earlier campaign had not examined; returns how many."""
        found = [(n, bad) for n, bad in self._state.pending(BadCase.from_json) if bad.target in self._examiners]
        for at, (name, bad) in enumerate(found):
            self._push(_Item((-1, at), name, bad))
        return len(found)

    # ---- the line ---------------------------------------------------------------------------------------------------

    def offer(self, order: Order, bad: BadCase) -> None:
        """Takes in a bad case, from any thread."""
        if bad.case.target != bad.target:
            bad = replace(bad, case=replace(bad.case, target=bad.target))
        with self._lock:
            # The first violation that no finding explains: a loud bug in every case must not hide the others.
            unexplained = [one for one in bad.each() if not self._explained(one) and not self._closed(one.bucket)]
            if not unexplained:
                return
            # Of cases whose worker was killed nothing is known, least of all that they are alike.
            room = (one for one in unexplained if self._waiting[one.bucket] < MAX_WAITING or killed(one.verdict))
            first = next(room, None)
            if first is None:
                self.duplicates += 1  # most likely: as many of its kind are in line before it
                return
            bad = first
            name = self._state.add_pending(bad.to_json())
            self._push(_Item(order, name, bad))
        self._emit(events.ViolationSeen(bad.target, bad.case, bad.verdict))

    @property
    def waiting(self) -> int:
        with self._lock:
            return len(self._line)

    @property
    def busy(self) -> bool:
        """Whether anybody is in line, or examined."""
        with self._lock:
            return self._examining or bool(self._line)

    def work(self, seconds: Callable[[], float]) -> bool:
        """Examines the first in line; False if nobody is. `seconds()` is what the reducer may take; none left means
        that only cases of a kind not yet reported are looked at, without reducing them."""
        with self._lock:
            if not self._line:
                return False
            item = min(self._line, key=lambda item: (self._minimized[item.bad.bucket], item.order))
            self._line.remove(item)
            self._waiting[item.bad.bucket] -= 1
            bucket = item.bad.bucket
            if self._explained(item.bad) or self._closed(bucket):
                self.offer(item.order, item.bad)  # what else it shows may be news
                self._state.drop_pending(item.name)
                return True
        if seconds() <= 0 and self._minimized[bucket]:
            self.unexamined += 1
            return True
        self._examining = True
        try:
            self._examine(item, seconds())
        except BaseException:  # an interrupt, a full disk: it is pending, for the next run
            self.unexamined += 1
            raise
        finally:
            self._examining = False
        self._state.drop_pending(item.name)
        return True

    def leave(self) -> None:
        """Leaves the line where it is, on disk, for the next run."""
        with self._lock:
            self.unexamined += len(self._line)
            self._line.clear()

    def flush(self) -> None:
        """Writes how often the findings were seen."""
        with self._lock:
            for id_, times in self._sightings.items():
                group = self.new if id_ in self.new else self.known
                group[id_] = seen_again(self._state, group[id_], times)
            self._sightings.clear()

    def _push(self, item: _Item) -> None:
        with self._lock:
            self._line.append(item)
            self._waiting[item.bad.bucket] += 1

    def _examine(self, item: _Item, seconds: float) -> None:
        bad, bucket = item.bad, item.bad.bucket
        examiner = self._examiners[bad.target]
        self._emit(events.FindingConfirming(bad.target, *bad.key, examiner.space.label(bad.case)))
        last = time.monotonic()

        def progress(tries: int, case: Case) -> None:
            nonlocal last
            if time.monotonic() - last >= MINIMIZING_EVERY:
                last = time.monotonic()
                self._emit(events.FindingMinimizing(bad.target, *bad.key, tries, examiner.space.label(case)))

        if killed(bad.verdict):
            shown = examiner.shown(bad)
            if shown is None:
                self._flaky(bad)
                return
            if not killed(shown.verdict):  # it may be known, all or in part, and waits for its turn as others do
                self.offer(item.order, shown)
                return
        finding = examiner.examine(bad, seconds, progress)
        if finding is None:
            self._flakies[bucket] += not killed(bad.verdict)
            self._flaky(bad)
            return
        self._minimized[bucket] += 1
        if not self._is_face(finding, examiner):
            self._report(finding)

    def _is_face(self, finding: Finding, examiner: Examiner) -> bool:
        """Whether a finding of this campaign is taken for the same defect, which is then told. Not one of an earlier
        campaign: somebody may have looked at that one, and must hear of what they did not see."""
        if any(finding.id in one.ids for one in (*self.new.values(), *self.known.values())):
            return False  # that is known without another run
        for earlier in list(self.new.values()):
            reason = examiner.same_defect(earlier, finding)
            if reason:
                with self._lock:
                    known = promoted(self.new[earlier.id], finding)
                    self.new[earlier.id] = add_face(self._state, known, face_of(finding, reason))
                    self.duplicates += 1
                said = f"{finding.target}: finding {earlier.id} also shows on {finding.label}: {reason}"
                self._emit(events.Note(said))
                return True
        return False

    def _report(self, finding: Finding) -> None:
        with self._lock:
            for group in (self.new, self.known):
                known = next((one for one in group.values() if finding.id in one.ids), None)
                if known is not None:
                    self._again(group, known, finding)
                    return
            earlier = self.fixed.get(finding.id)
            # One that fails sometimes only looked fixed; any other one is back, which is news.
            only_looked_fixed = earlier is not None and earlier.reproduces != "always"
            if earlier is not None:
                del self.fixed[finding.id]
                finding = replace(finding, first_seen=earlier.first_seen, times_seen=earlier.times_seen + 1)
            group = self.known if only_looked_fixed else self.new
            group[finding.id] = finding
            try:
                self._save()  # first: if killed now, the next run must not take what lies there for old news
                path = write_finding(self._state, finding, self._render)
            except BaseException:  # an interrupt, say. What has no folder is no finding yet, and nobody may count it
                if not folder(self._state, finding).exists():
                    del group[finding.id]
                    self._sightings.pop(finding.id, None)
                raise
        self._emit(events.FindingReported(finding, "known" if only_looked_fixed else "new", str(path)))

    def _again(self, group: dict[str, Finding], known: Finding, finding: Finding) -> None:
        group[known.id] = widened(known, finding)
        self._sightings[known.id] += 1
        self.duplicates += 1

    def _explained(self, bad: BadCase) -> bool:
        features = features_of(self._examiners[bad.target].space, bad.case)
        for finding in (*self.new.values(), *self.known.values()):
            if explains(finding, bad, features):
                self._sightings[finding.id] += 1
                return True
        return False

    def _closed(self, bucket: Bucket) -> bool:
        if self._minimized[bucket] >= MAX_MINIMIZED:
            self.duplicates += 1
            self._tell(bucket, f"{MAX_MINIMIZED} were minimized; more of the kind are counted as duplicates")
            return True
        if self._flakies[bucket] >= MAX_FLAKY:
            self.unexamined += 1
            self._tell(bucket, f"{MAX_FLAKY} did not come back in a fresh worker; more of the kind are not examined")
            return True
        return False

    def _tell(self, bucket: Bucket, message: str) -> None:
        if bucket not in self._told:
            self._told.add(bucket)
            self._emit(events.Note(f"{bucket.target}: {bucket.check} {bucket.symptom}: {message}"))
