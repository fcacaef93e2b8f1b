"""How the script of a finding tells that something is wrong: by its child process, a rule, one place, or two calls."""

from __future__ import annotations

from dataclasses import dataclass

from moe_fuzz.campaign.finding import Finding
from moe_fuzz.errors import CaseError
from moe_fuzz.ops import get_space
from moe_fuzz.verdict import CRASH, HANG, OOM, Violation

#: check -> what the script must see of the child process that makes the calls; all others return a sentence
_SHOWS = {CRASH: "died", "fence": "died", HANG: "hung", "oom": "memory", OOM: "memory", "error": "raised",
          "capture": "uncapturable"}  # fmt: skip
#: Checks that `general.py.j2` can judge for any op, beside what a child process shows.
_GENERAL = ("canary", "determinism", "structure", "written")
#: By family. Rules of a plan, whatever its order, are in align.py.j2, bytes in nvfp4.py.j2.
_RULES = {"align": ("slots", "experts", "fill", "inverse", "order", "stable")}
_BYTES = {"nvfp4": ("scale", "codes", "finite", "padding")}
#: Pairs of calls: relations.py.j2, and for blocks nvfp4.py.j2.
_RELATIONS = {
    "experts": ("determinism", "isolation", "batch_invariance", "relabel", "shards", "scaling", "backends"),
    "layer": ("isolation",),
    "nvfp4": ("determinism", "isolation", "batch_invariance"),
}


@dataclass(frozen=True)
class Judged:
    """Names that the templates ask for."""

    family: str
    shows: str  # "died", …; "wrong": what judge() returns is the bug
    template: str
    plan: bool = False  # by a rule of the family's own, of a plan
    bytes: bool = False
    relation: bool = False


def judged(finding: Finding) -> Judged:
    """CaseError where a script would make the calls, find nothing wrong, and call the bug fixed."""
    family, check = get_space(finding.case.op).family, finding.check
    shows = _SHOWS.get(check, "wrong")
    if family == "routing":
        return Judged(family, shows, "judge.py.j2")
    found = next(iter(finding.verdict.violations), None)
    plan, its_bytes, relation = (check in checks.get(family, ()) for checks in (_RULES, _BYTES, _RELATIONS))
    if shows == "wrong" and check not in _GENERAL and not plan and not (relation and found) and not _known(found):
        raise CaseError("", f"a script cannot judge {check} of {finding.case.op} yet", "use `moe-fuzz replay`")
    return Judged(family, shows, "general.py.j2", plan, its_bytes, relation)


def _known(found: Violation | None) -> bool:
    """Whether it is known what is right at the place that was found wrong."""
    if found is None:
        return False
    if found.check == "finite" and found.symptom.endswith("-lost"):
        return True
    return found.allowed is not None or bool(found.right) or (found.check == "ids" and found.tensor == "ids")
