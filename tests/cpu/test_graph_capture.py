"""What surrounds a capture, on a machine without CUDA: torch's graphs are stood in for, the order of things is ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_fuzz.case import Case, Step
from moe_fuzz.execute.call import CaptureFailed, TargetError
from moe_fuzz.execute.capture import Captured, GraphPool
from moe_fuzz.execute.graph import GraphSteps
from moe_fuzz.execute.runner import Runner
from moe_fuzz.fence import FenceOptions, cuda_driver, open_arena, unwritten
from moe_fuzz.labels import Labels
from moe_fuzz.ops.routing.inputs import materialize
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.options import RunOptions
from moe_fuzz.reference.routing import topk_softmax
from moe_fuzz.targets.bind import bind
from moe_fuzz.verdict import OOM, REJECTED, VIOLATION


class Graph:
    """Does the call again, into the tensors of the first."""

    def __init__(self, function: Callable[[], Any], result: Any) -> None:
        self.function, self.result, self.alive = function, result, True

    def replay(self) -> None:
        new = self.function()
        for old, fresh in zip(_tensors(self.result), _tensors(new), strict=True):
            old.copy_(fresh)

    def reset(self) -> None:
        self.alive = False


class Pool:
    def __init__(self) -> None:
        self.log: list[str] = []

    def warm_up(self, function: Callable[[], Any]) -> Any:
        self.log.append("warm up")
        return function()

    def capture(self, function: Callable[[], Any]) -> tuple[Graph, Any]:
        self.log.append("capture")
        result = function()
        return Graph(function, result), result


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "synchronize", lambda: None)


@pytest.mark.interpreter
@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("with_out", [False, True])
def test_a_bucket_answers_for_each_replays_own_inputs(pieces: bool, with_out: bool) -> None:
    target = bind("topk_softmax@builtin")
    config = {**SIMPLEST, "experts": "0-15", "top_k": 3, "out": with_out}
    steps = tuple(Step(Labels.range(8)) for _ in range(3))
    inputs = [materialize(Case("topk_softmax", config, steps, 5, "graph"), index) for index in range(3)]
    pool = Pool()
    with open_arena("cpu", FenceOptions(), "right") as arena:
        bucket = Captured(inputs[0], target, arena, with_out, pieces, pool)  # type: ignore[arg-type]
        assert pool.log == (["warm up"] * 3 + ["capture"] * 3 if pieces else ["warm up", "capture"])
        for one in inputs:
            weights, ids = bucket.replay(one)
            expected = topk_softmax(one.plain["logits"], 3)
            assert torch.equal(ids, expected[1])
            torch.testing.assert_close(weights, expected[0])
        graphs = list(bucket._graphs)
        graphs[-2 if pieces else -1].function = lambda: ()  # a router that does nothing any more
        graphs[-2 if pieces else -1].result = ()
        assert unwritten(bucket.replay(inputs[0])[0]).all()
        bucket.close()
        assert not any(graph.alive for graph in graphs)
        assert arena.check() == []


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize("ends_well", [False, True])
def test_a_failed_capture_tells_what_the_target_raised(monkeypatch: pytest.MonkeyPatch, ends_well: bool) -> None:
    """Ending the capture raises an error of its own, which must not hide the target's; the stream is put back."""
    log: list[object] = []

    @contextmanager
    def stream(side: object) -> Iterator[None]:
        log.append(side)
        try:
            yield
        finally:
            log.append("main")

    class Refusing:
        def capture_begin(self, pool: object, capture_error_mode: str) -> None:
            assert capture_error_mode == "global"
            log.append(pool)

        def capture_end(self) -> None:
            log.append("end")
            if not ends_well:
                raise RuntimeError("capture was invalidated")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refusing)
    monkeypatch.setattr(torch.cuda, "stream", stream)

    def router() -> None:
        raise ValueError("no capture, please")

    pool = GraphPool("pool", "side")  # type: ignore[arg-type]
    with pytest.raises(CaptureFailed) as caught:
        pool.capture(router)
    assert caught.value.error.violation.symptom == "ValueError"
    assert caught.value.error.violation.site.startswith("test_graph_capture.py:")
    assert log == ["side", "pool", "end", "main"]
    if not ends_well:
        with pytest.raises(CaptureFailed) as caught:
            pool.capture(lambda: None)
        assert "invalidated" in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "declared", "kind", "key"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True, OOM, ("oom", "out-of-memory")),
        (RuntimeError("no capture"), True, VIOLATION, ("capture", "RuntimeError")),
        (RuntimeError("no capture"), False, REJECTED, (REJECTED, "")),
    ],
)
def test_memory_that_runs_out_while_capturing_says_nothing_of_the_target(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, declared: bool, kind: str, key: tuple[str, str]
) -> None:
    def run(self: GraphSteps) -> None:
        raise CaptureFailed(TargetError(raised))

    monkeypatch.setattr(GraphSteps, "run", run)
    runner = Runner("cpu")
    target = runner._bind("topk_softmax@torch")
    contract = replace(target.info.contract, graph=declared)
    runner._targets["topk_softmax@torch"] = replace(target, info=replace(target.info, contract=contract))
    case = Case("topk_softmax", {**SIMPLEST, "experts": "0-7", "top_k": 2}, (Step(Labels.range(2)),), 1, "graph")
    verdict = runner.run(case, "topk_softmax@torch", RunOptions())
    assert (verdict.kind, verdict.key, verdict.spent) == (kind, key, True)
