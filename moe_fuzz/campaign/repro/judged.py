"""How the script of a finding tells that something is wrong: by its child process, a rule, one place, or two calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_fuzz.campaign.finding import Finding
from moe_fuzz.errors import CaseError
from moe_fuzz.ops import get_space
from moe_fuzz.verdict import CRASH, HANG, OOM, Violation

#: check -> what the script must see of the child process that makes the calls; all others return a sentence
_SHOWS = {CRASH: "died", "fence": "died", HANG: "hung", "oom": "memory", OOM: "memory", "error": "raised",
          "capture": "uncapturable"}  # fmt: skip
#: Checks that `general.py.j2` can judge for any op, beside what a child process shows.
_GENERAL = ("canary", "determinism", "replay", "structure", "written")
#: By family. Rules of a plan, whatever its order, are in align.py.j2, bytes in nvfp4.py.j2, ranks in allreduce.py.j2.
_RULES = {"align": ("count", "slots", "experts", "fill", "inverse", "order", "stable")}
_BYTES = {"nvfp4": ("scale", "codes", "finite", "padding")}
_GROUP = {"allreduce": ("ranks", "exact", "residual", "bound", "pads", "tail", "isolation", "batch_invariance",
                        "backends")}  # fmt: skip
#: Pairs of calls: relations.py.j2, and for blocks nvfp4.py.j2.
_RELATIONS = {
    "experts": ("determinism", "isolation", "batch_invariance", "relabel", "shards", "scaling", "backends"),
    "layer": ("isolation",),
    "nvfp4": ("determinism", "isolation", "batch_invariance", "replay"),
    "allreduce": ("isolation", "batch_invariance", "backends"),
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
    group: bool = False  # by what all ranks of an all-reduce have got


def judged(finding: Finding, contract: Mapping[str, Any]) -> Judged:
    """contract: that of the target. CaseError where a script would make the calls, find nothing wrong, and call the bug
    fixed."""
    family, check = get_space(finding.case.op).family, finding.check
    shows = _SHOWS.get(check, "wrong")
    if family == "routing":
        return Judged(family, shows, "judge.py.j2")
    found = next(iter(finding.verdict.violations), None)
    kinds = (_RULES, _BYTES, _RELATIONS, _GROUP)
    by_bits = contract["deterministic"] and contract["batch_invariant"]
    if family == "allreduce" and check == "backends" and not by_bits:  # any of half a dozen rules may be broken
        raise CaseError("", "a script compares backends by their bits, which may differ", "use `moe-fuzz replay`")
    plan, its_bytes, relation, group = (check in checks.get(family, ()) for checks in kinds)
    can = check in _GENERAL or plan or group or (relation and found) or _known(found)
    if shows == "wrong" and not can:
        raise CaseError("", f"a script cannot judge {check} of {finding.case.op} yet", "use `moe-fuzz replay`")
    return Judged(family, shows, "general.py.j2", plan, its_bytes, relation, group)


def _known(found: Violation | None) -> bool:
    """Whether it is known what is right at the place that was found wrong."""
    if found is None:
        return False
    if found.check == "finite" and found.symptom.endswith("-lost"):
        return True
    return found.allowed is not None or bool(found.right) or (found.check == "ids" and found.tensor == "ids")
