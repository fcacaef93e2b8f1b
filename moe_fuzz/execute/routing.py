"""A step of a routing case: inputs in fences, the call, then every check that the case and the options ask for."""

from __future__ import annotations

from typing import Any

import torch

from moe_fuzz.case import Case
from moe_fuzz.checks import CHECKS, binding, metamorphic, routing, structural  # noqa: F401 - they register
from moe_fuzz.checks.observation import Outputs, RoutingObservation
from moe_fuzz.execute.call import guarded
from moe_fuzz.fence import Arena
from moe_fuzz.ops import get_space
from moe_fuzz.ops.routing.inputs import Inputs, materialize
from moe_fuzz.options import RunOptions
from moe_fuzz.targets.bind import Target
from moe_fuzz.verdict import Violation


class RoutingStep:
    """Runs one step in an arena that stays open while its outputs are judged."""

    def __init__(self, case: Case, index: int, target: Target, arena: Arena, options: RunOptions) -> None:
        self.case, self.index, self.target, self.arena, self.options = case, index, target, arena, options
        self.parity = False
        self.budget = 0.0

    def judge(self) -> list[Violation]:
        """The violations of this step: of the first check that finds any, for what follows may be its consequence."""
        inputs = materialize(self.case, self.index)
        outputs = self._call(inputs)
        if isinstance(outputs, Violation):
            return self._selected("structure", lambda: [outputs])
        seen = RoutingObservation(self.case, self.index, self.target.info, inputs, outputs, self._call_again)
        found = self._selected("canary", self.arena.check)
        checks = CHECKS["routing"]
        found += self._selected("structure", lambda: checks["structure"](seen))
        if not seen.shaped:
            return found
        for name in get_space(self.case.op).checks:  # their order is that of attribution
            if name in checks and name != "structure":
                found += self._selected(name, lambda judge=checks[name]: judge(seen))
        if not any(violation.check == "canary" for violation in found):
            found += self._selected("canary", self.arena.check)  # what the calls of the checks did
        self.budget = max(seen.budget.values(), default=0.0)
        self.parity = not found and not binding.binding(seen)
        return found

    def _selected(self, name: str, judge: Any) -> list[Violation]:
        return list(judge()) if self.options.checks is None or name in self.options.checks else []

    def _call_again(self, inputs: Inputs) -> Outputs:
        outputs = self._call(inputs)
        if isinstance(outputs, Violation):  # the shape of a result cannot depend on what a check replaced
            raise TypeError(outputs.message)
        return outputs

    def _call(self, inputs: Inputs) -> Outputs | Violation:
        """Places the inputs, protects them, and calls the target."""
        capabilities = self.target.info.capabilities
        out: tuple[torch.Tensor, ...] = ()
        arguments: dict[str, Any] = dict(inputs.options)
        placed = inputs.place(self.arena, capabilities)
        logits = placed.pop("logits")
        arguments |= placed
        tokens = inputs.plain["logits"].shape[0]
        if self.case.config["out"]:
            shape, alignment = (tokens, inputs.width), max(4, capabilities.alignment)
            out = arguments["out"] = (
                self.arena.tensor("weights", shape, torch.float32, role="output", alignment=alignment),
                self.arena.tensor("ids", shape, torch.int32, role="output", alignment=alignment),
            )
        self.arena.protect()
        try:
            with self.arena.own():
                result = guarded(lambda: self.target(logits, inputs.top_k, arguments), logits.device.type)
        finally:
            self.arena.unprotect()
        return _outputs(result, out, logits.device)


def _outputs(result: Any, out: tuple[torch.Tensor, ...], device: torch.device) -> Outputs | Violation:
    """(weights, ids), or the violation that it is not that, or not the buffers `out` that were given.

    They are copied to the CPU, to the bit: a target may use its own buffers again, and checks call it again. So the
    checks are the same for every device.
    """
    if (
        isinstance(result, tuple | list)
        and len(result) >= 2
        and all(isinstance(t, torch.Tensor) and t.dim() == 2 for t in result[:2])
    ):
        for name, tensor in zip(("weights", "ids"), result, strict=False):
            if tensor.device != device:
                message = f"{name} is on the wrong device"
                return Violation("structure", f"{name}:device", message, name, (), str(device), str(tensor.device))
        for name, given, got in zip(("weights", "ids"), out, result, strict=False):
            if given.numel() and not _same_memory(given, got):
                return Violation(
                    "structure", f"{name}:out", f"{name} did not come back in the buffer `out` that was given", name,
                    (), f"the tensor out[{0 if name == 'weights' else 1}]", "another tensor",
                )  # fmt: skip
        return Outputs(*(tensor.detach().to("cpu", copy=True) for tensor in result[:2]))
    kind = (
        type(result).__name__ if not isinstance(result, tuple | list) else f"{type(result).__name__} of {len(result)}"
    )
    return Violation(
        "structure", "result", "the result is not a pair of tensors (weights, ids)", expected="(weights, ids)", got=kind
    )


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
