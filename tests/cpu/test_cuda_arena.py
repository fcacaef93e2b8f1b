"""Arenas of CUDA with a stand-in for the driver: what a step waits for, and that nothing is lost by waiting once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.interpreter

#: Prints {name: [kind, symptoms, waits]} for targets that write one canary over, at one of the calls of a case.
SCRIPT = """
import ctypes, json
from tests.cpu import test_waits as cases
from tests.cpu.driver_stand_in import pretend
from moe_fuzz.execute.capture import GraphPool
from moe_fuzz.fence import FenceOptions
from moe_fuzz.options import RunOptions
from moe_fuzz.reference.routing import topk_softmax

waits, found, kept = [], {}, []
pretend(lambda: waits.append(0))
GraphPool.of_process = cases.Pool
SOFT = FenceOptions(hard=(), readonly=())

def damaging(at, behind=True, calls=None):
    calls = []
    def router(logits, top_k, out=None, **more):
        weights, ids = topk_softmax(logits, top_k, out=out, **more)
        calls.append(0)
        if len(calls) == at:
            ctypes.memset(weights.data_ptr() + (4 * weights.numel() if behind else -2), 0, 2)
        return weights, ids
    return router

def keeping(logits, top_k, out=None, **more):
    result = topk_softmax(logits, top_k, out=out, **more)
    kept.append(result[0])
    if len(kept) == 8:
        ctypes.memset(kept[0].data_ptr() - 4, 0, 2)
    return result

def run(name, function, mode="eager", count=1, fence=SOFT):
    waits.clear()
    verdict = cases.run(function, mode, cases.NAN, count=count, out=True, options=RunOptions(fence=fence))
    found[name] = [verdict.kind, [v.symptom for v in verdict.violations], len(waits)]

for at in (1, 2, 3, 4):
    run(f"call {at}", damaging(at))
run("left", damaging(1, behind=False))
run("second step", damaging(5), count=2)
run("replay", damaging(3), "graph", 3)
for fence in (SOFT, FenceOptions()):
    for mode in ("eager", "graph", "piecewise"):
        run(f"clean {mode} {fence.hard}", damaging(0), mode, 3, fence)
for turn in ("first", "second", "third"):
    run(f"kept, {turn}", keeping)
print(json.dumps(found))
"""


def run_by(script: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    return subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip


def told_by(script: str) -> dict[str, Any]:
    done = run_by(script)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return told_by(SCRIPT)


def test_damage_is_found_whichever_call_of_a_step_does_it(found: dict[str, Any]) -> None:
    for at in (1, 2, 3, 4):
        assert found[f"call {at}"] == ["violation", ["weights:right"], 1]
    assert found["left"] == ["violation", ["weights:left"], 1]
    assert found["second step"] == ["violation", ["weights:right"], 2]
    assert found["replay"] == ["violation", ["weights:right"], 2]


def test_a_step_waits_once_and_a_bucket_once(found: dict[str, Any]) -> None:
    clean = {name: what for name, what in found.items() if name.startswith("clean")}
    assert len(clean) == 6
    for name, what in clean.items():
        assert what == ["pass", [], 3 if "eager" in name else 4], name


def test_damage_around_a_tensor_that_is_kept_is_told_once(found: dict[str, Any]) -> None:
    assert found["kept, first"] == ["pass", [], 1]
    assert found["kept, second"] == ["violation", ["weights:left:stale"], 1]
    assert found["kept, third"] == ["pass", [], 1]


#: Prints {layout: [kind, messages, whether the weights were laid anew]} of graphs of experts whose weights lie as rows
#: with gaps, or off their start. The seed's relation lays the experts in another order into the read-only buffers.
LAYOUTS = """
import json
from tests.cpu import test_waits as cases
from tests.cpu.driver_stand_in import pretend
from tests.cpu.test_experts_inputs import CONFIG
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.contract import Capabilities, Contract, TargetInfo
from moe_fuzz.execute.capture import GraphPool
from moe_fuzz.execute.graph import GraphSteps
from moe_fuzz.execute.runner import _verdict
from moe_fuzz.labels import Labels
from moe_fuzz.options import RunOptions
from moe_fuzz.reference.experts_bf16 import experts_bf16
from moe_fuzz.targets.bind import Target

pretend(lambda: None)
GraphPool.of_process = cases.Pool
INFO = TargetInfo("experts_bf16@reference", "experts_bf16", "reference",
                  contract=Contract(deterministic=True, accepts=("distinct", "minus_one")),
                  capabilities=Capabilities(dtypes=("bfloat16",), alignment=1, out=True))
KEYWORDS = {name: name for name in ("expert_map", "activation", "gate_layout", "b13", "b2", "apply_weight_on_input",
                                     "out")}
POSITIONAL = ("x", "w13", "w2", "weights", "ids")
called, found = [], {}

def experts(x, w13, w2, *rest, **more):
    called.append((w13.clone(), w2.clone()))
    return experts_bf16(x, w13, w2, *rest, **more)

LAID = (24, "w13", "noncontiguous"), (24, "w2", "misaligned"), (24, "w2", "int32_boundary"), (224, "w2", "misaligned")
for hidden, name, fault in LAID:  # the last is copied; small ones are staged
    called.clear()
    step = Step(Labels.range(5), faults=(Fault(fault, name),))
    config = {**CONFIG, "hidden": hidden, "intermediate": hidden - 4, "experts": "0-2", "recipe": "integer",
              "out": True}
    case = Case("experts_bf16", config, (step, step), 3, mode="graph")
    verdict = _verdict(GraphSteps(case, Target(INFO, experts, KEYWORDS, POSITIONAL), RunOptions(), "cuda"))
    first, *others = (weights[name == "w2"] for weights in called)
    moved = any(bool((other == first.roll(1, 0)).all()) for other in others)
    found[f"{hidden} {name} {fault}"] = [verdict.kind, [v.message for v in verdict.violations], moved]
print(json.dumps(found))
"""


def test_weights_that_are_placed_as_rows_can_be_laid_anew() -> None:
    """What is read-only is written through a twin, which must have the shape that the weights were unfolded to."""
    found = told_by(LAYOUTS)
    assert len(found) == 4
    assert found == {layout: ["pass", [], True] for layout in found}


#: Prints {mode: [kind, symptoms, switches of protection, blocks made]} for routing cases whose rows lie far apart, the
#: same one twice; then a target writes into such an input.
FAR = """
import json
from tests.cpu import test_waits as cases
from tests.cpu.driver_stand_in import pretend
from moe_fuzz.case import Fault
from moe_fuzz.execute.capture import GraphPool
from moe_fuzz.fence import cuda_driver, cuda_placed
from moe_fuzz.reference.routing import topk_softmax

pretend(lambda: None)
GraphPool.of_process = cases.Pool
switches, found, protect = [], {}, cuda_driver.protect
cuda_driver.protect = lambda *given: (switches.append(0), protect(*given))
FAULT = Fault("int32_boundary", "logits")

def writing(logits, top_k, **more):
    print(json.dumps(found), flush=True)
    logits[0, 0] = 0
    return topk_softmax(logits, top_k, **more)

for mode, count in (("eager", 1), ("graph", 3)):
    for turn in ("first", "second"):
        switches.clear()
        made = cuda_placed.POOL.made
        verdict = cases.run(topk_softmax, mode, FAULT, count=count, out=True)
        found[f"{turn} {mode}"] = [verdict.kind, [v.symptom for v in verdict.violations], len(switches),
                                   cuda_placed.POOL.made - made]
cases.run(writing, "eager", FAULT)
"""


def test_far_rows_are_read_only_from_the_beginning_and_their_memory_is_used_again() -> None:
    """Switching a granule for each row, twice a call, took longer than all else that a small case does."""
    done = run_by(FAR)
    assert done.returncode == -signal.SIGSEGV, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: what[:2] for name, what in found.items()} == {name: ["pass", []] for name in found}
    assert found["second eager"][2:] == found["second graph"][2:] == [0, 0]
    assert found["first eager"][2] > 0


#: Prints what one look at two open arenas says, with a tensor of an arena before them that somebody has kept.
TOGETHER = """
import ctypes, json
from tests.cpu.driver_stand_in import pretend
import torch
from moe_fuzz.fence import FenceOptions, cuda, open_arena

pretend(lambda: None)
compared, real = [], cuda.changed
cuda.changed = lambda pieces: (compared.append(0), real(pieces))[1]
SOFT = FenceOptions(hard=(), readonly=())

def spoil(tensor):
    ctypes.memset(tensor.data_ptr() - 2, 0, 2)

def told(look):
    return [[v.tensor, v.symptom] for v in look()]

with open_arena("cuda", SOFT) as before:
    kept = before.tensor("kept", (4,), torch.float32, "output")
found = {}
for name, damaged in {"none": "", "one": "a", "other": "b", "both": "ab", "kept": "k", "all": "kba"}.items():
    compared.clear()
    with open_arena("cuda", SOFT) as one, open_arena("cuda", SOFT) as other:
        tensors = {"a": one.tensor("a", (3,), torch.float32, "output"),
                   "b": other.tensor("b", (5,), torch.int32, "output"), "k": kept}
        look = one.look([other])
        clean = told(look)
        for letter in damaged:
            spoil(tensors[letter])
        found[name] = [clean, told(one.look([other])), len(compared)]
    found[name].append(len(compared) - 2)  # when they close
print(json.dumps(found))
"""


def test_one_look_tells_of_all_arenas_and_once() -> None:
    stale = ["kept", "kept:left:stale"]
    a, b = ["a", "a:left"], ["b", "b:left"]
    assert told_by(TOGETHER) == {
        "none": [[], [], 2, 0], "one": [[], [a], 2, 0], "other": [[], [b], 2, 0], "both": [[], [a, b], 2, 0],
        "kept": [[], [stale], 2, 0], "all": [[], [a, stale, b], 2, 0],
    }  # fmt: skip


#: Prints {gathered or not: [poisoned outputs, whether some were so before the end, what is in the bytes beside them]}.
POISON = """
import contextlib, json
from tests.cpu.driver_stand_in import pretend
import torch
from moe_fuzz.fence import open_arena, unwritten

pretend(lambda: None)
found = {}
with open_arena("cuda") as arena:
    dtypes = torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.float64, torch.complex128
    outputs = [arena.tensor(f"out{at}", (3, 5), dtype, "output") for at, dtype in enumerate(dtypes)]
    found["exact"] = all(one.untyped_storage().nbytes() == one.nbytes and not one.storage_offset() for one in outputs)
    found["own"] = own = []
    for like in (torch.zeros(3, 1, 4), torch.zeros(1, 4).as_strided((1, 4), (9, 1)), torch.zeros(5, 4).t()):
        one = arena._own(like)
        own.append([one.shape == like.shape, one.stride() == like.stride(), bool(unwritten(one).all())])
    plain = torch.zeros(4, 6)
    outputs.append(plain[:, 1])
    for gathered in (False, True):
        for output in outputs:
            output.zero_()
        with arena.gathering() if gathered else contextlib.nullcontext():
            with arena.gathering() if gathered else contextlib.nullcontext():
                arena.poison(outputs)
            early = [bool(unwritten(output).any()) for output in outputs]
        found[str(gathered)] = [[bool(unwritten(output).all()) for output in outputs], any(early[:-1]),
                                float(plain.nan_to_num().abs().sum())]
    found["told"] = len(arena.check())
print(json.dumps(found))
"""


def test_outputs_are_poisoned_together_with_what_is_gathered() -> None:
    found = told_by(POISON)
    assert found == {
        "False": [[True] * 7, True, 0.0], "True": [[True] * 7, False, 0.0], "told": 0, "exact": True,
        "own": [[True, True, True]] * 3,
    }  # fmt: skip
