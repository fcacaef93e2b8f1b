"""Groups of experts under rounding: which choices of groups a target may have made, from bounds on each expert's score.

T rows, E experts, G groups of E / G neighbouring experts, of which K stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_fuzz.checks.routing.scores import U


@dataclass(frozen=True)
class Kept:
    """What the selected experts say of the groups that were kept."""

    lawful: torch.Tensor  # bool [T]: some legal choice of groups holds the selected experts and no better other one
    touched: torch.Tensor  # bool [T, G]: groups of the selected experts, which were therefore kept
    low: torch.Tensor  # float64 [T, G]: the lowest score a target may compute for a group
    high: torch.Tensor  # float64 [T, G]: the highest


def group_bounds(
    low: torch.Tensor, high: torch.Tensor, n_group: int, group_score: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds on the groups' scores [T, G] from those on their experts' [T, E].

    Both rules grow with every expert's score, so the bounds of the experts bound the groups; a sum is rounded once.
    """
    tokens, experts = low.shape
    best = 1 if group_score == "max" or experts == n_group else 2
    shape = (tokens, n_group, experts // n_group)
    below, above = (bound.view(shape).topk(best, dim=2).values.sum(dim=2) for bound in (low, high))
    if best == 1:
        return below, above
    return below - U * below.abs().nan_to_num(posinf=0.0), above + U * above.abs().nan_to_num(posinf=0.0)


def kept_groups(
    low: torch.Tensor, high: torch.Tensor, taken: torch.Tensor, n_group: int, topk_group: int, group_score: str
) -> Kept:
    """Judges the selected experts `taken`, bool [T, E], against all choices of `topk_group` groups.

    A choice is legal iff no group left out beats one kept by more than rounding: max low(out) <= min high(kept). Only
    the groups that selected experts touch are seen. The rest of the choice is free, except that a group must be out if
    it holds an expert that was not selected and beats one that was: it is tempting. A choice exists iff for some
    threshold, which can be taken among the groups' `high`, the groups that must stay (touched, or with a `low` above
    it) are among those that may (not tempting, with a `high` at or above it), and there are at most `topk_group` of the
    former and at least as many of the latter.

    The higher the threshold, the fewer must stay, and the fewer may. So the highest is tried at which each touched
    group and `topk_group` groups that are not tempting may: if any does, that does.
    """
    tokens, experts = low.shape
    members = taken.view(tokens, n_group, experts // n_group)
    touched = members.any(dim=2)  # [T, G]
    worst = high.masked_fill(~taken, torch.inf).amin(dim=1)  # [T]
    best_left = low.masked_fill(taken, -torch.inf).view(members.shape).amax(dim=2)  # [T, G]
    tempting = best_left > worst.view(-1, 1)
    group_low, group_high = group_bounds(low, high, n_group, group_score)
    free = group_high.masked_fill(tempting, -torch.inf).sort(dim=1, descending=True).values
    threshold = group_high.masked_fill(~touched, torch.inf).amin(dim=1).minimum(free[:, topk_group - 1])[:, None]
    must = touched | (group_low > threshold)  # [T, G]
    lawful = ~(must & tempting).any(dim=1) & (must.sum(dim=1) <= topk_group)
    lawful &= (~tempting).sum(dim=1) >= topk_group
    return Kept(lawful, touched, group_low, group_high)


def alike_groups(logits: torch.Tensor, bias: torch.Tensor | None, n_group: int) -> torch.Tensor:
    """int64 [T, G]: the same number for groups that hold the same logits with the same biases, in any order.

    Their scores are equal in any arithmetic that computes an expert's score from its logit and bias alone.
    """
    values = logits.double().view(logits.shape[0], n_group, logits.shape[1] // n_group) + 0.0  # -0 as +0
    rows = values.sort(dim=2).values  # [T, G, S]
    if bias is not None:
        biases = bias.double().view(1, *values.shape[1:]).expand(values.shape) + 0.0
        order = biases.argsort(dim=2, stable=True)
        values, biases = values.gather(2, order), biases.gather(2, order)
        order = values.argsort(dim=2, stable=True)
        rows = torch.cat([values.gather(2, order), biases.gather(2, order)], dim=2)
    return rows.flatten(0, 1).unique(dim=0, return_inverse=True)[1].view(rows.shape[:2])
