"""Wrong answers of a router, each of which must be rejected: see checks/binding.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_fuzz.checks.binding import SAMPLE, rejected
from moe_fuzz.checks.routing.observation import Outputs, RoutingObservation

_JUDGES = ("ids", "shared", "expert_map", "finite")


def wrong_answers(seen: RoutingObservation) -> Iterator[tuple[str, Outputs]]:
    """All zero; rows exchanged (each gets another's answer); two experts swapped.

    Where the op has them also: groups ignored, ids not looked up, shared experts left out.
    """
    weights, ids = seen.outputs.weights, seen.outputs.ids
    yield "all zero", Outputs(torch.zeros_like(weights), torch.zeros_like(ids))
    yield "rows exchanged", _exchanged(seen)
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


def _exchanged(seen: RoutingObservation) -> Outputs:
    """To each row the answer of the row before it. Where rows are too much alike for that to be wrong, or there is one
    alone, the right answer to other logits, which takes a reference's time."""
    other = Outputs(seen.outputs.weights.roll(1, 0), seen.outputs.ids.roll(1, 0))
    if seen.tokens > 1 and _rejected(seen, other):
        return other
    return seen.right_answer(logits=seen.benign(torch.arange(seen.tokens)))


def _rejected(seen: RoutingObservation, outputs: Outputs) -> bool:
    known = seen.__dict__.setdefault("_rejected", {})  # by the answer's identity: some are asked about twice
    if id(outputs) not in known:
        known[id(outputs)] = (outputs, rejected(seen.with_outputs(outputs), "routing", _JUDGES))
    return bool(known[id(outputs)][1])


def _with_ids(seen: RoutingObservation, logical: torch.Tensor) -> Outputs:
    """The answer with these experts in the routed slots. An id that is none stays none."""
    experts = logical if seen.expert_map is None else seen.expert_map.long()[logical.clamp(0, seen.experts - 1)]
    ids = seen.outputs.ids
    return Outputs(seen.outputs.weights, torch.cat([experts.to(ids.dtype), ids[:, seen.top_k :]], dim=1))


def binding(seen: RoutingObservation) -> list[str]:
    """The wrong answers that no check rejected; empty when the case proves parity."""
    judged = seen.judged.nonzero().flatten()
    if not len(judged):
        return ["no row is defined"]
    # Every check goes row by row, so an answer that is rejected on some rows is rejected as a whole.
    seen = seen.take(judged[:: -(-len(judged) // SAMPLE)])
    return [name for name, outputs in wrong_answers(seen) if not _rejected(seen, outputs)]
