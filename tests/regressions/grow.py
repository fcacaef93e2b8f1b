"""Grows the smallest case of a planted bug, and writes it to `upstream/` under the number of the issue it stands for.

    python tests/regressions/grow.py [NAME…] [--device cpu|cuda] [--seconds 10] [--seed 3] [--again]

It draws cases as `moe-fuzz selftest` does, reduces as a campaign does, and asks five fresh workers whether the case
fails. A bug may show on more than its issue tells of: where the smallest case would be one of those, TRIGGERS holds on
to the issue's own.
One that races may need more rows than the reducer leaves: `"reproduces": "sometimes"` asks for a case by hand.
What is written is for a person to look at: test_upstream.py holds it to its check from then on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_fuzz.campaign.confirm import Key, holds, rerun
from moe_fuzz.campaign.locate import is_memory_fault, locate
from moe_fuzz.campaign.minimize import Reducer
from moe_fuzz.campaign.selftest import OOM, draw, options_of, violations_of
from moe_fuzz.case import Case
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.planted.catalog import PLANTED
from moe_fuzz.planted.entry import Planted
from moe_fuzz.verdict import Verdict, Violation
from moe_fuzz.worker.pool import Pool

#: What stays in the case of a bug, because its issue tells of that.
TRIGGERS: Mapping[str, Callable[[Case], bool]] = {
    "renorm_zero_division": lambda case: finite(case) and case.config["bias"] is True,
    "sigmoid_zero_division": lambda case: finite(case),
    "four_a_lane": lambda case: "clustered_top" in case.fault_names,
    "whole_tiles_need_one_more": lambda case: "exact_count" in case.fault_names,
    "saturated_ties": lambda case: finite(case),
    "tied_best_counted_once": lambda case: finite(case) and group_size(case) > 2,
    "amax_of_the_batch": lambda case: "huge_rows" in case.fault_names,
    "amax_of_all_ranks": lambda case: "inf_rows" in case.fault_names,
    "amax_of_the_layer": lambda case: "inf_rows" in case.fault_names,
    "dense_combine": lambda case: any(step.padding for step in case.steps),
    "nan_blind_layer": lambda case: any(step.padding for step in case.steps),
    # on a GPU: graphs of more than one replay, and what is too small to be wrong
    "frozen_staging": lambda case: len(case.steps) > 1,
    "epoch_baked_in": lambda case: len(case.steps) > 1,
    "frozen_hidden_states": lambda case: len(case.steps) > 1,
}  # fmt: skip
FOLDER = Path(__file__).parent / "upstream"
TRIES = 5
MOST = 3000  # cases that are tried


def file_of(bug: Planted) -> Path:
    """`vllm#39391`, nan_argmax → vllm-39391-nan-argmax.json"""
    project, _, number = bug.upstream.partition("#")
    return FOLDER / f"{project.lower()}-{number}-{bug.name.replace('_', '-')}.json"


def grow(bug: Planted, pool: Pool, device: str, seed: int, seconds: float) -> Case | None:
    """The smallest failing case that is found in the time; None if none is found."""
    trigger, options = TRIGGERS.get(bug.name, lambda case: True), options_of(bug)
    case, key = first(bug, pool, device, seed, trigger)
    if case is None or bug.check == "hang":  # each try of a hang costs its deadline
        return case
    space = get_space(case.op)

    def fails(cases: tuple[Case, ...]) -> bool:
        return trigger(cases[-1]) and holds(rerun(pool, cases, bug.target, options), key)

    def fails_here(cases: tuple[Case, ...]) -> bool:
        with pool.lease() as worker:
            return trigger(cases[-1]) and holds(worker.run(cases, bug.target, options)[-1], key)

    small = Reducer(space, fails_here, seconds).run(case).case  # quick; a bug that keeps state may deceive it
    return small if fails((small,)) else Reducer(space, fails, 4 * seconds).run(case).case


def first(
    bug: Planted, pool: Pool, device: str, seed: int, trigger: Callable[[Case], bool]
) -> tuple[Case | None, Key]:  # fmt: skip
    """The first case that shows the bug, in a fresh worker too, and how; no case after so many."""
    drawn = itertools.islice(draw(bug.op, pool.describe(bug.target), device, seed), MOST)
    for case in filter(trigger, drawn):
        case = replace(case, target=bug.target)
        with pool.lease() as worker:
            verdict = worker.run([case], bug.target, options_of(bug))[0]
        if seen_in(bug, verdict) and (found := shown(bug, pool, case)):
            return case, found[0]
    return None, ("", "")


def finite(case: Case) -> bool:
    infinite = {"nan_rows", "partial_nan", "inf_rows", "neg_inf_rows", "partial_inf", "broken_bias"}
    return not infinite & set(case.fault_names)


def group_size(case: Case) -> int:
    return len(Labels.parse(str(case.config["experts"]))) // int(case.config["n_group"])


def shown(bug: Planted, pool: Pool, case: Case) -> tuple[Key, Verdict] | None:
    """How the bug shows in a fresh worker: check and symptom as a worker tells them, and the verdict."""
    verdict = rerun(pool, (case,), bug.target, options_of(bug))
    key = seen_in(bug, verdict)
    return (key, verdict) if key else None


def seen_in(bug: Planted, verdict: Verdict) -> Key | None:
    if bug.check == OOM:
        return verdict.key if verdict.key[0] == OOM else None
    if bug.check == "fence":
        return verdict.key if is_memory_fault(verdict.key) else None
    hit = next((v for v in verdict.violations if v.check == bug.check and bug.symptom in ("", v.symptom)), None)
    return None if hit is None else (hit.check, hit.symptom)


def record(bug: Planted, pool: Pool, case: Case, device: str) -> dict[str, Any] | None:
    """What is written of a case; None if it does not fail in most of the fresh workers."""
    seen = [found for found in (shown(bug, pool, case) for _ in range(1 if bug.check == "hang" else TRIES)) if found]
    if 2 * len(seen) <= TRIES and bug.check != "hang":
        return None
    key, verdict = seen[0]
    violation = next((v for v in violations_of(verdict) if (v.check, v.symptom) == key), Violation(*key, ""))
    if bug.check == "fence":
        tensors = get_space(case.op).tensors
        violation = locate(pool, (case,), bug.target, options_of(bug), verdict, key, tensors)
    symptom: str | None = violation.symptom
    if any(found[0] != key for found in seen) or bug.check in ("error", "determinism"):
        symptom = None  # errors have names of their own everywhere; what differs first is up to the race
    return {
        "cause": bug.story,
        "upstream": bug.upstream,
        "check": violation.check,
        "symptom": symptom,
        "twin": bug.target,
        "device": device,
        "reproduces": "always" if len(seen) == TRIES or bug.check == "hang" else "sometimes",
        "case": replace(case, target="").to_json(),
    }


def write(bug: Planted, data: dict[str, Any]) -> Path:
    file = file_of(bug)
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the reduction of one case")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="also those that have a case")
    options = parser.parse_args()
    bugs = [bug for bug in PLANTED if not options.names or bug.name in options.names]
    bugs = [bug for bug in bugs if options.device in bug.devices and (options.again or not file_of(bug).exists())]
    failed = 0
    with Pool(1, options.device, memory_limit=2 << 30 if options.device == "cpu" else None) as pool:
        for bug in bugs:
            case = grow(bug, pool, options.device, options.seed, options.seconds)
            data = case and record(bug, pool, case, options.device)
            failed += not data
            print(write(bug, data).name if data else f"{bug.name}: no case", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
