"""Serving libraries as they were released, on a GPU. Needs MOE_FUZZ_VLLM_LIB or MOE_FUZZ_SGLANG_LIB, or the packages.

These are not tests of the libraries: what they get wrong, a campaign says. What is held here is that each is bound and
runs in its worker, and that what is known to be right in them is not called wrong.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from moe_fuzz import strategies
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.labels import Labels
from moe_fuzz.ops import OPS, get_space
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.options import LIB_VARIABLES, RunOptions
from moe_fuzz.targets import sources
from moe_fuzz.verdict import PASS, VIOLATION
from moe_fuzz.worker.pool import Pool

pytestmark = pytest.mark.gpu

OPTIONS = RunOptions(deadline=20.0, first_deadline=120.0)
DEGENERATE = ("nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "ties")


def need(provider: str) -> None:
    if not (os.environ.get(LIB_VARIABLES[provider]) or sources.installed(sources.SOURCES[provider].package)):
        pytest.skip(f"{provider} is not installed, and {LIB_VARIABLES[provider]} is not set")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(1, "cuda") as made:
        yield made


@pytest.mark.parametrize("target", [f"{op}@{provider}" for op in OPS for provider in LIB_VARIABLES])
def test_a_released_router_is_bound_and_runs(pool: Pool, target: str) -> None:
    op, _, provider = target.partition("@")
    need(provider)
    info = pool.describe(target)
    assert info.capabilities.devices == ("cuda",)
    assert "(Tensor" in info.origin  # the schema that was bound
    cases = list(itertools.islice(strategies.grid(get_space(op), info, "cuda", seed=9), 24))
    with pool.lease(target) as worker:
        verdicts = worker.run(cases, target, OPTIONS)
    assert {verdict.kind for verdict in verdicts} <= {PASS, VIOLATION}, [v for v in verdicts if v.kind not in (PASS,)]
    assert sum(verdict.parity for verdict in verdicts) > 0


def degenerate(fault: str, experts: int) -> Case:
    config = {**SIMPLEST, "experts": str(Labels.range(experts)), "top_k": 4, "dtype": "bfloat16", "renormalize": True}
    step = Step(Labels.range(9), faults=(Fault(fault, "logits", Labels.range(4)),))
    return Case("topk_softmax", config, (step,), seed=3)


def test_vllm_topk_softmax_is_clean_on_degenerate_rows(pool: Pool) -> None:
    """Known good since 0.20 (vllm#39391): NaN, Inf and tied rows, without a bias, for E of either kernel."""
    need("vllm")
    cases = [degenerate(fault, experts) for fault in DEGENERATE for experts in (8, 60, 128)]
    with pool.lease("topk_softmax@vllm") as worker:
        verdicts = worker.run(cases, "topk_softmax@vllm", OPTIONS)
    assert [v.kind for v in verdicts] == [PASS] * len(cases), [v.violations for v in verdicts if v.kind != PASS]


def test_sglang_topk_softmax_is_clean_on_ties(pool: Pool) -> None:
    need("sglang")
    cases = [degenerate("ties", experts) for experts in (8, 128)]
    with pool.lease("topk_softmax@sglang") as worker:
        verdicts = worker.run(cases, "topk_softmax@sglang", OPTIONS)
    assert [v.kind for v in verdicts] == [PASS] * len(cases), [v.violations for v in verdicts if v.kind != PASS]
