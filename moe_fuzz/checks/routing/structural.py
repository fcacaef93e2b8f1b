"""Rules that need no reference: shape and dtype, everything written, ids and weights that can be what they claim."""

from __future__ import annotations

import torch

from moe_fuzz.checks import check, outputs
from moe_fuzz.checks.coordinates import first, row_text
from moe_fuzz.checks.routing.observation import RoutingObservation
from moe_fuzz.checks.routing.scores import U
from moe_fuzz.fence import unwritten
from moe_fuzz.verdict import Violation


@check("routing", "structure")
def structure(seen: RoutingObservation) -> list[Violation]:
    """weights [T, k + n_shared] float32 and ids int32. Their device is judged where they are fetched."""
    return outputs.structure(seen.outputs, seen.inputs.results)


@check("routing", "written")
def written(seen: RoutingObservation) -> list[Violation]:
    """No element still holds the poison it had before the call; flagged rows may under the dialect `garbage`."""
    if seen.all_written:
        return []
    free = seen.flagged.view(-1, 1) if seen.dialect == "garbage" else torch.zeros_like(seen.flagged).view(-1, 1)
    results = {"weights": seen.outputs.weights, "ids": seen.outputs.ids}
    return outputs.never_written({name: unwritten(tensor) & ~free for name, tensor in results.items()})


def misnamed(seen: RoutingObservation) -> torch.Tensor:
    """bool [T]: the rows that `ids` finds wrong."""
    if seen.faultless:
        return torch.zeros_like(seen.lawful)
    return seen.lawful & (~seen.sound_ids if seen.expert_map is None else seen.repeating)


@check("routing", "ids", rows=misnamed)
def ids(seen: RoutingObservation) -> list[Violation]:
    """k distinct ids in [0, E) on every row that no padding dialect rules, undefined rows included (vllm#39391)."""
    if seen.faultless or not misnamed(seen).any():
        return []
    outside = ((seen.ids < 0) | (seen.ids >= seen.experts)) & seen.lawful.view(-1, 1)
    if outside.any() and seen.expert_map is None:  # else `expert_map` reports it
        where = first(outside)
        return [
            Violation(
                "ids",
                "out-of-range",
                f"row {where[0]} names an expert that does not exist",
                "ids",
                where,
                f"an id in [0, {seen.experts})",
                str(int(seen.ids[where])),
            )
        ]
    row = first(seen.lawful & seen.repeating)[0]
    return [
        Violation(
            "ids",
            "duplicate",
            f"row {row} names an expert twice",
            "ids",
            (row,),
            f"{seen.top_k} distinct ids",
            row_text(seen.routed[row]),
        )
    ]


def _unshared(seen: RoutingObservation) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [T, n_shared] each: slots of shared experts with another id, with another weight."""
    slack = (seen.top_k + 4) * 2 * U
    held = seen.all_weights[:, seen.top_k :]
    off = held.isfinite() & ((held - 1).abs() > slack)
    wanted = seen.experts + torch.arange(seen.n_shared, device=held.device)
    rows = seen.lawful.view(-1, 1)
    return (seen.outputs.ids[:, seen.top_k :] != wanted) & rows, off & rows


def misshared(seen: RoutingObservation) -> torch.Tensor:
    """bool [T]: the rows that `shared` finds wrong."""
    ids, weights = _unshared(seen)
    return (ids | weights).any(dim=1)


@check("routing", "shared", rows=misshared)
def shared(seen: RoutingObservation) -> list[Violation]:
    """The slots of fused shared experts hold the ids E, E + 1, … and the weight 1, on every row no dialect rules.

    A target may compute that 1, as the sum of the k renormalized weights divided by it: k + 4 roundings, each of 2u.
    A weight that is not finite is the business of `finite`, as in any other slot.
    """
    if not seen.n_shared:
        return []
    weights, ids = seen.outputs.weights[:, seen.top_k :], seen.outputs.ids[:, seen.top_k :]
    for (symptom, name), wrong in zip((("id", "ids"), ("weight", "weights")), _unshared(seen), strict=True):
        if wrong.any():
            row, slot = first(wrong)
            got = str(int(ids[row, slot])) if symptom == "id" else str(float(weights[row, slot]))
            message = f"row {row}: the slot of shared expert {slot} does not hold its {symptom}"
            expected = str(seen.experts + slot) if symptom == "id" else "1"
            return [Violation("shared", symptom, message, name, (row, seen.top_k + slot), expected, got)]
    return []


def _unknown(seen: RoutingObservation) -> torch.Tensor:
    return (seen.ids < 0) & seen.lawful.view(-1, 1)


def unmapped(seen: RoutingObservation) -> torch.Tensor:
    """bool [T]: the rows that `expert_map` finds wrong."""
    return torch.zeros_like(seen.lawful) if seen.expert_map is None else _unknown(seen).any(dim=1)


@check("routing", "expert_map", rows=unmapped)
def expert_map(seen: RoutingObservation) -> list[Violation]:
    """The ids of routed slots are in expert_map. Which expert each is, parity judges after the inverse map."""
    if seen.expert_map is None:
        return []
    unknown = _unknown(seen)
    if not unknown.any():
        return []
    where = first(unknown)
    got = int(seen.routed[where])
    symptom, what = ("logical", "a logical id") if 0 <= got < seen.experts else ("unknown", "an id of no expert")
    message = f"row {where[0]} holds {what}, where expert_map gives physical ones"
    return [Violation("expert_map", symptom, message, "ids", where, "an id in expert_map", str(got))]


def unsound(seen: RoutingObservation) -> torch.Tensor:
    """bool [T]: the rows that `finite` finds wrong."""
    return torch.zeros_like(seen.lawful) if seen.faultless else seen.lawful & ~seen.sound_weights.all(dim=1)


@check("routing", "finite", rows=unsound)
def finite(seen: RoutingObservation) -> list[Violation]:
    """Weights are finite and >= 0 on every row that no padding dialect rules (sglang#31017, flashinfer#3803)."""
    if seen.faultless or seen.sound_weights.all():
        return []
    wrong = ~seen.sound_weights & seen.lawful.view(-1, 1)
    if not wrong.any():
        return []
    defined = wrong & seen.defined.view(-1, 1)
    where = first(defined if defined.any() else wrong)  # a real row's weight is the worse news, and another bug
    value = float(seen.all_weights[where])
    kind = "nan" if value != value else "infinite" if abs(value) == float("inf") else "negative"
    symptom, row = (
        (kind, "") if bool(seen.defined[where[0]]) else (f"{kind} on an undefined row", ", which is undefined,")
    )
    return [
        Violation(
            "finite",
            symptom,
            f"row {where[0]}{row} has a weight that is {kind}",
            "weights",
            where,
            "finite and >= 0",
            str(value),
        )
    ]


@check("routing", "padding")
def padding(seen: RoutingObservation) -> list[Violation]:
    """A row flagged as padding carries exactly the declared dialect's id and weight, in every slot."""
    wanted = {"minus_one": -1, "num_experts": seen.experts, "zero_weight": 0}.get(seen.dialect)
    if wanted is None:
        return []
    if "is_padding" not in seen.inputs.plain:
        return []
    rows = (seen.flagged if seen.all_written else seen.flagged & ~seen.unwritten).view(-1, 1)
    weights, ids = seen.outputs.weights, seen.outputs.ids
    wrong = (ids != wanted) & rows
    if wrong.any():
        where = first(wrong)
        return [
            Violation(
                "padding",
                "id",
                f"padding row {where[0]} does not carry the dialect's id",
                "ids",
                where,
                f"{wanted} ({seen.dialect})",
                str(int(ids[where])),
            )
        ]
    heavy = ~(weights == 0) & rows
    if heavy.any() and seen.info.contract.padding_weight == "dialect":
        where = first(heavy)
        return [
            Violation(
                "padding",
                "weight",
                f"padding row {where[0]} has a weight",
                "weights",
                where,
                f"0 ({seen.dialect})",
                str(float(weights[where])),
            )
        ]
    return []
