"""Cases of the planted bugs that fail, and findings made of them: what the tests of repro.py render."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.selftest import draw
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.planted.catalog import PLANTED, Planted
from moe_fuzz.verdict import VIOLATION, Verdict, Violation

ROOT = Path(__file__).resolve().parents[2]
HEALTHY = f"{ROOT}/kernels/routing.py:topk_softmax"
SPACE = get_space("topk_softmax")
MOST = 600  # cases in which a bug shows, or the test has lost its way


def healthy(op: str) -> str:
    return f"{ROOT}/kernels/{'grouped_topk' if op == 'grouped_topk' else 'routing'}.py:{op}"


def case_of(
    target: str, tokens: int = 3, experts: int = 8, faults: tuple[Fault, ...] = (), mode: str = "eager",
    steps: tuple[Step, ...] = (), **config: Any,
) -> Case:  # fmt: skip
    op = target.partition("@")[0]
    config = {**get_space(op).simplest, "top_k": 2, **config, "experts": str(Labels.range(experts))}
    return Case(op, config, steps or (Step(Labels.range(tokens), Labels(), faults),), 7, mode, target=target)  # type: ignore[arg-type]


def _step(tokens: int, *faults: Fault) -> Step:
    return Step(Labels.range(tokens), Labels(), faults)


#: Cases written by hand: of bugs that would take this process down, and of those that the grid does not meet.
FATAL: dict[str, tuple[dict[str, Any], str]] = {
    "reads_past_logits": ({"experts": 6, "tokens": 2}, "logits:right:read"),  # 48 bytes: no slack
    "writes_past_ids": ({"tokens": 6, "out": True}, "ids:right:write"),
    "scratch_in_input": ({}, "logits:inside:write"),
    "null_workspace": ({"experts": 16, "top_k": 9}, "SIGSEGV"),
    "aborts_on_one_token": ({"tokens": 1}, "SIGABRT"),
    "exits_on_launch_error": ({"tokens": 17, "experts": 60}, "exit:3"),
    "waits_for_a_tile": ({"experts": 7}, "deadline"),
    "counts_below_zero": ({"experts": 7}, "out-of-memory"),
    "shared_ids_looked_up": ({"experts": 8, "n_shared": 1, "expert_map": True}, "expert_map:right:read"),
    "asserts_on_sentinel": ({"faults": (Fault("nan_rows", "logits", Labels.range(3)),)}, "device-assert"),
    "loads_words": ({"faults": (Fault("misaligned", "logits"),), "dtype": "bfloat16", "edge": "left"},
                    "misaligned-access"),
    "waits_for_a_partner": ({"tokens": 1}, "deadline"),
    "counts_rows_on_host": ({"mode": "graph"}, "RuntimeError"),
    "tactic_of_the_capture": ({"mode": "graph", "tokens": 16}, "weights"),
    "frozen_staging": ({"mode": "graph"}, "wrong-expert"),
    "epoch_baked_in": ({"mode": "graph", "steps": (_step(4, Fault("huge_rows", "logits", Labels.of([0]))), _step(4))},
                       "weights"),
    "side_stream_not_joined": ({"mode": "graph"}, "weights:unwritten"),
}  # fmt: skip
#: Bugs that a script can show, and a case is known for: it has no allocator of its own, no rows gigabytes apart, no
#: state from a call before.
SCRIPTED = [
    bug for bug in PLANTED
    if get_space(bug.op).family == "routing"  # the scripts of all others are general.py.j2's
    and bug.fence == "torch" and bug.name not in ("int32_row_offset", "int32_column_offset", "stale_row_max")
    and ("cpu" in bug.devices or bug.name in FATAL)
]  # fmt: skip
NAN_ARGMAX, SCRATCH_IN_INPUT = (
    next(bug for bug in PLANTED if bug.name == name) for name in ("nan_argmax", "scratch_in_input")
)
WRITTEN_BY_HAND = {
    "branch_128_8": {"experts": 128, "top_k": 8},
    "unwritten_candidates": {"experts": 129, "n_group": 1, "topk_group": 1},
    "mapped_in_place": {"n_group": 2, "topk_group": 2, "expert_map": True,
                        "faults": (Fault("overlapping_map", "expert_map"),)},
    "padding_mask_mirrored": {"mode": "graph", "steps": (_step(4), Step(Labels.range(4), Labels.of([3]))),
                              "is_padding": True, "padding": "minus_one"},
    "sums_cleared_once": {"mode": "piecewise", "steps": (_step(4), _step(2), _step(4))},
    "bias_without_its_stride": {"bias": True, "faults": (Fault("noncontiguous", "bias"),)},
    "flags_without_their_stride": {"is_padding": True, "padding": "minus_one",
                                   "steps": (Step(Labels.range(8), Labels.range(8).last(3),
                                                  (Fault("noncontiguous", "is_padding"),)),)},
    "four_a_lane": {"experts": 160, "top_k": 6, "faults": (Fault("clustered_top", "logits", Labels.range(3)),)},
    "id_left_unwritten": {"experts": 3, "top_k": 3, "out": True},  # its own memory, when bare, may hold anything
}


def scriptable(cases: Iterator[Case]) -> Iterator[Case]:
    """Of what is drawn, calls that a script can make: a single eager one, and no rows gigabytes apart."""
    far = {"int32_boundary", "far_columns"}
    return (
        case for case in cases
        if case.mode == "eager" and len(case.steps) == 1 and not far.intersection(case.fault_names)
    )  # fmt: skip


@cache
def _smallest() -> dict[str, Case]:
    """The cases of tests/regressions by target: reduced, as those of findings are."""
    found = {}
    for path in (ROOT / "tests" / "regressions" / "upstream").glob("*.json"):
        written = json.loads(path.read_text())
        if "case" in written:
            case = Case.from_json(written["case"])
            found[written["twin"]] = replace(case, target=written["twin"])
    return found


def smallest(bug: Planted) -> Iterator[Case]:
    """The case that is kept of a bug, if there is one and a script can call it."""
    kept = _smallest().get(bug.target)
    return scriptable(iter([kept] if kept is not None else []))


def failing(runner: Runner, bug: Planted) -> tuple[Case, Verdict]:
    return _failing(runner, bug.name)


@cache
def _failing(runner: Runner, name: str) -> tuple[Case, Verdict]:
    bug = next(bug for bug in PLANTED if bug.name == name)
    if bug.name in FATAL:
        config, symptom = FATAL[bug.name]
        violation = Violation(bug.check, symptom, f"{bug.story} ({bug.upstream})")
        return case_of(bug.target, **config), Verdict(VIOLATION, (violation,), seconds=1.0)
    only = RunOptions(checks=(bug.check,))
    cases = chain(smallest(bug), scriptable(draw(bug.op, runner.describe(bug.target), "cpu", 0)))
    if bug.name in WRITTEN_BY_HAND:
        cases = iter([case_of(bug.target, **WRITTEN_BY_HAND[bug.name])])
    for case in islice(cases, MOST):
        verdict = runner.run(case, bug.target, only)
        if verdict.kind == VIOLATION:
            return case, verdict
    raise AssertionError(f"no case shows {bug.name}")


def finding_of(case: Case, verdict: Verdict, **more: Any) -> Finding:
    violation = verdict.violations[0]
    return Finding(
        id="0123456789", target=case.target, check=violation.check, symptom=violation.symptom,
        message=violation.message, finding_class="robustness", clause="", case=case, verdict=verdict, raw=verdict.key,
        features=(), scope=(), **more,
    )  # fmt: skip


def exhibit_of(runner: Runner, case: Case, target: str = "") -> dict[str, Any]:
    return runner.exhibit(case, target or case.target) | {"memory_limit": 1 << 30}


def write(folder: Path, name: str, text: str) -> Path:
    compile(text, name, "exec")
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


#: check -> what a script says of it
SAYS = {
    "error": "raises on a valid input", "structure": " is torch.", "written": "never written",
    "ids": "names an expert", "finite": "not finite", "shared": "shared experts", "expert_map": "not in expert_map",
    "padding": "padding row", "selection": "takes expert",
    "ties": "comes first", "order": "before it", "weights": "the weight of expert", "canary": "were overwritten",
    "fence": "(SIGSEGV)", "isolation": "with other contents in the padding rows", "batch_invariance": "; among ",
    "determinism": "called again with the same input", "crash": "takes its process down", "hang": "does not come back",
    "oom": "runs out of memory, with 1024 MiB at hand", "capture": "cannot be captured into a CUDA graph",
    "replay": "replay",
}  # fmt: skip
