"""What the inputs of a call say of it before there is an answer: which rows are defined, the reference's scores, and
how far those of a target may be from them."""

from __future__ import annotations

import math

import torch

from moe_fuzz.case import Case
from moe_fuzz.checks.transfer import ends
from moe_fuzz.contract import TargetInfo
from moe_fuzz.lazy import cached
from moe_fuzz.ops.routing.inputs import RoutingInputs
from moe_fuzz.reference import grouped_topk, routing

U = 2.0**-24  # unit roundoff of float32
#: By Contract.sigmoid: how far a sigmoid may be from the exact one, for all that its relative error does not say. Two
#: roundings of 0.5 * tanh + 0.5; PTX gives the relative error of tanh.approx.f32 as at most 2^-11.
SIGMOID_FLOORS = {"exp": 2.0**-120, "tanh": 2.0**-120 + 2 * U, "tanh.approx": 2.0**-12 + 2 * U}


class Scored:
    """The half of a RoutingObservation that needs no outputs."""

    case: Case
    info: TargetInfo
    inputs: RoutingInputs

    # ---- inputs -----------------------------------------------------------------------------------------------------

    @cached
    def logits(self) -> torch.Tensor:
        return self.inputs.plain["logits"]

    @cached
    def bias(self) -> torch.Tensor | None:
        return self.inputs.plain.get("bias")

    @cached
    def tokens(self) -> int:
        return self.logits.shape[0]

    @cached
    def experts(self) -> int:
        return self.logits.shape[1]

    @cached
    def top_k(self) -> int:
        return self.inputs.top_k

    @cached
    def renormalize(self) -> bool:
        return bool(self.inputs.options["renormalize"])

    @cached
    def scale(self) -> float:
        return float(self.inputs.options["scale"])

    @cached
    def dialect(self) -> str:
        return str(self.inputs.options["padding"])

    @cached
    def scoring(self) -> str:
        return str(self.inputs.options.get("scoring", self.case.op.removeprefix("topk_")))

    @cached
    def n_group(self) -> int:
        return int(self.inputs.options.get("n_group", 1))

    @cached
    def topk_group(self) -> int:
        return int(self.inputs.options.get("topk_group", 1))

    @cached
    def group_score(self) -> str:
        return str(self.inputs.options.get("group_score", "max"))

    @cached
    def n_shared(self) -> int:
        return self.inputs.width - self.top_k

    @cached
    def expert_map(self) -> torch.Tensor | None:
        """From logical to physical ids, int32 [E]."""
        return self.inputs.plain.get("expert_map")

    # ---- reference --------------------------------------------------------------------------------------------------

    @cached
    def _reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        return routing.SCORES[self.scoring](self.logits, self.bias, self.finite)

    @cached
    def scores(self) -> torch.Tensor:
        """float64 scores [T, E]: softmax or sigmoid. Never NaN."""
        return self._reference[0]

    @cached
    def biased(self) -> torch.Tensor:
        """float64 scores by which experts are selected [T, E]. Never NaN."""
        return self._reference[1]

    @cached
    def highest_logit(self) -> torch.Tensor:
        """float64 [T, 1]."""
        return self.logits.amax(dim=1, keepdim=True).double()

    @cached
    def error(self) -> torch.Tensor:
        """δ [T, E]: how far a float32 score may be from the float64 one (docs/numerics.md)."""
        return self.error_of(self.logits.double(), self.scores)

    def error_of(self, logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """δ of some of a row's experts: of these float64 logits, which have these scores."""
        if self.scoring == "sigmoid":
            relative = (2 * logits.neg().clamp(min=0) + 12) * U
            floor = SIGMOID_FLOORS[self.info.contract.sigmoid]
        else:
            distance = self.highest_logit - logits
            relative = distance.mul_(2).add_(self.experts).add_(2 * math.log(self.experts)).add_(16).mul_(U)
            floor = 2.0**-126
        scaled = relative.mul_(scores)
        if not self.finite:  # else neither is NaN or infinite
            scaled = scaled.masked_fill_(scores == 0, 0.0).nan_to_num_(nan=torch.inf)
        return scaled.add_(floor)

    @cached
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The lowest and the highest biased score [T, E] that a target may compute for each expert, around the float64
        one.

        A masked expert (logit -inf) has a score of 0 + bias for some targets, for others it is out of the race.
        """
        size = self.biased.abs()
        if not self.finite:
            size.masked_fill_(size == torch.inf, 0.0)
        slack = size.mul_(U).add_(self.error)
        low = self.biased - slack
        if not self.finite:
            low.masked_fill_(self.logits == -torch.inf, -torch.inf)
        return low, slack.add_(self.biased)

    # ---- rows -------------------------------------------------------------------------------------------------------

    @cached
    def flagged(self) -> torch.Tensor:
        """bool [T]: rows that the caller flagged as padding."""
        flags = self.inputs.plain.get("is_padding")
        return torch.zeros(self.tokens, dtype=torch.bool, device=self.logits.device) if flags is None else flags

    @cached
    def finite(self) -> bool:
        """Whether no logit and no bias is NaN or infinite: most of what is asked of single rows then need not be."""
        return _finite(self.logits) and (self.bias is None or _finite(self.bias))

    @cached
    def defined(self) -> torch.Tensor:
        """bool [T]: not flagged, and selection and weights are determined by the contract."""
        if "n_group" in self.inputs.options:  # also where all is finite: it may be that no choice of groups holds k
            groups = self.n_group, self.topk_group, self.group_score
            return grouped_topk.defined_rows(self.logits, self.bias, self.top_k, *groups) & ~self.flagged
        if self.finite:
            return ~self.flagged
        if self.bias is not None and not _finite(self.bias):
            return routing.defined_rows(self.logits, self.bias, self.top_k) & ~self.flagged
        # The same of the logits alone, whose ends say it of all rows but those in which experts are masked.
        defined = (self.highest_logit[:, 0] < math.inf) & ~self.flagged  # of a NaN neither comparison holds
        masked = (defined & (self.logits.amin(dim=1) == -math.inf)).nonzero().flatten()
        if len(masked):
            defined[masked] = (self.logits[masked] > -math.inf).sum(dim=1) >= self.top_k
        return defined

    @cached
    def all_defined(self) -> bool:
        if self.finite and "is_padding" not in self.inputs.plain and "n_group" not in self.inputs.options:
            return True
        return bool(self.defined.all())

    @cached
    def any_defined(self) -> bool:
        return self.tokens > 0 if self.all_defined else bool(self.defined.any())


def _finite(values: torch.Tensor) -> bool:
    if not values.numel():
        return True
    low, high = ends(values)
    return low > -math.inf and high < math.inf
