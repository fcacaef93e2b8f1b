"""The plan of a campaign: what runs, in which pieces, from which seeds. The number of workers has no part in it.

A piece is a unit: a slice of the pairwise grid, or a shard of generation (a run of Hypothesis from its own seed).
One driver runs a unit from start to end, so the feedback inside a shard is the same in every run.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from moe_fuzz._version import __version__
from moe_fuzz.campaign.interfaces import Cases, Space
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import EnvironmentProblem, UsageError
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.restriction import Restriction

GRID_SHARE = 4  # the grid takes at most a quarter of the budget, and so does the corpus
CORPUS_LIMIT = 512  # cases of the corpus where the budget is time, for each target
GRID_SLICE = 32  # cases in a unit of the grid
PLAN = 2  # of `units`, which says what a unit is by its number
GRID_LIMIT = 2048  # cases of the grid where the budget is time
ROUND = 8  # cases of the grid in a round


@dataclass(frozen=True)
class Settings:
    """What the user asked for. `cases` and `seconds` bound the campaign; with neither it runs until interrupted."""

    targets: tuple[str, ...]
    cases: int | None
    seconds: float | None
    seed: int | None
    checks: tuple[str, ...] | None
    device: str
    workers: int
    deadline: float = 10.0
    first_deadline: float = 60.0  # for compiling and loading, which do not count against `deadline`
    minimize_seconds: float = 30.0  # for each finding
    max_findings: int | None = None  # stop after this many new ones
    shard_cases: int = 256
    restriction: Restriction = field(default_factory=Restriction)
    own: str = "torch"  # which memory of the target's own is fenced: see FenceOptions.own
    notes: tuple[str, ...] = ()  # for the header

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(dict.fromkeys(self.targets)))
        if not self.targets:
            raise UsageError("there is nothing to test: no target was given", "see `moe-fuzz list targets`")
        for name in ("cases", "seconds", "max_findings"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be more than 0, not {value}")
        for name in ("workers", "deadline", "first_deadline", "shard_cases"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be more than 0, not {getattr(self, name)}")

    def options(self) -> RunOptions:
        """How workers run the cases. Where the checks are named and `fence` is not among them, nothing is fenced."""
        fenced = self.checks is None or "fence" in self.checks
        fence = FenceOptions(own=self.own) if fenced else FenceOptions(hard=(), readonly=(), own="off")
        return RunOptions(self.checks, fence, self.deadline, self.first_deadline)

    def key(self) -> dict[str, Any]:
        """What an interrupted campaign must have in common with this one to be gone on with."""
        return {
            "version": __version__,
            "targets": sorted(self.targets),
            "cases": self.cases,
            "seconds": self.seconds,
            "checks": None if self.checks is None else sorted(self.checks),
            "device": self.device,
            "shard_cases": self.shard_cases,
            "plan": PLAN,
            "restriction": self.restriction.to_json(),
            "own": self.own,
        }


@dataclass(frozen=True)
class Unit:
    """A piece of the plan. `order` is its place in it."""

    order: int
    phase: str  # "corpus" | "grid" | "generate"
    target: str
    index: int  # among the units of its phase and target
    budget: int  # cases
    cases: Cases = ()  # of the corpus and the grid

    @property
    def line(self) -> str:
        """The row of units it belongs to; `index` counts inside it."""
        return f"{self.phase}/{self.target}"


def not_here(space: Space, info: TargetInfo, device: str) -> EnvironmentProblem | None:
    """Why a target has no cases on this machine, whatever is asked for; None if it has some."""
    if not info.capabilities.devices:
        return EnvironmentProblem(f"it does not run on this machine: {info.origin}", "see `moe-fuzz doctor`")
    if device not in info.capabilities.devices:
        where = " or ".join(info.capabilities.devices)
        return EnvironmentProblem(f"it runs on {where}, and this is a campaign on {device}",
                                  f"--device {info.capabilities.devices[0]}, where there is one")  # fmt: skip
    if not space.modes(info):
        return EnvironmentProblem("each of its ranks needs a device of its own, and there are not two here",
                                  "run it on a machine with two GPUs, or with more of them in CUDA_VISIBLE_DEVICES")
    return None


def nothing_left(refusal: str) -> EnvironmentProblem:
    """The error for a target for which a restriction leaves no cases."""
    return EnvironmentProblem(f"there is nothing to run: {refusal}", "widen --mode, --preset, --faults or --only")


def share(total: int, names: Sequence[str]) -> dict[str, int]:
    """Splits `total` as evenly as can be; the first ones get what is left over."""
    each, over = divmod(total, len(names))
    return {name: each + (at < over) for at, name in enumerate(names)}


def corpus_limit(settings: Settings) -> int:
    """How many cases of the corpus a target replays."""
    if settings.cases is None:
        return CORPUS_LIMIT
    return settings.cases // len(settings.targets) // GRID_SHARE


def units(
    settings: Settings, targets: Sequence[str], grid: Callable[[str], Iterator[Case]],
    corpus: Mapping[str, Cases] = MappingProxyType({}), over: Callable[[str], bool] = lambda phase: False,
    done: Callable[[Unit], bool] = lambda unit: False,
) -> Iterator[Unit]:  # fmt: skip
    """All units in order: corpus, grid, then generation; the targets take turns. Endless if only time bounds the
    campaign. corpus: what of it is replayed, at most `corpus_limit` for each target. over: whether the time of a phase
    is up, of which the rest is not drawn then: generation has as many cases more. done: in an earlier run, whose
    units come again."""
    quotas: Mapping[str, int | None] = dict.fromkeys(targets)
    if settings.cases is not None:
        quotas = share(settings.cases, targets)
    order = itertools.count()
    replayed = {target: corpus.get(target, ()) for target in targets}
    handed = Counter[str]()
    for unit in _in_turn("corpus", order, replayed, over, done):
        handed[unit.target] += unit.budget
        yield unit
    # Drawn as they are run, where time is all there is: of a dozen targets a whole grid takes a while to draw.
    grids = {target: itertools.islice(grid(target), GRID_LIMIT if quota is None else quota // GRID_SHARE)
             for target, quota in quotas.items()}  # fmt: skip
    for unit in _in_turn("grid", order, grids, over, done):
        handed[unit.target] += unit.budget
        yield unit
    left = {target: None if quota is None else quota - handed[target] for target, quota in quotas.items()}
    # The first are small where there are many targets, so that each has its turn before the time is up.
    first = min(settings.shard_cases, max(GRID_SLICE, settings.shard_cases // len(settings.targets)))
    for index in itertools.count():
        budgets = {target: _shard(first, settings.shard_cases, rest, index) for target, rest in left.items()}
        if not any(budgets.values()):
            return
        for target, budget in budgets.items():
            if budget:
                yield Unit(next(order), "generate", target, index, budget)


def _in_turn(
    phase: str, order: Iterator[int], cases: Mapping[str, Iterable[Case]], over: Callable[[str], bool],
    done: Callable[[Unit], bool],
) -> Iterator[Unit]:  # fmt: skip
    left = {target: iter(each) for target, each in cases.items()}
    for index in itertools.count():
        for target in tuple(left):
            if over(phase) and not done(Unit(0, phase, target, index, 0)):
                del left[target]
                continue
            part = tuple(itertools.islice(left[target], GRID_SLICE))
            if part:
                yield Unit(next(order), phase, target, index, len(part), part)
            else:
                del left[target]
        if not left:
            return


def _shard(first: int, size: int, total: int | None, index: int) -> int:
    """The cases of a row's shard `index`, when the row has `total` in all. first: of the first shard."""
    before, size = (first + size * (index - 1), size) if index else (0, first)
    return size if total is None else max(0, min(size, total - before))
