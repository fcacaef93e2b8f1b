"""The op `experts_nvfp4` on a GPU: the same inputs as on the host, our backends in every mode, the planted bugs."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from moe_fuzz import strategies
from moe_fuzz.campaign.selftest import run_planted
from moe_fuzz.case import MODES
from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.ops import get_space
from moe_fuzz.ops.experts.fp4_inputs import materialize
from moe_fuzz.ops.inputs import element_bits
from moe_fuzz.options import RunOptions
from moe_fuzz.planted.experts_nvfp4_catalog import EXPERTS_NVFP4
from moe_fuzz.worker.pool import Pool
from tests.gpu.telling import all_pass, bug_found

pytestmark = pytest.mark.gpu
OPTIONS = RunOptions(deadline=20.0, first_deadline=180.0)
SPACE = get_space("experts_nvfp4")
ANY = TargetInfo(
    "experts_nvfp4@x", "experts_nvfp4", "x", contract=Contract(accepts=PADDING_DIALECTS),
    capabilities=Capabilities(out=True, alignment=1, global_scales=("power", "fitted", "large", "nan", "zero")),
)  # fmt: skip


def test_the_same_bits_on_every_device() -> None:
    for case in itertools.islice(strategies.grid(SPACE, ANY, "cuda", seed=5), 60):
        here, there = materialize(case, 0), materialize(case, 0, "cuda")
        assert here.plain.keys() == there.plain.keys()
        for name, tensor in here.plain.items():
            same = torch.equal(element_bits(tensor), element_bits(there.plain[name].cpu()))
            assert same, (name, SPACE.label(case))


@pytest.mark.parametrize("name", ["builtin", "builtin.small", "builtin.large", "torch"])
def test_the_grid_passes_in_every_mode(pool: Pool, name: str) -> None:
    target = f"experts_nvfp4@{name}"
    grid = strategies.grid(SPACE, pool.describe(target), "cuda", seed=3)
    cases = list(itertools.islice(grid, 24))  # each compiles kernels of its own: a campaign runs more of them
    with pool.lease() as worker:
        verdicts = worker.run(cases, target, OPTIONS)
    all_pass(cases, verdicts)
    assert sum(v.parity for v in verdicts) >= len(cases) // 4
    assert set(Counter(case.mode for case in cases)) == (set(MODES) if name != "torch" else {"eager"})


@pytest.mark.parametrize("planted", EXPERTS_NVFP4, ids=lambda planted: planted.name)
def test_planted_bugs_are_found(pool: Pool, planted) -> None:
    outcome = run_planted(planted, pool, seed=0, max_cases=1000, max_seconds=60.0, device="cuda")
    bug_found(outcome)
