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
