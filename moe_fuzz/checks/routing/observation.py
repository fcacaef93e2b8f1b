"""What the routing checks see of one call: inputs, outputs, the float64 reference, and a way to call again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from moe_fuzz.case import Case
from moe_fuzz.checks.transfer import to_host
from moe_fuzz.contract import TargetInfo
from moe_fuzz.fence import unwritten
from moe_fuzz.ops.routing.inputs import RoutingInputs, benign_rows
from moe_fuzz.reference import grouped_topk, routing

U = 2.0**-24  # unit roundoff of float32
REFERENCES: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "topk_softmax": routing.topk_softmax,
    "topk_sigmoid": routing.topk_sigmoid,
    "grouped_topk": grouped_topk.grouped_topk,
}


@dataclass(frozen=True)
class Outputs:
    """What a router returned, as it was returned."""

    weights: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class RoutingObservation:
    """One call of a router under test. All tensors are on one device, that of the inputs; T, E, k as in the op."""

    case: Case
    step_index: int
    info: TargetInfo
    inputs: RoutingInputs
    outputs: Outputs
    call: Callable[[RoutingInputs], Outputs]  # runs the target again, in fences, on other inputs; a graph is replayed
    eager: Callable[[RoutingInputs], Outputs] | None = None  # runs it without a graph, where `call` is a replay
    budget: dict[str, float] = field(default_factory=dict)  # largest accepted error over bound, by check
    rows: list[int] | None = None  # positions in the step of the rows that are seen; None: all of them

    def with_outputs(self, outputs: Outputs) -> RoutingObservation:
        """The same inputs and another answer; the reference is not computed again."""
        other = replace(self, outputs=outputs, budget={})
        for name in ("_reference", "error", "bounds", "defined", "flagged"):
            other.__dict__[name] = getattr(self, name)
        return other

    def take(self, rows: torch.Tensor) -> RoutingObservation:
        """The call as seen on these rows alone, int64 [R], on the host: there, operations on a few rows take the least
        time. What has been computed of them is not computed again."""
        if len(rows) == self.tokens and self.logits.device.type == "cpu":
            return self
        plain, fluid = self.inputs.plain, self.inputs.fluid
        tables = {f"{name}/{at}": table[rows] for name in ("_reference", "bounds")
                  for at, table in enumerate(getattr(self, name))}  # fmt: skip
        tables |= {name: getattr(self, name)[rows] for name in ("error", "defined", "flagged")}
        tables |= {"weights": self.outputs.weights[rows], "ids": self.outputs.ids[rows], "rows": rows}
        inputs = {name: tensor[rows] if name in fluid else tensor for name, tensor in plain.items()}
        there = to_host(tables | {f"plain/{name}": tensor for name, tensor in inputs.items()})
        part = replace(
            self,
            inputs=self.inputs.replace(**{name: there[f"plain/{name}"] for name in inputs}),
            outputs=Outputs(there["weights"], there["ids"]),
            rows=there["rows"].tolist(),
            budget={},
        )
        part.__dict__.update({name: there[name] for name in ("error", "defined", "flagged")})
        part.__dict__.update({name: (there[f"{name}/0"], there[f"{name}/1"]) for name in ("_reference", "bounds")})
        return part

    def benign(self, rows: torch.Tensor) -> torch.Tensor:
        """Ordinary logits for these rows: what could have stood there instead."""
        positions = rows.tolist() if self.rows is None else [self.rows[row] for row in rows.tolist()]
        return benign_rows(self.case, self.step_index, positions, self.logits.device)

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
        return float(self.inputs.options["scale"])

    @property
    def dialect(self) -> str:
        return str(self.inputs.options["padding"])

    @property
    def scoring(self) -> str:
        return str(self.inputs.options.get("scoring", self.case.op.removeprefix("topk_")))

    @property
    def n_group(self) -> int:
        return int(self.inputs.options.get("n_group", 1))

    @property
    def topk_group(self) -> int:
        return int(self.inputs.options.get("topk_group", 1))

    @property
    def group_score(self) -> str:
        return str(self.inputs.options.get("group_score", "max"))

    @property
    def n_shared(self) -> int:
        return self.inputs.width - self.top_k

    @property
    def expert_map(self) -> torch.Tensor | None:
        """From logical to physical ids, int32 [E]."""
        return self.inputs.plain.get("expert_map")

    # ---- reference --------------------------------------------------------------------------------------------------

    @cached_property
    def _reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        return routing.SCORES[self.scoring](self.logits, self.bias)

    def right_answer(self, **changed: Any) -> Outputs:
        """What the reference gives for these inputs, some of them changed; without padding flags."""
        arguments = {**self.inputs.plain, **self.inputs.options, **changed}
        arguments.pop("is_padding", None)
        return Outputs(*REFERENCES[self.case.op](arguments.pop("logits"), arguments.pop("top_k"), **arguments))

    @property
    def scores(self) -> torch.Tensor:
        """float64 scores [T, E]: softmax or sigmoid."""
        return self._reference[0]

    @property
    def biased(self) -> torch.Tensor:
        """float64 scores by which experts are selected [T, E]."""
        return self._reference[1]

    @cached_property
    def error(self) -> torch.Tensor:
        """δ [T, E]: how far a float32 score may be from the float64 one (docs/numerics.md)."""
        x = self.logits.double()
        if self.scoring == "sigmoid":
            relative = (2 * x.neg().clamp(min=0) + 12) * U
            floor = 2.0**-120 + (2 * U if self.info.contract.sigmoid == "tanh" else 0.0)
        else:
            distance = (x - x.amax(dim=1, keepdim=True)).abs_()
            relative = distance.mul_(2).add_(self.experts).add_(2 * math.log(self.experts)).add_(16).mul_(U)
            floor = 2.0**-126
        scaled = relative.mul_(self.scores).masked_fill_(self.scores == 0, 0.0)  # a score is never NaN
        return scaled.nan_to_num_(nan=torch.inf).add_(floor)

    @cached_property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The lowest and the highest biased score [T, E] that a target may compute for each expert.

        A masked expert (logit -inf) has a score of 0 + bias for some targets, for others it is out of the race.
        """
        size = self.biased.abs()
        if not self.finite:
            size.masked_fill_(size == torch.inf, 0.0)  # neither is a biased score ever NaN
        slack = size.mul_(U).add_(self.error)
        low = self.biased - slack
        if not self.finite:
            low.masked_fill_(self.logits == -torch.inf, -torch.inf)
        return low, slack.add_(self.biased)

    @cached_property
    def flagged(self) -> torch.Tensor:
        """bool [T]: rows that the caller flagged as padding."""
        flags = self.inputs.plain.get("is_padding")
        return torch.zeros(self.tokens, dtype=torch.bool, device=self.logits.device) if flags is None else flags

    @cached_property
    def finite(self) -> bool:
        """Whether no logit and no bias is NaN or infinite: most of what is asked of single rows then need not be."""
        return bool(self.logits.isfinite().all()) and (self.bias is None or bool(self.bias.isfinite().all()))

    @cached_property
    def defined(self) -> torch.Tensor:
        """bool [T]: not flagged, and selection and weights are determined by the contract."""
        if "n_group" in self.inputs.options:  # also where all is finite: it may be that no choice of groups holds k
            groups = self.n_group, self.topk_group, self.group_score
            return grouped_topk.defined_rows(self.logits, self.bias, self.top_k, *groups) & ~self.flagged
        if self.finite:
            return ~self.flagged
        return routing.defined_rows(self.logits, self.bias, self.top_k) & ~self.flagged

    @cached_property
    def healed_inputs(self) -> RoutingInputs:
        """The same inputs with ordinary logits in all rows that are not defined; the very same where there are none."""
        positions = (~self.defined).nonzero().flatten()
        if not len(positions):
            return self.inputs
        logits = self.logits.clone()
        logits[positions] = self.benign(positions)
        return self.inputs.replace(logits=logits)

    @cached_property
    def healed(self) -> tuple[RoutingInputs, Outputs]:
        """The call on `healed_inputs`; the call itself where nothing is to be healed."""
        inputs = self.healed_inputs
        return inputs, self.outputs if inputs is self.inputs else self.call(inputs)

    @cached_property
    def fewer(self) -> tuple[torch.Tensor, RoutingInputs]:
        """Every second defined row from the last, int64 [R], and the healed inputs of these rows alone."""
        rows = self.defined.nonzero().flatten().flip(0)[::2]
        by_row = {name: self.healed_inputs.plain[name] for name in self.inputs.fluid if name in self.inputs.plain}
        return rows, self.healed_inputs.replace(**{name: tensor[rows] for name, tensor in by_row.items()})

    # ---- outputs ----------------------------------------------------------------------------------------------------

    @property
    def shaped(self) -> bool:
        """Whether the outputs have the contract's shape; without it nothing else can be judged."""
        shape = (self.tokens, self.inputs.width)
        return tuple(self.outputs.weights.shape) == shape and tuple(self.outputs.ids.shape) == shape

    @cached_property
    def all_weights(self) -> torch.Tensor:
        """float64 [T, k + n_shared]."""
        return self.outputs.weights.double()

    @property
    def weights(self) -> torch.Tensor:
        """float64 [T, k]: of the routed slots."""
        return self.all_weights[:, : self.top_k]

    @cached_property
    def routed(self) -> torch.Tensor:
        """int64 [T, k]: the ids of the routed slots as they were returned, physical where there is a map."""
        return self.outputs.ids[:, : self.top_k].long()

    @cached_property
    def ids(self) -> torch.Tensor:
        """int64 [T, k]: the logical ids of the routed slots; -1 for a physical id that no expert has."""
        if self.expert_map is None:
            return self.routed
        physical, logical = self.expert_map.long().sort()
        at = torch.searchsorted(physical, self.routed).clamp(max=self.experts - 1)
        return torch.where(physical[at] == self.routed, logical[at], -1)

    @cached_property
    def unwritten(self) -> torch.Tensor:
        """bool [T]: rows in which an element of an output still holds its poison."""
        return unwritten(self.outputs.weights).any(dim=1) | unwritten(self.outputs.ids).any(dim=1)

    @cached_property
    def lawful(self) -> torch.Tensor:
        """bool [T]: rows bound to k distinct experts and finite weights: all but those under a padding dialect."""
        return ~self.unwritten if self.dialect == "distinct" else ~(self.flagged | self.unwritten)

    @cached_property
    def repeating(self) -> torch.Tensor:
        """bool [T]: rows that name an expert twice, as it was returned."""
        return _repeating(self.routed)

    @cached_property
    def sound_ids(self) -> torch.Tensor:
        """bool [T]: lawful rows whose ids are distinct and in range."""
        in_range = ((self.ids >= 0) & (self.ids < self.experts)).all(dim=1)
        return self.lawful & in_range & ~(self.repeating if self.expert_map is None else _repeating(self.ids))

    @cached_property
    def sound_weights(self) -> torch.Tensor:
        """bool [T, k + n_shared]: weights that are finite and >= 0."""
        return (self.all_weights >= 0) & (self.all_weights < torch.inf)

    @cached_property
    def judged(self) -> torch.Tensor:
        """bool [T]: defined rows with sound ids, which the parity checks judge."""
        return self.defined & self.sound_ids

    @cached_property
    def any_judged(self) -> bool:
        return bool(self.judged.any())

    @cached_property
    def chosen(self) -> torch.Tensor:
        """int64 [T, k]: the logical ids where they are sound, else 0, in rows that are judged by no one."""
        return self.ids * self.sound_ids.view(-1, 1)

    def gather(self, table: torch.Tensor) -> torch.Tensor:
        """table [T, E] at the kernel's own ids -> [T, k]."""
        return table.gather(1, self.chosen)

    @cached_property
    def lowest(self) -> torch.Tensor:
        """float64 [T, k]: the lowest biased score that a target may compute for each chosen expert."""
        return self.gather(self.bounds[0])

    @cached_property
    def highest(self) -> torch.Tensor:
        """float64 [T, k]: the highest one."""
        return self.gather(self.bounds[1])


def _repeating(ids: torch.Tensor) -> torch.Tensor:
    ordered = ids.sort(dim=1).values
    return (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
