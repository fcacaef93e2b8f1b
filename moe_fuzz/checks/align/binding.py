"""Wrong plans, made from the right one. A case on which one of them passes proves nothing about parity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from moe_fuzz.checks.align.observation import AlignObservation, Outputs
from moe_fuzz.checks.binding import rejected


def wrong_answers(seen: AlignObservation) -> Iterator[tuple[str, Outputs]]:
    """All zero; a slot lost; a slot twice; two experts exchanged; two slots in each other's blocks."""
    outputs = seen.outputs
    yield "all zero", replace(outputs, **{name: torch.zeros_like(tensor) for name, tensor in vars(outputs).items()
                                          if tensor is not None})  # fmt: skip
    kept = seen.kept[seen.placed].nonzero().flatten()
    places = seen.places[kept]  # of the kept slots, none of which is missing
    yield "a slot lost", _with(outputs, places[0], seen.slots)
    if len(places) > 1:
        yield "a slot twice", _with(outputs, places[1], int(seen.sorted[places[0]]))
    one = int(seen.owner[places[0] // seen.block_size])
    others = seen.owner[(seen.owner != one) & (seen.owner >= 0)]
    if len(others):
        named, other = outputs.expert_ids, int(others[0])
        swapped = torch.where(named == one, other, torch.where(named == other, one, named)).to(named.dtype)
        yield "two experts exchanged", replace(outputs, expert_ids=swapped)
        away = places[seen.owner[places // seen.block_size] == other][0]
        exchanged = _with(outputs, places[0], int(seen.sorted[away]))
        yield "two slots exchanged", _with(exchanged, away, int(seen.sorted[places[0]]))
    elif seen.experts > 1:
        named = outputs.expert_ids.clone()
        named[: seen.blocks][seen.owner == one] = (one + 1) % seen.experts
        yield "another expert", replace(outputs, expert_ids=named)


def _with(outputs: Outputs, place: torch.Tensor, slot: int) -> Outputs:
    held = outputs.sorted_token_ids.clone()
    held[place] = slot
    return replace(outputs, sorted_token_ids=held)


def binding(seen: AlignObservation) -> list[str]:
    """The wrong answers that no check rejected; empty when the case proves parity."""
    if not seen.kept.any():
        return ["no slot is kept"]
    return [name for name, outputs in wrong_answers(seen) if not rejected(seen.with_outputs(outputs), "align")]
