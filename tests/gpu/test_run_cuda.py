"""Cases on a GPU from the pool to the verdict: our kernel passes, a broken one dies in its fence and is named."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign.locate import is_memory_fault, locate
from moe_fuzz.case import Case, Step
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import CRASH, HANG, PASS, VIOLATION
from moe_fuzz.worker.pool import Pool
from tests.gpu.telling import all_pass, told, told_all

pytestmark = pytest.mark.gpu

OPTIONS = RunOptions(deadline=20.0, first_deadline=60.0)
SPACE = get_space("topk_softmax")


def case(tokens: int, experts: int, top_k: int, **config: object) -> Case:
    made = {**SIMPLEST, "experts": str(Labels.range(experts)), "top_k": top_k, **config}
    return Case("topk_softmax", made, (Step(Labels.range(tokens)),), seed=1)


def test_our_kernel_passes_and_counts_as_parity(pool: Pool) -> None:
    target = "topk_softmax@builtin"
    cases = list(itertools.islice(strategies.grid(SPACE, pool.describe(target), "cuda", seed=3), 24))
    with pool.lease() as worker:
        verdicts = worker.run(cases, target, OPTIONS)
    all_pass(cases, verdicts)
    assert sum(v.parity for v in verdicts) >= len(cases) // 3
    assert all(v.fence_seconds > 0 for v in verdicts)


@pytest.mark.parametrize(
    ("bug", "broken", "symptom"),
    [
        ("reads_past_logits", case(4, 13, 2), "logits:right:read"),  # 208 bytes: no slack
        ("writes_past_ids", case(5, 16, 4, out=True), "ids:right:write"),
        ("writes_past_ids", case(5, 16, 4), "own:right:write"),
        ("scratch_in_input", case(5, 16, 2), "logits:inside:write"),
    ],
)
def test_a_memory_bug_is_a_crash_and_is_located(pool: Pool, bug: str, broken: Case, symptom: str) -> None:
    target = f"topk_softmax@planted.{bug}"
    with pool.lease() as worker:
        verdict, after = worker.run([broken, case(0, 16, 2)], target, OPTIONS)
    assert (verdict.kind, verdict.key) == (CRASH, ("crash", "illegal-access")), told(verdict, broken)
    assert is_memory_fault(verdict.key)
    assert after.kind == PASS, told(after)  # in a process that did not lose its context
    found = locate(pool, (broken,), target, OPTIONS, verdict, verdict.key, SPACE.tensors)
    assert (found.check, found.symptom) == ("fence", symptom), found.message


def test_a_write_into_the_slack_is_named_by_the_canary(pool: Pool) -> None:
    broken = case(3, 16, 3, out=True)  # 36 bytes of ids: 12 of slack
    with pool.lease() as worker:
        (verdict,) = worker.run([broken], "topk_softmax@planted.memset_rounded_up", OPTIONS)
    assert (verdict.kind, verdict.key) == (VIOLATION, ("canary", "weights:right")), told(verdict, broken)


def test_a_kernel_that_never_ends_is_a_hang_and_the_gpu_goes_on(pool: Pool) -> None:
    target = f"topk_softmax@{Path(__file__).with_name('spinning_target.py')}:waits_for_ever"
    with pool.lease() as worker:
        verdicts = worker.run([case(1, 8, 2), case(2, 8, 2), case(1, 8, 2)], target, replace(OPTIONS, deadline=3.0))
    assert [v.kind for v in verdicts] == [PASS, HANG, PASS], told_all(verdicts)
