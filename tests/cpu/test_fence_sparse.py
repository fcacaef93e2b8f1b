"""Rows so far apart that offsets pass 2^31 elements: addresses for all, memory for the rows, guards in between."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.errors import CaseError, UsageError
from moe_fuzz.execute.runner import Runner
from moe_fuzz.fence import FenceOptions, cpu, open_arena, unwritten
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import PASS, VIOLATION

STRIDE = (1 << 30) + 7  # the third of four rows begins past 2^31


def status(act: Callable[[torch.Tensor], object], edge: str = "right", protect: bool = False) -> int:
    """What becomes of a process that does this to a tensor [4, 33] with rows that far apart: 0, or minus a signal."""
    pid = os.fork()
    if not pid:
        faulthandler.disable()
        torch.set_num_threads(1)
        with open_arena("cpu", FenceOptions(), edge) as arena:
            tensor = arena.tensor("logits", (4, 33), torch.float32, strides=(STRIDE, 1), alignment=4)
            tensor.fill_(1)
            if protect:
                arena.protect()
            act(tensor)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def poke(tensor: torch.Tensor, element: int, byte: int = 0) -> None:
    ctypes.memset(tensor.data_ptr() + 4 * element + byte, 0, 1)


@pytest.mark.parametrize("edge", ["right", "left"])
def test_rows_hold_their_values_and_little_memory(edge: str) -> None:
    kept = {*cpu._KEPT}  # by other tests' targets
    before = int(Path("/proc/self/statm").read_text().split()[1])
    with open_arena("cpu", FenceOptions(), edge) as arena:
        tensor = arena.tensor("logits", (4, 33), torch.bfloat16, strides=(STRIDE, 1), offset=1, alignment=2)
        plain = torch.arange(132.0).view(4, 33).bfloat16()
        assert torch.equal(tensor.copy_(plain), plain)
        assert tensor[3].data_ptr() - tensor.data_ptr() == 3 * STRIDE * 2
        assert arena.check() == []
        out = arena.tensor("out", (4, 33), torch.float32, role="output", strides=(STRIDE, 1))
        assert unwritten(out).all()
        assert int(Path("/proc/self/statm").read_text().split()[1]) - before < 2000  # pages
        del tensor, out
    with open_arena("cpu"):
        assert {*cpu._KEPT} <= kept


def test_so_do_packed_columns() -> None:
    with open_arena("cpu") as arena:
        tensor = arena.tensor("logits", (33, 4), torch.bfloat16, strides=(1, STRIDE), offset=1, alignment=2)
        plain = torch.arange(132.0).view(33, 4).bfloat16()
        assert torch.equal(tensor.copy_(plain), plain)
        assert tensor[0, 3].data_ptr() - tensor.data_ptr() == 3 * STRIDE * 2
        assert arena.check() == []
        poke(tensor, 0, 66)  # the slack behind the first column
        [violation] = arena.check()
        assert violation.tensor == "logits"


@pytest.mark.parametrize(
    ("element", "expected"),
    [(0, 0), (3 * STRIDE + 32, 0), (3 * STRIDE + 33, -signal.SIGSEGV), (2 * STRIDE - (1 << 32), -signal.SIGSEGV),
     (STRIDE + 5000, -signal.SIGSEGV), (-5000, -signal.SIGSEGV)],
)  # fmt: skip
def test_what_lies_between_and_beyond_faults(element: int, expected: int) -> None:
    assert status(lambda tensor: poke(tensor, element)) == expected


def test_the_left_edge_and_protection() -> None:
    assert status(lambda tensor: poke(tensor, -1), "left") == -signal.SIGSEGV
    assert status(lambda tensor: poke(tensor, STRIDE), protect=True) == -signal.SIGSEGV
    assert status(lambda tensor: tensor.sum(), protect=True) == 0


def test_slack_beside_each_row_is_watched() -> None:
    with open_arena("cpu") as arena:
        tensor = arena.tensor("logits", (3, 33), torch.float32, strides=(STRIDE, 1)).fill_(1)
        assert arena.check() == []
        poke(tensor, -1)
        poke(tensor, STRIDE + 33, 2)
        found = [(v.symptom, v.where[0]) for v in arena.check()]
        assert found == [("logits:left", -4), ("logits:gap", 4 * (STRIDE + 33) + 2)]


def test_too_many_rows_are_refused() -> None:
    with open_arena("cpu") as arena, pytest.raises(UsageError, match="at most 64"):
        arena.tensor("logits", (65, 8), torch.float32, strides=(1 << 25, 1))


# ---- the fault ------------------------------------------------------------------------------------------------------


def case(tokens: int, *more: Fault, **config: object) -> Case:
    made = {**SIMPLEST, "experts": "0-12", "top_k": 2, **config}
    return Case("topk_softmax", made, (Step(Labels.range(tokens), faults=(*more, FAULT)),), seed=1)


FAULT = Fault("int32_boundary", "logits")


@pytest.mark.parametrize(
    "target", [pytest.param("topk_softmax@builtin", marks=pytest.mark.interpreter), "topk_softmax@torch"]
)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 64])
@pytest.mark.parametrize("edge", ["right", "left"])
def test_sound_routers_pass(target: str, tokens: int, edge: str) -> None:
    verdict = Runner("cpu").run(case(tokens, edge=edge, dtype="bfloat16"), target, RunOptions())
    assert (verdict.kind, verdict.violations) == (PASS, ())


def test_together_with_other_layouts() -> None:
    for name in ("transposed", "noncontiguous", "misaligned"):
        made = case(5, Fault(name, "logits"))
        get_space("topk_softmax").validate(made)
        assert Runner("cpu").run(made, "topk_softmax@torch", RunOptions()).kind == PASS


@pytest.mark.interpreter
@pytest.mark.parametrize("op", ["topk_softmax", "topk_sigmoid", "grouped_topk"])
def test_our_routers_find_columns_that_begin_past_2_to_the_31(op: str) -> None:
    config = {**get_space(op).simplest, "experts": "0-9", "top_k": 3}
    step = Step(Labels.range(5), faults=(Fault("far_columns", "logits"),))
    assert Runner("cpu").run(Case(op, config, (step,), 3), f"{op}@builtin", RunOptions()).kind == PASS


@pytest.mark.interpreter
@pytest.mark.parametrize("provider", ["builtin", "torch"])
@pytest.mark.parametrize(("op", "tensor"), [
    ("align", "ids"), ("experts_bf16", "x"), ("experts_bf16", "weights"), ("experts_bf16", "ids"),
    ("experts_nvfp4", "x"), ("experts_nvfp4", "ids"), ("nvfp4_quantize", "x"),
])  # fmt: skip
def test_columns_of_other_ops_begin_past_2_to_the_31(op: str, tensor: str, provider: str) -> None:
    """With the largest sizes of which columns may lie far apart, in the modes that have the fault."""
    space, runner, target = get_space(op), Runner("cpu"), f"{op}@{provider}"
    info = runner.describe(target)
    config = {axis.name: axis.values[0] for axis in space.axes(info)}
    wanted = {"hidden": 64, "intermediate": 32, "experts": 5, "top_k": 3}
    config = space.complete({**config, **{name: n for name, n in wanted.items() if name in config}}, info)
    if op == "nvfp4_quantize":
        config |= {"blocks": "0-3"}
    step = Step(Labels.range(5), faults=(Fault("far_columns", tensor),))
    for mode in ("eager", "graph"):
        if mode in space.modes(info):
            made = Case(op, config, (step,), 3, mode)
            space.validate(made)
            verdict = runner.run(made, target, RunOptions())
            assert (verdict.kind, verdict.violations) == (PASS, ())


def test_an_activation_leaves_no_room_for_columns_that_far_apart() -> None:
    """Of 64 columns of a gate and 64 of a factor none is laid far from the next."""
    space, runner, target = get_space("nvfp4_quantize"), Runner("cpu"), "nvfp4_quantize@torch"
    info = runner.describe(target)
    config = {axis.name: axis.values[0] for axis in space.axes(info)}
    config = space.complete(config, info) | {"blocks": "0-3", "activation": "silu"}
    step = Step(Labels.range(5), faults=(Fault("far_columns", "x"),))
    assert runner.run(Case("nvfp4_quantize", config, (step,), 3), target, RunOptions()).kind == PASS


def test_the_fault_is_for_few_rows() -> None:
    with pytest.raises(CaseError, match="64 rows at most, not 65"):
        get_space("topk_softmax").validate(case(65))


@pytest.mark.parametrize(("tokens", "dies"), [(1, False), (2, True), (9, True)])
def test_an_offset_in_32_bits_leaves_the_tensor(tokens: int, dies: bool) -> None:
    pid = os.fork()
    if not pid:
        faulthandler.disable()
        torch.set_num_threads(1)
        verdict = Runner("cpu").run(case(tokens), "topk_softmax@planted.int32_row_offset", RunOptions())
        os._exit(0 if verdict.kind == PASS else 1 if verdict.kind == VIOLATION else 2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == (-signal.SIGSEGV if dies else 0)
