"""Compiled routers: against the float64 references, on hostile rows, bit for bit, and from the pool to the verdict."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign.selftest import run_planted
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.planted.catalog import get_planted
from moe_fuzz.worker.pool import Pool
from tests.gpu.telling import all_pass, bug_found

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).with_name("compiled_routers.py")
OPTIONS = RunOptions(deadline=20.0, first_deadline=60.0)


@pytest.mark.parametrize(
    "arguments",
    [
        *(f"agrees {op}" for op in ("topk_softmax", "topk_sigmoid", "grouped_topk")),
        "hostile_rows topk_softmax", "hostile_rows topk_sigmoid",
        "hostile_rows grouped_topk softmax", "hostile_rows grouped_topk sigmoid",
        "rows_alone grouped_topk", "slots grouped_topk",
    ],
)  # fmt: skip
def test_the_compiled_kernel(arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-P", str(SCRIPT), *arguments.split()], env=environment, capture_output=True,
                          text=True, timeout=400, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("op", ["topk_sigmoid", "grouped_topk"])
def test_the_grid_passes(pool: Pool, op: str) -> None:
    target, space = f"{op}@builtin", get_space(op)
    cases = list(itertools.islice(strategies.grid(space, pool.describe(target), "cuda", seed=3), 40))
    with pool.lease() as worker:
        verdicts = worker.run(cases, target, OPTIONS)
    all_pass(cases, verdicts)
    assert sum(v.parity for v in verdicts) >= len(cases) // 3


@pytest.mark.parametrize("name", ["narrow_index", "negative_nan_key", "nan_groups", "shared_ids_looked_up"])
def test_bugs_that_need_a_device_are_found(pool: Pool, name: str) -> None:
    bug = get_planted(name)
    assert bug is not None
    outcome = run_planted(bug, pool, seed=0, max_cases=600, max_seconds=60.0, device="cuda")
    bug_found(outcome)
