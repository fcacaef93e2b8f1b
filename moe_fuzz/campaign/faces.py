"""Whether two findings are one defect that ends in two smallest cases: the reducer stops where no single step helps.

What is inside a target cannot be seen, so two findings with the same target, check, symptom and site are taken for one
* if the smallest case of one has all that the other needs. A bad case like that is not examined at all where the other
  finding came first (triage.py); here it came later, or the case gained what it lacked while it was reduced;
* or if each fails with the faults of the other in place of its own: what one needs of the config the other does not
  lack, and the fault is only what sets it off.
The second one is kept as a face of the first: what was taken for one can be seen to be two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from moe_fuzz.campaign.finding import Face, Finding, features_of
from moe_fuzz.campaign.interfaces import Space
from moe_fuzz.case import Case, Fault
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels


def same_defect(space: Space, earlier: Finding, new: Finding, fails: Callable[[Case, Finding], bool]) -> str:
    """Why `new` is taken for `earlier`; empty if it is not. `fails(case, finding)`: a fresh worker runs the case, and
    it fails as the finding does."""
    if not _alike(earlier, new):
        return ""
    if any(map(features_of(space, new.case).issuperset, earlier.scopes)):
        return "the case has all that the finding needs"
    if features_of(space, earlier.case).issuperset(new.scope):
        return f"the finding's own case has all that this one needs: {', '.join(new.scope) or 'nothing special'}"
    if earlier.case.fault_names == new.case.fault_names or not (earlier.case.fault_names and new.case.fault_names):
        return ""
    for one, other in ((new, earlier), (earlier, new)):
        swapped = with_faults_of(space, one.case, other.case)
        if swapped is None or not fails(swapped, one):
            return ""
    return f"each fails with the faults of the other: {_names(earlier)} and {_names(new)}"


def with_faults_of(space: Space, case: Case, other: Case) -> Case | None:
    """The case with the faults of another in place of its own, on the same rows; None where that is no valid case."""
    if len(case.steps) != 1 or len(other.steps) != 1:
        return None
    step = case.steps[0]
    rows = Labels.of(row for fault in step.faults for row in fault.rows) or step.rows
    faults = tuple(Fault(f.name, f.tensor, rows if f.rows else Labels()) for f in other.steps[0].faults)
    flags = {flag: other.config[flag] for flag in _flags(space, other)}
    swapped = case.with_step(0, replace(step, faults=faults)).with_config(**flags)
    try:
        space.validate(swapped)
    except CaseError:
        return None
    return swapped


def face_of(finding: Finding, reason: str) -> Face:
    return Face(finding.id, finding.case, finding.features, finding.scope, finding.label, reason)


def _alike(one: Finding, other: Finding) -> bool:
    same = (one.target, one.check, one.symptom, one.site) == (other.target, other.check, other.symptom, other.site)
    return same and not one.sequence and not other.sequence and one.case.mode == other.case.mode


def _flags(space: Space, case: Case) -> frozenset[str]:
    laid = {(fault.name, fault.tensor) for step in case.steps for fault in step.faults}
    return frozenset(place.needs for place in space.places if place.needs and (place.fault, place.tensor) in laid)


def _names(finding: Finding) -> str:
    return "+".join(finding.case.fault_names)
