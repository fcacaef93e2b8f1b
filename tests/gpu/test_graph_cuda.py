"""Graphs captured for real: ours passes, each planted bug of replays is found, and nothing leaks to the next case."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign.locate import is_memory_fault, locate
from moe_fuzz.campaign.selftest import run_alone, run_planted
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.options import RunOptions
from moe_fuzz.planted.catalog import PLANTED
from moe_fuzz.verdict import CRASH, PASS, REJECTED, VIOLATION, Verdict
from moe_fuzz.worker.pool import Pool
from tests.gpu.telling import all_pass, bug_found, told, told_all, told_outcome

pytestmark = pytest.mark.gpu

OPTIONS = RunOptions(deadline=20.0, first_deadline=60.0)
SPACE = get_space("topk_softmax")
TARGETS = Path(__file__).with_name("graph_targets.py")
BUILTIN = "topk_softmax@builtin"
BUGS = [bug for bug in PLANTED if bug.module == "routing_graph"]


def step(tokens: int, padding: int = 0, *faults: Fault) -> Step:
    rows = Labels.range(tokens)
    return Step(rows, rows.last(padding), faults)


def case(*steps: Step, mode: str = "graph", **config: object) -> Case:
    made = Case("topk_softmax", {**SIMPLEST, "experts": "0-15", "top_k": 3, **config}, steps, 3, mode)  # type: ignore[arg-type]
    SPACE.validate(made)
    return made


def run(pool: Pool, target: str, *cases: Case) -> list[Verdict]:
    with pool.lease() as worker:
        return worker.run(cases, target if "@" in target else f"topk_softmax@{TARGETS}:{target}", OPTIONS)


TAIL = Labels.parse("6-7")
SEQUENCE = (
    step(8), step(8, 2, Fault("nan_rows", "logits", TAIL)), step(4, 4), step(4, 1),
    step(8, 2, Fault("stale_rows", "logits", TAIL, 0)), step(8, 8), step(8),
)  # fmt: skip


@pytest.mark.parametrize("mode", ["graph", "piecewise"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"out": True, "is_padding": True, "padding": "minus_one", "dtype": "bfloat16"},
        {"is_padding": True, "padding": "garbage", "bias": True, "edge": "left"},
    ],
)
def test_our_kernel_passes_in_two_buckets_of_one_pool(pool: Pool, mode: str, config: dict[str, object]) -> None:
    cases = case(*SEQUENCE, mode=mode, **config), case(step(0), step(1), mode=mode, **config)
    all_pass(cases, run(pool, BUILTIN, *cases))


@pytest.mark.parametrize("target", [BUILTIN, "topk_softmax@torch", "right"])
def test_drawn_cases_pass(pool: Pool, target: str) -> None:
    info = pool.describe(target if "@" in target else f"topk_softmax@{TARGETS}:{target}")
    drawn = (c for c in strategies.grid(SPACE, info, "cuda", 7) if len(c.steps) > 1)
    if target == "topk_softmax@torch":  # who promises nothing of undefined rows
        drawn = (c for c in drawn if all(f.name in ("stale_rows", "zero_rows") for s in c.steps for f in s.faults))
    cases = list(itertools.islice(drawn, 24))
    verdicts = run(pool, target, *cases)
    all_pass(cases, verdicts)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_each_planted_bug_is_found(pool: Pool, bug: object) -> None:
    outcome = run_planted(bug, pool, 0, 400, 60.0, device="cuda")  # type: ignore[arg-type]
    bug_found(outcome)


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.only], ids=lambda bug: bug.name)
def test_some_are_found_by_one_check_alone(pool: Pool, bug: object) -> None:
    outcome = run_alone(bug, pool, 0, 400, 60.0, device="cuda")  # type: ignore[arg-type]
    assert (outcome.found, outcome.silent) == (True, True), told_outcome(outcome)


@pytest.mark.parametrize(
    ("name", "symptom"), [("raises_while_capturing", "ValueError"), ("waits_for_the_device", "")]
)
@pytest.mark.parametrize("mode", ["graph", "piecewise"])
def test_a_failed_capture_is_a_violation_and_the_worker_goes_on(pool: Pool, name: str, symptom: str, mode: str) -> None:
    broken = case(step(8), step(8, 2), mode=mode)
    before, failed, after, again = run(pool, name, case(step(8), mode="eager"), broken,
                                       case(step(8), step(4), mode="eager"), broken)  # fmt: skip
    assert (before.kind, after.kind) == (PASS, PASS), told_all((before, after))
    assert (failed.kind, failed.violations[0].check, failed.spent) == (VIOLATION, "capture", True), told(failed, broken)
    assert failed.violations[0].symptom == (symptom or failed.violations[0].symptom)
    assert "graph_targets.py" in failed.violations[0].site
    assert again.key == failed.key, told_all((failed, again))
    sound = case(*SEQUENCE, mode=mode)
    all_pass([sound], run(pool, BUILTIN, sound))


def test_a_failed_capture_is_no_violation_where_nobody_promised(pool: Pool) -> None:
    failed, after = run(pool, "waits_and_promises_nothing", case(step(8), step(8, 2)), case(step(8), mode="eager"))
    assert (failed.kind, failed.violations, after.kind) == (REJECTED, (), PASS), told_all((failed, after))


def test_a_fault_inside_a_replay_is_a_crash_and_is_located(pool: Pool) -> None:
    """Warm-up and capture are well; the first replay reads behind its static buffer."""
    target = f"topk_softmax@{TARGETS}:reads_past_in_the_graph"
    broken = case(step(8), step(8, 2))
    eager, verdict, after = run(pool, target, case(step(8), mode="eager"), broken, case(step(8), mode="eager"))
    assert (eager.kind, after.kind) == (PASS, PASS), told_all((eager, after))
    assert (verdict.kind, verdict.key) == (CRASH, ("crash", "illegal-access")), told(verdict, broken)
    assert is_memory_fault(verdict.key)
    place = locate(pool, (broken,), target, OPTIONS, verdict, verdict.key, SPACE.tensors)
    assert (place.check, place.symptom) == ("fence", "logits:right:read"), place.message


def test_a_buffer_that_the_target_keeps_need_not_be_written_again(pool: Pool) -> None:
    (verdict,) = run(pool, "keeps_its_ids", case(step(8), step(8, 2), step(4), top_k=16))
    assert verdict.kind == PASS, told(verdict)


def test_a_replay_costs_milliseconds(pool: Pool) -> None:
    """Ten cases of four replays in one bucket, after one that compiles. Generous: it is no benchmark."""
    cases = [Case("topk_softmax", case(step(8)).config, (step(8), step(8, 2), step(8, 4), step(8)), seed, "graph")
             for seed in range(11)]  # fmt: skip
    verdicts = run(pool, BUILTIN, *cases)
    seconds = [v.seconds for v in verdicts[1:]]
    print(f"a graph case of four replays: median {1e3 * statistics.median(seconds):.1f} ms, "
          f"of them fences {1e3 * statistics.median(v.fence_seconds for v in verdicts[1:]):.1f} ms")  # fmt: skip
    all_pass(cases, verdicts)
    assert statistics.median(seconds) < 0.5
