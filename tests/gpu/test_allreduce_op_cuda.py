"""allreduce_rmsnorm through the fuzzer: in phases and in one launch on one GPU, with a process a rank on several."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign.selftest import run_planted
from moe_fuzz.case import RANKS, Case, Fault, Step
from moe_fuzz.kernels.allreduce_rmsnorm.dispatch import BACKENDS
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.planted.allreduce_catalog import ALLREDUCE
from moe_fuzz.verdict import CRASH, HANG, PASS, Verdict
from moe_fuzz.worker.gpus import gpus
from moe_fuzz.worker.pool import Pool
from tests.gpu.telling import all_pass, bug_found, told, told_all

pytestmark = pytest.mark.gpu

SPACE = get_space("allreduce_rmsnorm")
OPTIONS = RunOptions(deadline=30.0, first_deadline=180.0)
OURS = ("allreduce_rmsnorm@builtin", *(f"allreduce_rmsnorm@builtin.{name}" for name in BACKENDS))
BUGS = {bug.name: bug for bug in ALLREDUCE}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(1, "cuda") as made:
        yield made


def case(*faults: Fault, tokens: int = 33, mode: str = "eager", seed: int = 3, **changes: object) -> Case:
    config = {**SPACE.simplest, "hidden": 2048, **changes}
    found = Case("allreduce_rmsnorm", config, (Step(Labels.range(tokens), faults=faults),), seed, mode)
    SPACE.validate(found)
    return found


def passed(pool: Pool, cases: list[Case], target: str) -> list[Verdict]:
    with pool.lease(target) as worker:
        verdicts = worker.run(cases, target, OPTIONS)
    all_pass(cases, verdicts)
    return verdicts


# ---- one GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*OURS, "allreduce_rmsnorm@torch"])
def test_ours_pass_in_every_mode(pool: Pool, target: str) -> None:
    drawn = strategies.grid(SPACE, pool.describe(target), "cuda", seed=9)
    cases = [one for one in itertools.islice(drawn, 60) if one.mode != RANKS and one.config["burst"] != 1000]
    verdicts = passed(pool, cases, target)
    assert {one.mode for one in cases} >= {"eager", "graph"}
    assert sum(verdict.parity for verdict in verdicts) > len(cases) // 3


@pytest.mark.parametrize("launches", ["phases", "single"])
@pytest.mark.parametrize("target", OURS)
def test_a_thousand_calls_in_a_row_and_two_groups(pool: Pool, target: str, launches: str) -> None:
    passed(pool, [case(tokens=7, hidden=256, burst=1000, groups=2, launches=launches, ranks=4)], target)


@pytest.mark.parametrize("launches", ["phases", "single"])
def test_bad_rows_of_one_rank_stay_where_they_are(pool: Pool, launches: str) -> None:
    cases = [
        case(Fault(name, place, Labels.parse("3,17")), launches=launches, ranks=ranks, burst=3, dtype=dtype)
        for name in ("nan_rows", "inf_rows", "overflowing_squares", "negative_subnormals")
        for place, ranks, dtype in (("x0", 2, "bfloat16"), ("x1", 4, "float32"))
    ]
    passed(pool, cases, OURS[0])


@pytest.mark.parametrize("name", ["counts_rows_on_the_host", "other_order_in_a_graph", "gamma_taken_for_x",
                                  "cluster_of_seven", "order_of_arrival"])  # fmt: skip
def test_planted_bugs_are_found(pool: Pool, name: str) -> None:
    outcome = run_planted(BUGS[name], pool, 0, 300, 60.0, device="cuda")
    bug_found(outcome)


# ---- several --------------------------------------------------------------------------------------------------------


@pytest.mark.multigpu(2)
@pytest.mark.parametrize("target", [*OURS, "allreduce_rmsnorm@torch"])
def test_real_ranks_pass(pool: Pool, target: str) -> None:
    """Every kind of fault, and of pace, at two ranks; captured and not."""
    faults = [place for place in SPACE.places if place.on_rows and place.fault != "stale_rows"]
    cases = [
        case(Fault(place.fault, place.tensor, Labels.parse("2,9")), mode=RANKS, tokens=tokens, pace=pace, burst=burst,
             captured=captured, groups=groups)
        for place, (tokens, pace, burst, captured, groups) in zip(
            faults, itertools.cycle(itertools.product((13, 64), ("together", "late", "ahead", "random"), (0, 3),
                                                      (False, True), (1, 2))), strict=False)
    ]  # fmt: skip
    if target.endswith("torch"):
        cases = [one for one in cases if not one.config["captured"]]
    verdicts = passed(pool, cases, target)
    assert sum(verdict.parity for verdict in verdicts) > len(cases) // 2


@pytest.mark.multigpu(2)
def test_sizes_about_every_cap_and_a_thousand_calls(pool: Pool) -> None:
    sizes = sorted({(cap // 4096) + more for cap in (1 << 18, 1 << 19, 1 << 20) for more in (-1, 0, 1)})
    cases = [case(tokens=tokens, mode=RANKS, burst=3, pace="random") for tokens in sizes]
    passed(pool, [*cases, case(tokens=5, hidden=256, mode=RANKS, burst=1000, groups=2, pace="random")], OURS[0])


@pytest.mark.multigpu(2)
@pytest.mark.parametrize(("name", "kind", "tokens"), [
    ("last_rank_aborts", CRASH, 1), ("last_rank_waits_elsewhere", HANG, 3),
])  # fmt: skip
def test_a_rank_that_is_lost_is_named_and_the_group_is_back(pool: Pool, name: str, kind: str, tokens: int) -> None:
    target, options = BUGS[name].target, RunOptions(deadline=3.0, first_deadline=60.0)
    with pool.lease(target) as worker:
        (bad,) = worker.run([case(tokens=tokens, mode=RANKS)], target, options)
        sound = worker.run([case(tokens=4, mode=RANKS)], OURS[0], OPTIONS)
    assert bad.kind == kind, told(bad)
    assert bad.violations[0].message.startswith("rank 1 of 2"), told(bad)
    assert sound[0].kind == PASS, told(sound[0])


@pytest.mark.multigpu(2)
def test_a_group_whose_kernel_waits_for_a_rank_is_back(pool: Pool, tmp_path: Path) -> None:
    file = tmp_path / "late.py"
    file.write_text(
        "import time\n"
        "from moe_fuzz.contract import Capabilities, Contract, declares\n"
        "from moe_fuzz.targets.builtin_allreduce import allreduce_rmsnorm as sound\n"
        "@declares(contract=Contract(deterministic=True), capabilities=Capabilities(processes=('cuda',)))\n"
        "def call(x, residual, gamma, eps, *, group):\n"
        "    while x.shape[-2] == 5 and group.rank == 1:\n"
        "        time.sleep(0.01)\n"
        "    return sound(x, residual, gamma, eps, group=group)\n"
    )
    target, ends = f"allreduce_rmsnorm@{file}:call", list[float]()
    cases = [case(tokens=4, mode=RANKS), case(tokens=5, mode=RANKS), case(tokens=4, mode=RANKS)]
    with pool.lease(target) as worker:
        verdicts = worker.run(cases, target, RunOptions(deadline=4.0, first_deadline=120.0),
                              lambda index, verdict, history: ends.append(time.monotonic()))  # fmt: skip
    assert [verdict.kind for verdict in verdicts] == [PASS, HANG, PASS], told_all(verdicts, cases)
    assert verdicts[1].violations[0].message.startswith("rank 1 of 2"), told(verdicts[1])
    print(f"back after {ends[2] - ends[1]:.2f} s")  # 5 at most where nobody else uses the GPUs


@pytest.mark.multigpu(2)
def test_ranks_far_apart(pool: Pool, tmp_path: Path) -> None:
    """On the device before a call and behind it, inside graphs too, and on the host: whatever one rank gives back, uses
    again or captures while the other is far behind, it must not be what that one still needs."""
    file = tmp_path / "apart.py"
    file.write_text(
        "import time, torch\n"
        "from moe_fuzz.contract import Capabilities, Contract, declares\n"
        "from moe_fuzz.targets.builtin_allreduce import allreduce_rmsnorm as sound\n"
        "PROMISED = Contract(deterministic=True, batch_invariant=True, isolated=True, rounds=('residual',),\n"
        "                    sum_order='rank')\n"
        "calls = 0\n"
        "@declares(contract=PROMISED, capabilities=Capabilities(processes=('cuda',)))\n"
        "def call(x, residual, gamma, eps, *, group):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    late = calls % 2 == group.rank\n"
        "    if late:\n"
        "        torch.cuda._sleep(100_000_000)\n"
        "    if calls % 3 == group.rank and not torch.cuda.is_current_stream_capturing():\n"
        "        time.sleep(0.05)\n"
        "    result = sound(x, residual, gamma, eps, group=group)\n"
        "    if not late:\n"
        "        torch.cuda._sleep(100_000_000)\n"
        "    return result\n"
    )
    bad = Fault("nan_rows", "x0", Labels.parse("2,9"))
    cases = [
        case(bad, mode=RANKS, tokens=tokens, captured=captured, burst=burst, groups=groups)
        for tokens, burst, groups in ((13, 0, 1), (64, 0, 1), (13, 3, 2)) for captured in (False, True)
    ]  # fmt: skip
    passed(pool, cases, f"allreduce_rmsnorm@{file}:call")


@pytest.mark.multigpu(4)
def test_four_ranks(pool: Pool) -> None:
    passed(pool, [case(mode=RANKS, ranks=ranks, pace="random", burst=8, captured=captured)
                  for ranks in (2, 3, 4) for captured in (False, True)], OURS[0])  # fmt: skip


def test_a_pool_says_how_many_ranks_it_has_room_for(pool: Pool) -> None:
    assert pool.describe(OURS[0]).capabilities.max_processes == min(8, len(gpus()))
