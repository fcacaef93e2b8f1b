"""From one bad case to one finding: confirm, minimize, locate, name. It writes nothing and knows no other finding."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from moe_fuzz._version import __version__
from moe_fuzz.campaign.badcase import BadCase
from moe_fuzz.campaign.confirm import TRIES, Confirmation, Key, confirm, holds, killed, matching, rerun
from moe_fuzz.campaign.faces import same_defect
from moe_fuzz.campaign.finding import Finding, features_of, fingerprint, needed_features, place
from moe_fuzz.campaign.interfaces import Cases, Pool, Sanitize, Sanitized, Space
from moe_fuzz.campaign.locate import is_about_memory, is_device_fault, is_memory_fault, launch_site, locate
from moe_fuzz.campaign.minimize import Minimized
from moe_fuzz.campaign.reduce import reduce
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.ops import get_space
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.verdict import BROKEN, CRASH, HANG, OOM, UNJUDGED, Verdict, Violation


def blame(space: Space, minimized: Minimized, violation: Violation) -> str:
    """Culprit and victim, where they are two: what must run first in the process, and what then fails.

    A write out of bounds that hits nobody's guard is seen later, in another call (flashinfer#3957).
    """
    if minimized.before:
        culprit = minimized.before[-1]
        elsewhere = f" of {culprit.target}" if culprit.target != minimized.case.target else ""
        label = (space if culprit.op == space.op else get_space(culprit.op)).label(culprit)
        return f"; the victim: it passes alone, and fails after its culprit, {label}{elsewhere}"
    before = violation.step or 0
    if not before or not minimized.complete:  # else earlier steps may be there for want of time
        return ""
    steps = ", ".join(map(str, range(before)))
    kind = "replays" if minimized.case.mode != "eager" else "calls"
    return f"; step {before} is the victim: without what step {steps} leaves behind, its {kind} pass"


def with_lines(finding: Finding, said: Sanitized) -> Finding:
    """The finding with what a sanitizer says of it. Its id stays: elsewhere there may be none."""
    first, *others = finding.verdict.violations
    verdict = replace(finding.verdict, violations=(replace(first, site=said.site or first.site), *others))
    return replace(finding, verdict=verdict, sanitizer=said.lines)


@dataclass(frozen=True)
class Examiner:
    """`options` are those under which the bad cases were seen. `tries`: of a reduction, at most. `reduces_flaky`:
    whether a case that fails sometimes is worth reducing, which takes three runs a try."""

    pool: Pool
    info: TargetInfo
    space: Space
    options: RunOptions
    device: str
    tries: int | None = None
    reduces_flaky: bool = True
    sanitize: Sanitize | None = None  # names the line of the kernel, for what is about memory

    def examine(self, bad: BadCase, seconds: float, progress: Callable[[int, Case], None]) -> Finding | None:
        """The finding, or None if the case is not bad again in fresh workers. `seconds` bounds the reducer, of whose
        every try `progress(tries, case)` hears."""
        if killed(bad.verdict):
            shown = self.shown(bad)
            if shown is None:
                return None
            bad = shown
        confirmed = confirm(self.pool, bad.target, bad.case, bad.history, bad.key, self.options)
        if confirmed is None:
            return None
        seconds = seconds if confirmed.always or self.reduces_flaky else 0.0
        minimized, verdict = self._minimize(confirmed, bad.key, seconds, progress)
        said = f"{verdict.kind}: what a worker may have was not enough"
        violation = matching(verdict, bad.key) or Violation(*bad.key, said)
        cases = (*minimized.before, minimized.case)
        if self.device == "cuda" and not violation.site and is_device_fault(bad.key):
            site = launch_site(self.pool, cases, bad.target, self.options, bad.key)
            violation = replace(violation, site=site)
            verdict = replace(verdict, violations=(violation, *verdict.violations[1:]))
        if is_memory_fault(bad.key):
            tries = 1 if confirmed.always else TRIES
            tensors = dict(self.space.tensors)
            violation = locate(self.pool, cases, bad.target, self.options, verdict, bad.key, tensors, tries)
        own = self._needed_fence(cases, bad, confirmed.always)
        others = tuple(v for v in verdict.violations if (v.check, v.symptom) != bad.key)
        finding = self._finding(bad, confirmed, minimized, replace(verdict, violations=(violation, *others)), own)
        if self.sanitize is None or not is_about_memory(violation.check, bad.key):
            return finding
        return with_lines(finding, self.sanitize(cases, bad.target))

    def shown(self, bad: BadCase) -> BadCase | None:
        """What a case whose worker was killed shows in a fresh one; None if nothing. The kill says nothing about it."""
        verdict = rerun(self.pool, (bad.case,), bad.target, self.options)
        return replace(bad, verdict=verdict, history=()) if verdict.bad else None

    def still_fails(self, finding: Finding) -> bool:
        """Whether a finding of an earlier campaign fails today, in fresh workers and under all checks. An answer that
        was not judged does not show that it is gone, nor does a worker that is."""
        tries = 1 if finding.reproduces == "always" else 2 * TRIES
        all_cases = ((*finding.sequence, finding.case), *((face.case,) for face in finding.faces))
        return any(self._fails(cases, finding, tries, doubted=True) for cases in all_cases)

    def same_defect(self, earlier: Finding, new: Finding) -> str:
        """Why a finding is taken for an earlier one: see faces.py. Empty if it is not."""

        def fails(case: Case, finding: Finding) -> bool:
            return self._fails((case,), finding, TRIES)  # even of one that always failed: its smallest case is another

        return same_defect(self.space, earlier, new, fails)

    def _fails(self, cases: Cases, finding: Finding, tries: int, doubted: bool = False) -> bool:
        """doubted: an answer that was not judged counts, too, and none at all."""
        options = replace(self.options, checks=None, fence=FenceOptions(own=finding.own))
        verdicts = (rerun(self.pool, cases, finding.target, options) for _ in range(tries))
        return any(
            holds(verdict, finding.raw)
            or (doubted and (UNJUDGED in verdict.stats or verdict.kind in (CRASH, HANG, OOM, BROKEN)))
            for verdict in verdicts
        )

    def _minimize(
        self, confirmed: Confirmation, key: Key, seconds: float, progress: Callable[[int, Case], None]
    ) -> tuple[Minimized, Verdict]:
        if seconds <= 0:
            return Minimized(confirmed.case, confirmed.sequence, 0, False, ()), confirmed.verdict
        cases = (*confirmed.sequence, confirmed.case)
        return reduce(
            self.pool, self.space, cases, confirmed.case.target, confirmed.verdict, key, self.options, seconds,
            runs=1 if confirmed.always else TRIES, tries=self.tries, progress=progress,
        )  # fmt: skip

    def _class(self, verdict: Verdict, features: tuple[str, ...]) -> tuple[str, str]:
        """Contract, where any of what is broken is promised: a finding stands for all that its verdict holds."""
        first = verdict.violations[0]
        for violation in verdict.violations:
            class_, clause = self.info.classify(violation.check, violation.symptom, features)
            if class_ == "contract":
                return class_, clause if violation.check == first.check else f"{violation.check}: {clause}"
        return self.info.classify(first.check, first.symptom, features)

    def _needed_fence(self, cases: Cases, bad: BadCase, always: bool) -> str:
        """FenceOptions.own for a replay: what everybody has, if the failure shows with it."""
        own = self.options.fence.own
        usual = replace(self.options, fence=replace(self.options.fence, own="torch"))
        if own == "torch" or self.options.fence.hard == ():  # nothing was fenced: it shows without
            return "torch"
        shown = any(holds(rerun(self.pool, cases, bad.target, usual), bad.key) for _ in range(1 if always else TRIES))
        return "torch" if shown else own

    def _finding(
        self, bad: BadCase, confirmed: Confirmation, minimized: Minimized, verdict: Verdict, own: str
    ) -> Finding:
        violation = verdict.violations[0]
        features = needed_features(self.space, minimized.case)
        if minimized.before:
            features = (*features, "after other cases")
        site = place(violation.site)
        before = self.space.label(bad.case)
        class_, clause = self._class(verdict, features)
        return Finding(
            id=fingerprint(bad.target, violation.check, violation.symptom, site, features),
            target=bad.target,
            check=violation.check,
            symptom=violation.symptom,
            message=violation.story + blame(self.space, minimized, violation),
            finding_class=class_,
            clause=clause,
            case=minimized.case,
            verdict=verdict,
            raw=bad.key,
            features=features,
            scope=tuple(sorted(features_of(self.space, bad.case).intersection(features))),
            site=site,
            sequence=minimized.before,
            reproduces=confirmed.reproduces,
            label=self.space.label(minimized.case),
            minimized_from=before if minimized.case != bad.case else "",
            minimal=minimized.complete,
            explain=minimized.explain,
            env=self._environment(),
            own=own,
            first_seen=datetime.now(UTC).isoformat(timespec="seconds"),
        )


    def _environment(self) -> dict[str, str]:
        """Versions for a report, as the workers have them: their interpreter need not be this one."""
        env = {"moe-fuzz": __version__, "target": self.info.name, "origin": self.info.origin, "device": self.device}
        env |= {"platform": platform.platform()}
        return env | {str(name): str(version) for name, version in self.pool.versions(self.info.name).items()}
