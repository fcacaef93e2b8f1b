"""Workers on a GPU: each way to break it is a verdict with a name and a place, and the next worker is there at once."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign.locate import is_device_fault, launch_site, locate
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.cli import probes
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.verdict import CRASH, HANG, OOM, PASS, REJECTED, VIOLATION, Verdict
from moe_fuzz.worker.gpus import gpus
from moe_fuzz.worker.pool import Pool
from tests.gpu.telling import all_pass, told, told_all

pytestmark = pytest.mark.gpu

OPTIONS = RunOptions(deadline=3.0, first_deadline=60.0)
ALL = replace(OPTIONS, fence=FenceOptions(own="all"))
SPACE = get_space("topk_softmax")
GREEDY = f"topk_softmax@{Path(__file__).with_name('greedy_target.py')}"


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(1, "cuda") as made:
        yield made


def case(tokens: int, experts: int = 8, *faults: Fault, **config: object) -> Case:
    made = {**SIMPLEST, "experts": str(Labels.range(experts)), "top_k": 2, **config}
    return Case("topk_softmax", made, (Step(Labels.range(tokens), faults=faults),), seed=1)


NAN = Fault("nan_rows", "logits", Labels.range(2))
BROKEN = {
    "asserts_on_sentinel": (case(4, 8, NAN), ("crash", "device-assert"), "asserts_on_sentinel"),
    "loads_words": (case(4, 8, Fault("misaligned", "logits"), edge="left", dtype="bfloat16"),
                    ("crash", "misaligned-access"), "loads_words"),
    "reads_past_logits": (case(4, 13), ("crash", "illegal-access"), "_route"),
    "int32_row_offset": (case(4, 8, Fault("int32_boundary", "logits")), ("crash", "illegal-access"),
                         "int32_row_offset"),
    "waits_for_a_partner": (case(1), ("hang", "deadline"), "waits_for_a_partner"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BROKEN)
def test_each_way_to_break_the_device_has_its_name_and_place(pool: Pool, bug: str) -> None:
    broken, key, function = BROKEN[bug]
    target = f"topk_softmax@planted.{bug}"
    ends: list[float] = []
    with pool.lease() as worker:
        worker.run([case(2)], target, OPTIONS)  # compiled, so that what is measured below is the worker alone
        verdicts = worker.run([broken, case(2)], target, OPTIONS, lambda *_: ends.append(time.monotonic()))
    assert [v.key for v in verdicts] == [key, ("pass", "")], told_all(verdicts)
    started = time.monotonic()
    with pool.fresh() as worker:
        worker.run([case(2)], target, OPTIONS)
    fresh = time.monotonic() - started
    print(f"\n{bug}: {ends[1] - ends[0]:.2f} s from a death to the next verdict, a fresh worker takes {fresh:.2f} s")
    assert is_device_fault(key)
    site = launch_site(pool, (broken,), target, OPTIONS, key)
    assert site.endswith(f"in {function}"), site


def test_a_kernel_that_spins_on_its_first_call_costs_the_short_deadline(pool: Pool) -> None:
    with pool.fresh() as worker:
        worker.describe("topk_softmax@planted.waits_for_a_partner", 60.0)
        (verdict,) = worker.run([case(1)], "topk_softmax@planted.waits_for_a_partner", OPTIONS)
    assert verdict.kind == HANG, told(verdict)
    assert verdict.violations[0].message.startswith("no verdict within 3 s;")  # not 60 s of compiling


def test_memory_beyond_the_share_of_a_worker_is_its_own_verdict(pool: Pool) -> None:
    assert gpus()[0].budget, "NVML or nvidia-smi tells of the memory"
    with pool.lease() as worker:
        verdicts = worker.run([case(1), case(2), case(1)], f"{GREEDY}:takes_all", OPTIONS)
    assert [v.kind for v in verdicts] == [PASS, OOM, PASS], told_all(verdicts)


def test_a_launch_that_is_refused_is_an_error_and_the_worker_lives(pool: Pool) -> None:
    with pool.lease() as worker:
        verdicts = worker.run([case(1), case(2), case(1)], f"{GREEDY}:takes_too_large_a_grid", OPTIONS)
    assert [v.kind for v in verdicts] == [PASS, VIOLATION, PASS], told_all(verdicts)
    assert verdicts[1].key == ("error", "RuntimeError"), told(verdicts[1])


def test_our_router_takes_rows_beyond_two_to_the_31(pool: Pool) -> None:
    fault = Fault("int32_boundary", "logits")
    cases = [case(t, 60, fault, dtype=d, edge=e) for t in (1, 2, 3, 33, 64) for d, e in (
        ("float32", "right"), ("bfloat16", "left"))]  # fmt: skip
    with pool.lease() as worker:
        for target in ("topk_softmax@builtin", "topk_softmax@torch"):
            verdicts = worker.run(cases, target, replace(OPTIONS, deadline=20.0))
            all_pass(cases, verdicts)


# ---- --fence all ----------------------------------------------------------------------------------------------------


def test_hidden_scratch_is_fenced_by_all_alone(pool: Pool) -> None:
    target, broken = "topk_softmax@planted.overruns_hidden_scratch", case(4, 13)
    with pool.lease() as worker:
        assert worker.run([broken], target, OPTIONS)[0].kind == PASS
        verdict, after = worker.run([broken, case(4, 8)], target, ALL)
    assert (verdict.kind, verdict.key) == (CRASH, ("crash", "illegal-access")), told(verdict, broken)
    assert after.kind == PASS, told(after)
    found = locate(pool, (broken,), target, ALL, verdict, verdict.key, SPACE.tensors)
    assert (found.check, found.symptom) == ("fence", "own:right:write"), found.message


@pytest.mark.parametrize("target", ["topk_softmax@builtin", "topk_softmax@torch"])
def test_sound_routers_pass_when_all_is_fenced(pool: Pool, target: str) -> None:
    cases = list(itertools.islice(strategies.grid(SPACE, pool.describe(target), "cuda", seed=5), 60))
    with pool.lease() as worker:
        for options in (OPTIONS, ALL):
            started = time.monotonic()
            verdicts = worker.run(cases, target, replace(options, deadline=20.0))
            print(f"\n{target} fence {options.fence.own}: {len(cases) / (time.monotonic() - started):.0f} cases/s")
            all_pass(cases, verdicts, (PASS, REJECTED), lambda v: known_of(target, v))


def known_of(target: str, verdict: Verdict) -> bool:
    """torch's own softmax gives NaN for a row without a number. It is no doing of a fence."""
    return target == "topk_softmax@torch" and {v.check for v in verdict.violations} == {"finite"}


# ---- several workers ------------------------------------------------------------------------------------------------


def test_workers_share_a_gpu() -> None:
    count = min(3, gpus()[0].slots)
    with Pool(count, "cuda") as pool, contextlib.ExitStack() as stack:
        workers = [stack.enter_context(pool.lease()) for _ in range(count)]
        for worker in workers:
            assert worker.run([case(4)], "topk_softmax@builtin", OPTIONS)[0].kind == PASS
        assert len({worker.pid for worker in workers}) == count


def test_the_doctors_probes() -> None:
    compiled, fenced = probes.cuda()
    assert (compiled.problem, fenced.problem) == ("", "")
    assert fenced.said == "illegal-access"
    assert probes.allocator().said == "replaced"
    assert "CUDA_LAUNCH_BLOCKING" not in os.environ
