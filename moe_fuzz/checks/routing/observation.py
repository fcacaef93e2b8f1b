"""What the routing checks see of one call: inputs, outputs, the float64 reference, and a way to call again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moe_fuzz.case import Case
from moe_fuzz.checks.routing.scores import Scored
from moe_fuzz.checks.transfer import ends, to_host
from moe_fuzz.contract import TargetInfo
from moe_fuzz.fence import unwritten
from moe_fuzz.lazy import cached
from moe_fuzz.ops.routing.inputs import RoutingInputs, benign_rows
from moe_fuzz.reference import grouped_topk, routing

REFERENCES: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "topk_softmax": routing.topk_softmax,
    "topk_sigmoid": routing.topk_sigmoid,
    "grouped_topk": grouped_topk.grouped_topk,
}
#: what is computed of the inputs alone
_OF_INPUTS = ("_reference", "highest_logit", "error", "bounds", "flagged", "finite", "defined", "all_defined",
              "any_defined")  # fmt: skip


@dataclass(frozen=True)
class Outputs:
    """What a router returned, as it was returned."""

    weights: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class RoutingObservation(Scored):
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
        """The same inputs and another answer; the reference, and what else is known of the inputs, is not computed
        again."""
        other = replace(self, outputs=outputs, budget={})
        known = {"_reference": self._reference, "flagged": self.flagged, "defined": self.defined}
        other.__dict__.update({name: value for name, value in self.__dict__.items() if name in _OF_INPUTS} | known)
        return other

    def take(self, rows: torch.Tensor) -> RoutingObservation:
        """The call as seen on these rows alone, int64 [R], on the host: there, operations on a few rows take the least
        time. The reference is not computed again."""
        if len(rows) == self.tokens and self.logits.device.type == "cpu":
            return self
        plain, fluid = self.inputs.plain, self.inputs.fluid
        tables = {"scores": self.scores[rows], "defined": self.defined[rows]}
        if self.biased is not self.scores:
            tables["biased"] = self.biased[rows]
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
        reference = there["scores"], there.get("biased", there["scores"])
        part.__dict__.update(defined=there["defined"], _reference=reference)
        return part

    def benign(self, rows: torch.Tensor) -> torch.Tensor:
        """Ordinary logits for these rows: what could have stood there instead."""
        positions = rows.tolist() if self.rows is None else [self.rows[row] for row in rows.tolist()]
        return benign_rows(self.case, self.step_index, positions, self.logits.device)

    def right_answer(self, **changed: Any) -> Outputs:
        """What the reference gives for these inputs, some of them changed; without padding flags."""
        arguments = {**self.inputs.plain, **self.inputs.options, **changed}
        arguments.pop("is_padding", None)
        return Outputs(*REFERENCES[self.case.op](arguments.pop("logits"), arguments.pop("top_k"), **arguments))

    @cached
    def healed_inputs(self) -> RoutingInputs:
        """The same inputs with ordinary logits in all rows that are not defined; the very same where there are none."""
        if self.all_defined:
            return self.inputs
        positions = (~self.defined).nonzero().flatten()
        logits = self.logits.clone()
        logits[positions] = self.benign(positions)
        return self.inputs.replace(logits=logits)

    @cached
    def healed(self) -> tuple[RoutingInputs, Outputs]:
        """The call on `healed_inputs`; the call itself where nothing is to be healed."""
        inputs = self.healed_inputs
        return inputs, self.outputs if inputs is self.inputs else self.call(inputs)

    @cached
    def fewer(self) -> tuple[torch.Tensor, RoutingInputs]:
        """Every second defined row from the last, int64 [R], and the healed inputs of these rows alone."""
        if self.all_defined:
            rows = torch.arange(self.tokens - 1, -1, -2, device=self.logits.device)
        else:
            rows = self.defined.nonzero().flatten().flip(0)[::2]
        by_row = {name: self.healed_inputs.plain[name] for name in self.inputs.fluid if name in self.inputs.plain}
        return rows, self.healed_inputs.replace(**{name: tensor[rows] for name, tensor in by_row.items()})

    # ---- outputs ----------------------------------------------------------------------------------------------------

    @property
    def shaped(self) -> bool:
        """Whether the outputs have the contract's shape; without it nothing else can be judged."""
        shape = (self.tokens, self.inputs.width)
        return tuple(self.outputs.weights.shape) == shape and tuple(self.outputs.ids.shape) == shape

    @cached
    def _range(self) -> tuple[float, float, float, float]:
        """The lowest and the highest weight, NaN where one is, and id: so that one look at each output is enough where
        nothing is wrong with any row. NaN for an output that is not of the contract's dtype, and where there is none.
        """
        weights, ids = self.outputs.weights, self.outputs.ids
        if weights.dtype != torch.float32 or ids.dtype != torch.int32 or not weights.numel():
            return (math.nan,) * 4
        low, high, first, last = ends(weights, ids)
        return low, high, first, last

    @cached
    def all_written(self) -> bool:
        """Whether no element can hold its poison: as a weight that is a NaN, as an id a number far below 0."""
        low, _, first, _ = self._range
        return (low > -math.inf and first >= -1) or not bool(self.unwritten.any())

    @cached
    def faultless(self) -> bool:
        """Whether each row, whatever rules it, was written, has finite weights >= 0 and k distinct ids in [0, E)."""
        low, high, first, last = self._range
        number = self.expert_map is None and not self.n_shared
        return number and low >= 0 and high < math.inf and first >= 0 and last < self.experts and not self._repeats

    @cached
    def _repeats(self) -> bool:
        if self.top_k == 1:
            return False
        ordered = self.routed.sort(dim=1).values
        return bool((ordered[:, 1:] == ordered[:, :-1]).any())

    @cached
    def all_weights(self) -> torch.Tensor:
        """float64 [T, k + n_shared]."""
        return self.outputs.weights.double()

    @cached
    def weights(self) -> torch.Tensor:
        """float64 [T, k]: of the routed slots."""
        return self.all_weights[:, : self.top_k] if self.n_shared else self.all_weights

    @cached
    def routed(self) -> torch.Tensor:
        """int64 [T, k]: the ids of the routed slots as they were returned, physical where there is a map."""
        return (self.outputs.ids[:, : self.top_k] if self.n_shared else self.outputs.ids).long()

    @cached
    def ids(self) -> torch.Tensor:
        """int64 [T, k]: the logical ids of the routed slots; -1 for a physical id that no expert has."""
        if self.expert_map is None:
            return self.routed
        physical, logical = self.expert_map.long().sort()
        at = torch.searchsorted(physical, self.routed).clamp(max=self.experts - 1)
        return torch.where(physical[at] == self.routed, logical[at], -1)

    @cached
    def unwritten(self) -> torch.Tensor:
        """bool [T]: rows in which an element of an output still holds its poison."""
        return unwritten(self.outputs.weights).any(dim=1) | unwritten(self.outputs.ids).any(dim=1)

    @cached
    def lawful(self) -> torch.Tensor:
        """bool [T]: rows bound to k distinct experts and finite weights: all but those under a padding dialect."""
        if not self.all_written:
            return ~self.unwritten if self.dialect == "distinct" else ~(self.flagged | self.unwritten)
        if self.dialect != "distinct":
            return ~self.flagged
        return torch.ones(len(self.outputs.ids), dtype=torch.bool, device=self.outputs.ids.device)

    @cached
    def repeating(self) -> torch.Tensor:
        """bool [T]: rows that name an expert twice, as it was returned."""
        return _repeating(self.routed)

    @cached
    def sound_ids(self) -> torch.Tensor:
        """bool [T]: lawful rows whose ids are distinct and in range."""
        if self.faultless:
            return self.lawful
        in_range = ((self.ids >= 0) & (self.ids < self.experts)).all(dim=1)
        return self.lawful & in_range & ~(self.repeating if self.expert_map is None else _repeating(self.ids))

    @cached
    def sound_weights(self) -> torch.Tensor:
        """bool [T, k + n_shared]: weights that are finite and >= 0."""
        return (self.all_weights >= 0) & (self.all_weights < torch.inf)

    @cached
    def judged(self) -> torch.Tensor:
        """bool [T]: defined rows with sound ids, which the parity checks judge."""
        if self.all_defined:
            return self.sound_ids
        return self.defined if self.faultless else self.defined & self.sound_ids  # no defined row is flagged

    @cached
    def any_judged(self) -> bool:
        return self.any_defined if self.faultless else bool(self.judged.any())

    @cached
    def all_judged(self) -> bool:
        """Whether every row is, as far as that is known without a look at each; there is at least one."""
        return self.faultless and self.all_defined

    @cached
    def chosen(self) -> torch.Tensor:
        """int64 [T, k]: the logical ids where they are sound, else some expert's, in rows that are judged by no one."""
        return self.ids if self.faultless else self.ids * self.sound_ids.view(-1, 1)

    def gather(self, table: torch.Tensor) -> torch.Tensor:
        """table [T, E] at the kernel's own ids -> [T, k]."""
        return table.gather(1, self.chosen)

    @cached
    def chosen_scores(self) -> torch.Tensor:
        """float64 [T, k]."""
        return self.gather(self.scores)

    @cached
    def chosen_biased(self) -> torch.Tensor:
        """float64 [T, k]."""
        return self.chosen_scores if self.biased is self.scores else self.gather(self.biased)

    @cached
    def chosen_error(self) -> torch.Tensor:
        """float64 [T, k]: `error` at the kernel's own ids."""
        return self.error_of(self.gather(self.logits).double(), self.chosen_scores)

    @cached
    def worst_chosen(self) -> torch.Tensor:
        """float64 [T]: the lowest biased score of an expert that was taken."""
        return self.chosen_biased.amin(dim=1)

    @cached
    def best_left(self) -> torch.Tensor:
        """float64 [T]: the highest biased score of an expert that was not; -inf where there is none."""
        taken = self.chosen_biased
        best = self.biased.scatter_(1, self.chosen, -torch.inf).amax(dim=1)
        self.biased.scatter_(1, self.chosen, taken)  # as they were: a copy of all scores takes longer
        return best

    @cached
    def least_lead(self) -> float:
        """The least that an expert that was taken leads one that was not, in all rows, judged or not; NaN where there
        is no difference."""
        return float((self.worst_chosen - self.best_left).amin())

    def lowest_left(self) -> torch.Tensor:
        """float64 [T, E]: of each expert that was not taken the lowest biased score that a target may compute for it,
        -inf for one that was. A new tensor."""
        return self.bounds[0].scatter(1, self.chosen, -torch.inf)

    @cached
    def lowest(self) -> torch.Tensor:
        """float64 [T, k]: the lowest biased score that a target may compute for each chosen expert."""
        return self.gather(self.bounds[0])

    @cached
    def highest(self) -> torch.Tensor:
        """float64 [T, k]: the highest one."""
        return self.gather(self.bounds[1])


def _repeating(ids: torch.Tensor) -> torch.Tensor:
    ordered = ids.sort(dim=1).values
    return (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
