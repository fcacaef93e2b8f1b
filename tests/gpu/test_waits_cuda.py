"""How often a step waits for the device: our own waits, and those of torch where a copy or a flag is asked for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.gpu.conftest import compiling

pytestmark = pytest.mark.gpu

#: Prints, for each case of an eager and of a graph step, [our waits, torch's warnings of others].
COUNT = """
import json, warnings
import torch
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.execute.runner import Runner
from moe_fuzz.fence import cuda_driver
from moe_fuzz.labels import Labels
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.options import RunOptions

runner, wait, waits = Runner("cuda"), cuda_driver.synchronize, []
cuda_driver.synchronize = lambda: (waits.append(0), wait())[1]
config = {**SIMPLEST, "experts": "0-15", "top_k": 3, "bias": True, "out": True}
step = Step(Labels.range(8), Labels(), (Fault("nan_rows", "logits", Labels.parse("6-7")),))
found = {}
for name, mode, count in (("eager", "eager", 1), ("eager steps", "eager", 3), ("graph", "graph", 3),
                          ("piecewise", "piecewise", 3)):
    case = Case("topk_softmax", config, (step,) * count, 3, mode)
    for _ in range(3):  # compiles; fills the pools
        assert runner.run(case, "topk_softmax@builtin", RunOptions()).kind == "pass"
    waits.clear()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        verdict = runner.run(case, "topk_softmax@builtin", RunOptions())
    torch.cuda.set_sync_debug_mode("default")
    assert verdict.kind == "pass", verdict
    found[name] = [len(waits), [str(one.message)[:80] for one in said if "synchroniz" in str(one.message)]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counted() -> dict[str, list[object]]:
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env=compiling(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, list[object]] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(("name", "ours"), [("eager", 1), ("eager steps", 3), ("graph", 1 + 3), ("piecewise", 1 + 3)])
def test_a_step_waits_once_and_a_bucket_once(counted: dict[str, list[object]], name: str, ours: int) -> None:
    assert counted[name] == [ours, []]


#: Prints the waits, ours and torch's, for the last of some cases of experts that are judged on the device.
EXPERTS = """
import collections, json, traceback, warnings
import torch
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.execute.runner import Runner
from moe_fuzz.fence import cuda_driver
from moe_fuzz.labels import Labels
from moe_fuzz.options import RunOptions

runner, wait, waits = Runner("cuda"), cuda_driver.synchronize, []
cuda_driver.synchronize = lambda: (waits.append(0), wait())[1]
sites = collections.Counter()
def heard(message, *more, **others):
    if str(message).startswith("called a synchronizing"):  # turning the mode on says something too
        ours = [f for f in traceback.extract_stack() if "/moe_fuzz/" in f.filename]
        sites[f"{ours[-1].filename.split('/moe_fuzz/')[-1]}:{ours[-1].lineno}"] += 1
warnings.showwarning = heard
config = {"experts": "0-15", "hidden": 128, "intermediate": 96, "top_k": 2, "dtype": "bfloat16", "activation": "silu",
          "gate_layout": "first", "bias": "none", "weight_on_input": False, "expert_map": "none", "recipe": "dense",
          "dialect": "distinct", "edge": "right", "out": False, "magnitude": 0, "weight_scale": -3}
fault = Fault("nan_rows", "x", Labels.parse("6-7"))
found = {}
for name, faults in (("plain", ()), ("faulty", (fault,))):
    for seed in range(3, 7):  # each relation has its turn by the seed; the first compile, and fill the pools
        case = Case("experts_bf16", config, (Step(Labels.range(24), Labels(), faults),), seed)
        assert runner.run(case, TARGET, RunOptions()).kind == "pass"
        waits.clear()
        sites.clear()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = heard
            verdict = runner.run(case, TARGET, RunOptions())
        torch.cuda.set_sync_debug_mode("default")
        assert verdict.kind == "pass", verdict
        found[f"{name} {seed}"] = [len(waits) + sum(sites.values()), sites]
print(json.dumps(found))
"""


@pytest.mark.parametrize("target", ["experts_bf16@builtin", "experts_bf16@planted.bias_offset_padded"])
def test_experts_are_judged_with_few_waits(target: str) -> None:
    """It were two hundred before the host kept what it had made. The planted one waits once a call for its inputs, and
    its bug does not show without a bias."""
    program = EXPERTS.replace("TARGET", repr(target))
    done = subprocess.run(
        [sys.executable, "-c", program], env=compiling(), capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(count for count, _ in found.values()) <= 24, found
