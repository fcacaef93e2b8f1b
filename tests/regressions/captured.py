"""CUDA graphs as a host can act them out: what the host does at a capture is done once, the rest at every replay.

A planted bug that shows under capture alone cannot be run here. But whether its case can show it is known here: its
code is told that its tensors are on a device, and that it is captured when it is; then the checks judge as they do on a
GPU. What is acted out:

* a call that is recorded sees `torch.cuda.is_current_stream_capturing()`, and each replay is that call again;
* numbers that the host counts are the capture's at each replay;
* a value that the host reads from a tensor breaks a capture;
* what is launched on a stream that was not joined is not in the graph: its result stays as it was;
* where DIVISION says so, a division by a number of the host is a product with its reciprocal, as in torch's kernels
  for CUDA.

What is not: other orders of a sum than the host's, `exp` and `rsqrt` to the last bit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from moe_fuzz.case import Case
from moe_fuzz.execute import graph, runner
from moe_fuzz.execute.buckets import Simulated
from moe_fuzz.execute.call import CaptureFailed, TargetError
from moe_fuzz.execute.calls import Results
from moe_fuzz.fence import canary
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.planted.entry import Planted
from moe_fuzz.targets.bind import bind
from moe_fuzz.verdict import Verdict

DIVISION = ("by the number", "by its reciprocal")
_READS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal, torch.ops.aten.is_nonzero}
_DIVISIONS = {torch.ops.aten.div.Tensor, torch.ops.aten.div_.Tensor}
_OPTIONS = RunOptions(fence=FenceOptions(hard=(), readonly=(), own="off"))


class OnDevice(torch.Tensor):
    """A tensor of the host that says it is not."""

    is_cuda = True


@dataclass
class Acted:
    """What the device is doing."""

    module: Any  # of the planted bug
    division: str
    capturing: bool = False  # the target is being captured, or replayed: in both its host code takes that branch
    aside: bool = False  # on a stream of the target's own
    unjoined: list[torch.Tensor] = field(default_factory=list)  # made there

    def call(self, function: Callable[..., Any], *tensors: Any, **named: Any) -> Any:
        """The target's call, on tensors that say they are on a device."""
        there = partial(tree_map_only, torch.Tensor, lambda tensor: tensor.as_subclass(OnDevice))
        with _Ops(self):
            result = function(*there(tensors), **there(named))
        for tensor in self.unjoined:
            canary.poison(tensor)
        self.unjoined.clear()
        return tree_map_only(torch.Tensor, lambda tensor: tensor.as_subclass(torch.Tensor), result)

    @contextmanager
    def captured(self) -> Iterator[None]:
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    @contextmanager
    def stream(self, other: object) -> Iterator[None]:
        self.aside = True
        try:
            yield
        finally:
            self.aside = False

    @property
    def counted(self) -> dict[str, dict[Any, int]]:
        """Numbers that the host counts from call to call."""
        found = {name: value for name, value in vars(self.module).items() if isinstance(value, dict)}
        return {name: dict(value) for name, value in found.items()
                if value and all(isinstance(number, int) for number in value.values())}  # fmt: skip

    def count(self, numbers: dict[str, dict[Any, int]]) -> None:
        for name, value in numbers.items():
            vars(self.module)[name].update(value)


class _Ops(TorchDispatchMode):
    """Every operation that the target asks torch for."""

    def __init__(self, acted: Acted) -> None:
        super().__init__()
        self.acted = acted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        acted, kwargs = self.acted, kwargs or {}
        if acted.capturing and func.overloadpacket in _READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        if func in _DIVISIONS and acted.division == DIVISION[1] and not isinstance(args[1], torch.Tensor):
            quotient = func(args[0], 1.0, *args[2:], **kwargs)  # of the quotient's dtype
            inner = torch.float64 if quotient.dtype == torch.float64 else torch.float32
            return quotient.mul_(torch.tensor(1 / args[1], dtype=inner))
        result = func(*args, **kwargs)
        if acted.capturing and acted.aside and isinstance(result, torch.Tensor):
            acted.unjoined.append(result)
        return result


def verdict_of(bug: Planted, case: Case, division: str = DIVISION[0], told: bool = True) -> Verdict:
    """What the case's checks say of the planted bug where it is captured. `told`: the bug can see that it is."""
    acted = Acted(importlib.import_module(f"moe_fuzz.planted.{bug.module}"), division)

    class Recorded(Simulated):
        def __init__(self, *made: Any) -> None:
            super().__init__(*made)
            self.numbers = acted.counted  # at the capture
            try:
                with acted.captured():
                    self.call.bare()
            except Exception as error:
                raise CaptureFailed(TargetError(error)) from error

        def _replay(self) -> Results:
            now = acted.counted
            acted.count(self.numbers)
            try:
                with acted.captured():
                    return super()._replay()
            finally:
                acted.count(now)

    target = bind(bug.target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "Taped", Recorded)
        patch.setattr(graph, "Simulated", Recorded)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: told and acted.capturing)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "Stream", object)
        patch.setattr(torch.cuda, "stream", acted.stream)
        steps = graph.GraphSteps(case, replace(target, function=partial(acted.call, target.function)), _OPTIONS, "cpu")
        with steps.staged():
            return runner._verdict(steps)
