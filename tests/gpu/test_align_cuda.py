"""align on a GPU, compiled and captured: ours and torch's pass, releases pass where their bugs are not asked for."""

from __future__ import annotations

import itertools
import os

import pytest

from moe_fuzz import strategies
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.options import LIB_VARIABLES, RunOptions
from moe_fuzz.restriction import NO_FAULT, RestrictedSpace, Restriction
from moe_fuzz.targets import sources
from moe_fuzz.verdict import Verdict
from moe_fuzz.worker.pool import Pool
from tests.gpu.telling import all_pass, told

pytestmark = pytest.mark.gpu

SPACE = get_space("align")
OPTIONS = RunOptions(deadline=20.0, first_deadline=120.0)


def run(pool: Pool, target: str, cases: list[Case]) -> list[Verdict]:
    with pool.lease(target) as worker:
        return list(worker.run(cases, target, OPTIONS))


def case_of(*steps: Step, mode: str = "eager", **config: object) -> Case:
    whole = {**SPACE.simplest, "experts": "0-7", "top_k": 2} | config
    case = Case("align", whole, steps, 3, mode)
    SPACE.validate(case)
    return case


@pytest.mark.parametrize("target", ["align@builtin", "align@torch"])
def test_ours_pass_in_every_mode(pool: Pool, target: str) -> None:
    drawn = strategies.grid(SPACE, pool.describe(target), "cuda", seed=9)
    cases = list(itertools.islice(drawn, 64))  # most of them compile
    verdicts = run(pool, target, cases)
    all_pass(cases, verdicts)
    assert {case.mode for case in cases} == {"eager", "graph", "piecewise"}
    assert sum(verdict.parity for verdict in verdicts) > 30


@pytest.mark.parametrize("target", ["align@builtin", "align@torch"])
def test_sizes_that_a_cpu_does_not_afford(pool: Pool, target: str) -> None:
    """Slots on both sides of 65536, experts past 1024, one expert for all slots."""
    one = Fault("all_to_one", "ids", Labels.range(8192))
    cases = [
        *(case_of(Step(Labels.range(rows)), experts="0-255", top_k=8) for rows in (8191, 8192, 8193)),
        case_of(Step(Labels.range(4096)), experts="0-2047", top_k=32, block_size=128),
        case_of(Step(Labels.range(8192), faults=(one,)), experts="0-255", top_k=8),
        case_of(Step(Labels.range(65537)), experts="0-0", top_k=1, block_size=1, ids_dtype="int64"),
    ]
    verdicts = run(pool, target, cases)
    all_pass(cases, verdicts)
    assert all(verdict.parity for verdict in verdicts)


@pytest.mark.parametrize("provider", LIB_VARIABLES)
def test_releases_pass_without_faults(pool: Pool, provider: str) -> None:
    if not (os.environ.get(LIB_VARIABLES[provider]) or sources.installed(sources.SOURCES[provider].package)):
        pytest.skip(f"{provider} is not installed, and {LIB_VARIABLES[provider]} is not set")
    target = f"align@{provider}"
    info = pool.describe(target)
    assert info.capabilities.devices == ("cuda",)
    assert "(Tensor" in info.origin  # the schema that was bound
    plain = RestrictedSpace(SPACE, Restriction(faults=(NO_FAULT,)))
    drawn = (case for case in strategies.grid(plain, info, "cuda", seed=9) if all(s.tokens for s in case.steps))
    cases = list(itertools.islice(drawn, 60))
    verdicts = run(pool, target, cases)
    all_pass(cases, verdicts)
    assert sum(verdict.parity for verdict in verdicts) > 40


@pytest.mark.parametrize(
    ("name", "check", "case"),
    [
        ("total_read_on_host", "capture", case_of(Step(Labels.range(5)), Step(Labels.range(5)), mode="graph")),
        ("ranked_backwards_in_a_graph", "replay",
         case_of(Step(Labels.range(9)), Step(Labels.range(9)), mode="graph", experts="0-1")),
        ("counts_of_16_bits", "count", case_of(Step(Labels.range(40000)), experts="0-0", top_k=1)),
        ("filled_once", "fill", case_of(
            Step(Labels.range(9)), Step(Labels.range(9), faults=(Fault("minus_one_ids", "ids", Labels.range(9)),)),
            mode="graph")),
    ],
)  # fmt: skip
def test_planted_bugs_that_take_a_gpu_are_found(pool: Pool, name: str, check: str, case: Case) -> None:
    (verdict,) = run(pool, f"align@planted.{name}", [case])
    assert check in {violation.check for violation in verdict.violations}, told(verdict, case)
