"""What each part of a campaign's guidance buys over uniform random cases, in cases until a planted bug is found.

    python benchmarks/guidance.py [--seeds 20] [--cases 800] [--executed 256] [--out FILE]

No kernel runs in the first table. A planted bug's trigger is a predicate on cases, read off its code; it is found by
the first case for which that holds. Each variant of the generator draws one stream of cases a seed and an op, and all
bugs of the op are looked for in it. A part is judged by the variant without it: the ratio of the cases to find, bug by
bug (median of the seeds, a miss counting as all cases), and their geometric mean.

In the second table routers run, in this process: there the score that `target()` climbs on, the largest error over
bound, is known, and the bugs are such that no predicate tells of them but the numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from hypothesis import target as climb_on

from moe_fuzz import sequences, strategies
from moe_fuzz._version import __version__
from moe_fuzz.campaign import lattice
from moe_fuzz.campaign.drive import PLAIN, Enough, derive_seed, drive
from moe_fuzz.case import Case, Scalar, in_mode
from moe_fuzz.contract import Capabilities, Contract, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.ops import get_space
from moe_fuzz.ops.space import Means
from moe_fuzz.strategies import MAX_ROUND

DEVICE = "cpu"
HYPOTHESIS = "hypothesis"  # its own backend
OPS = ("topk_softmax", "grouped_topk", "align")
#: A target that takes whatever the op knows.
CONTRACT = Contract(accepts=("distinct", "minus_one", "num_experts", "garbage"), padding=("distinct", "minus_one"))
INFOS = {
    op: TargetInfo(
        f"{op}@guidance", op, "guidance", "", CONTRACT,
        Capabilities(out=True, alignment=1, max_experts=2048 if op == "align" else 1024, block_sizes=()),
    )
    for op in OPS
}  # fmt: skip


# ---- triggers -------------------------------------------------------------------------------------------------------


def experts(case: Case) -> int:
    return len(case.experts)


def top_k(case: Case) -> int:
    return int(case.config["top_k"])


def tokens(case: Case) -> int:
    return max(step.tokens for step in case.steps)


def has(case: Case, *faults: str) -> bool:
    """A fault of these lies on some row that is a token or not."""
    return bool(set(faults) & set(case.fault_names))


def ragged(case: Case, multiple: int) -> bool:
    return experts(case) % multiple != 0


def odd(case: Case) -> bool:
    return bool(experts(case) & (experts(case) - 1))


def group_size(case: Case) -> int:
    return experts(case) // int(case.config["n_group"])


#: op -> bug -> whether a case shows it
TRIGGERS: Mapping[str, Mapping[str, Callable[[Case], bool]]] = {
    "topk_softmax": {
        "nan_argmax": lambda c: has(c, "nan_rows") and top_k(c) > 1,
        "negative_nan_key": lambda c: has(c, "nan_rows") and odd(c),
        "reads_past_logits": lambda c: ragged(c, 4) and tokens(c) > 0,
        "memset_rounded_up": lambda c: bool(c.config["out"]) and tokens(c) * top_k(c) % 4 != 0,
        "id_left_unwritten": lambda c: bool(c.config["out"]) and top_k(c) % 2 == 1 and tokens(c) > 0,
        "renorm_zero_division": lambda c: bool(c.config["renormalize"]) and has(c, "extreme_bias"),
        "masked_with_zero": lambda c: has(c, "negative_bias") and top_k(c) > 1,
        "branch_128_8": lambda c: (experts(c), top_k(c), c.config["renormalize"]) == (128, 8, False),
        "tail_experts_dropped": lambda c: ragged(c, 32) and experts(c) > 32,
        "reversed_ties": lambda c: has(c, "ties", "zero_rows") and top_k(c) < experts(c),
        "zero_tokens_raises": lambda c: any(step.tokens == 0 for step in c.steps),
        "nan_tile_slow_path": lambda c: has(c, "nan_rows", "partial_nan") and tokens(c) > 1,
        "small_batch_path": lambda c: tokens(c) > 16 and c.mode == "eager",
        "aborts_on_one_token": lambda c: any(step.tokens == 1 for step in c.steps),
        "exits_on_launch_error": lambda c: tokens(c) > 16 and odd(c),
        "null_workspace": lambda c: top_k(c) > 8,
        "int32_row_offset": lambda c: has(c, "int32_boundary"),
        "loads_words": lambda c: has(c, "misaligned") and experts(c) % 4 == 0,
        "stale_row_max": lambda c: len(c.steps) > 1 and has(c, "huge_rows"),
        "padding_mask_mirrored": lambda c: (
            c.mode != "eager" and bool(c.config["is_padding"]) and c.config["padding"] == "minus_one"
            and len({step.padding for step in c.steps}) > 1
        ),
    },
    "grouped_topk": {
        "masked_groups_zero": lambda c: has(c, "negative_bias") and int(c.config["n_group"]) > 1,
        "top2_for_every_rule": lambda c: c.config["group_score"] == "max" and group_size(c) > 1 and grouped(c),
        "groups_before_bias": lambda c: bool(c.config["bias"]) and grouped(c),
        "group_of_one": lambda c: group_size(c) == 1 and c.config["group_score"] == "top2_sum",
        "padded_group_lanes": lambda c: (
            has(c, "negative_bias") and grouped(c) and bool(group_size(c) & (group_size(c) - 1))
        ),
        "last_of_tied_groups": lambda c: has(c, "tied_groups", "ties", "zero_rows") and grouped(c),
        "bits_of_negative_scores": lambda c: has(c, "negative_bias", "extreme_bias"),
        "groups_beyond_eight": lambda c: int(c.config["n_group"]) > 8 and grouped(c),
        "grouped_zero_division": lambda c: bool(c.config["renormalize"]) and has(c, "extreme_bias") and grouped(c),
        "shared_guard_missing": lambda c: int(c.config["n_shared"]) > 0 and grouped(c),
        "unmapped_on_one_path": lambda c: bool(c.config["expert_map"]) and int(c.config["n_group"]) == 1,
        "mapped_in_place": lambda c: has(c, "overlapping_map") and top_k(c) > 1,
        "shared_ids_looked_up": lambda c: bool(c.config["expert_map"]) and int(c.config["n_shared"]) > 0,
        "nan_groups": lambda c: has(c, "nan_rows") and top_k(c) > 1,
    },
    "align": {
        "negative_id_counts": lambda c: has(c, "minus_one_ids"),
        "map_indexed_by_minus_one": lambda c: has(c, "minus_one_ids") and c.config["expert_map"] != "none",
        "id_cut_to_32_bits": lambda c: has(c, "wide_ids") and c.config["ids_dtype"] == "int64",
        "scan_of_1024_threads": lambda c: experts(c) >= 1024 and bool(c.config["out"]),
        "stops_at_first_match": lambda c: (
            tokens(c) > 16 and top_k(c) > 1 and bool(c.config["out"])
            and has(c, "all_to_one", "hot_expert", "duplicate_experts", "zero_rows")
        ),
        "last_warp_not_placed": lambda c: tokens(c) * top_k(c) > 64 and tokens(c) * top_k(c) % 32 != 0,
        "token_for_slot": lambda c: top_k(c) > 1 and tokens(c) > 0,
        "global_expert_ids": lambda c: c.config["expert_map"] in ("shard", "permuted") and tokens(c) > 0,
        "no_slots_raises": lambda c: any(step.tokens == 0 for step in c.steps),
        "full_experts_first": lambda c: tokens(c) > 2 and has(c, "hot_expert", "all_to_one") and experts(c) > 1,
        "fills_whole_vectors": lambda c: bool(c.config["out"]) and int(c.config["block_size"]) % 4 != 0,
        "row_offset_of_32_bits": lambda c: has(c, "int32_boundary"),
        "counts_cleared_once": lambda c: c.mode != "eager" and len(c.steps) > 1,
        "filled_once": lambda c: c.mode != "eager" and len(c.steps) > 2 and has(c, "minus_one_ids", "sentinel_ids"),
    },
}  # fmt: skip


def grouped(case: Case) -> bool:
    return int(case.config["n_group"]) > int(case.config["topk_group"])


# ---- generators -----------------------------------------------------------------------------------------------------

Stream = Callable[[Any, TargetInfo, random.Random], Iterator[Case]]
Rounds = Callable[[Any, TargetInfo, random.Random], Iterator[list[Case]]]


def config_of(
    space: Any, info: TargetInfo, chosen: random.Random, dictionary: bool, presets: bool
) -> dict[str, Scalar]:  # fmt: skip
    """As strategies.configs, without Hypothesis; sizes from the dictionary, or uniformly between its ends."""
    axes = space.axes(info)
    config: dict[str, Scalar] = {axis.name: chosen.choice(list(axis.values)) for axis in axes}
    if not dictionary:
        for axis in axes:
            if axis.name in space.sizes and all(isinstance(value, int) for value in axis.values):
                config[axis.name] = chosen.randint(min(axis.values), max(axis.values))
    shape = chosen.randrange(8) if presets else 7
    if shape < 2:
        allowed = {axis.name: axis.values for axis in axes}
        preset, whole = space.presets[chosen.choice(sorted(space.presets))], chosen.random() < 0.5
        config |= {n: v for n, v in preset.items() if v in allowed[n] and (whole or n in space.sizes)}
    elif shape == 2:
        small = [e for axis in axes if axis.name == "experts" for e in axis.values if int(e) <= 32]
        config["experts"] = config["top_k"] = chosen.choice(small)
    return dict(space.complete(config, info))


def rounds(
    space: Any, info: TargetInfo, chosen: random.Random, *, dictionary: bool = True, presets: bool = True,
    swarm: bool = True, alike: int = MAX_ROUND,
) -> Iterator[list[Case]]:  # fmt: skip
    """As strategies.rounds. swarm: the cases of a round share a few faults, else each has any. alike: cases of a
    config."""
    while True:
        try:
            config = config_of(space, info, chosen, dictionary, presets)
            kinds = sequences.runs(space.modes(info), DEVICE)
            drawn = chosen.choice(kinds)
            run, sizes = sequences.afforded(space, info, in_mode(config, drawn), drawn, kinds, Means.of(info, DEVICE))
            config = in_mode(config, run)
            if not dictionary and run == sequences.SINGLE and sizes:
                sizes = tuple(chosen.randint(0, max(sizes)) for _ in range(8))
            places = [p for p in space.places_for(config, info) if sequences.mode(run) in p.modes]
            few = places
            if swarm:
                tensors = dict.fromkeys(place.tensor for place in places)
                by_tensor = [[place for place in places if place.tensor == name] for name in tensors]
                some = [chosen.choice(chosen.choice(by_tensor)) for _ in range(chosen.randint(0, 4)) if places]
                few = list(dict.fromkeys(some))
            found = []
            for _ in range(chosen.randint(1, alike if run == sequences.SINGLE else max(1, alike // 4))):
                seed = chosen.getrandbits(62)
                if run == sequences.SINGLE:
                    laid = sequences.some(few, 3, chosen)
                    size = sequences.some_size(sizes, chosen) if dictionary else chosen.choice(sizes)
                    case = strategies.make_case(space, config, size, chosen.randint(0, 6), laid, seed, info.name)
                else:
                    plan = sequences.plan(run, sizes, few, chosen)
                    taken = space.places_for(config, info)
                    case = sequences.make(space, config, run, plan, seed, info.name, Means.of(info, DEVICE), taken)
                space.validate(case)
                found.append(case)
        except (CaseError, IndexError, ValueError):
            continue  # a size that uniform draws make and no config can have
        yield found


def flat(found: Iterator[list[Case]]) -> Iterator[Case]:
    for cases in found:
        yield from cases


def drawn_by(backend: str) -> Rounds:
    """strategies.rounds by Hypothesis, a shard after the other."""

    def source(space: Any, info: TargetInfo, chosen: random.Random) -> Iterator[list[Case]]:
        root = chosen.getrandbits(62)
        for shard in range(10_000):
            drawn: list[tuple[Case, ...]] = []
            drive(strategies.rounds(space, info, DEVICE), derive_seed(root, shard), 32, drawn.append, backend)
            yield from map(list, drawn)

    return source


campaign = drawn_by(PLAIN)  # what a campaign draws after its grid


def some_of_each(source: Rounds, most: int) -> Stream:
    """The first few of each round, as the self-test takes them."""
    return lambda space, info, chosen: flat(cases[:most] for cases in source(space, info, chosen))


def with_grid(stream: Stream, share: int) -> Stream:
    """The grid first, for a part of all cases, as a campaign does."""

    def both(space: Any, info: TargetInfo, chosen: random.Random) -> Iterator[Case]:
        drawn = strategies.grid(space, info, DEVICE, chosen.getrandbits(32))
        yield from (case for case, _ in zip(drawn, range(share), strict=False))
        yield from stream(space, info, chosen)

    return both


def novel(source: Rounds, most: int = 2) -> Stream:
    """Feature coverage: of a round, the cases that cover a point of the lattice for the first time; where there are
    none, `most` of them."""

    def filtered(space: Any, info: TargetInfo, chosen: random.Random) -> Iterator[Case]:
        seen: set[lattice.Cell] = set()
        for cases in source(space, info, chosen):
            fresh = []
            for case in cases:
                found = lattice.cells(space, case, 0.0)
                if not found <= seen:
                    fresh.append(case)
                    seen |= found
            yield from fresh or cases[:most]

    return filtered


def variant(**options: Any) -> Stream:
    return lambda space, info, chosen: flat(rounds(space, info, chosen, **options))


#: name -> (what it is, its stream, the variant that it is held against)
VARIANTS: Mapping[str, tuple[str, Callable[[int], Stream], str]] = {
    "uniform": ("sizes uniform, any faults, one case of a config",
                lambda n: variant(dictionary=False, presets=False, swarm=False, alike=1), "uniform"),
    "dictionary": ("sizes from the dictionary", lambda n: variant(presets=False, swarm=False, alike=1), "uniform"),
    "presets": ("and models that people serve", lambda n: variant(swarm=False, alike=1), "dictionary"),
    "alike": ("up to 16 cases of a config", lambda n: variant(swarm=False), "presets"),
    "swarm": ("and these share a few faults", lambda n: variant(), "alike"),
    "swarm of one": ("a few faults, one case of a config", lambda n: variant(alike=1), "presets"),
    "hypothesis": ("drawn by Hypothesis as it is",
                   lambda n: lambda *given: flat(drawn_by(HYPOTHESIS)(*given)), "swarm"),
    "plain": ("drawn by Hypothesis with our backend, as campaigns do",
              lambda n: lambda *given: flat(campaign(*given)), "hypothesis"),
    "grid": ("the pairwise grid first, a quarter of all cases",
             lambda n: with_grid(lambda *given: flat(campaign(*given)), n // 4), "plain"),
    "coverage": ("of a round, what covers something new, else two", lambda n: novel(campaign), "plain"),
    "two of a round": ("of a round, the first two", lambda n: some_of_each(campaign, 2), "plain"),
    "one of a round": ("of a round, the first", lambda n: some_of_each(campaign, 1), "two of a round"),
    "grid and coverage": ("both", lambda n: with_grid(novel(campaign), n // 4), "grid"),
    "grid and two": ("both", lambda n: with_grid(some_of_each(campaign, 2), n // 4), "grid"),
    "grid and one": ("both", lambda n: with_grid(some_of_each(campaign, 1), n // 4), "grid and two"),
}  # fmt: skip


def stream_of(job: tuple[str, str, int, int]) -> tuple[str, str, int, dict[str, int | None]]:
    """One stream: bug -> the number of the case that finds it, None for a miss."""
    name, op, seed, most = job
    space, info = get_space(op), INFOS[op]
    chosen = random.Random(f"{name} {op} {seed}" if name == "uniform" else f"{op} {seed}")
    left = dict(TRIGGERS[op])
    found: dict[str, int | None] = dict.fromkeys(left)
    stream = VARIANTS[name][1](most)(space, info, chosen)
    for number, case in zip(range(1, most + 1), stream, strict=False):
        for bug in [bug for bug, trigger in left.items() if trigger(case)]:
            found[bug] = number
            del left[bug]
        if not left:
            break
    return name, op, seed, found


# ---- with kernels ---------------------------------------------------------------------------------------------------

EXECUTED = (
    ("topk_softmax", "bf16_scores", "selection"),
    ("topk_sigmoid", "sigmoid_in_input_dtype", "weights"),
    ("topk_sigmoid", "bias_taken_back", "weights"),
    ("topk_sigmoid", "saturated_ties", "ids"),
    ("grouped_topk", "grouped_zero_division", "finite"),
    ("nvfp4_quantize", "sixth_by_reciprocal", "scale"),
    ("nvfp4_quantize", "codes_by_two_reciprocals", "codes"),
    ("experts_bf16", "bf16_weights", "statistical"),
    ("experts_bf16", "weights_saturate", "bound"),
    ("experts_bf16", "halves_rounded_away", "exact"),
)
SCORES = ("none", "budget", "imbalance")
UNIFORM, SWARM = "no swarm", "swarm"  # the same bugs by our own rounds, without Hypothesis: shared faults, or any
DRAWN = (UNIFORM, SWARM)
_runner: Any = None


def climb(job: tuple[str, str, str, str, int, int]) -> tuple[str, str, int, int | None]:
    """Cases until the check fires on a planted bug, with a score to climb on."""
    op, bug, check, score, seed, most = job
    global _runner
    from moe_fuzz.execute.runner import Runner
    from moe_fuzz.options import FenceOptions, RunOptions

    _runner = _runner or Runner(DEVICE)
    target = f"{op}@planted.{bug}"
    info, space = _runner.describe(target), get_space(op)
    options = RunOptions(None, FenceOptions(hard=(), readonly=(), own="off"))
    ran, hit = 0, False

    def run(cases: tuple[Case, ...]) -> None:
        nonlocal ran, hit
        best: float | None = None
        for case in cases[:2]:
            verdict = _runner.run(case, target, options)
            ran += 1
            hit = any(violation.check == check for violation in verdict.violations)
            if hit or ran >= most:
                raise Enough
            value = verdict.budget if score == "budget" else imbalance(case) if score == "imbalance" else None
            if value is not None and verdict.kind == "pass":
                best = max(best or 0.0, value)
        if best is not None:
            climb_on(best, label=score)

    if score in DRAWN:
        for cases in rounds(space, info, random.Random(f"{bug} {seed}"), swarm=score == SWARM, alike=2):
            try:
                run(tuple(cases))
            except Enough:
                return bug, score, seed, ran if hit else None
    for shard in range(most):
        drive(strategies.rounds(space, info, DEVICE), derive_seed(seed, target, shard), 32, run, HYPOTHESIS)
        if hit or ran >= most:
            break
    return bug, score, seed, ran if hit else None


def imbalance(case: Case) -> float:
    """How uneven the experts' loads are meant to be: the share of rows that all go to few experts."""
    rows = sum(step.tokens for step in case.steps)
    faults = [fault for step in case.steps for fault in step.faults]
    uneven = sum(len(f.rows) for f in faults if f.name in ("all_to_one", "hot_expert", "ties", "shifted_rows"))
    return uneven / rows if rows else 0.0


# ---- tables ---------------------------------------------------------------------------------------------------------


def median(values: Sequence[int | None], most: int) -> float:
    return statistics.median(most if value is None else value for value in values)


def mean_ratio(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """Geometric mean of how many times fewer cases ours takes: above 1 is better."""
    return round(math.exp(statistics.fmean(math.log(theirs[bug] / ours[bug]) for bug in ours)), 2)


def predicates(options: argparse.Namespace) -> dict[str, Any]:
    """The first table."""
    jobs = [(name, op, seed, options.cases) for seed in range(options.seeds) for name in VARIANTS for op in OPS]
    found: dict[str, dict[str, list[int | None]]] = {name: {} for name in VARIANTS}
    with ProcessPoolExecutor(options.processes) as pool:
        for name, op, _, by_bug in pool.map(stream_of, jobs):
            for bug, number in by_bug.items():
                found[name].setdefault(f"{op}/{bug}", []).append(number)
    medians = {name: {bug: median(n, options.cases) for bug, n in bugs.items()} for name, bugs in found.items()}
    table = []
    for name, (what, _, against) in VARIANTS.items():
        every = [number for numbers in found[name].values() for number in numbers]
        table.append({
            "variant": name, "what": what, "found": share(every),
            "median of medians": statistics.median(medians[name].values()),
            "worst median": max(medians[name].values()),
            "over uniform": mean_ratio(medians[name], medians["uniform"]),
            "against": against, "over it": mean_ratio(medians[name], medians[against]),
        })  # fmt: skip
    return {"cases": options.cases, "bugs": len(medians["uniform"]), "rows": table, "median_cases_to_find": medians}


def scores(options: argparse.Namespace) -> dict[str, Any]:
    """The second table."""
    every = (*SCORES, *DRAWN)
    climbs = [(op, bug, check, score, seed, options.executed)
              for seed in range(options.seeds) for op, bug, check in EXECUTED for score in every]  # fmt: skip
    climbed: dict[str, dict[str, list[int | None]]] = {score: {} for score in every}
    with ProcessPoolExecutor(options.processes) as pool:
        for bug, score, _, number in pool.map(climb, climbs):
            climbed[score].setdefault(bug, []).append(number)
    medians = {score: {bug: median(n, options.executed) for bug, n in bugs.items()} for score, bugs in climbed.items()}
    rows = [
        {"score": score, "found": share([n for numbers in climbed[score].values() for n in numbers]),
         "against": UNIFORM if score in DRAWN else "none",
         "over it": mean_ratio(medians[score], medians[UNIFORM if score in DRAWN else "none"])}
        for score in every
    ]  # fmt: skip
    return {"cases": options.executed, "bugs": len(EXECUTED), "rows": rows, "median_cases_to_find": medians}


def share(numbers: Sequence[int | None]) -> float:
    return round(sum(number is not None for number in numbers) / len(numbers), 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--cases", type=int, default=800, help="of a stream; 0: leave the first table as it is")
    parser.add_argument("--executed", type=int, default=256, help="of a campaign with kernels; 0: leave the second")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    start = time.monotonic()
    data: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    data |= {
        "command": "python benchmarks/guidance.py --out benchmarks/results/guidance.json",
        "date": time.strftime("%Y-%m-%d"), "seeds": options.seeds, "versions": {"moe-fuzz": __version__},
        "machine": {"cpu": platform.machine(), "cores": options.processes, "python": platform.python_version()},
    }  # fmt: skip
    for name, wanted, make in (("generator", options.cases, predicates), ("scores", options.executed, scores)):
        if wanted:
            data[name] = make(options)
            for row in data[name]["rows"]:
                print(row, flush=True)
    print(f"{time.monotonic() - start:.0f} s")
    if options.out:
        options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
