"""The ledger: the findings a project knows of, each with the issue that tracks it. A gate tolerates them.

    [[known]]
    fingerprint = "709fbec7a7"                    # the finding's id, and/or a predicate:
    target = "topk_softmax@vllm"                  #   `*` and `?` stand for anything, as in file names
    check = "finite"
    symptom = "nan on an undefined row"           #   optional
    also = ["weights off"]                        #   optional: other checks and symptoms of the same defect
    features = ["fault:nan_rows"]                 #   optional: what a case has to have
    tracker = "vllm#39391"                        # mandatory: an issue's address, project#number, or KEY-number
    owner = "@somebody"                           # mandatory
    case = "mfz1:…"                               # the case, or the sequence, that shows it: every gate runs it
    reproduces = "always"                         # or "sometimes"
    expires = 2027-06-30                          # optional: from that day on the gate is red
    versions = { vllm = "<0.34", torch = ">=2.9" }   # optional: where it is in force
    arch = ["sm90"]                               # optional: GPUs where it is in force; "cpu" for none
    note = "for a person"

Optional too: `raw`, what a worker says of it where that is not what the finding says (a crash, before the fence that it
ran into is named); `quarantine`, that it takes its process down, so that cases like it run in a process of their own
(so it is for the checks crash, hang and oom); `fence`, as of the command line.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from moe_fuzz.campaign.badcase import BadCase
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.interfaces import Cases
from moe_fuzz.case import targets_of
from moe_fuzz.contract import TargetInfo
from moe_fuzz.verdict import Verdict

FILE = "moe-fuzz-ledger.toml"  # beside pyproject.toml, where nothing else is said
DEADLY = ("crash", "hang", "oom")  # checks whose findings take their process down
_ORIGIN = re.compile(r"(?P<name>[A-Za-z][\w.-]*) (?P<version>\d[\w.+!]*)")  # how a target's origin begins


@dataclass(frozen=True)
class Entry:
    """One known finding. `name` is what a person calls it: its fingerprint, or its place in the file."""

    name: str
    tracker: str
    owner: str
    fingerprint: str = ""
    target: str = ""
    check: str = ""
    symptom: str = ""
    also: tuple[tuple[str, str], ...] = ()
    features: tuple[str, ...] = ()
    cases: Cases = ()  # the last one shows it, after the others ran in the same process
    reproduces: str = "always"
    expires: datetime.date | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    arch: tuple[str, ...] = ()
    raw: tuple[str, str] | None = None
    quarantine: bool | None = None
    fence: str = "torch"
    note: str = ""

    @property
    def deadly(self) -> bool:
        """Whether it takes its process down."""
        if self.quarantine is not None:
            return self.quarantine
        return self.check in DEADLY or (self.raw is not None and self.raw[0] in DEADLY)

    @property
    def alone(self) -> bool:
        """Whether its cases run in a process that runs nothing else: what takes it down, or needs what ran before."""
        return self.deadly or len(self.cases) > 1 or self.fence != "torch"

    @property
    def covers_cases(self) -> bool:
        """Whether it says which cases of the plan are its own, so that these are kept apart."""
        return self.deadly and bool(self.check) and len(self.cases) <= 1

    @property
    def always(self) -> bool:
        return self.reproduces == "always"

    def cases_for(self, target: str) -> Cases:
        named = zip(self.cases, targets_of(self.cases, target), strict=True)
        return tuple(replace(case, target=name) for case, name in named)

    @property
    def pattern(self) -> str:
        """The targets it is of. Where none is named, the one its case was found on."""
        return self.target or (self.cases[-1].target if self.cases else "*")

    def is_of(self, target: str) -> bool:
        """Whether it is about this target."""
        return fnmatchcase(target, self.pattern)

    def concerns(self, target: str) -> bool:
        """Whether it is about this target, and its case is one of the target's op."""
        return self.is_of(target) and all(case.op == target.partition("@")[0] for case in self.cases[-1:])

    def expired(self, today: datetime.date) -> bool:
        return self.expires is not None and today >= self.expires

    def absent(self, info: TargetInfo, versions: Mapping[str, Any], arch: str) -> str:
        """Why it is not in force for this target here; empty if it is. What cannot be told counts as in force."""
        if self.arch and arch and arch not in self.arch:
            return f"it is for {', '.join(self.arch)}, and this is {arch}"
        found = _versions(info, versions)
        for name, specifier in self.versions.items():
            version = _version(found.get(name.lower(), ""))
            if version is not None and not SpecifierSet(specifier).contains(version, prereleases=True):
                return f"it is for {name} {specifier}, and this is {version}"
        return ""

    def unheard_of(self, info: TargetInfo, versions: Mapping[str, Any]) -> frozenset[str]:
        """The packages of `versions` that nothing is known of where this target runs."""
        found = _versions(info, versions)
        return frozenset(name for name in self.versions if name.lower() not in found)

    def shows(self, verdict: Verdict) -> bool:
        """Whether a verdict on its case is the failure it tells of."""
        seen = [(v.check, v.symptom) for v in verdict.violations]
        if verdict.bad and not seen:
            seen = [verdict.key]
        if self.raw is not None and self.raw in seen:
            return True
        if not self.check:
            return verdict.bad
        return any(self._alike(*pair) for pair in seen)

    def explains(self, bad: BadCase, features: frozenset[str]) -> bool:
        """Whether a bad case of a shared worker is no news. Deadly entries explain only what runs on their account."""
        if not self.check or self.alone or not self.is_of(bad.target):
            return False
        return self.shows(bad.verdict.only(*bad.verdict.violations[:1])) and features.issuperset(self.features)

    def is_finding(self, finding: Finding) -> bool:
        """Whether a confirmed finding is this one: by its fingerprint, or by the predicate."""
        if self.fingerprint and self.fingerprint in finding.ids:
            return True
        return (
            bool(self.check) and self.is_of(finding.target) and self._alike(finding.check, finding.symptom)
            and set(finding.features).issuperset(self.features)
        )  # fmt: skip

    def _alike(self, check: str, symptom: str) -> bool:
        ways = ((self.check, self.symptom or "*"), *self.also)
        return any(fnmatchcase(check, one) and fnmatchcase(symptom, other) for one, other in ways)

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self)} | {"expires": str(self.expires or "")}
        data |= {"versions": dict(self.versions), "cases": [case.inline() for case in self.cases]}
        return data


def strays(entries: Iterable[Entry], targets: Iterable[str]) -> tuple[Entry, ...]:
    """Those that are of none of these targets."""
    names = tuple(targets)
    return tuple(entry for entry in entries if not any(map(entry.concerns, names)))


def _versions(info: TargetInfo, versions: Mapping[str, Any]) -> dict[str, str]:
    found = {name.lower(): str(version) for name, version in versions.items()}
    origin = _ORIGIN.match(info.origin)
    if origin:
        found[origin["name"].lower()] = origin["version"]
    return found


def _version(text: str) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:
        return None
