"""The plan of a gate: all its cases, in order, before the first of them runs.

It is a function of the version, the seed, the number of cases a target has, and the targets (what they say they take,
on this kind of device): nothing is read from the state directory, and the number of workers has
no part in it. What a target is given does not depend on which other targets there are. A gate that time cuts begins
rounds in this order, and judges none behind the first that it did not end, so two of them are prefixes of one list.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from moe_fuzz._version import __version__
from moe_fuzz.campaign.drive import Enough, derive_seed, drive
from moe_fuzz.campaign.finding import features_of
from moe_fuzz.campaign.gate.ledger import Entry
from moe_fuzz.campaign.interfaces import Cases, Sources, Space
from moe_fuzz.campaign.plan import GRID_SHARE, ROUND, share
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import UsageError
from moe_fuzz.worker.protocol import provider_of

PHASES = ("ledger", "corpus", "grid", "generate")
#: Rounds of a target in a row. A worker that goes from one provider to another starts a new process, which on a GPU
#: costs a second or more.
IN_A_ROW = {"cpu": 1, "cuda": 8}
#: On a GPU every config of the grid is compiled for one case, which takes seconds, and the twenty or forty cases of a
#: generated round share one. So half of the rounds in a row are the grid's, and not all of the first ones: of 13
#: targets of our own nothing but the grid would run within ten minutes, at a tenth of the rate.
OF_THE_GRID = IN_A_ROW["cuda"] // 2
MIN_EXAMPLES = 16  # of Hypothesis, whose first rounds are its simplest
QUARANTINED = 16  # cases of the plan that run for an entry of the ledger which takes its process down; the rest do not


@dataclass(frozen=True)
class Profile:
    """A named plan: cases for each target, on a CPU and on a GPU, the time that cuts it, and the floor: the cases of
    each target below which a gate cut by time counts as not having run.

    A reduction is bounded by tries, so that two gates end in the same fingerprint on machines of unlike speed; by time
    only where the whole gate is."""

    name: str
    seconds: float
    tries: int  # of a reduction
    cases: Mapping[str, int]
    floor: Mapping[str, int]
    help: str


#: `seconds` leave room, within two and ten minutes, for workers to start and for a last case to end.
PROFILES = {
    profile.name: profile
    for profile in (
        Profile("quick", 100.0, 150, {"cpu": 48, "cuda": 512}, {"cpu": 12, "cuda": 64}, "at most 2 minutes"),
        Profile("default", 540.0, 400, {"cpu": 256, "cuda": 4096}, {"cpu": 48, "cuda": 512}, "at most 10 minutes"),
        Profile("deep", 7200.0, 2000, {"cpu": 2048, "cuda": 16384}, {"cpu": 256, "cuda": 4096}, "at most 2 hours"),
    )
}


@dataclass(frozen=True)
class Round:
    """Cases that one worker runs, one after the other. `entry`: whose cases they are (phase "ledger"), or on whose
    account they run in a worker of their own."""

    order: int
    phase: str  # of PHASES
    target: str
    cases: Cases
    entry: Entry | None = None
    alone: bool = False  # in a fresh worker


@dataclass(frozen=True)
class FixedPlan:
    seed: int
    rounds: tuple[Round, ...]
    digest: str  # 10 hexadecimal digits: the same for the same list of cases, whatever the ledger says of them
    held_back: int = 0  # cases that do not run, since they would only take down one more process: see QUARANTINED

    @property
    def cases(self) -> int:
        return sum(len(part.cases) for part in self.rounds if part.phase != "ledger")

    def cases_of(self, phase: str) -> int:
        return sum(len(part.cases) for part in self.rounds if part.phase == phase)


def fixed_plan(
    targets: Sequence[tuple[TargetInfo, Space]], sources: Sources, device: str, seed: int, quotas: Mapping[str, int],
    corpus: Cases = (), entries: Mapping[str, Sequence[Entry]] | None = None,
) -> FixedPlan:  # fmt: skip
    """quotas: target -> its cases of grid and generation together. corpus: cases of any op, run on each target of it
    that takes them. entries: target -> those of the ledger that are in force for it."""
    in_force = entries or {}
    held_back = 0
    order = itertools.count()
    rounds: list[Round] = []
    for info, _ in targets:
        for entry in in_force.get(info.name, ()):
            if entry.cases:
                rounds.append(Round(next(order), "ledger", info.name, entry.cases_for(info.name), entry, entry.alone))
    drawn = [
        (name, part)
        for phase in _phases(targets, sources, device, seed, quotas, corpus)
        for name, part in _in_turn(phase, IN_A_ROW[device])
    ]
    lines = (f"{phase} {portable(target)} {bare(case)}\n" for (phase, target), cases in drawn for case in cases)
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()[:10]
    spaces = {info.name: space for info, space in targets}
    alone: dict[str, int] = {}
    for (phase, target), cases in drawn:
        together: list[Case] = []
        for case in cases:
            keeper = _quarantined(in_force.get(target, ()), case, spaces[target])
            if keeper is None:
                together.append(case)
                continue
            alone[keeper.name] = alone.get(keeper.name, 0) + 1
            if alone[keeper.name] > QUARANTINED:
                held_back += 1
            else:
                rounds.append(Round(next(order), phase, target, (case,), keeper, alone=True))
        if together:
            rounds.append(Round(next(order), phase, target, tuple(together)))
    return FixedPlan(seed, tuple(rounds), digest, held_back)


def portable(target: str) -> str:
    """A target's name without the folder of its file, which is another one in each checkout."""
    op, _, source = target.partition("@")
    return f"{op}@{source.rpartition('/')[2]}"


def bare(case: Case) -> str:
    """The digest of a case, whoever is under test and wherever that lies."""
    return replace(case, target="").digest


def quotas(targets: Sequence[str], cases: int | None, each: int) -> dict[str, int]:
    """How many cases each target has: `cases` among all of them, or `each`."""
    return share(cases, targets) if cases is not None and targets else dict.fromkeys(targets, each)


_T = TypeVar("_T")
_Key = tuple[str, str]  # (phase, target)
_Row = tuple[str, Iterator[tuple[_Key, Cases]]]  # a target, some of its rounds


def _phases(
    targets: Sequence[tuple[TargetInfo, Space]], sources: Sources, device: str, seed: int, quotas: Mapping[str, int],
    corpus: Cases,
) -> Iterator[list[_Row]]:  # fmt: skip
    yield [(info.name, _keyed("corpus", info, _rounds(_of_target(corpus, info, space)))) for info, space in targets]
    grids, generated = [], []
    for info, space in targets:
        quota = quotas[info.name]

        def root(phase: str, info: TargetInfo = info) -> int:
            return derive_seed(seed, __version__, portable(info.name), phase)

        grid = tuple(itertools.islice(sources.grid(space, info, device, root("grid")), quota // GRID_SHARE))
        grids.append((info.name, _keyed("grid", info, _rounds(grid))))
        drawn = _drawn(sources, space, info, device, root, quota - len(grid))
        generated.append((info.name, _keyed("generate", info, drawn)))
    if device == "cpu":
        yield grids
        yield generated
    else:
        yield [(name, _dealt(grid, rest)) for (name, grid), (_, rest) in zip(grids, generated, strict=True)]


def _keyed(phase: str, info: TargetInfo, rounds: Iterable[Cases]) -> Iterator[tuple[_Key, Cases]]:
    return (((phase, info.name), part) for part in rounds)


def _dealt(grid: Iterator[_T], generated: Iterator[_T]) -> Iterator[_T]:
    """Some of the grid's rounds, then some of the generated ones, then the next of both."""
    while some := [*itertools.islice(grid, OF_THE_GRID),
                   *itertools.islice(generated, IN_A_ROW["cuda"] - OF_THE_GRID)]:  # fmt: skip
        yield from some


def _drawn(
    sources: Sources, space: Space, info: TargetInfo, device: str, root: Callable[[str], int], count: int
) -> list[Cases]:
    """Rounds of `count` cases as Hypothesis draws them, no case twice; fewer where the space has no more."""
    found: list[Cases] = []
    seen: set[str] = set()

    def take(cases: Cases) -> None:
        fresh = {case.digest: case for case in cases if case.digest not in seen}
        kept = tuple(fresh.values())[: count - len(seen)]
        seen.update(case.digest for case in kept)
        if kept:
            found.append(kept)
        if len(seen) >= count:
            raise Enough

    rounds = sources.rounds(space, info, device)
    for number in itertools.count():
        before = len(seen)
        if before >= count:
            break
        drive(rounds, root(f"generate {number}"), max(MIN_EXAMPLES, count // ROUND), take)
        if len(seen) == before:
            break  # a space so small that there is nothing new in it
    return found


def _rounds(cases: Cases) -> list[Cases]:
    return [cases[at : at + ROUND] for at in range(0, len(cases), ROUND)]


def _of_target(corpus: Cases, info: TargetInfo, space: Space) -> Cases:
    """Those of the target's op, each once, made its own. Whether it takes them, it says itself: it refuses."""
    own = (replace(case, target=info.name) for case in corpus if case.op == space.op)
    return tuple({case.digest: case for case in own}.values())


def _in_turn(rows: list[_Row], in_a_row: int) -> Iterator[tuple[_Key, Cases]]:
    """Some rounds of each, then the next ones of each: a prefix is fair to all of them. Those of a provider follow each
    other."""
    waiting = sorted(rows, key=lambda row: provider_of(row[0]))
    while waiting:
        for row in list(waiting):
            parts = list(itertools.islice(row[1], in_a_row))
            yield from parts
            if not parts:
                waiting.remove(row)


def _quarantined(entries: Sequence[Entry], case: Case, space: Space) -> Entry | None:
    candidates = [entry for entry in entries if entry.covers_cases]
    if not candidates:
        return None
    features = features_of(space, case)
    return next((entry for entry in candidates if features.issuperset(entry.features)), None)


def read_quota(cases: int | None, targets: Sequence[str]) -> None:
    """Raises UsageError where `cases` are too few for every target to have one."""
    if cases is not None and cases < len(targets):
        raise UsageError(f"{cases} cases are too few for {len(targets)} targets: each has to run at least one",
                         f"--cases {len(targets)} or more, or name fewer targets")  # fmt: skip
