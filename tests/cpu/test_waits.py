"""How often a step waits for the device. Without one: arenas lie on the host, captures are stood in for, waits counted.

Where several processes share a GPU, each wait is a turn of theirs: at 7,000 a second in all, whatever was launched,
they are what bounds the rate of cases. tests/gpu/test_waits_cuda.py counts those that torch makes too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.contract import Capabilities, Contract, TargetInfo
from moe_fuzz.execute import clock, steps
from moe_fuzz.execute.capture import GraphPool
from moe_fuzz.execute.eager import EagerSteps
from moe_fuzz.execute.graph import GraphSteps
from moe_fuzz.execute.runner import _verdict
from moe_fuzz.fence import Arena, FenceOptions, cuda_driver
from moe_fuzz.fence.cpu import CpuArena
from moe_fuzz.fence.cuda_driver import DeviceLost
from moe_fuzz.labels import Labels
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.options import RunOptions
from moe_fuzz.reference.routing import topk_softmax
from moe_fuzz.targets.bind import Target
from moe_fuzz.verdict import CRASH, OOM, PASS, VIOLATION, Verdict, Violation

STRICT = Contract(deterministic=True, batch_invariant=True)
NAN = Fault("nan_rows", "logits", Labels.parse("1"))


class Device:
    """Counts waits; what was enqueued is done, and broken, when it is waited for."""

    def __init__(self) -> None:
        self.waits = 0
        self.broken = False

    def synchronize(self) -> None:
        self.waits += 1
        if self.broken:
            raise DeviceLost("illegal-access", "a kernel broke the CUDA context")


class Graph:
    def __init__(self, function: Callable[[], Any], result: Any) -> None:
        self.function, self.result = function, result

    def replay(self) -> None:
        kept, new = ((one,) if isinstance(one, torch.Tensor) else one for one in (self.result, self.function()))
        for old, fresh in zip(kept, new, strict=True):
            old.copy_(fresh)

    def reset(self) -> None: ...


class Pool:
    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def capture(self, function: Callable[[], Any]) -> tuple[Graph, Any]:
        result = function()
        return Graph(function, result), result


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()

    class HostArena(CpuArena):
        def look(self, beside: Sequence[Arena] = ()) -> Callable[[], list[Violation]]:
            # The comparison is enqueued.
            return lambda: [found for arena in (self, *beside) for found in CpuArena.check(arena)]  # type: ignore[arg-type]

        def check(self) -> list[Violation]:
            found.synchronize()
            return super().check()

    monkeypatch.setattr(cuda_driver, "synchronize", found.synchronize)
    monkeypatch.setattr(steps, "open_arena", lambda device, options, edge: HostArena(options, edge))
    monkeypatch.setattr(GraphPool, "of_process", Pool)
    return found


def run(
    function: Callable[..., Any], mode: str, *faults: Fault, contract: Contract = STRICT, count: int = 1,
    options: RunOptions | None = None, out: bool = False,
) -> Verdict:  # fmt: skip
    info = TargetInfo("topk_softmax@it", "topk_softmax", "it", contract=contract, capabilities=Capabilities(out=True))
    keywords = {name: name for name in ("renormalize", "bias", "scale", "out")}
    target = Target(info, function, keywords, ("logits", "top_k"))
    one = Step(Labels.range(6), Labels(), faults)
    case = Case("topk_softmax", {**SIMPLEST, "experts": "0-7", "top_k": 2, "out": out}, (one,) * count, 3, mode)
    made = (EagerSteps if mode == "eager" else GraphSteps)(case, target, options or RunOptions(), "cuda")
    return _verdict(made)


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("faults", [(), (NAN,)])
def test_an_eager_step_waits_once(device: Device, faults: tuple[Fault, ...], out: bool) -> None:
    """For its own call, three relations and the canaries."""
    calls = []

    def counted(*given: Any, **more: Any) -> Any:
        calls.append(given[0].shape)
        return topk_softmax(*given, **more)

    verdict = run(counted, "eager", *faults, count=2, out=out)
    assert (verdict.kind, verdict.parity) == (PASS, True)
    assert device.waits == 2
    assert len(calls) == 2 * (4 if faults else 3)  # itself, determinism, isolation where a row is undefined, fewer rows


@pytest.mark.parametrize("mode", ["graph", "piecewise"])
def test_a_graph_step_waits_once_and_a_bucket_once(device: Device, mode: str) -> None:
    verdict = run(topk_softmax, mode, NAN, count=3)
    assert (verdict.kind, verdict.parity) == (PASS, True)
    assert device.waits == 1 + 3


def test_a_check_that_doubts_waits_for_each_call_of_its_own(device: Device) -> None:
    """What a relation asks for only where the results differ is not called ahead; and the canaries are asked again."""
    calls: list[int] = []

    def drifting(logits: torch.Tensor, top_k: int, **more: Any) -> Any:
        weights, ids = topk_softmax(logits, top_k, **more)
        calls.append(0)
        return weights * (1 + 2.0**-23 * len(calls)), ids

    verdict = run(drifting, "eager", contract=replace(STRICT, deterministic=True))
    assert "determinism" in {violation.check for violation in verdict.violations}
    assert device.waits == 1 + len(calls) - 3 + 1


def test_no_wait_for_what_the_target_launched_is_taken_for_our_judgement(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A later call launches a kernel that never ends, and raises: the next wait is the canaries'."""
    told: list[dict[str, Any]] = []
    waits: list[dict[str, Any]] = []
    calls: list[int] = []

    def raising(logits: torch.Tensor, top_k: int, **more: Any) -> Any:
        weights, ids = topk_softmax(logits, top_k, **more)
        calls.append(0)
        if len(calls) == 5:  # asked for by a check that doubts: nobody has called it ahead
            raise ValueError("not again")
        return weights * (1 + 2.0**-23 * len(calls)), ids

    monkeypatch.setattr(steps, "DEVICE_ELEMENTS", 1)
    monkeypatch.setattr(steps.Steps, "inputs", lambda self, at: self.family.materialize(self.case, at, "cpu"))
    synchronize = cuda_driver.synchronize
    monkeypatch.setattr(cuda_driver, "synchronize", lambda: (waits.append(told[-1] if told else {}), synchronize()))
    monkeypatch.setattr(device, "synchronize", cuda_driver.synchronize)
    with clock.heard(told.append):
        verdict = run(raising, "eager", NAN)
    assert "error" in {violation.check for violation in verdict.violations}
    assert {"still": "judge"} in told
    assert len(waits) >= 2
    assert {"still": "judge"} not in waits


def test_an_error_is_told_of_the_call_that_raised_it(device: Device) -> None:
    calls: list[int] = []

    def raising(at: int) -> Callable[..., Any]:
        def router(logits: torch.Tensor, top_k: int, **more: Any) -> Any:
            calls.append(0)
            if len(calls) == at:
                raise ValueError("not again")
            return topk_softmax(logits, top_k, **more)

        return router

    for at, when in ((1, ""), (2, " (when `determinism` called it again)"), (3, " (when `isolation` called it again)")):
        calls.clear()
        verdict = run(raising(at), "eager", NAN)
        assert [(v.check, v.symptom) for v in verdict.violations] == [("error", "ValueError")]
        assert verdict.violations[0].message == "raised ValueError on a valid input: not again" + when


def test_nobody_hears_of_a_relation_that_is_not_asked_for(device: Device) -> None:
    calls: list[int] = []

    def once(logits: torch.Tensor, top_k: int, **more: Any) -> Any:
        calls.append(0)
        return topk_softmax(logits, top_k, **more)

    assert run(once, "eager", options=RunOptions(checks=("weights", "canary"))).kind == PASS
    assert len(calls) == 1
    calls.clear()
    assert run(once, "eager", contract=Contract()).kind == PASS
    assert len(calls) == 1


def test_results_are_copied_before_the_next_call_overwrites_them(device: Device) -> None:
    kept = torch.empty(6, 2), torch.empty(6, 2, dtype=torch.int32)

    def same_buffers(logits: torch.Tensor, top_k: int, **more: Any) -> Any:
        found = tuple(mine[: len(logits)] for mine in kept)
        for mine, new in zip(found, topk_softmax(logits, top_k, **more), strict=True):
            mine.copy_(new)
        return found

    assert run(same_buffers, "eager", NAN).kind == PASS
    assert run(same_buffers, "eager", NAN, options=RunOptions(fence=FenceOptions(own="off"))).kind == PASS


def test_a_lost_device_is_a_crash_whatever_our_own_code_raised_of_it(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def breaking(logits: torch.Tensor, top_k: int, **more: Any) -> Any:
        device.broken = True
        return topk_softmax(logits, top_k, **more)

    verdict = run(breaking, "eager")
    assert (verdict.kind, [v.symptom for v in verdict.violations]) == (CRASH, ["illegal-access"])

    def refused(*given: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("moe_fuzz.execute.calls.fetch", refused)
    verdict = run(breaking, "eager")
    assert (verdict.kind, [v.symptom for v in verdict.violations]) == (CRASH, ["illegal-access"])
    device.broken = False
    with pytest.raises(RuntimeError):
        run(topk_softmax, "eager")


def test_a_canary_that_a_relation_damages_is_found_without_another_wait(device: Device) -> None:
    calls: list[int] = []

    def overruns_second(logits: torch.Tensor, top_k: int, **more: Any) -> Any:
        calls.append(0)
        room = torch.empty(8)
        if len(calls) == 2:
            ctypes.memset(room.data_ptr() + 32, 0, 1)
        return topk_softmax(logits, top_k, **more)

    soft = FenceOptions(hard=(), readonly=())
    verdict = run(overruns_second, "eager", options=RunOptions(fence=soft))
    assert (verdict.kind, [v.symptom for v in verdict.violations]) == (VIOLATION, ["own:right"])
    assert device.waits == 1


def test_memory_that_runs_out_in_a_call_made_ahead_counts_when_it_is_asked_for(device: Device) -> None:
    calls: list[int] = []

    def starved(logits: torch.Tensor, top_k: int, **more: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return topk_softmax(logits, top_k, **more)

    assert run(starved, "eager").kind == OOM
