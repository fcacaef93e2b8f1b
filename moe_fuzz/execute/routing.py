"""One call of a router: its tensors laid into an arena, the call itself, and what came back.

The eager mode makes a new call for each step and each relation. The graph modes keep one a bucket: its tensors are the
static buffers, filled anew before each replay.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_fuzz.checks.observation import Outputs
from moe_fuzz.execute.call import guarded
from moe_fuzz.fence import Arena, cuda_driver
from moe_fuzz.ops.routing.inputs import Inputs
from moe_fuzz.targets.bind import Target
from moe_fuzz.verdict import Violation


class BadResult(Exception):
    """What a target returned is no result at all: the violation it is."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(violation.message)
        self.violation = violation


class RoutingCall:
    """A call that is ready to be made. Its tensors live in the arena."""

    def __init__(self, inputs: Inputs, target: Target, arena: Arena, with_out: bool) -> None:
        """with_out: the result goes into buffers of ours."""
        capabilities = target.info.capabilities
        self.target, self.arena, self.top_k = target, arena, inputs.top_k
        self.shape = (inputs.plain["logits"].shape[0], inputs.width)
        self.tensors = inputs.place(arena, capabilities)  # logits, bias, is_padding
        self.arguments: dict[str, Any] = inputs.options | {k: v for k, v in self.tensors.items() if k != "logits"}
        self.out: tuple[torch.Tensor, ...] = ()
        if with_out:
            alignment = max(4, capabilities.alignment)
            self.out = self.arguments["out"] = (
                arena.tensor("weights", self.shape, torch.float32, role="output", alignment=alignment),
                arena.tensor("ids", self.shape, torch.int32, role="output", alignment=alignment),
            )

    @property
    def device(self) -> torch.device:
        return self.tensors["logits"].device

    def bare(self, logits: torch.Tensor | None = None) -> Any:
        """Calls the target and returns what it returns. Nothing is guarded, nothing waits for the device."""
        return self.target(self.tensors["logits"] if logits is None else logits, self.top_k, self.arguments)

    def run(self) -> Any:
        """Calls the target with its inputs read-only and its own memory fenced. Raises TargetError, DeviceLost."""
        self.arena.protect()
        try:
            with self.arena.own():
                return guarded(self.bare, self.device.type)
        finally:
            self.arena.unprotect()

    def fetched(self, device: torch.device) -> Outputs:
        """Calls the target, and fetches the result to `device`. Also raises BadResult."""
        return fetch(self.pair(self.run()), device)

    def pair(self, result: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights, ids) of a result. Raises BadResult if it is not that, or not the buffers that were given."""
        if (
            not isinstance(result, tuple | list)
            or len(result) < 2
            or not all(isinstance(t, torch.Tensor) and t.dim() == 2 for t in result[:2])
        ):
            several = isinstance(result, tuple | list)
            raise BadResult(Violation(
                "structure", "result", "the result is not a pair of tensors (weights, ids)", expected="(weights, ids)",
                got=type(result).__name__ + (f" of {len(result)}" if several else ""),
            ))  # fmt: skip
        for name, tensor in zip(("weights", "ids"), result, strict=False):
            if tensor.device != self.device:
                message = f"{name} is on the wrong device"
                raise BadResult(
                    Violation("structure", f"{name}:device", message, name, (), str(self.device), str(tensor.device))
                )
        for name, given, got in zip(("weights", "ids"), self.out, result, strict=False):
            if given.numel() and not _same_memory(given, got):
                raise BadResult(Violation(
                    "structure", f"{name}:out", f"{name} did not come back in the buffer `out` that was given", name,
                    (), f"the tensor out[{0 if name == 'weights' else 1}]", "another tensor",
                ))  # fmt: skip
        return result[0], result[1]


def fetch(pair: tuple[torch.Tensor, torch.Tensor], device: torch.device) -> Outputs:
    """The result, copied to the bit to where it is judged: a target may use its own buffers again, and checks call it
    again."""
    if device.type == pair[0].device.type:
        return Outputs(*(tensor.detach().clone() for tensor in pair))
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in pair]
    for copy, tensor in zip(copies, pair, strict=True):
        copy.copy_(tensor.detach(), non_blocking=True)
    cuda_driver.synchronize()  # once for both
    return Outputs(*copies)


def call_once(inputs: Inputs, target: Target, arena: Arena, with_out: bool) -> Outputs:
    """Lays the inputs, calls, and fetches the result. Raises TargetError, BadResult, DeviceLost, MemoryError."""
    return RoutingCall(inputs, target, arena, with_out).fetched(inputs.device)


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
