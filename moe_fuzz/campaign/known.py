"""What a reported finding explains, and how it learns to explain more: the rules that campaigns and gates share."""

from __future__ import annotations

from dataclasses import replace

from moe_fuzz.campaign.badcase import BadCase
from moe_fuzz.campaign.finding import Finding


def explains(finding: Finding, bad: BadCase, features: frozenset[str]) -> bool:
    """Whether a reported finding says it all: same failure, and the case has every feature the finding needs.

    features: all of the case's (finding.features_of). Whether a culprit ran before the case cannot be told from here,
    so a finding that needs one explains nothing.
    """
    here = not (bad.bucket.site and finding.site) or bad.bucket.site == finding.site
    same = here and finding.target == bad.target and bad.key in finding.symptoms
    return same and not finding.sequence and any(map(features.issuperset, finding.scopes))


def promoted(known: Finding, finding: Finding) -> Finding:
    """`known` after `finding` was taken for it: of class contract, if either breaks what was promised."""
    if known.finding_class == "contract" or finding.finding_class != "contract":
        return known
    return replace(known, finding_class=finding.finding_class, clause=finding.clause)


def widened(known: Finding, finding: Finding) -> Finding:
    """`known` after the same defect was met by another way: what that case lacked, the defect does not need."""

    def common(scope: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(scope) & set(finding.scope)))

    if finding.id == known.id:
        return replace(promoted(known, finding), scope=common(known.scope))
    faces = (replace(face, scope=common(face.scope)) if face.id == finding.id else face for face in known.faces)
    return replace(known, faces=tuple(faces))
