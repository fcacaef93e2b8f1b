"""The check that the checks can fail: wrong answers, made from the right one, must each be rejected on this very case.

A case on which an all-zero answer passes proves nothing about parity (so did 26 of 27 upstream cases, measured); it
counts for its memory and structural checks alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_fuzz.checks import CHECKS, PARITY
from moe_fuzz.checks.observation import Outputs, RoutingObservation
from moe_fuzz.ops.routing.inputs import benign_rows
from moe_fuzz.reference.routing import topk_softmax

_JUDGES = ("ids", "finite")


def wrong_answers(seen: RoutingObservation) -> Iterator[tuple[str, Outputs]]:
    """All zero; stale (the right answer to the logits of another step); two experts swapped."""
    weights, ids = seen.outputs.weights, seen.outputs.ids
    yield "all zero", Outputs(torch.zeros_like(weights), torch.zeros_like(ids))
    other = benign_rows(seen.case, seen.step_index, list(range(seen.tokens)))
    old = topk_softmax(other, seen.top_k, renormalize=seen.renormalize, bias=seen.bias, scale=seen.scale)
    yield "stale", Outputs(*old)
    one = seen.ids[:, :1]
    neighbour = torch.where(one == 0, seen.experts - 1, one - 1)
    swapped = torch.where(seen.ids == one, neighbour, torch.where(seen.ids == neighbour, one, seen.ids))
    yield "two experts swapped", Outputs(weights, swapped.to(ids.dtype))


def binding(seen: RoutingObservation, family: str = "routing") -> list[str]:
    """The wrong answers that no check rejected; empty when the case proves parity."""
    if not seen.judged.any():
        return ["no row is defined"]
    judges = [CHECKS[family][name] for name in (*_JUDGES, *PARITY[family])]
    return [
        name for name, outputs in wrong_answers(seen) if not any(judge(seen.with_outputs(outputs)) for judge in judges)
    ]
