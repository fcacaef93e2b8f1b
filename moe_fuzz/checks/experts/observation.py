"""What the checks of experts see of one call: inputs, outputs, the float64 result with its bound, a way to call again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from moe_fuzz.case import Case
from moe_fuzz.checks.experts import others
from moe_fuzz.checks.experts.bounds import Numbers, evaluate, shared
from moe_fuzz.checks.experts.flags import first_look
from moe_fuzz.checks.experts.known import exact_answer
from moe_fuzz.checks.experts.nonfinite import never_finite
from moe_fuzz.checks.experts.values import rounded
from moe_fuzz.checks.relations import has_huge_neighbours, huge
from moe_fuzz.contract import TargetInfo
from moe_fuzz.fence import unwritten
from moe_fuzz.mirror import on_host, rows_of, uploaded
from moe_fuzz.ops.experts.inputs import ExpertsInputs, benign_rows
from moe_fuzz.reference.align import expert_of_slot

_STORES = ("intermediate", "slot")  # that a contract may leave out
_TURNS = ("relabel", "shards", "scaling", "backends")
_MOST_INTERPRETED = 1 << 16  # bytes of codes that a backend may decode as a whole in the interpreter
_RANDOM_WIDTH = 16  # from which on no two rows of x are alike, nor two rows of a projection


@dataclass(frozen=True)
class Outputs:
    """What the experts returned, as it was returned."""

    y: torch.Tensor


@dataclass(frozen=True)
class ExpertsObservation:
    """One call of experts under test. All tensors are on one device, that of the inputs; T, k, H, I, E as in the op."""

    case: Case
    step_index: int
    info: TargetInfo
    inputs: ExpertsInputs
    outputs: Outputs
    call: Callable[[ExpertsInputs], Outputs]  # runs the target again, in fences, on other inputs; a graph is replayed
    eager: Callable[[ExpertsInputs], Outputs] | None = None  # runs it without a graph, where `call` is a replay
    budget: dict[str, float] = field(default_factory=dict)  # largest accepted error over bound, by check
    rows: list[int] | None = None  # positions in the step of the rows that are seen; None: all of them
    whole: tuple[ExpertsObservation, torch.Tensor] | None = None  # what this is taken of, and which rows
    brief: bool = False  # nobody reads the violations: what went wrong need not be found out

    def with_outputs(self, y: torch.Tensor) -> ExpertsObservation:
        """The same inputs and another answer; what is known of the inputs is not computed again."""
        other = replace(self, outputs=Outputs(y), budget={}, brief=True)
        other.__dict__.update({name: self.__dict__[name] for name in _OF_INPUTS if name in self.__dict__})
        return other

    def take(self, rows: torch.Tensor) -> ExpertsObservation:
        """The call as seen on these rows alone, int64 [R]; what is known of them is not computed again."""
        positions = on_host(rows).tolist()
        part = replace(self, inputs=self.rows_of(self.inputs, rows), outputs=Outputs(self.outputs.y[rows]), budget={},
                       rows=positions if self.rows is None else [self.rows[at] for at in positions],
                       whole=(self, rows))  # fmt: skip
        part.__dict__.update(self.known_of(rows))
        return part

    def known_of(self, rows: torch.Tensor | slice) -> dict[str, Any]:
        """What the inputs alone decide of these rows, int64 [R], by the name of the property that has it."""
        found: dict[str, Any] = {"numbers": self.numbers.take(rows)}
        for name in ("expert", "kept", "sound", "real", "random", "claimed", "hopeless"):
            found[name] = rows_of(getattr(self, name), rows)
        for name in ("limits", "exact") if self.inputs.exact else ("limits",):
            found[name] = tuple(one[rows] for one in getattr(self, name))
        return found

    def benign(self, rows: torch.Tensor) -> torch.Tensor:
        """Ordinary x for these rows: what could have stood there instead."""
        positions = on_host(rows).tolist()
        if self.rows is not None:
            positions = [self.rows[row] for row in positions]
        return benign_rows(self.case, self.step_index, positions, self.x.device)

    # ---- inputs -----------------------------------------------------------------------------------------------------

    @property
    def x(self) -> torch.Tensor:
        return self.inputs.plain["x"]

    @property
    def weights(self) -> torch.Tensor:
        return self.inputs.plain["weights"]

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def experts(self) -> int:
        """How many are here."""
        return self.inputs.plain["w13"].shape[0]

    @property
    def on_input(self) -> bool:
        return bool(self.inputs.options["apply_weight_on_input"])

    @cached_property
    def expert(self) -> torch.Tensor:
        """int64 [T, k]: the expert of each slot, -1 where it is dropped."""
        expert_map = self.inputs.plain.get("expert_map")
        there_is = None if expert_map is None else on_host(expert_map)
        return self._made(expert_of_slot(on_host(self.inputs.plain["ids"]), self.experts, there_is))

    @cached_property
    def kept(self) -> torch.Tensor:
        """bool [T, k]: slots that have an expert here."""
        return self._made(on_host(self.expert) >= 0)

    @cached_property
    def sound(self) -> torch.Tensor:
        """bool [T]: x is finite, or what is not is lost as the contract says; and the weights of the kept slots are."""
        lost = self.inputs.quantizes and self.info.contract.nonfinite == "reference"
        weights = (on_host(self.weights).isfinite() | ~on_host(self.kept)).all(dim=1)
        return self._made(weights if lost else weights & self.inputs.finite_rows)

    @cached_property
    def real(self) -> torch.Tensor:
        """bool [T]: rows that are not padding, and whose values are determined."""
        return self._made(on_host(self.sound) & ~on_host(self.inputs.padding))

    @cached_property
    def random(self) -> torch.Tensor:
        """bool [T]: rows on which errors are those of random numbers: iid data, no expert twice, roundings to nearest.
        """
        contract = self.info.contract
        valid = (
            self.inputs.recipe == "dense"
            and contract.intermediate == "dtype"
            and contract.accumulate == "float32"
            and contract.weight_dtype == "float32"
            and (contract.weighted_x == "float32" or not self.on_input)
            and contract.factor == "float32"
            and not contract.truncates
            and min(self.x.shape[1], self.inputs.inter) >= _RANDOM_WIDTH
        )
        ordinary = on_host(self.inputs.ordinary)
        if not valid:
            return self._made(torch.zeros_like(ordinary))
        ordered = on_host(self.expert).sort(dim=1).values
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(dim=1)
        return self._made(ordinary & on_host(self.kept).any(dim=1) & ~twice)

    @cached_property
    def numbers(self) -> Numbers:
        """The float64 result of each token, with its bound."""
        return evaluate(self.inputs, self.expert, self.info.contract, random=self.random, free=not self.info.declared)

    @cached_property
    def shared(self) -> torch.Tensor:
        """[T, H]: for how many tokens an error counts, of a step with random rows. Dear, and nearly always errors are
        small enough for one token each: who asks has found one that is not."""
        if self.whole is not None:
            whole, rows = self.whole
            return whole.shared[rows]
        return shared(self.inputs, self.expert, self.info.contract, self.random)

    @cached_property
    def rounded(self) -> tuple[torch.Tensor, ...]:
        """float64 [T, H] each: y where each declared store rounds to nearest and no sum does: a right answer. One of
        each contract that the target may keep."""
        return tuple(rounded(self.inputs, self.expert, one) for one in self.info.choices(*_STORES))

    @cached_property
    def claimed(self) -> torch.Tensor:
        """bool [T, H]: values that the contract determines, of sound tokens with an expert here."""
        return self.numbers.bound.isfinite() & (self.kept.any(dim=1) & self.sound)[:, None]

    @cached_property
    def hopeless(self) -> torch.Tensor:
        """bool [T, H]: values that no right target has finite."""
        return never_finite(self.inputs, self.expert)

    @cached_property
    def limits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The lowest and the highest value that y may have [T, H]: where it may be too large for its dtype, anything
        of its sign that is large enough, infinity too."""
        value, bound, most = self.numbers.value, self.numbers.bound, torch.finfo(self.x.dtype).max
        low, high = value - bound, value + bound
        over, under = high >= most, low <= -most
        high, low = high.masked_fill(over, torch.inf), low.masked_fill(under, -torch.inf)
        return torch.where(over, low.clamp(max=most), low), torch.where(under, high.clamp(min=-most), high)

    @cached_property
    def closed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [T, H]: where y must not be too low, and where not too high."""
        low, high = self.limits
        return low > -torch.inf, high < torch.inf

    @cached_property
    def empty(self) -> torch.Tensor:
        """bool [T, 1]: tokens without an expert here."""
        return self._made(~on_host(self.kept).any(dim=1, keepdim=True))

    @cached_property
    def tainted(self) -> torch.Tensor:
        """bool [T, 1]: tokens whose NaN has to be seen in y. Where x is quantized none has: a code has no NaN."""
        if self.inputs.quantizes or bool(self.inputs.finite_rows.all()):
            return self.x.new_zeros((self.tokens, 1), dtype=torch.bool)
        weighty = (on_host(self.kept) & (on_host(self.weights) != 0)).any(dim=1, keepdim=True)
        return self.x.isnan().any(dim=1, keepdim=True) & self._made(weighty)

    @cached_property
    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The result [T, H], float64, and where its bits are known for certain, bool: whatever contract of those that
        it may keep the target keeps."""
        usable = on_host(self.inputs.ordinary) & on_host(self.sound)
        expert = self.expert  # whose batches are there already
        if not bool((usable | ~on_host(self.kept).any(dim=1)).all()):
            expert = self._made(torch.where(usable[:, None], on_host(expert), -1))
        return exact_answer(self.inputs, expert, self.info.choices(*_STORES))

    def _made(self, host: torch.Tensor) -> torch.Tensor:
        """What was computed on the host, where the inputs are."""
        return uploaded(host, self.inputs.device)

    # ---- other calls ------------------------------------------------------------------------------------------------

    @cached_property
    def healed_inputs(self) -> ExpertsInputs:
        """The same inputs with ordinary x in the rows that are not real, and other weights in dropped slots and in
        those rows; the very same where there is nothing to change."""
        real, old = on_host(self.real), on_host(self.weights)
        rows = self._made((~real).nonzero().flatten())
        spare = ~on_host(self.kept) | ~real[:, None]
        if not bool(spare.any()):
            return self.inputs
        weights = self._made(torch.where(spare, old.nan_to_num(0.5, 0.25, 2.0).neg() + 1.0, old))
        if not len(rows):
            return self.inputs.replace(weights=weights)
        x = self.x.clone()
        x[rows] = self.benign(rows)
        return self.inputs.replace(x=x, weights=weights)

    @cached_property
    def healed(self) -> tuple[ExpertsInputs, Outputs]:
        """The call on `healed_inputs`; the call itself where nothing is to be healed."""
        inputs = self.healed_inputs
        return inputs, self.outputs if inputs is self.inputs else self.call(inputs)

    @cached_property
    def neighbours(self) -> tuple[torch.Tensor, ExpertsInputs] | None:
        """The other ones, bool [T], and the same inputs with huge numbers in every second real row; None: a case has
        them by its seed, and where there are two rows."""
        rows = on_host(self.real).nonzero().flatten()
        if len(rows) < 2 or not has_huge_neighbours(self):
            return None
        kept = on_host(self.real).clone()
        kept[rows[::2]] = False
        x = torch.where(self._made(kept | ~on_host(self.real))[:, None], self.x, huge(self.x))
        return self._made(kept), self.inputs.replace(x=x)

    @cached_property
    def fewer(self) -> tuple[torch.Tensor, ExpertsInputs]:
        """Every second real row from the last, int64 [R], and the healed inputs of these rows alone."""
        rows = self._made(on_host(self.real).nonzero().flatten().flip(0)[::2])
        return rows, self.rows_of(self.healed_inputs, rows)

    def _turn(self, relation: str) -> bool:
        """Whether a case has this relation: one of them, by its seed. Each costs as much as the case itself."""
        turns = _TURNS if self.info.capabilities.backends else _TURNS[:3]
        return turns[self.case.seed % len(turns)] == relation

    @cached_property
    def relabelled(self) -> ExpertsInputs | None:
        return others.relabelled(self.inputs) if self._turn("relabel") else None

    @cached_property
    def sharded(self) -> list[ExpertsInputs]:
        takes = self.info.capabilities.expert_map and self._turn("shards")
        return others.sharded(self.inputs) if takes else []

    @cached_property
    def forced(self) -> dict[str, ExpertsInputs]:
        """The same call, with each backend forced in turn that can be."""
        costly = not self.x.is_cuda and self.inputs.plain["w13"].numel() > _MOST_INTERPRETED
        if self.inputs.quantizes or not self.tokens or costly or not self._turn("backends"):
            return {}
        return {name: replace(self.inputs, options={**self.inputs.options, "backend": name})
                for name in self.info.capabilities.backends}  # fmt: skip

    @cached_property
    def scaled(self) -> ExpertsInputs | None:
        return others.scaled(self.inputs) if self._turn("scaling") else None

    def rows_of(self, inputs: ExpertsInputs, rows: torch.Tensor) -> ExpertsInputs:
        """The call with these rows alone, int64 [R]."""
        part = inputs.replace(**{name: rows_of(inputs.plain[name], rows) for name in inputs.fluid})
        return replace(part, padding=rows_of(inputs.padding, rows), ordinary=rows_of(inputs.ordinary, rows))

    # ---- outputs ----------------------------------------------------------------------------------------------------

    @property
    def shaped(self) -> bool:
        """Whether the output has the contract's shape; without it nothing else can be judged."""
        return self.outputs.y.shape == self.x.shape

    @cached_property
    def y(self) -> torch.Tensor:
        """float64 [T, H]: the output."""
        return self.outputs.y.double()

    @cached_property
    def missing(self) -> torch.Tensor:
        """bool [T, H]: elements that still hold the poison of their buffer, and were never written."""
        return unwritten(self.outputs.y)

    @cached_property
    def written(self) -> torch.Tensor:
        """bool [T, H]"""
        return ~self.missing

    @cached_property
    def finite(self) -> torch.Tensor:
        """bool [T, H]: elements that were written, and are finite."""
        return self.written & self.outputs.y.isfinite()

    @cached_property
    def judged(self) -> torch.Tensor:
        """bool [T, H]: what the parity checks judge: claimed, written, finite. `finite` speaks of the others."""
        return self.claimed & self.finite

    @cached_property
    def well(self) -> torch.Tensor:
        """bool [T, H]: what was judged in the call itself, in rows where nothing was wrong. That is another check's."""
        low, high = self.limits
        right = ~self.claimed | (self.judged & (low <= self.y) & (self.y <= high))
        return self.judged & right.all(dim=1)[:, None]

    @cached_property
    def flags(self) -> Mapping[str, float]:
        """What the first look at the output says: see flags.py."""
        return first_look(self)


_OF_INPUTS = ("expert", "kept", "sound", "real", "random", "numbers", "shared", "rounded", "claimed", "hopeless",
              "limits", "closed", "empty", "tainted", "exact")
