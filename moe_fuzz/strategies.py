"""What Hypothesis draws: rounds, that is, cases that share a config. And the pairwise grid that runs before it.

Free of torch. Sizes come from the space's dictionary or from between two of its numbers (sizes.py), never uniformly at
random; presets mix with free draws; the faults of a round are a small random subset (swarm), so that one loud fault
does not drown the others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import combinations, repeat, starmap

from hypothesis import strategies as st

from moe_fuzz import sequences
from moe_fuzz.case import Case, Scalar, in_mode
from moe_fuzz.contract import TargetInfo
from moe_fuzz.ops.space import Axis, FaultPlace, Means, Space
from moe_fuzz.sequences import make_step
from moe_fuzz.sizes import loosened

MAX_ROUND = 16
MAX_PARTS = 24  # of a round whose config is compiled
LARGE = 20  # one round in so many is a case that only larger means than the ordinary ones afford
LARGE_ROWS = 8  # and of the grid's rows that ask for a large size, one in so many
SEAMS = 4  # one case in so many has tokens behind a seam, where its config has one; one config in so many is made to
SOMETIMES = 6  # one case in so many has a fault beside those that were drawn, where its space has such
#: Where elements lie changes no value: none of these hides another fault, or is hidden by one.
LAYOUTS = ("noncontiguous", "transposed", "misaligned")
_APART = (*LAYOUTS, "int32_boundary", "far_columns")  # a tensor has one of them
_SEEDS = st.integers(0, 2**62 - 1)


@st.composite
def configs(draw: st.DrawFn, space: Space, info: TargetInfo) -> dict[str, Scalar]:
    """A config of the op inside the target's capabilities; one in four is that of a model people serve."""
    axes = space.axes(info)
    config: dict[str, Scalar] = {axis.name: draw(st.sampled_from((*axis.values, *axis.often))) for axis in axes}
    chosen = random.Random(repr((draw(_SEEDS), config)))  # of both: Hypothesis draws a seed again and again
    for axis in axes:
        if axis.between is not None:
            config[axis.name] = loosened(int(config[axis.name]), axis.values, chosen, axis.between)
    shape = draw(st.integers(0, 7))
    if shape < 2:
        allowed = {axis.name: axis.values for axis in axes}
        preset = space.presets[draw(st.sampled_from(sorted(space.presets)))]
        whole = draw(st.booleans())  # or its sizes alone: a branch for one shape may be wrong in one flag only
        config |= {n: v for n, v in preset.items() if v in allowed[n] and (whole or n in space.sizes)}
    elif shape == 2:  # every expert is taken
        small = [e for axis in axes if axis.name == "experts" for e in axis.values if int(e) <= 32]
        if small and "top_k" in config:
            config["experts"] = config["top_k"] = draw(st.sampled_from(small))
            config["top_k"] = min(int(config["top_k"]), info.capabilities.max_top_k)
    elif shape == 3:  # all flags plain, which fast paths ask for: drawn one by one, they hardly ever are
        config |= {axis.name: axis.values[0] for axis in axes if axis.name not in (*space.sizes, "dtype")}
    return space.complete(config, info)


@st.composite
def rounds(
    draw: st.DrawFn, space: Space, info: TargetInfo, device: str, most: int | None = None
) -> tuple[Case, ...]:  # fmt: skip
    """Cases of one config: 1 to 16 that share a few faults and the kind of run, each with rows, padding and faults of
    its own; at most 4 where they have several steps. Where a config must be compiled, which takes as long as hundreds
    of cases, 1 to `most` times so many, each time with other faults and another kind of run.

    Hypothesis chooses the config, and what the first of them share; a seed of its gives the rest. A choice of
    Hypothesis costs a hundred times one of `random`, and no case is ever shrunk by it.
    """
    if most is None:
        most = MAX_PARTS if device != "cpu" and info.capabilities.compiles else 1
    config = draw(configs(space, info))
    kinds = sequences.runs(space.modes(info), device)
    drawn = draw(st.sampled_from(kinds))
    # Hypothesis repeats and recombines what it has drawn. A seed from the whole round makes each repeat a new one.
    seed = draw(_SEEDS)
    means, rare = Means.of(info, device), random.Random(repr((seed, config, drawn)))
    if not rare.randrange(LARGE):
        means = means.more
        crowded = getattr(space, "crowded", None)
        if crowded is not None and means.times > 1 and rare.randrange(2):
            config = crowded(config, _allowed(space, info), info, means, rare)
    seamed = getattr(space, "seamed", None)
    if seamed is not None and not rare.randrange(SEAMS):
        config = seamed(config, _allowed(space, info), rare)
    config = _roomy(space, config, means)
    run, tokens = sequences.afforded(space, info, _in_mode(config, drawn, info), drawn, kinds, means)
    places = _places(space, info, _in_mode(config, run, info), run)
    swarm = draw(_swarms(tuple(places))) if places else []
    chosen = random.Random(repr((seed, config, swarm, run)))
    cases = _alike(space, info, means, config, run, tokens, swarm, chosen)
    for _ in range(chosen.randrange(most)):
        drawn = chosen.choice(kinds)
        run, tokens = sequences.afforded(space, info, _in_mode(config, drawn, info), drawn, kinds, means)
        places = _places(space, info, _in_mode(config, run, info), run)
        drawn_places = chosen.sample(_weighed(places), min(chosen.randint(0, 4), len(places)))
        swarm = list(dict.fromkeys(drawn_places))
        cases += _alike(space, info, means, config, run, tokens, swarm, chosen)
    return tuple(cases)


# Both are small in memory. Kept, for Hypothesis keeps each list strategy too, 1,024 of them for each thread; and drawn
# as numbers, for it notes in words from what it drew, each time it draws again.
@lru_cache(maxsize=512)
def _swarms(places: tuple[FaultPlace, ...]) -> st.SearchStrategy[list[FaultPlace]]:
    """At most 4 of the places."""
    # The tensor first, then the fault: else a tensor with few faults of its own would hardly ever have one.
    by_tensor = [[at for at, place in enumerate(places) if place.tensor == tensor for _ in range(place.often)]
                 for tensor in dict.fromkeys(place.tensor for place in places)]
    one = st.sampled_from(by_tensor).flatmap(st.sampled_from)
    return st.lists(one, max_size=4, unique=True).map(lambda chosen: [places[at] for at in chosen])


def _weighed(places: Sequence[FaultPlace]) -> list[FaultPlace]:
    return [place for place in places for _ in range(place.often)]


def _allowed(space: Space, info: TargetInfo) -> dict[str, Sequence[Scalar]]:
    return {axis.name: axis.values for axis in space.axes(info)}


def _roomy(space: Space, config: dict[str, Scalar], means: Means) -> dict[str, Scalar]:
    roomy = getattr(space, "roomy", None)
    return config if roomy is None else roomy(config, means)


def _in_mode(config: Mapping[str, Scalar], run: str, info: TargetInfo) -> dict[str, Scalar]:
    return in_mode(config, run, info.capabilities.max_processes)


def _places(space: Space, info: TargetInfo, config: Mapping[str, Scalar], run: str) -> list[FaultPlace]:
    return [place for place in space.places_for(config, info) if sequences.mode(run) in place.modes]


def _alike(
    space: Space, info: TargetInfo, means: Means, config: Mapping[str, Scalar], run: str, tokens: Sequence[int],
    swarm: Sequence[FaultPlace], chosen: random.Random,
) -> list[Case]:  # fmt: skip
    """Cases of a config and a kind of run, with faults of `swarm`. tokens: as in `sequences.plan`."""
    config = _in_mode(config, run, info)
    large = sequences.large(space, info, config, run, tokens, means)
    means = means if large else replace(means, times=1)  # or else it would be the steps that are many
    most = 1 if large else MAX_ROUND if run == sequences.SINGLE else MAX_ROUND // 4
    taken = space.places_for(config, info)
    if run != sequences.SINGLE:
        plans = [sequences.plan(run, large or tokens, swarm, chosen) for _ in range(chosen.randint(1, most))]
        return [
            sequences.make(space, config, run, plan, chosen.getrandbits(62), info.name, means, taken)
            for plan in plans
        ]
    cases, seams = [], getattr(space, "seams", None)
    for _ in range(chosen.randint(1, most)):
        faults = sequences.some(swarm, 3, chosen)
        fitting = sequences.within(tokens, faults)
        behind = seams(config, fitting) if seams is not None else ()
        size = (chosen.choice(large) if large else chosen.choice(behind) if behind and not chosen.randrange(SEAMS)
                else sequences.some_size(fitting, chosen))  # fmt: skip
        size = loosened(size, tokens, chosen)
        padding, seed = chosen.randint(0, 6), chosen.getrandbits(62)
        faults += _beside(space, config, taken, faults, size, random.Random(repr((seed, "beside"))))
        faults += _layouts(taken, faults, random.Random(repr(seed)))
        cases.append(make_case(space, config, size, padding, faults, seed, info.name))
    return cases


def _beside(
    space: Space, config: Mapping[str, Scalar], taken: Sequence[FaultPlace], faults: Sequence[sequences.LaidFault],
    tokens: int, chosen: random.Random,
) -> tuple[sequences.LaidFault, ...]:  # fmt: skip
    """What a case has besides the faults that were drawn: in one case of SOMETIMES, one of the whole, or of its rows,
    of some where others have faults of their own; three times in four, what those that it has need to show anything.
    """
    found: list[sequences.LaidFault] = []
    sometimes = getattr(space, "sometimes", None)
    if sometimes is not None and not chosen.randrange(SOMETIMES):
        name = chosen.choice(sometimes(config))
        places = [one for one in taken if one.fault == name and (tokens > 1 or not one.on_rows)]
        where = 2 if any(place.on_rows for place, _ in faults) else 3
        found = [(chosen.choice(_weighed(places)), where)] if places else []
    of: Mapping[str, str] = getattr(space, "beside", {})
    wanted = {of[place.fault] for place, _ in (*faults, *found) if place.fault in of}
    hit = {place.tensor for place, _ in faults}
    needed = [place for place in taken if place.fault in wanted and place.tensor not in hit]
    return (*found, *((place, 0) for place in needed if chosen.randrange(4)))


def _layouts(
    taken: Sequence[FaultPlace], faults: Sequence[sequences.LaidFault], chosen: random.Random
) -> tuple[sequences.LaidFault, ...]:  # fmt: skip
    """In one case of four, a layout of its own for every second tensor.

    A stride that is forgotten is forgotten of one tensor, on one path. Of ten tensors each would be strided in one case
    of a hundred, were it drawn as other faults are; and then the path would have to be that one as well.
    """
    if chosen.randrange(4):
        return ()
    apart = {place.tensor for place, _ in faults if place.fault in _APART}
    of_tensor: dict[str, list[FaultPlace]] = {}
    for place in taken:
        if place.fault in LAYOUTS and place.tensor not in apart:
            of_tensor.setdefault(place.tensor, []).append(place)
    return tuple((chosen.choice(places), 0) for places in of_tensor.values() if chosen.randrange(2))


def make_case(
    space: Space,
    config: Mapping[str, Scalar],
    tokens: int,
    padding: int,
    faults: Sequence[tuple[FaultPlace, int]],
    seed: int,
    target: str,
) -> Case:
    """A case from small choices: `padding`, as in `sequences.padding_rows`, and each fault with where it is laid."""
    chosen = random.Random(seed)  # positions only; the values come from the case's generator
    return Case(space.op, config, (make_step(tokens, padding, faults, chosen),), seed, target=target)


def grid(space: Space, info: TargetInfo, device: str, seed: int) -> Iterator[Case]:
    """Cases that cover every pair of values of the dictionary: config axes, token counts, padding and faults.

    Greedy and deterministic; the pairs covered first are those of the first cases, so a prefix is worth most.
    """
    chosen = random.Random(seed)
    places: list[Scalar] = ["", *(f"{p.fault}@{p.tensor}" for p in space.places)]
    runs = sequences.runs(space.modes(info), device)
    own = space.axes(info)
    owed: list[FaultPlace] = []  # that a config had no room for: the next that has, and no fault of its own, takes one
    rows = Axis("padding rows", (0, 1, 2, 4, 5)), Axis("where", (0, 1, 2, 3)), Axis("size", sequences.SIZES)
    asked_large = 0
    for row in pairwise([*own, Axis("fault", places), *rows, Axis("run", runs)], chosen):
        config = space.complete({axis.name: row[axis.name] for axis in own}, info)
        asked = next((place for place in space.places if f"{place.fault}@{place.tensor}" == row["fault"]), None)
        drawn = str(row["run"])
        if asked is not None and sequences.mode(drawn) not in asked.modes and sequences.SINGLE in runs:
            drawn = sequences.SINGLE  # else the fault would be laid nowhere, and its pairs be met by no case
        asked_large += row["size"] == "large"
        means = Means.of(info, device)
        if row["size"] == "large" and not asked_large % LARGE_ROWS:
            means = means.more
        config = _roomy(space, config, means)
        run, tokens = sequences.afforded(space, info, _in_mode(config, drawn, info), drawn, runs, means)
        config = _in_mode(config, run, info)
        taken = space.places_for(config, info)
        wanted = [asked, *owed] if asked is not None else owed
        place = next((one for one in wanted if one in taken and sequences.mode(run) in one.modes), None)
        owed = [one for one in dict.fromkeys(wanted) if one is not place]
        faults = [(place, int(row["where"]))] if place else []
        fitting = sequences.within(tokens, faults)
        if place is None or place.max_rows is None:
            fitting = sequences.large(space, info, config, run, tokens, means) or fitting
        if run != sequences.SINGLE:
            plan = sequences.random_plan(fitting, faults, int(row["padding rows"]), str(row["size"]), chosen)
            yield sequences.make(space, config, run, plan, chosen.getrandbits(62), info.name, means, taken)
            continue
        count = sequences.some_size(fitting, chosen, str(row["size"]))
        yield make_case(space, config, count, int(row["padding rows"]), faults, chosen.getrandbits(62), info.name)


def pairwise(axes: Sequence[Axis], chosen: random.Random) -> Iterator[dict[str, Scalar]]:
    """Rows that together hold every pair of values of every two axes at least once. But for one pair that is missing, a
    row has values that the fewest rows have had, so that no fault waits for the others."""
    missing: dict[tuple[int, int], set[tuple[int, int]]] = {
        (a, b): {(i, j) for i in range(len(axes[a].values)) for j in range(len(axes[b].values))}
        for a, b in combinations(range(len(axes)), 2)
    }
    left = sum(map(len, missing.values()))
    used = [[0] * len(axis.values) for axis in axes]
    # The same pairs once more as bits: of each value, the values of later axes that it was not with. A row is counted
    # eight times where it is taken once, and there are hundreds of pairs of axes.
    bits: list[list[int]] = []
    for axis in axes:
        first = sum(map(len, bits))
        bits.append([1 << first + at for at in range(len(axis.values))])
    later = [[sum(map(sum, bits[a + 1 :]))] * len(axis.values) for a, axis in enumerate(axes)]
    while left:
        rare = [[i for i, count in enumerate(counts) if count == fewest] for counts in used for fewest in [min(counts)]]
        sizes = list(map(len, missing.values()))
        pair = list(missing)[sizes.index(max(sizes))]
        candidates = list(missing[pair])
        best: list[int] = []
        best_bits, best_gain = 0, -1
        for _ in range(8):
            row = [chosen.choice(values) for values in rare]
            keys = list(starmap(chosen.random, repeat((), len(candidates))))
            row[pair[0]], row[pair[1]] = candidates[keys.index(min(keys))]
            row_bits = sum(of[i] for of, i in zip(bits, row, strict=True))
            gain = sum((of[i] & row_bits).bit_count() for of, i in zip(later, row, strict=True))
            if gain > best_gain:
                best, best_bits, best_gain = row, row_bits, gain
        for (a, b), todo in missing.items():
            todo.discard((best[a], best[b]))
        for of, i in zip(later, best, strict=True):
            of[i] &= ~best_bits
        for counts, value in zip(used, best, strict=True):
            counts[value] += 1
        left -= best_gain
        yield {axis.name: axis.values[i] for axis, i in zip(axes, best, strict=True)}
