"""What the checks of a layer see of one call: inputs, outputs, the references of both halves, a way to call again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from moe_fuzz.case import Case
from moe_fuzz.checks.experts.rounding import depth, floor, gamma, unit
from moe_fuzz.checks.layer.bound import Bounded, bounded
from moe_fuzz.checks.layer.decision import Decision
from moe_fuzz.checks.layer.known import known
from moe_fuzz.checks.relations import has_huge_neighbours, huge
from moe_fuzz.checks.routing.observation import Outputs as Routed
from moe_fuzz.contract import TargetInfo
from moe_fuzz.fence import unwritten
from moe_fuzz.ops.layer.inputs import LayerInputs, fresh_rows
from moe_fuzz.ops.routing.inputs import RoutingInputs

BENIGN = 62  # the generator's stream of what padding could have held instead
_OF_INPUTS = ("logits", "_logit_sizes", "logit_error", "defined", "flagged", "_router")
_ROUTER_TABLES = ("_reference", "error", "bounds", "defined", "flagged")


@dataclass(frozen=True)
class Outputs:
    """What a layer returned, as it was returned."""

    y: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class LayerObservation:
    """One call of a layer under test. All tensors are on one device, that of the inputs; T, H, E, k as in the op."""

    case: Case
    step_index: int
    info: TargetInfo
    inputs: LayerInputs
    outputs: Outputs
    call: Callable[[LayerInputs], Outputs]
    eager: Callable[[LayerInputs], Outputs] | None = None
    budget: dict[str, float] = field(default_factory=dict)
    brief: bool = False  # nobody reads the violations: what went wrong need not be found out

    def with_outputs(self, outputs: Outputs) -> LayerObservation:
        """The same inputs and another answer; what depends on the inputs alone is not computed again."""
        other = replace(self, outputs=outputs, budget={}, brief=True)
        for name in _OF_INPUTS:
            other.__dict__[name] = getattr(self, name)
        return other

    @property
    def hidden(self) -> torch.Tensor:
        return self.inputs.plain["hidden"]

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def dialect(self) -> str:
        return str(self.inputs.options["dialect"])

    # ---- the router's half ------------------------------------------------------------------------------------------

    @cached_property
    def logits(self) -> torch.Tensor:
        """float64 [T, E]."""
        return self.hidden.double() @ self.inputs.plain["gate"].double().t()

    @cached_property
    def _logit_sizes(self) -> torch.Tensor:
        """float64 [T, E]: the sum of the sizes of a logit's terms, which no sum on the way to it exceeds."""
        return self.hidden.double().abs() @ self.inputs.plain["gate"].double().abs().t()

    @cached_property
    def logit_error(self) -> torch.Tensor:
        """float64 [T, E]: how far a target's logits may be from these (docs/numerics.md)."""
        error = gamma(depth(self.hidden.shape[1])) * self._logit_sizes + 2.0**-126 * self.hidden.shape[1]
        if self.info.contract.logits == "dtype":
            error = error + unit(self.hidden.dtype) * (self.logits.abs() + error) + floor(self.hidden.dtype)
        return error

    @cached_property
    def flagged(self) -> torch.Tensor:
        """bool [T]: rows that the caller flagged as padding."""
        flags = self.inputs.plain.get("is_padding")
        return torch.zeros(self.tokens, dtype=torch.bool, device=self.hidden.device) if flags is None else flags

    @cached_property
    def defined(self) -> torch.Tensor:
        """bool [T]: not flagged, hidden states finite, and no logit, nor what is summed up on the way to it, near the
        end of float32."""
        limit = 2.0**15 if self.info.contract.logits == "dtype" and self.hidden.dtype == torch.float16 else 2.0**126
        steady = (self.logits.abs() + self.logit_error < limit) & (self._logit_sizes < 2.0**126)  # NaN is not
        steady = steady.all(dim=1)
        return self._router.defined & self.hidden.isfinite().all(dim=1) & steady

    @cached_property
    def _router(self) -> Decision:
        """The decision without what was decided: all that depends on the inputs alone."""
        options = self.inputs.options
        given = {name: options[name] for name in ("top_k", "renormalize", "scale", "scoring")}
        plain = {"logits": self.logits}
        plain |= {name: self.inputs.plain[name] for name in ("bias", "is_padding") if name in self.inputs.plain}
        inputs = RoutingInputs({**given, "padding": self.dialect}, plain)
        nothing = Routed(torch.empty(0, 0), torch.empty(0, 0, dtype=torch.int32))  # before there are outputs, too
        return Decision(self.case, self.step_index, self.info, inputs, nothing, _no_call, logit_error=self.logit_error)

    @cached_property
    def decision(self) -> Decision:
        """The router's half as the checks of routers see it."""
        found = replace(self._router, outputs=Routed(self.outputs.weights, self.outputs.ids), budget=self.budget)
        for name in _ROUTER_TABLES:
            found.__dict__[name] = getattr(self._router, name)
        found.__dict__["defined"] = self.defined
        return found

    # ---- the experts' half ------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> torch.Tensor:
        """int64 [R]: the rows whose y is judged, where the decision can be taken for one."""
        weights = self.outputs.weights
        sound = torch.isfinite(weights).all(dim=1) & (weights.abs() < 2.0**64).all(dim=1)
        return (self.decision.judged & sound).nonzero().flatten()

    @cached_property
    def expected(self) -> Bounded:
        """y of `rows` for the target's own decision, and how far it may be off."""
        return self.of_decision(self.outputs.weights, self.outputs.ids)

    def of_decision(self, weights: torch.Tensor, ids: torch.Tensor) -> Bounded:
        """y of `rows` for this decision."""
        return bounded(self.inputs, self.rows, weights, ids, self.info.contract)

    @cached_property
    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """y of `rows` for the target's own decision, float64 [R, H], and where its bits are known, bool."""
        return known(self.inputs, self.rows, self.outputs.weights, self.outputs.ids, self.info)

    # ---- relations --------------------------------------------------------------------------------------------------

    @cached_property
    def healed_inputs(self) -> LayerInputs:
        """The same inputs with ordinary hidden states in all rows that are not defined; the same where all are."""
        positions = (~self.defined).nonzero().flatten()
        if not len(positions):
            return self.inputs
        hidden = self.hidden.clone()
        labels = [self.inputs.rows[row] for row in positions.tolist()]
        hidden[positions] = fresh_rows(self.case, labels, BENIGN, hidden.device)
        return self.inputs.replace(hidden=hidden)

    @cached_property
    def neighbours(self) -> tuple[torch.Tensor, LayerInputs] | None:
        """The other ones, int64 [R], and the same inputs with huge numbers in every second defined row; None: a case
        has them by its seed, and where there are two rows."""
        rows = self.defined.nonzero().flatten()
        if len(rows) < 2 or not has_huge_neighbours(self):
            return None
        hidden = self.hidden.clone()
        hidden[rows[::2]] = huge(hidden[rows[::2]])
        return rows[1::2], self.inputs.replace(hidden=hidden)

    # ---- outputs ----------------------------------------------------------------------------------------------------

    @property
    def shaped(self) -> bool:
        """Whether the outputs have the contract's shapes; without them nothing else can be judged."""
        wanted = {name: shape for name, (shape, _) in self.inputs.results.items()}
        return all(tuple(getattr(self.outputs, name).shape) == shape for name, shape in wanted.items())

    @cached_property
    def comparable(self) -> torch.Tensor:
        """int64 [R]: rows that a second call on the same inputs must repeat: those that are written."""
        missing = self.decision.unwritten | unwritten(self.outputs.y).any(dim=1)
        return (~missing & ~self.flagged).nonzero().flatten()


def _no_call(inputs: Any) -> Routed:
    raise AssertionError("a router's half cannot be called alone")
