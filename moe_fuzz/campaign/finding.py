"""A finding: a confirmed, minimized violation, and the fingerprint by which it is known again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from moe_fuzz.campaign.interfaces import Cases, Space
from moe_fuzz.case import Case, Step, inline_sequence
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.verdict import Verdict

_LINE = re.compile(r":\d+(?=$|[ ,:])")


@dataclass(frozen=True)
class Face:
    """Another smallest case of what is taken for the same defect: nobody but a person can tell, so it is told."""

    id: str  # the fingerprint it would have had as a finding
    case: Case
    features: tuple[str, ...]
    scope: tuple[str, ...]
    label: str
    reason: str  # why it is taken for the same

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self)} | {"case": self.case.to_json()}
        return data | {"features": list(self.features), "scope": list(self.scope)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Face:
        """Raises KeyError, TypeError, ValueError or CaseError if `data` is not a face's."""
        lists = {name: tuple(data[name]) for name in ("features", "scope")}
        return cls(**{**data, **lists, "case": Case.from_json(data["case"])})


@dataclass(frozen=True)
class Finding:
    """`case` fails in a fresh worker; if `sequence` is not empty, only after those cases ran there before it."""

    id: str
    target: str
    check: str
    symptom: str
    message: str
    finding_class: str  # contract.FINDING_CLASSES
    clause: str  # what the target's project promises, for the class `contract`
    case: Case
    verdict: Verdict
    raw: tuple[str, str]  # (check, symptom) as a worker tells them, before a crash was located
    features: tuple[str, ...]  # what sets the minimal case apart: part of the fingerprint
    scope: tuple[str, ...]  # those of them that every failing case seen had: what a case needs to be explained by it
    site: str = ""  # file and function, where they are known
    sequence: Cases = ()
    reproduces: str = "always"
    label: str = ""
    minimized_from: str = ""
    minimal: bool = True  # False: the budget ended before the reducer did
    explain: tuple[str, ...] = ()  # what was taken away
    env: Mapping[str, str] = field(default_factory=dict)
    first_seen: str = ""  # UTC, ISO 8601
    times_seen: int = 1
    own: str = "torch"  # FenceOptions.own, without which it does not show
    faces: tuple[Face, ...] = ()
    sanitizer: tuple[str, ...] = ()  # what compute-sanitizer said, a line a tool

    @property
    def title(self) -> str:
        return f"{self.target}: {self.check} {self.symptom}"

    @property
    def replay(self) -> str:
        """The line that shows it again, anywhere: the case itself, after those that must run before it."""
        inline = inline_sequence((*self.sequence, self.case)) if self.sequence else self.case.inline()
        return f"moe-fuzz replay {inline}" + (f" --fence {self.own}" if self.own != "torch" else "")

    @property
    def ids(self) -> frozenset[str]:
        """Its own id and those of its faces."""
        return frozenset({self.id, *(face.id for face in self.faces)})

    @property
    def scopes(self) -> tuple[tuple[str, ...], ...]:
        """What a case needs to be explained by it: all of one of these."""
        return (self.scope, *(face.scope for face in self.faces))

    @property
    def symptoms(self) -> frozenset[tuple[str, str]]:
        """(check, symptom) of all that the minimal case shows, as a worker tells them: one defect may show in many."""
        return frozenset({self.raw, *((v.check, v.symptom) for v in self.verdict.violations[1:])})

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data |= {"case": self.case.to_json(), "sequence": [case.to_json() for case in self.sequence]}
        data |= {"verdict": self.verdict.to_json(), "raw": list(self.raw)}
        data |= {"features": list(self.features), "scope": list(self.scope)}
        data |= {"faces": [face.to_json() for face in self.faces]}
        data |= {"sanitizer": list(self.sanitizer)}
        return data | {"explain": list(self.explain), "env": dict(self.env), "replay": self.replay}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Finding:
        """Raises KeyError, TypeError, ValueError or CaseError if `data` is not a finding's."""
        found = {key: value for key, value in data.items() if key != "replay"}
        check, symptom = found["raw"]
        found |= {"case": Case.from_json(found["case"]), "verdict": Verdict.from_json(found["verdict"])}
        found |= {"sequence": tuple(Case.from_json(case) for case in found["sequence"]), "raw": (check, symptom)}
        found |= {name: tuple(found[name]) for name in ("features", "scope", "explain")}
        found |= {"sanitizer": tuple(map(str, found.get("sanitizer", ())))}
        found |= {"faces": tuple(map(Face.from_json, found.get("faces", ())))}
        return cls(**found)


def place(site: str) -> str:
    """A site without its line number, which every edit moves: `routing.py:9 in _kernel` → `routing.py in _kernel`."""
    return _LINE.sub("", site)


def fingerprint(target: str, check: str, symptom: str, site: str, features: Iterable[str]) -> str:
    """10 hexadecimal digits: the same for the same defect, whatever shapes and seeds showed it."""
    op, _, provider = target.partition("@")
    parts = [op, provider, check, symptom, place(site), sorted(set(features))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]


def features_of(space: Space, case: Case) -> frozenset[str]:
    """All classes a case belongs to: its config's, its faults', its mode's."""
    faults = {f"fault:{name}" for name in case.fault_names}
    mode = {f"mode={case.mode}"} if case.mode != "eager" else {"refilled buffers"} if case.refilled else set()
    return space.features(case) | faults | mode


def needed_features(space: Space, case: Case) -> tuple[str, ...]:
    """What sets a minimal case apart from the simplest case of its op: what its defect needs."""
    return tuple(sorted(features_of(space, case) - features_of(space, simplest(space, case))))


def simplest(space: Space, case: Case) -> Case:
    """Where every case ends when nothing holds it: one step of one row, no faults, the simplest config."""
    bare = replace(case, mode="eager", steps=(Step(case.steps[0].rows.first(1) or Labels.range(1)),))
    try:
        space.validate(bare)
    except CaseError:
        bare = case
    for _ in range(10_000):
        simpler = next(iter(space.simplify(bare)), None)
        if simpler is None:
            return bare
        bare = simpler
    raise AssertionError(f"{space.op}: space.simplify does not end at {space.label(bare)}")
