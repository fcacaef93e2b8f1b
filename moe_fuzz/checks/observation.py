"""What the routing checks see of one call: inputs, outputs, the float64 reference, and a way to call again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.fence import unwritten
from moe_fuzz.ops.routing.inputs import Inputs, benign_rows
from moe_fuzz.reference.routing import defined_rows, softmax_scores

U = 2.0**-24  # unit roundoff of float32


@dataclass(frozen=True)
class Outputs:
    """What a router returned, as it was returned."""

    weights: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class RoutingObservation:
    """One call of a router under test. All tensors are on the CPU; T, E, k as in the op."""

    case: Case
    step_index: int
    info: TargetInfo
    inputs: Inputs
    outputs: Outputs
    call: Callable[[Inputs], Outputs]  # runs the target again, in fences, on other inputs; a graph is replayed
    eager: Callable[[Inputs], Outputs] | None = None  # runs it without a graph, where `call` is a replay
    budget: dict[str, float] = field(default_factory=dict)  # largest accepted error over bound, by check

    def with_outputs(self, outputs: Outputs) -> RoutingObservation:
        """The same inputs and another answer; the reference is not computed again."""
        other = replace(self, outputs=outputs, budget={})
        for name in ("scores", "biased", "defined", "_reference", "error", "flagged"):
            other.__dict__[name] = getattr(self, name)
        return other

    # ---- inputs -----------------------------------------------------------------------------------------------------

    @property
    def logits(self) -> torch.Tensor:
        return self.inputs.plain["logits"]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.inputs.plain.get("bias")

    @property
    def tokens(self) -> int:
        return self.logits.shape[0]

    @property
    def experts(self) -> int:
        return self.logits.shape[1]

    @property
    def top_k(self) -> int:
        return self.inputs.top_k

    @property
    def renormalize(self) -> bool:
        return bool(self.inputs.options["renormalize"])

    @property
    def scale(self) -> float:
        return float(self.inputs.options["scale"])  # type: ignore[arg-type]

    @property
    def dialect(self) -> str:
        return str(self.inputs.options["padding"])

    # ---- reference --------------------------------------------------------------------------------------------------

    @cached_property
    def _reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        return softmax_scores(self.logits, self.bias)

    @cached_property
    def scores(self) -> torch.Tensor:
        """float64 softmax scores [T, E]."""
        return self._reference[0]

    @cached_property
    def biased(self) -> torch.Tensor:
        """float64 scores by which experts are selected [T, E]."""
        return self._reference[1]

    @cached_property
    def error(self) -> torch.Tensor:
        """δ [T, E]: how far a float32 softmax score may be from the float64 one (docs/numerics.md)."""
        x = self.logits.double()
        distance = (x - x.amax(dim=1, keepdim=True)).abs()
        relative = (2 * distance + self.experts + 2 * math.log(self.experts) + 16) * U
        scaled = torch.where(self.scores > 0, self.scores * relative, torch.zeros_like(relative))
        return torch.nan_to_num(scaled, nan=torch.inf) + 2.0**-126

    @cached_property
    def flagged(self) -> torch.Tensor:
        """bool [T]: rows that the caller flagged as padding."""
        flags = self.inputs.plain.get("is_padding")
        return torch.zeros(self.tokens, dtype=torch.bool) if flags is None else flags

    @cached_property
    def defined(self) -> torch.Tensor:
        """bool [T]: not flagged, and the reference of the scores is finite."""
        return defined_rows(self.logits, self.bias, self.top_k) & ~self.flagged

    @cached_property
    def healed(self) -> tuple[Inputs, Outputs]:
        """The same call with ordinary logits in all rows that are not defined; the call itself where there are none."""
        positions = (~self.defined).nonzero().flatten()
        if not len(positions):
            return self.inputs, self.outputs
        logits = self.logits.clone()
        logits[positions] = benign_rows(self.case, self.step_index, positions.tolist())
        inputs = self.inputs.replace(logits=logits)
        return inputs, self.call(inputs)

    # ---- outputs ----------------------------------------------------------------------------------------------------

    @property
    def shaped(self) -> bool:
        """Whether the outputs have the contract's shape; without it nothing else can be judged."""
        shape = (self.tokens, self.top_k)
        return tuple(self.outputs.weights.shape) == shape and tuple(self.outputs.ids.shape) == shape

    @cached_property
    def weights(self) -> torch.Tensor:
        return self.outputs.weights.double()

    @cached_property
    def ids(self) -> torch.Tensor:
        return self.outputs.ids.long()

    @cached_property
    def unwritten(self) -> torch.Tensor:
        """bool [T]: rows in which an element of an output still holds its poison."""
        return unwritten(self.outputs.weights).any(dim=1) | unwritten(self.outputs.ids).any(dim=1)

    @cached_property
    def lawful(self) -> torch.Tensor:
        """bool [T]: rows bound to k distinct experts and finite weights: all but those under a padding dialect."""
        speaks = self.flagged if self.dialect != "distinct" else torch.zeros_like(self.flagged)
        return ~speaks & ~self.unwritten

    @cached_property
    def sound_ids(self) -> torch.Tensor:
        """bool [T]: lawful rows whose ids are distinct and in range."""
        in_range = ((self.ids >= 0) & (self.ids < self.experts)).all(dim=1)
        ordered = self.ids.sort(dim=1).values
        distinct = (ordered[:, 1:] != ordered[:, :-1]).all(dim=1)
        return self.lawful & in_range & distinct

    @cached_property
    def judged(self) -> torch.Tensor:
        """bool [T]: defined rows with sound ids, which the parity checks judge."""
        return self.defined & self.sound_ids

    def gather(self, table: torch.Tensor) -> torch.Tensor:
        """table [T, E] at the kernel's own ids -> [T, k]; unsound ids read column 0 and are judged by no one."""
        ids = torch.where(self.sound_ids.view(-1, 1), self.ids, torch.zeros_like(self.ids))
        return table.gather(1, ids)


def first(mask: torch.Tensor) -> tuple[int, ...]:
    """The coordinate of the first True."""
    return tuple(int(i) for i in mask.nonzero()[0])


def row_text(row: torch.Tensor, limit: int = 8) -> str:
    """A row for a person: `[0.25, 0.125, …]`."""
    items = [f"{float(v):.6g}" if row.is_floating_point() else str(int(v)) for v in row[:limit]]
    return "[" + ", ".join(items) + (", …]" if row.numel() > limit else "]")
