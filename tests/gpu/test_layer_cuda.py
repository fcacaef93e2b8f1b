"""Layers on a GPU: the gate against float64, our layer in every mode, the planted ones, and who did what."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign.badcase import BadCase
from moe_fuzz.campaign.examine import Examiner
from moe_fuzz.campaign.selftest import run_planted
from moe_fuzz.case import ALL_MODES, Case, Fault, Step
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.planted.layer_catalog import LAYER
from moe_fuzz.worker.pool import Pool
from tests.gpu.conftest import compiling
from tests.gpu.telling import all_pass, bug_found, told

pytestmark = pytest.mark.gpu
OPTIONS = RunOptions(deadline=20.0, first_deadline=120.0)
SPACE = get_space("moe_layer")
GATE = """
import torch
from moe_fuzz.kernels.moe_layer import gate_logits
torch.manual_seed(0)
for tokens, experts, hidden in [(1, 1, 1), (3, 5, 7), (17, 33, 100), (64, 128, 2048), (257, 257, 2880), (0, 8, 16)]:
    for dtype, kind in [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)]:
        x = torch.randn(tokens, hidden, device="cuda").to(dtype)
        gate = torch.randn(experts, hidden, device="cuda").to(kind)
        got = gate_logits(x, gate).double()
        size = x.double().abs() @ gate.double().abs().t()
        n = (hidden + hidden // 16 + 2) * 2.0**-23
        assert ((got - x.double() @ gate.double().t()).abs() <= n / (1 - n) * size + 1e-30).all()
        if tokens > 1:  # a row's bits depend on that row alone
            assert torch.equal(got[1:2], gate_logits(x[1:2], gate).double())
"""


def test_the_gate_is_within_its_bound() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", GATE], env=compiling(), capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_grid_passes_in_every_mode(pool: Pool) -> None:
    grid = strategies.grid(SPACE, pool.describe("moe_layer@builtin"), "cuda", seed=3)
    cases = list(itertools.islice(grid, 24))  # each compiles four kernels or more: a campaign runs more of them
    with pool.lease() as worker:
        verdicts = worker.run(cases, "moe_layer@builtin", OPTIONS)
    all_pass(cases, verdicts)
    assert sum(v.parity for v in verdicts) >= len(cases) // 4
    assert set(Counter(case.mode for case in cases)) == set(ALL_MODES)


@pytest.mark.parametrize("planted", LAYER, ids=lambda planted: planted.name)
def test_planted_layers_are_found(pool: Pool, planted) -> None:
    outcome = run_planted(planted, pool, seed=0, max_cases=1000, max_seconds=120.0, device="cuda")
    bug_found(outcome)


def test_the_finding_of_vllm_37758_names_both_halves(pool: Pool) -> None:
    target = "moe_layer@planted.nan_blind_layer"
    nan = (Fault("nan_rows", "hidden", Labels.parse("4-5")),)
    config = {**SPACE.simplest, "experts": "0-5", "top_k": 2}
    case = Case("moe_layer", config, (Step(Labels.range(6), Labels.parse("4-5"), nan),), 5, target=target)
    info = pool.describe(target)
    with pool.lease() as worker:
        verdict = worker.run((case,), target, OPTIONS)[-1]
    examiner = Examiner(pool, info, SPACE, OPTIONS, "cuda")
    finding = examiner.examine(BadCase(target, case, verdict), 20.0, lambda *_: None)
    assert finding is not None, told(verdict, case)
    assert finding.message.startswith("the router gave row "), told(verdict, case)
    assert ", one expert twice; then the experts began: " in finding.message, told(verdict, case)
