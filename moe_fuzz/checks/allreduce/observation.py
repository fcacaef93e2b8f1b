"""What the checks of allreduce_rmsnorm see of one call: what each rank held, and what each rank got."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from moe_fuzz import generator
from moe_fuzz.case import Case
from moe_fuzz.checks.allreduce.bounds import Bounded, bounded_norm, bounded_sum
from moe_fuzz.checks.experts.rounding import LARGEST, TINY
from moe_fuzz.contract import Contract, TargetInfo
from moe_fuzz.fence import unwritten
from moe_fuzz.ops.allreduce.inputs import BENIGN, WHOLE, AllreduceInputs, fresh_rows

_OF_INPUTS = ("sums", "defined")


@dataclass(frozen=True)
class Outputs:
    """What the ranks have got, [R, T, H] each."""

    normed: torch.Tensor
    residual_out: torch.Tensor


@dataclass(frozen=True)
class AllreduceObservation:
    """One call under test, on all ranks. All tensors are on one device, that of the inputs; R, T, H as in the op."""

    case: Case
    step_index: int
    info: TargetInfo
    inputs: AllreduceInputs
    outputs: Outputs
    call: Callable[[AllreduceInputs], Outputs]  # runs the target again, in fences; a graph is replayed
    eager: Callable[[AllreduceInputs], Outputs] | None = None  # runs it without a graph, where `call` is a replay
    budget: dict[str, float] = field(default_factory=dict)

    def with_outputs(self, outputs: Outputs) -> AllreduceObservation:
        """The same inputs and another answer; what is known of the inputs is not computed again."""
        other = replace(self, outputs=outputs, budget={})
        for name in _OF_INPUTS:
            other.__dict__[name] = getattr(self, name)
        return other

    # ---- inputs -----------------------------------------------------------------------------------------------------

    @property
    def x(self) -> torch.Tensor:
        """[R, T, H]"""
        return self.inputs.plain["x"]

    @property
    def residual(self) -> torch.Tensor | None:
        """[T, H]"""
        return self.inputs.plain.get("residual")

    @cached_property
    def sums(self) -> tuple[Bounded, Bounded]:
        """residual_out, [T, H]: before and after it is stored."""
        return bounded_sum(self.x, self.residual, self.info.contract)

    @cached_property
    def defined(self) -> torch.Tensor:
        """bool [T]: rows of finite numbers on all ranks, whose sums and squares stay far from the ends of the dtypes.
        Of the others the contract says nothing but that all ranks get the same."""
        size = self.x.double().abs().sum(dim=0)
        if self.residual is not None:
            size = size + self.residual.double().abs()
        ends = min(torch.finfo(self.x.dtype).max / 2, LARGEST)
        return (size < ends).all(dim=1) & (4 * size.square().sum(dim=1) < LARGEST)  # NaN is not

    @cached_property
    def healed_inputs(self) -> AllreduceInputs:
        """The same inputs with ordinary numbers in all rows that are not defined, on every rank."""
        positions = (~self.defined).nonzero().flatten()
        if not len(positions):
            return self.inputs
        x, residual = fresh_rows(
            self.case, [self.inputs.rows[row] for row in positions.tolist()], BENIGN, self.x.device
        )
        healed = self.x.clone()
        healed[:, positions] = x
        changed = {"x": healed}
        if self.residual is not None:
            changed["residual"] = self.residual.clone()
            changed["residual"][positions] = residual
        return self.inputs.replace(**changed)

    @cached_property
    def fewer(self) -> tuple[torch.Tensor, AllreduceInputs]:
        """int64 [N], some of the rows, the last first; and a call with these alone. One row, or an eighth of them, or
        every second one: kernels choose their way by the size of a message."""
        count = self.inputs.tokens
        every = (count, 8, 2)[generator.choice(self.case.seed, "fewer", [0], [0], 3)[0, 0]] if count else 1
        rows = torch.arange(count - 1, -1, -max(2, min(every, count)), device=self.x.device)
        rows = rows if count > 1 else rows[:0]
        whole = self.healed_inputs
        changed = {"x": whole.plain["x"][:, rows]}
        if self.residual is not None:
            changed["residual"] = whole.plain["residual"][rows]
        return rows, replace(whole.replace(**changed), rows=[whole.rows[row] for row in rows.tolist()])

    @cached_property
    def forced(self) -> tuple[str, AllreduceInputs] | None:
        """A backend and a call with it forced; of half the cases, each backend in its turn. Not in graphs, which have
        the backend of their capture, nor across processes, where all ranks would have to call as often."""
        names = self.info.capabilities.backends
        turn = self.case.seed % (2 * len(names)) if names else 0
        if turn >= len(names) or self.case.mode != "eager" or not self.inputs.tokens:
            return None
        return names[turn], replace(self.inputs, options={**self.inputs.options, "backend": names[turn]})

    # ---- what may have come back ------------------------------------------------------------------------------------

    @cached_property
    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """residual_out, [T, H] in its dtype, where every sum of it is exact in any order, and where that is, bool."""
        parts = self.x if self.residual is None else torch.cat([self.x, self.residual[None]])
        values = parts.double()
        whole = (values == values.round()).all(dim=0) & (values.abs().sum(dim=0) <= WHOLE[self.x.dtype])
        return values.sum(dim=0).to(self.x.dtype), whole & self.defined[:, None]

    @cached_property
    def ordered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """residual_out, [T, H] in its dtype, as float32 sums from rank 0 on give it, the residual last; and where that
        is known, bool: not where numbers below the normal ones may be flushed."""
        total = self.x[0].float()
        known = normal(total)
        for part in self.x[1:]:
            total = total + part.float()
            known &= normal(total)
        if "sum" in self.info.contract.rounds:
            total = total.to(self.x.dtype).float()
        if self.residual is not None:
            total = total + self.residual.float()
            known &= normal(total)
        tiny = (self.x.float().abs() < TINY) & (self.x != 0)
        stored = total.to(self.x.dtype)
        known &= ~tiny.any(dim=0) & normal(stored.float(), torch.finfo(self.x.dtype).smallest_normal)
        return stored, known & self.defined[:, None]

    @cached_property
    def expected(self) -> Bounded:
        """normed, [R, T, H]: of each rank for its own residual_out, where that is what the contract takes the norm of.
        Where the target may keep one of several contracts, of each row by that which the answer is nearest to.
        """
        first, *others = (self._expected_by(contract) for contract in self.info.choices("rounds"))
        for other in others:
            nearer = (self._share(other) < self._share(first)).expand(first.value.shape)
            first = Bounded(*(torch.where(nearer, a, b) for a, b in zip(vars(other).values(), vars(first).values(),
                                                                       strict=True)))  # fmt: skip
        return first

    def _share(self, normed: Bounded) -> torch.Tensor:
        """[R, T, 1]: the largest error of normed in a row over its bound; infinite where there is a NaN."""
        share = (self.outputs.normed.double() - normed.value).abs() / normed.bound
        return share.masked_fill(~self.judged, 0.0).nan_to_num(torch.inf).amax(dim=-1, keepdim=True)

    def _expected_by(self, contract: Contract) -> Bounded:
        gamma, eps = self.inputs.plain["gamma"], float(self.inputs.options["eps"])
        if "residual" in contract.rounds:
            got = self.outputs.residual_out.double()
            return bounded_norm(Bounded(got, torch.zeros_like(got)), gamma, eps, self.x.dtype, contract)
        found = bounded_norm(self.sums[0], gamma, eps, self.x.dtype, contract)
        shape = self.outputs.normed.shape
        return Bounded(found.value.expand(shape), found.bound.expand(shape))

    # ---- outputs ----------------------------------------------------------------------------------------------------

    @property
    def shaped(self) -> bool:
        """Whether the outputs have the contract's shapes; without them nothing else can be judged."""
        wanted = tuple(self.x.shape)
        return all(tuple(t.shape) == wanted for t in (self.outputs.normed, self.outputs.residual_out))

    @cached_property
    def missing(self) -> torch.Tensor:
        """bool [R, T, H]: elements that were never written."""
        return unwritten(self.outputs.normed) | unwritten(self.outputs.residual_out)

    @cached_property
    def judged(self) -> torch.Tensor:
        """bool [R, T, H]: elements of defined rows that were written."""
        return ~self.missing & self.defined[None, :, None]


def normal(values: torch.Tensor, least: float = TINY) -> torch.Tensor:
    """Where a number is 0 or a normal one."""
    return (values == 0) | (values.abs() >= least)
