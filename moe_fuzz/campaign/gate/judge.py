"""Bad cases of a gate, judged one after the other in the plan's order, so that every gate of a plan says the same.

known     the ledger tells of it, by the failure and the features of the case, or by what it is reduced to
flaky     fresh workers do not show it again, or not each of three times
base      it fails on the base build too: nobody's change has brought it
robustness
          it breaks nobody's promise
new       all else: it failed in a fresh worker three times, was reduced, and fails three times more
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from moe_fuzz.campaign import events
from moe_fuzz.campaign.badcase import BadCase, Bucket
from moe_fuzz.campaign.confirm import TRIES, holds, rerun
from moe_fuzz.campaign.examine import Examiner
from moe_fuzz.campaign.faces import face_of
from moe_fuzz.campaign.finding import Finding, features_of
from moe_fuzz.campaign.findings import RenderRepro, add_face, write_finding
from moe_fuzz.campaign.gate.ledger import Entry
from moe_fuzz.campaign.interfaces import Pool
from moe_fuzz.campaign.known import explains, promoted, widened
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case
from moe_fuzz.errors import EnvironmentProblem

MAX_EXAMINED = 6  # new ones of a bucket; what comes after them counts as a duplicate
MAX_KNOWN = 24  # of a bucket, that had to be reduced before the ledger knew them
#: Of a bucket, flaky ones, and ones of the base build. From then on any bad case of it is first tried itself: three
#: runs tell what a reduction would tell in the end.
MAX_HARMLESS = 6
#: Reductions to an entry that takes its process down, each try of which is a process. Then a case that has all features
#: of one that was reduced to it is not reduced any more.
LEARNED = 3
MINIMIZING_EVERY = 0.5  # seconds between two events of one reduction


class Judge:
    """`new`, `unstable` and `on_base` are by id. `seen`: name of an entry of the ledger -> bad cases it explained."""

    def __init__(
        self, state: StateDir, examiners: Mapping[str, Examiner], emit: Callable[[events.Event], None],
        entries: Mapping[str, Sequence[Entry]], turns_red: Callable[[Finding], bool], base: Pool | None = None,
        render_repro: RenderRepro | None = None,
    ) -> None:  # fmt: skip
        """entries: target -> those that are in force for it."""
        self.new: dict[str, Finding] = {}
        self.known: dict[str, Finding] = {}
        self.unstable: dict[str, Finding] = {}
        self.on_base: dict[str, Finding] = {}
        self.flaky: Counter[str] = Counter()  # target -> bad cases that did not come back
        self.unexamined = 0
        self.seen: Counter[str] = Counter()
        self._state = state
        self._examiners = examiners
        self._emit = emit
        self._entries = entries
        self._turns_red = turns_red
        self._base = base
        self._render = render_repro
        self._examined: Counter[tuple[str, Bucket]] = Counter()  # (how it ended, bucket)
        self._told: set[Bucket] = set()  # that they are closed
        self._unsure: set[Bucket] = set()  # told that they may be known
        self._counted: dict[str, BadCase] = {}  # name of an entry -> the last case that it explained
        self._learned: dict[str, list[Finding]] = {}  # name of a deadly entry -> what was reduced to it
        self._reduced: dict[Bucket, list[Finding]] = {}  # what was known once it had been reduced, one of each id
        self._comparable: dict[str, bool] = {}  # target -> whether the base build can be asked

    def bad_case(self, bad: BadCase, keeper: Entry | None, seconds: float) -> None:
        """keeper: the entry on whose account the case ran alone. seconds: what reducing it may take."""
        for one in bad.each():  # a loud bug in every case must not hide the others
            if self._explained(one, keeper, bad) or self._brought_before(one) or self._shaky(one, seconds):
                continue
            if self._closed(one) or (seconds <= 0 and self._examined["new", one.bucket]):
                self.unexamined += 1
                continue
            if seconds <= 0 and (entry := self._failing_alike(one)) is not None:
                self._leave(one, entry)
                continue
            self._emit(events.ViolationSeen(one.target, one.case, one.verdict))
            self._examine(one, max(0.0, seconds))
            return

    def entry_of(self, finding: Finding) -> Entry | None:
        entries = self._entries.get(finding.target, ())
        by_id = (entry for entry in entries if entry.fingerprint and entry.fingerprint in finding.ids)
        return next(by_id, None) or next((entry for entry in entries if entry.is_finding(finding)), None)

    def _explained(self, bad: BadCase, keeper: Entry | None, whole: BadCase) -> bool:
        """whole: the case with all that is wrong in it, which counts once for an entry."""
        features = features_of(self._examiners[bad.target].space, bad.case)
        if keeper is not None and keeper.shows(bad.verdict):
            self._count(keeper, whole)
            return True
        for entry in self._entries.get(bad.target, ()):
            if entry.explains(bad, features):
                self._count(entry, whole)
                return True
        for entry in self._entries.get(bad.target, ()):
            learned = self._learned.get(entry.name, ())
            if len(learned) >= LEARNED and any(explains(finding, bad, features) for finding in learned):
                self._count(entry, whole)
                return True
        return any(explains(finding, bad, features) for finding in self.new.values())

    def _failing_alike(self, bad: BadCase) -> Entry | None:
        """An entry that tells of such a failure, of cases with other features: what is reduced often has them. So
        nobody can say that the case, unreduced, is new."""
        failure = bad.verdict.only(*bad.verdict.violations[:1])
        return next((one for one in self._entries.get(bad.target, ()) if one.check and one.shows(failure)), None)

    def _leave(self, bad: BadCase, entry: Entry) -> None:
        """Leaves a case unexamined that may be the entry's; told once of each kind."""
        self.unexamined += 1
        if bad.bucket not in self._unsure:
            self._unsure.add(bad.bucket)
            said = f"the time was up before it was known whether they are {entry.name}, which fails like them"
            self._emit(events.Note(f"{bad.target}: {bad.bucket.check} {bad.bucket.symptom}: {said}"))

    def _count(self, entry: Entry, bad: BadCase) -> None:
        if self._counted.get(entry.name) is not bad:
            self._counted[entry.name] = bad
            self.seen[entry.name] += 1

    # What is green must not hide what is red: a finding of the base build, or a flaky one, has the looks of a case that
    # this change breaks for good. So a case that it would explain is tried itself.

    def _brought_before(self, bad: BadCase) -> bool:
        """Whether a finding of the base build explains it, and the case fails there too."""
        many = self._examined["base", bad.bucket] >= MAX_HARMLESS
        return (many or self._looks_like(bad, self.on_base)) and self._fails_there(bad)

    def _shaky(self, bad: BadCase, seconds: float) -> bool:
        """Whether a flaky finding explains it, or may, as they are many; and the case does not fail each time."""
        if not (self._examined["flaky", bad.bucket] >= MAX_HARMLESS or self._looks_like(bad, self.unstable)):
            return False
        if seconds <= 0 and self._examined["new", bad.bucket]:  # it is red already
            self.unexamined += 1
            return True
        if self._stands(bad):
            return False
        self.flaky[bad.target] += 1
        return True

    def _looks_like(self, bad: BadCase, findings: Mapping[str, Finding]) -> bool:
        features = features_of(self._examiners[bad.target].space, bad.case)
        return any(explains(finding, bad, features) for finding in findings.values())

    def _fails_there(self, bad: BadCase) -> bool:
        """Whether the case itself fails like that on the base build."""
        if self._base is None or not self._is_on_base(bad.target):
            return False
        with self._base.lease(bad.target) as worker:
            verdict = worker.run([bad.case], bad.target, self._examiners[bad.target].options)[-1]
        return holds(verdict, bad.key)

    def _stands(self, bad: BadCase) -> bool:
        """Whether the case itself fails in each of three fresh workers."""
        examiner = self._examiners[bad.target]
        runs = (rerun(examiner.pool, (bad.case,), bad.target, examiner.options) for _ in range(TRIES))
        return all(holds(verdict, bad.key) for verdict in runs)

    def _examine(self, bad: BadCase, seconds: float) -> None:
        examiner = self._examiners[bad.target]
        self._emit(events.FindingConfirming(bad.target, *bad.key, examiner.space.label(bad.case)))
        began = last = time.monotonic()

        def progress(tries: int, case: Case) -> None:
            nonlocal last
            if time.monotonic() - last >= MINIMIZING_EVERY:
                last = time.monotonic()
                self._emit(events.FindingMinimizing(bad.target, *bad.key, tries, examiner.space.label(case)))

        finding = examiner.examine(bad, seconds, progress)
        late = time.monotonic() - began >= seconds
        if finding is None:
            self._examined["flaky", bad.bucket] += 1
            self.flaky[bad.target] += 1
            self._emit(events.FlakySeen(bad.target, bad.case, bad.verdict))
            return
        entry = self.entry_of(finding)
        if entry is not None:
            self._examined["known", bad.bucket] += 1
            self.seen[entry.name] += 1
            reduced = self._reduced.setdefault(bad.bucket, [])
            if all(earlier.id != finding.id for earlier in reduced):
                reduced.append(finding)
            if entry.deadly:
                # Not what the smallest case needs: the reducer may have gone over from another crash to this one.
                here = features_of(examiner.space, bad.case)
                learned = replace(finding, scope=tuple(sorted(here)), faces=())
                self._learned.setdefault(entry.name, []).append(learned)
            if entry.fingerprint not in self.known:
                self.known[entry.fingerprint or finding.id] = finding
                self._emit(events.FindingReported(finding, "known", "", entry.to_json()))
            return
        if late and not finding.minimal and (entry := self._failing_alike(bad)) is not None:
            self._leave(bad, entry)
            return
        if self._met_before(finding, examiner):
            self._examined["new", bad.bucket] += 1
            return
        status = self._status(finding, examiner)
        if status and finding.case != bad.case and self._is_red(bad, status):
            # The reducer went over from one defect to another, which is not red.
            whole = examiner.examine(bad, 0.0, progress)
            if whole is not None:
                finding, status = whole, self._status(whole, examiner)
        self._examined[status.partition(" ")[0] or "new", bad.bucket] += 1
        self._report(finding, status)

    def _met_before(self, finding: Finding, examiner: Examiner) -> bool:
        """Whether it is a new one that was reported already, or another face of one."""
        for earlier in list(self.new.values()):
            if finding.id in earlier.ids:
                self._learn(earlier, widened(earlier, finding))
                return True
        for earlier in list(self.new.values()):
            reason = examiner.same_defect(earlier, finding)
            if reason:
                self._learn(earlier, add_face(self._state, promoted(earlier, finding), face_of(finding, reason)))
                said = f"{finding.target}: finding {earlier.id} also shows on {finding.label}: {reason}"
                self._emit(events.Note(said))
                return True
        return False

    def _learn(self, earlier: Finding, finding: Finding) -> None:
        self.new[earlier.id] = finding
        if self._turns_red(finding) and not self._turns_red(earlier):
            path = write_finding(self._state, finding, self._render)
            self._emit(events.FindingReported(finding, "new", str(path)))

    def _status(self, finding: Finding, examiner: Examiner) -> str:
        """Why it is not red: "flaky" or "base"; empty for one that is this change's."""
        times = self._times(examiner.pool, finding, examiner) if finding.reproduces == "always" else 0
        if times < TRIES:
            return f"flaky {times}/{TRIES}" if finding.reproduces == "always" else "flaky"
        return "base" if self._fails_on_base(finding, examiner) else ""

    def _is_red(self, bad: BadCase, status: str) -> bool:
        """Whether the case itself is, of which nothing that is red was left."""
        return not self._fails_there(bad) if status == "base" else self._stands(bad)

    def _report(self, finding: Finding, status: str) -> None:
        flaky, _, times = status.partition(" ")
        group = {"flaky": self.unstable, "base": self.on_base, "": self.new}[flaky]
        if times:
            finding = replace(finding, reproduces=f"sometimes {times}")
        for earlier in list(group.values()):
            if finding.id in earlier.ids:
                group[earlier.id] = widened(earlier, finding)
                return
        group[finding.id] = finding
        path = write_finding(self._state, finding, self._render)
        told = flaky or ("new" if self._turns_red(finding) else "robustness")
        self._emit(events.FindingReported(finding, told, str(path)))

    def _fails_on_base(self, finding: Finding, examiner: Examiner) -> bool:
        if self._base is None or not self._is_on_base(finding.target):
            return False
        return self._times(self._base, finding, examiner) > 0

    def _is_on_base(self, target: str) -> bool:
        """Whether the base build has the target, and code of its own for it. Told once of each that it has not."""
        if target not in self._comparable:
            why = self._not_comparable(target)
            self._comparable[target] = not why
            if why:
                self._emit(events.Note(f"{target} {why}"))
        return self._comparable[target]

    def _not_comparable(self, target: str) -> str:
        assert self._base is not None
        try:
            there = self._base.describe(target).origin
        except EnvironmentProblem as problem:
            return f"is not on the base build, so what fails is new: {problem.message}"
        here = self._examiners[target].info.origin
        if here == there and here.startswith("/"):
            return f"is {here.partition(' ')[0]} on the base build too, so what fails is told as new: see --base-path"
        return ""

    def _times(self, pool: Pool, finding: Finding, examiner: Examiner) -> int:
        """In how many of three fresh workers the finding, as it was reduced, fails."""
        options = replace(examiner.options, fence=replace(examiner.options.fence, own=finding.own))
        if examiner.options.fence.hard == ():
            options = examiner.options  # nothing was fenced when it was seen
        cases = (*finding.sequence, finding.case)
        return sum(holds(rerun(pool, cases, finding.target, options), finding.raw) for _ in range(TRIES))

    def _closed(self, bad: BadCase) -> bool:
        """Whether so many of its kind were examined that this one is not. One that lacks what every known finding of
        the kind needs can be none of those, however many they were."""
        bucket = bad.bucket
        if self._examined["new", bucket] >= MAX_EXAMINED:
            self._tell_closed(bucket, f"{MAX_EXAMINED} of them were new")
            return True
        if self._examined["known", bucket] < MAX_KNOWN:
            return False
        self._tell_closed(bucket, f"{MAX_KNOWN} of them were known")
        features = features_of(self._examiners[bad.target].space, bad.case)
        return any(features.issuperset(finding.features) for finding in self._reduced.get(bucket, ()))

    def _tell_closed(self, bucket: Bucket, why: str) -> None:
        if bucket not in self._told:
            self._told.add(bucket)
            said = f"{why}; more like them are not examined"
            self._emit(events.Note(f"{bucket.target}: {bucket.check} {bucket.symptom}: {said}"))
