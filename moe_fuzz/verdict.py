"""What one run of a case gave. Free of torch: the worker writes it, the parent reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

PASS = "pass"
VIOLATION = "violation"  # a check says no
CRASH = "crash"  # the worker died: a signal, an abort, an exit
HANG = "hang"  # the worker was killed at its deadline
OOM = "out-of-memory"
REJECTED = "rejected"  # outside the declared capabilities, refused with a clear error; UNJUDGED, UNINTERPRETED
BROKEN = "broken"  # an error of our own: nothing is known of the target; `detail` has the traceback and the case
FLAKY = "flaky"  # seen once, not seen again in fresh workers
KINDS = (PASS, VIOLATION, CRASH, HANG, OOM, REJECTED, BROKEN, FLAKY)
BAD = (VIOLATION, CRASH, HANG, OOM)
NOT_RUN = (REJECTED, OOM, BROKEN)  # the target itself was not put to the test


#: Where `Verdict.stats` counts steps with padding: PADDING/kind of run/what, of PADDING_COUNTS.
PADDING = "padding"
PADDING_COUNTS = ("steps", "nan", "inf", "tokens")  # with padding; with NaN in it; with Inf in it; its rows in all

#: Where `Verdict.stats` counts a case that is rejected for another reason: its answer was not judged in time.
UNJUDGED = "unjudged"

#: Where it counts one that is rejected for what Triton's interpreter has not: UNINTERPRETED/what.
UNINTERPRETED = "uninterpreted"


@dataclass(frozen=True)
class Violation:
    """One rule broken, at its first bad coordinate."""

    check: str  # the check that says so; `crash` and `hang` for a worker that died
    symptom: str  # a short slug that stays the same while the case shrinks: "duplicate-id", "logits:right:read"
    message: str  # one sentence for a person
    tensor: str = ""
    where: tuple[int, ...] = ()  # first bad coordinate
    expected: str = ""
    got: str = ""
    budget: float | None = None  # error over bound, where there is a bound, and the error is a number
    site: str = ""  # file:line of the kernel or launcher, where it is known
    step: int | None = None  # of the case, where it has several
    after: str = ""  # what an earlier stage of the target had decided before a later one broke
    allowed: tuple[float, float] | None = None  # the least and the greatest right value at `where`, if that is known
    #: what the target had decided before, for which `allowed` or `right` hold: of a layer the experts of row where[0],
    #: of a quantizer the scale byte of the block, and the column of the code
    chosen: tuple[int, ...] = ()
    right: tuple[int, ...] = ()  # of a code: all that are right there

    def __post_init__(self) -> None:
        if self.budget is not None and not math.isfinite(self.budget):  # of NaN, say: JSON has no word for it
            object.__setattr__(self, "budget", None)

    @property
    def story(self) -> str:
        """The message, with what went before it."""
        return f"{self.after}: {self.message}" if self.after else self.message


_TUPLES = ("where", "allowed", "chosen", "right")


@dataclass(frozen=True)
class Verdict:
    kind: str
    violations: tuple[Violation, ...] = ()
    seconds: float = 0.0  # wall time of the case in the worker
    fence_seconds: float = 0.0  # of it: making, filling, protecting and checking fences
    compile_seconds: float = 0.0  # of it: compiling, and loading what was compiled
    parity: bool = False  # the case counts as parity: binding proved that wrong outputs are rejected on it
    budget: float = 0.0  # largest error over bound that was still accepted
    detail: str = ""  # for a person: a traceback's tail, the reason of a rejection
    stats: Mapping[str, float] = field(default_factory=dict)
    spent: bool = False  # the process that gave it must not run another case

    @property
    def bad(self) -> bool:
        return self.kind in BAD

    @property
    def key(self) -> tuple[str, str]:
        """(check, symptom) of the first violation: what must stay the same while a case is minimized."""
        if self.violations:
            return self.violations[0].check, self.violations[0].symptom
        return ("oom", "out-of-memory") if self.kind == OOM else (self.kind, "")

    def only(self, *keep: Violation) -> Verdict:
        return replace(self, violations=keep)

    def to_json(self) -> dict[str, Any]:
        # Not dataclasses.asdict, which copies every value: a worker writes a verdict a case.
        return vars(self) | {"violations": [dict(vars(v)) for v in self.violations], "stats": dict(self.stats)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verdict:
        violations = tuple(Violation(**v | {name: tuple(v[name]) for name in _TUPLES if v.get(name) is not None})
                           for v in data["violations"])  # fmt: skip
        return cls(**{**data, "violations": violations})
