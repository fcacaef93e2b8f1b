"""A bad verdict on its way to becoming a finding, as it lies in `pending/`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from moe_fuzz.campaign.confirm import Key
from moe_fuzz.campaign.finding import place
from moe_fuzz.campaign.interfaces import Cases
from moe_fuzz.case import Case
from moe_fuzz.verdict import Verdict


class Bucket(NamedTuple):
    """What bad verdicts are told apart by before anything else is known of them."""

    target: str
    check: str
    symptom: str
    site: str  # file and function, where they are known


@dataclass(frozen=True)
class BadCase:
    """A case, its bad verdict, and what the same process had run before (oldest first)."""

    target: str
    case: Case
    verdict: Verdict
    history: Cases = ()

    @property
    def key(self) -> Key:
        return self.verdict.key

    @property
    def bucket(self) -> Bucket:
        site = self.verdict.violations[0].site if self.verdict.violations else ""
        return Bucket(self.target, *self.key, place(site))

    def each(self) -> Iterator[BadCase]:
        """This bad case, once for each of its violations, with that one first."""
        found = self.verdict.violations
        for at, violation in enumerate(found):
            rest = (*found[:at], *found[at + 1 :])
            yield replace(self, verdict=self.verdict.only(violation, *rest))
        if not found:
            yield self

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"target": self.target, "case": self.case.to_json(), "verdict": self.verdict.to_json()}
        return data | {"history": [case.to_json() for case in self.history]}

    @classmethod
    def from_json(cls, data: Any) -> BadCase:
        """Raises KeyError, TypeError, ValueError or CaseError if `data` is not a bad case's."""
        verdict = Verdict.from_json(data["verdict"])
        if not verdict.bad:
            raise ValueError(f"a verdict {verdict.kind!r} is not bad")
        history = tuple(Case.from_json(case) for case in data["history"])
        return cls(str(data["target"]), Case.from_json(data["case"]), verdict, history)
