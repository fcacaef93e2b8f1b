"""The router's half of a layer: its logits are the target's own, and known only within their rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch

from moe_fuzz.checks.routing.observation import RoutingObservation
from moe_fuzz.checks.routing.scores import SIGMOID_FLOORS, U


@dataclass(frozen=True)
class Decision(RoutingObservation):
    """A router that saw logits within `logit_error` of those in `inputs`. The checks of routers judge it."""

    logit_error: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # float64 [T, E]

    @cached_property
    def interval(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The lowest and the highest float32 score [T, E] that a target may compute, from any logits it may have.

        With e for the logits' error and e' for the largest in the row, a softmax score lies within s * exp(±(e + e')):
        its own logit moves it by e, the sum of all by e' at most. A sigmoid lies between its values at x - e and x + e.
        Around these, the error of a score as in `RoutingObservation.error`.
        """
        x, e = self.logits.double(), self.logit_error
        if self.scoring == "sigmoid":
            floor = SIGMOID_FLOORS[self.info.contract.sigmoid]
            low, high = (x - e).sigmoid(), (x + e).sigmoid()
            relative = (2 * (e - x).clamp(min=0) + 12) * U
        else:
            floor = 2.0**-126
            most = e.amax(dim=1, keepdim=True)
            low, high = self.scores * (-(e + most)).exp(), self.scores * (e + most).clamp(max=700.0).exp()
            distance = (x - x.amax(dim=1, keepdim=True)).abs() + 2 * most
            relative = (2 * distance + self.experts + 2 * math.log(self.experts) + 16) * U
        relative = torch.nan_to_num(relative, nan=torch.inf)
        low = torch.where(low > 0, low * (1 - relative).clamp(min=0.0), torch.zeros_like(low)) - floor
        return low, torch.nan_to_num(high * (1 + relative), nan=torch.inf) + floor

    @cached_property
    def error(self) -> torch.Tensor:
        """[T, E]: how far a target's score may be from the one of these logits."""
        low, high = self.interval
        return torch.maximum(self.scores - low, high - self.scores)

    @cached_property
    def chosen_error(self) -> torch.Tensor:
        return self.gather(self.error)

    @cached_property
    def all_defined(self) -> bool:
        return bool(self.defined.all())  # what the layer says of its hidden states is part of it

    @cached_property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, E]: the interval with the bias; without one, selection may also be by the logits themselves.

        That adds nothing: a score grows with its logit, so that logits within their error have scores in the interval.
        """
        low, high = self.interval
        if self.bias is None:
            return low, high
        bias = self.bias.double()
        low, high = low + bias, high + bias
        finite = torch.isfinite(bias)
        slack = U * torch.maximum(low.abs(), high.abs()).masked_fill(~finite, 0.0)
        return low - slack, high + slack
