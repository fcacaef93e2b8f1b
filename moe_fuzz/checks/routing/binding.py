"""Wrong answers of a router, each of which must be rejected: see checks/binding.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from moe_fuzz.checks import CHECKS, PARITY, ROWS
from moe_fuzz.checks.binding import SAMPLE
from moe_fuzz.checks.routing import parity, structural  # noqa: F401 - they register
from moe_fuzz.checks.routing.observation import Outputs, RoutingObservation
from moe_fuzz.lazy import cached

_EXCHANGED = "rows exchanged"
# Which of them rejects an answer is all the same: the first are those that take the least time and reject many.
_JUDGES = ("ids", *PARITY["routing"], "shared", "expert_map", "finite")


@dataclass(frozen=True)
class Answers(RoutingObservation):
    """Several answers to one call as one of as many times its rows, for what goes row by row: those of the first
    answer, then those of the second. The reference is that of one answer, and is not computed again."""

    of: RoutingObservation = field(kw_only=True)
    times: int = field(kw_only=True)

    @classmethod
    def to(cls, seen: RoutingObservation, answers: Sequence[Outputs]) -> Answers:
        weights, ids = torch.cat([one.weights for one in answers]), torch.cat([one.ids for one in answers])
        return cls(seen.case, seen.step_index, seen.info, seen.inputs, Outputs(weights, ids), seen.call, of=seen,
                   times=len(answers))  # fmt: skip

    @property
    def tokens(self) -> int:
        return self.times * self.of.tokens

    def gather(self, table: torch.Tensor) -> torch.Tensor:
        """table [T, E], of one answer, at the ids of all of them. No row of it is copied for that."""
        several = table.expand(self.times, *table.shape)
        return several.gather(2, self.chosen.view(self.times, -1, self.top_k)).view(-1, self.top_k)

    @property
    def _reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one answer, as the logits are."""
        return self.of._reference

    @property
    def faultless(self) -> bool:
        return False  # as a rule one of them is not, and then the others have been looked at for nothing

    @property
    def finite(self) -> bool:
        return self.of.finite

    @property
    def all_defined(self) -> bool:
        return self.of.all_defined

    @cached
    def highest_logit(self) -> torch.Tensor:
        return self._again(self.of.highest_logit)

    @cached
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self.of.bounds
        return self._again(low), self._again(high)

    def lowest_left(self) -> torch.Tensor:
        return self._again(self.of.bounds[0]).scatter_(1, self.chosen, -torch.inf)

    @cached
    def highest(self) -> torch.Tensor:
        return self.gather(self.of.bounds[1])

    @cached
    def flagged(self) -> torch.Tensor:
        return self._again(self.of.flagged)

    @cached
    def defined(self) -> torch.Tensor:
        return self._again(self.of.defined)

    def _again(self, table: torch.Tensor) -> torch.Tensor:
        return torch.cat([table] * self.times)


def wrong_answers(seen: RoutingObservation) -> Iterator[tuple[str, Outputs]]:
    """All zero; rows exchanged (each gets the answer of the row before it; a single row, that to other logits); two
    experts swapped.

    Where the op has them also: groups ignored, ids not looked up, shared experts left out.
    """
    weights, ids = seen.outputs.weights, seen.outputs.ids
    yield "all zero", Outputs(torch.zeros_like(weights), torch.zeros_like(ids))
    alone = seen.tokens == 1
    yield _EXCHANGED, _others(seen) if alone else Outputs(weights.roll(1, 0), ids.roll(1, 0))
    one = seen.ids[:, :1]
    neighbour = torch.where(one == 0, seen.experts - 1, one - 1)
    swapped = torch.where(seen.ids == one, neighbour, torch.where(seen.ids == neighbour, one, seen.ids))
    yield "two experts swapped", _with_ids(seen, swapped)
    if seen.topk_group < seen.n_group:
        anywhere = seen.right_answer(topk_group=seen.n_group)
        if not torch.equal(anywhere.ids[seen.judged], seen.right_answer().ids[seen.judged]):  # else it is right
            yield "groups ignored", anywhere
    if seen.expert_map is not None:
        yield "ids not looked up", Outputs(weights, torch.cat([seen.ids.to(ids.dtype), ids[:, seen.top_k :]], dim=1))
    if seen.n_shared:
        bare = ids.clone()
        bare[:, seen.top_k :] = 0
        yield "shared experts left out", Outputs(weights, bare)


def _with_ids(seen: RoutingObservation, logical: torch.Tensor) -> Outputs:
    """The answer with these experts in the routed slots. An id that is none stays none."""
    if seen.expert_map is None and not seen.n_shared:
        return Outputs(seen.outputs.weights, logical.to(seen.outputs.ids.dtype))
    experts = logical if seen.expert_map is None else seen.expert_map.long()[logical.clamp(0, seen.experts - 1)]
    ids = seen.outputs.ids
    return Outputs(seen.outputs.weights, torch.cat([experts.to(ids.dtype), ids[:, seen.top_k :]], dim=1))


def _others(seen: RoutingObservation) -> Outputs:
    """The right answer to other logits, which takes a reference's time."""
    return seen.right_answer(logits=seen.benign(torch.arange(seen.tokens)))


def rejected(seen: RoutingObservation, answers: Sequence[Outputs]) -> list[bool]:
    """Of each answer, whether one of `_JUDGES` finds a row of it wrong.

    They are judged together, as one call of as many more rows; where a check does not tell its rows, one by one.
    """
    whole = Answers.to(seen, answers)
    found = torch.zeros(len(answers), dtype=torch.bool)
    for name in _JUDGES:
        judge = CHECKS["routing"][name]
        if judge in ROWS:
            found |= ROWS[judge](whole).view(len(answers), -1).any(dim=1)
        else:
            found |= torch.tensor([bool(judge(seen.with_outputs(one))) for one in answers])
        if found.all():
            break
    return found.tolist()


def binding(seen: RoutingObservation) -> list[str]:
    """The wrong answers that no check rejected; empty when the case proves parity."""
    device = seen.logits.device
    judged = torch.arange(seen.tokens, device=device) if seen.all_judged else seen.judged.nonzero().flatten()
    if not len(judged):
        return ["no row is defined"]
    # Every check goes row by row, so an answer that is rejected on some rows is rejected as a whole.
    seen = seen.take(judged[:: -(-len(judged) // SAMPLE)])
    answers = dict(wrong_answers(seen))
    known = dict(zip(answers, rejected(seen, list(answers.values())), strict=True))
    if not known[_EXCHANGED] and seen.tokens > 1:  # the rows are too much alike for that to be wrong
        known[_EXCHANGED] = rejected(seen, [_others(seen)])[0]
    return [name for name, found in known.items() if not found]
