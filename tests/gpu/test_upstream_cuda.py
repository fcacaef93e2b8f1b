"""Serving libraries as they were released, on a GPU. Needs MOE_FUZZ_VLLM_LIB or MOE_FUZZ_SGLANG_LIB, or the packages.

These are not tests of the libraries: what they get wrong, a campaign says. What is held here is that each is bound and
runs in its worker, and that what is known to be right in them is not called wrong.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign.repro import renderer
from moe_fuzz.case import Case, Fault, Scalar, Step
from moe_fuzz.labels import Labels
from moe_fuzz.ops import OPS, get_space
from moe_fuzz.ops.experts.fields import FIELDS
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.options import LIB_VARIABLES, RunOptions
from moe_fuzz.targets import registry, sources
from moe_fuzz.verdict import PASS, VIOLATION, Verdict, Violation
from moe_fuzz.worker.pool import Pool
from tests.cpu.repro_cases import finding_of, write
from tests.gpu.telling import all_pass, told

pytestmark = pytest.mark.gpu

OPTIONS = RunOptions(deadline=20.0, first_deadline=120.0)
ROUTERS = [op for op in OPS if get_space(op).family == "routing"]
PARTS = [target.name for target in registry.known()
         if target.op == "experts_bf16" and target.name.partition("@")[2] in sources.IN_LIBRARY]  # fmt: skip
DEGENERATE = ("nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "ties")


def need(provider: str) -> None:
    if not (os.environ.get(LIB_VARIABLES[provider]) or sources.installed(sources.SOURCES[provider].package)):
        pytest.skip(f"{provider} is not installed, and {LIB_VARIABLES[provider]} is not set")


@pytest.mark.parametrize("target", [f"{op}@{provider}" for op in ROUTERS for provider in LIB_VARIABLES])
def test_a_released_router_is_bound_and_runs(pool: Pool, target: str) -> None:
    op, _, provider = target.partition("@")
    need(provider)
    info = pool.describe(target)
    assert info.capabilities.devices == ("cuda",)
    assert "(Tensor" in info.origin  # the schema that was bound
    cases = list(itertools.islice(strategies.grid(get_space(op), info, "cuda", seed=9), 24))
    with pool.lease(target) as worker:
        verdicts = worker.run(cases, target, OPTIONS)
    all_pass(cases, verdicts, (PASS, VIOLATION))
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
    all_pass(cases, verdicts)


def test_sglang_topk_softmax_is_clean_on_ties(pool: Pool) -> None:
    need("sglang")
    cases = [degenerate("ties", experts) for experts in (8, 128)]
    with pool.lease("topk_softmax@sglang") as worker:
        verdicts = worker.run(cases, "topk_softmax@sglang", OPTIONS)
    all_pass(cases, verdicts)


def layer_of(tokens: int, mode: str = "eager", **changes: Scalar) -> Case:
    """Experts whose bits are known; a graph is replayed with fewer tokens than it was captured with, too."""
    config = {name: values[0] for name, values in FIELDS.items()}
    config |= {"experts": "0-7", "top_k": 2, "hidden": 64, "intermediate": 32, "recipe": "integer", **changes}
    padding = Labels.range(2) if "dialect" in changes else Labels()
    counts = (tokens,) if mode == "eager" else (tokens, tokens - 3, tokens)
    steps = tuple(Step(Labels.range(count), padding=padding) for count in counts)
    return Case("experts_bf16", config, steps, seed=4, mode=mode)


@pytest.mark.parametrize("target", PARTS)
def test_a_released_part_of_experts_is_bound_and_runs(pool: Pool, target: str) -> None:
    need(target.partition("@")[2].partition(".")[0])
    info = pool.describe(target)
    assert info.capabilities.devices == ("cuda",)
    assert "(Tensor" in info.origin
    grid = (case for case in strategies.grid(get_space("experts_bf16"), info, "cuda", seed=9)
            if all(step.tokens for step in case.steps))  # fmt: skip
    cases = list(itertools.islice(grid, 24))
    with pool.lease(target) as worker:
        verdicts = worker.run(cases, target, OPTIONS)
    all_pass(cases, verdicts, (PASS, VIOLATION))
    # a case on which a library is wrong counts for nothing here, and how many those are is not this test's matter
    assert sum(verdict.parity for verdict in verdicts) >= len(cases) // 4


@pytest.mark.parametrize("target", PARTS)
def test_a_released_part_of_experts_is_right_where_its_project_tests_it(pool: Pool, target: str) -> None:
    """Sizes in multiples of 16, several tokens, ids of experts; captured too. Every bit is known."""
    need(target.partition("@")[2].partition(".")[0])
    cases = [layer_of(tokens, top_k=top_k, mode=mode) for mode in ("eager", "graph")
             for tokens, top_k in ((9, 2), (33, 4), (130, 6))]  # fmt: skip
    if pool.describe(target).capabilities.expert_map:
        cases.append(layer_of(33, expert_map="shard"))
    if "minus_one" in pool.describe(target).contract.accepts:
        cases.append(layer_of(33, dialect="minus_one"))
    with pool.lease(target) as worker:
        verdicts = worker.run(cases, target, OPTIONS)
    all_pass(cases, verdicts)
    assert all(verdict.parity for verdict in verdicts)


def script_of(pool: Pool, folder: Path, target: str, case: Case, verdict: Verdict) -> tuple[int, str]:
    """Exit code and last line of the script, which loads the library itself."""
    text = renderer(pool)(finding_of(replace(case, target=target), verdict))
    assert "import moe_fuzz" not in text
    script = write(folder, "repro", text)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, (done.stdout.splitlines() or [done.stderr])[-1]


@pytest.mark.parametrize("target", ["topk_softmax@vllm", "topk_sigmoid@vllm", "topk_sigmoid@sglang"])
def test_a_finding_has_a_script_that_calls_the_library(pool: Pool, tmp_path: Path, target: str) -> None:
    """The first that the grid shows; and a case that passes is called fixed by the same means."""
    op, _, provider = target.partition("@")
    need(provider)
    info = pool.describe(target)
    grid = (case for case in strategies.grid(get_space(op), info, "cuda", seed=9) if case.mode == "eager")
    cases = list(itertools.islice(grid, 200))
    with pool.lease(target) as worker:
        verdicts = worker.run(cases, target, OPTIONS)
    pairs = list(zip(cases, verdicts, strict=True))
    good = next(case for case, verdict in pairs if verdict.parity)
    made_up = Verdict(VIOLATION, (Violation("selection", "wrong-expert", "takes another expert"),))
    code, said = script_of(pool, tmp_path, target, good, made_up)
    assert (code, said) == (0, f"fixed: {op} passes on this input")
    bad = next(((case, verdict) for case, verdict in pairs if verdict.kind == VIOLATION), None)
    if bad is None:
        pytest.skip(f"{info.origin} passes all of {len(cases)} cases")
    code, said = script_of(pool, tmp_path, target, *bad)
    assert (code, said[: len(f"BUG: {op}")]) == (1, f"BUG: {op}"), f"{said}\n{told(bad[1], bad[0])}"
