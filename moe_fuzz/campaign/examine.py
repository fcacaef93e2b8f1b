"""From one bad case to one finding: confirm, minimize, locate, name. It writes nothing and knows no other finding."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from moe_fuzz._version import __version__
from moe_fuzz.campaign.badcase import BadCase
from moe_fuzz.campaign.confirm import TRIES, Confirmation, Key, confirm, holds, killed, matching, rerun
from moe_fuzz.campaign.finding import Finding, features_of, fingerprint, needed_features, place
from moe_fuzz.campaign.interfaces import Cases, Pool, Space
from moe_fuzz.campaign.locate import is_memory_fault, locate
from moe_fuzz.campaign.minimize import Minimized, Reducer
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.verdict import Verdict, Violation


@dataclass(frozen=True)
class Examiner:
    """`options` are those under which the bad cases were seen."""

    pool: Pool
    info: TargetInfo
    space: Space
    options: RunOptions
    device: str

    def examine(self, bad: BadCase, seconds: float, progress: Callable[[int, Case], None]) -> Finding | None:
        """The finding, or None if the case is not bad again in fresh workers. `seconds` bounds the reducer, of whose
        every try `progress(tries, case)` hears."""
        if killed(bad.verdict):  # which says nothing about the case: what it gives is still to be seen
            verdict = rerun(self.pool, (bad.case,), bad.target, self.options)
            if not verdict.bad:
                return None
            bad = replace(bad, verdict=verdict, history=())
        confirmed = confirm(self.pool, bad.target, bad.case, bad.history, bad.key, self.options)
        if confirmed is None:
            return None
        minimized, verdict = self._minimize(confirmed, bad.key, seconds, progress)
        said = f"{verdict.kind}: what a worker may have was not enough"
        violation = matching(verdict, bad.key) or Violation(*bad.key, said)
        cases = (*minimized.before, minimized.case)
        if is_memory_fault(bad.key):
            tries = 1 if confirmed.always else TRIES
            tensors = dict(self.space.tensors)
            violation = locate(self.pool, cases, bad.target, self.options, verdict, bad.key, tensors, tries)
        others = tuple(v for v in verdict.violations if (v.check, v.symptom) != bad.key)
        return self._finding(bad, confirmed, minimized, replace(verdict, violations=(violation, *others)))

    def still_fails(self, finding: Finding) -> bool:
        """Whether a finding of an earlier campaign fails today, in fresh workers and under all checks."""
        cases = (*finding.sequence, finding.case)
        options = replace(self.options, checks=None, fence=FenceOptions())
        tries = 1 if finding.reproduces == "always" else 2 * TRIES
        return any(holds(rerun(self.pool, cases, finding.target, options), finding.raw) for _ in range(tries))

    def _minimize(
        self, confirmed: Confirmation, key: Key, seconds: float, progress: Callable[[int, Case], None]
    ) -> tuple[Minimized, Verdict]:
        target = confirmed.case.target
        tries = 1 if confirmed.always else TRIES
        verdicts: dict[Cases, Verdict] = {}

        def fails(cases: Cases) -> bool:
            for _ in range(tries):
                verdict = rerun(self.pool, cases, target, self.options)
                if holds(verdict, key):
                    verdicts[cases] = verdict
                    return True
            return False

        nothing = Minimized(confirmed.case, confirmed.sequence, 0, False, ())
        if seconds <= 0:
            return nothing, confirmed.verdict
        minimized = Reducer(self.space, fails, seconds, progress=progress).run(confirmed.case, confirmed.sequence)
        cases = (*minimized.before, minimized.case)
        if cases not in verdicts:
            return minimized, confirmed.verdict
        return minimized, verdicts[cases]

    def _finding(self, bad: BadCase, confirmed: Confirmation, minimized: Minimized, verdict: Verdict) -> Finding:
        violation = verdict.violations[0]
        features = needed_features(self.space, minimized.case)
        if minimized.before:
            features = (*features, "after other cases")
        site = place(violation.site)
        before = self.space.label(bad.case)
        class_, clause = self.info.classify(violation.check, violation.symptom, features)
        return Finding(
            id=fingerprint(bad.target, violation.check, violation.symptom, site, features),
            target=bad.target,
            check=violation.check,
            symptom=violation.symptom,
            message=violation.message,
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
            first_seen=datetime.now(UTC).isoformat(timespec="seconds"),
        )


    def _environment(self) -> dict[str, str]:
        """Versions for a report, as the workers have them: their interpreter need not be this one."""
        env = {"moe-fuzz": __version__, "target": self.info.name, "origin": self.info.origin, "device": self.device}
        env |= {"platform": platform.platform()}
        return env | {str(name): str(version) for name, version in self.pool.versions(self.info.name).items()}
