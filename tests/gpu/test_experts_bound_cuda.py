"""The known-good: an expert after the other by cuBLAS, judged on the device by every check. No alarm, and its budget.

It runs in a process of its own, which is this file as a script:

    python tests/gpu/test_experts_bound_cuda.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import product
from typing import Any

import pytest

#: tokens, experts, hidden, intermediate, top_k
SIZES = ((64, 8, 1024, 512, 2), (257, 60, 720, 384, 4), (33, 128, 2048, 768, 8), (1025, 8, 512, 1408, 2),
         (4097, 32, 256, 192, 4), (7, 512, 360, 90, 10))  # fmt: skip
RECIPES = ("dense", "integer", "one_hot", "ladder", "fine")


def layer(inputs: Any, narrow: bool) -> Any:
    """narrow: both products come out in the dtype of x, as a plain matmul's do; else in float32."""
    import torch

    from moe_fuzz.reference.align import expert_of_slot
    from moe_fuzz.reference.experts_bf16 import activate

    plain, options = inputs.plain, inputs.options
    x = plain["x"]

    def matmul(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (a @ w.t()).float() if narrow else torch.mm(a, w.t(), out_dtype=torch.float32)

    expert = expert_of_slot(plain["ids"], len(plain["w2"]), plain.get("expert_map"))
    slots = torch.zeros((*expert.shape, x.shape[1]), device=x.device)
    for e in expert.unique().tolist():
        if e < 0:
            continue
        token, slot = (expert == e).nonzero(as_tuple=True)
        a = matmul(x[token], plain["w13"][e])
        if "b13" in plain:
            a = a + plain["b13"][e].float()
        if narrow:
            a = a.to(x.dtype).float()
        h = activate(a, str(options["activation"]), str(options["gate_layout"])).to(x.dtype)
        y = matmul(h, plain["w2"][e])
        if "b2" in plain:
            y = y + plain["b2"][e].float()
        slots[token, slot] = y * plain["weights"][token, slot][:, None]
    return slots.sum(dim=1).to(x.dtype)


def main() -> int:
    """0 where no check speaks of any case."""
    import torch

    from moe_fuzz.case import Case, Step
    from moe_fuzz.checks import CHECKS
    from moe_fuzz.checks.experts.family import FAMILY
    from moe_fuzz.contract import Capabilities, Contract, TargetInfo
    from moe_fuzz.labels import Labels
    from moe_fuzz.reference.experts_bf16 import ACTIVATIONS

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    alarms, budgets, seconds, proved = 0, {"bound": 0.0, "statistical": 0.0}, 0.0, 0
    grid = list(product(SIZES, ACTIVATIONS, ("bfloat16", "float16"), (False, True)))
    for seed, (size, activation, dtype, narrow) in enumerate(grid):
        tokens, experts, hidden, inter, top_k = size
        config = {
            "experts": str(Labels.range(experts)), "hidden": hidden, "intermediate": inter, "top_k": top_k,
            "dtype": dtype, "activation": activation, "gate_layout": ("first", "up_first", "interleaved")[seed % 3],
            "bias": ("none", "float32", "dtype")[seed // 3 % 3], "weight_on_input": False, "expert_map": "none",
            "recipe": RECIPES[seed // 2 % 4], "dialect": "distinct", "edge": "right", "out": False,
            "magnitude": (0, 2, -4)[seed % 3], "weight_scale": -3,
        }  # fmt: skip
        case = Case("experts_bf16", config, (Step(Labels.range(tokens)),), seed)
        stores = {"gate_up": "dtype", "down": "dtype"} if narrow else {}
        info = TargetInfo("experts_bf16@cublas", "experts_bf16", "cublas", contract=Contract(slot="float32", **stores),
                          capabilities=Capabilities(alignment=1))  # fmt: skip
        inputs = FAMILY.materialize(case, 0, "cuda")
        y = layer(inputs, narrow)
        seen = FAMILY.observe(case, 0, info, inputs, FAMILY.outputs(y), lambda other, narrow=narrow: FAMILY.outputs(
            layer(other, narrow)))  # fmt: skip
        torch.cuda.synchronize()
        started = time.perf_counter()
        for name, check in CHECKS["experts"].items():
            for violation in check(seen):
                alarms += 1
                print(f"{name}: {violation.message}; {config}, narrow={narrow}", flush=True)
        torch.cuda.synchronize()
        seconds += time.perf_counter() - started
        budgets = {name: max(used, seen.budget.get(name, 0.0)) for name, used in budgets.items()}
        proved += not FAMILY.binding(seen)
    used = ", ".join(f"{name} {share:.2f}" for name, share in budgets.items())
    print(f"{len(grid)} cases, {alarms} alarms, {proved} prove parity; largest share of {used}; "
          f"{1000 * seconds / len(grid):.1f} ms a case to judge")  # fmt: skip
    return alarms


@pytest.mark.gpu
def test_cublas_raises_no_alarm() -> None:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 alarms" in done.stdout


if __name__ == "__main__":
    sys.exit(min(main(), 1))
