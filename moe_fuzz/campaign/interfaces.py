"""What a campaign asks of its neighbours, and no more: workers that run cases, and somebody who draws them.

The pool of this host is one implementation (worker/pool.py); many hosts need another with the same face.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.labels import Labels
from moe_fuzz.ops.space import FaultPlace, Means
from moe_fuzz.options import RunOptions
from moe_fuzz.restriction import RestrictedSpace, Restriction
from moe_fuzz.verdict import Verdict

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Cases = tuple[Case, ...]


@dataclass(frozen=True)
class Sanitized:
    """What a sanitizer says of cases that break memory."""

    site: str  # `routing.py:118 in _kernel`: the line of the kernel; empty where none was named
    lines: tuple[str, ...]  # what each tool gave, for a person; why it gave nothing, where it did


Sanitize = Callable[[Cases, str], Sanitized]  # (cases, oldest first; target)
OnVerdict = Callable[[int, Verdict, Cases], None]


class Worker(Protocol):
    def run(
        self, cases: Sequence[Case], target: str, options: RunOptions, on_verdict: OnVerdict | None = None
    ) -> list[Verdict]:
        """Blocks until every case has its verdict, or until `options.until`, when what is at hand is given up. The last
        argument of `on_verdict`: what this very process ran before."""
        ...


class Pool(Protocol):
    @property
    def environment(self) -> Mapping[str, Any]: ...  # versions on the workers' side

    def versions(self, target: str) -> Mapping[str, Any]: ...  # the same for this target, which may run elsewhere

    def describe(self, target: str) -> TargetInfo: ...

    def lease(self, target: str = "") -> AbstractContextManager[Worker]: ...

    def fresh(self, environment: Mapping[str, str] | None = None) -> AbstractContextManager[Worker]: ...


class Space(Protocol):
    """The part of an op's space (ops/space.py) that reducing, naming and sorting of findings need."""

    @property
    def op(self) -> str: ...

    @property
    def tensors(self) -> Mapping[str, str]: ...  # name -> "input" | "output"

    @property
    def places(self) -> tuple[FaultPlace, ...]: ...

    @property
    def sizes(self) -> tuple[str, ...]: ...  # the config fields that are sizes

    def cost(self, case: Case, means: Means) -> float: ...  # seconds, of a kernel that is like ours

    def modes(self, info: TargetInfo) -> Sequence[str]: ...  # of runs that the target can be given here

    def validate(self, case: Case) -> None: ...

    def features(self, case: Case) -> frozenset[str]: ...

    def simplify(self, case: Case) -> Iterator[Case]: ...

    def sharpen(self, case: Case) -> Iterator[Case]: ...

    def label_axes(self, case: Case) -> Mapping[str, Labels]: ...

    def keep(self, case: Case, axis: str, labels: Labels) -> Case: ...

    def label(self, case: Case) -> str: ...


@dataclass(frozen=True)
class Sources:
    """Where cases come from."""

    space: Callable[[str], Space]  # op -> its space
    rounds: Callable[[Any, TargetInfo, str], SearchStrategy[Cases]]
    grid: Callable[[Any, TargetInfo, str, int], Iterator[Case]]

    def restricted(self, restriction: Restriction) -> Sources:
        """The same, cut down: what a source draws against its space is dropped."""
        if not restriction:
            return self

        def rounds(space: Any, info: TargetInfo, device: str) -> SearchStrategy[Cases]:
            drawn = self.rounds(RestrictedSpace(space, restriction), info, device)
            return drawn.map(lambda cases: tuple(case for case in cases if restriction.allows(case)))

        def grid(space: Any, info: TargetInfo, device: str, seed: int) -> Iterator[Case]:
            return filter(restriction.allows, self.grid(RestrictedSpace(space, restriction), info, device, seed))

        return Sources(self.space, rounds, grid)


def own_sources() -> Sources:
    """moe-fuzz's own spaces and strategies."""
    from moe_fuzz import ops, strategies

    return Sources(ops.get_space, strategies.rounds, strategies.grid)
