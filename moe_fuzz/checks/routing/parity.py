"""Parity of a router: is the selection a top-k, are the weights those of its own ids, within derived bounds."""

from __future__ import annotations

import torch

from moe_fuzz.checks import check
from moe_fuzz.checks.coordinates import first, row_text
from moe_fuzz.checks.routing.groups import Kept, alike_groups, kept_groups
from moe_fuzz.checks.routing.observation import RoutingObservation
from moe_fuzz.checks.routing.scores import U
from moe_fuzz.verdict import Violation

_APART = 2.0**-40  # between float64 scores, which are 1 at most, of experts that do not tie
_LEAST = 2.0**-40  # the least sum of scores by which a target must renormalize
_AT_ONCE = 1 << 18  # elements of a comparison of all slots with all experts; of more, slot by slot


def _inverted(seen: RoutingObservation) -> tuple[torch.Tensor, Kept | None]:
    """bool [T]: rows in which an expert that was not selected beats one that was; and with groups, those kept."""
    left = seen.lowest_left()
    kept = None
    if seen.topk_group < seen.n_group:
        low, high = seen.bounds
        taken = torch.zeros_like(low, dtype=torch.bool).scatter_(1, seen.chosen, True)
        kept = kept_groups(low, high, taken, seen.n_group, seen.topk_group, seen.group_score)
        left.masked_fill_(~kept.touched.repeat_interleave(seen.experts // seen.n_group, dim=1), -torch.inf)
    return seen.judged & (left.amax(dim=1) > seen.highest.amin(dim=1)), kept


def _selects_the_best(seen: RoutingObservation) -> bool:
    """Whether no judged row leaves out an expert of a higher float64 score than one that it takes. Then no bounds are
    needed to see that its selection is right: each expert's hold its score between them, so that no lower one of those
    left out is above a higher one of those taken. With groups, what is left out may be better."""
    if seen.topk_group < seen.n_group:
        return False
    return seen.least_lead >= 0 or not bool((seen.judged & (seen.best_left > seen.worst_chosen)).any())


def misselected(seen: RoutingObservation) -> torch.Tensor:
    """bool [T]: the rows that `selection` finds wrong."""
    if seen.top_k == seen.experts:
        return torch.zeros_like(seen.judged)
    wrong, kept = _inverted(seen)
    return wrong if kept is None else wrong | (seen.judged & ~kept.lawful)


@check("routing", "selection", parity=True, rows=misselected)
def selection(seen: RoutingObservation) -> list[Violation]:
    """max(unselected) <= min(selected) + ε: set-valued, so that ties and near-ties may fall either way.

    An inversion of i (selected) and j (not) is legal iff c_j - c_i <= δ_i + δ_j + u(|c_i| + |c_j|), which splits into
    one number for each expert, c_j - slack_j <= c_i + slack_i. With groups, j counts only where its group was kept, and
    the groups that were kept must be a legal choice by the same rule (groups.py).
    """
    if seen.top_k == seen.experts or not seen.any_judged or _selects_the_best(seen):
        return []
    wrong, kept = _inverted(seen)
    if not wrong.any():
        return [] if kept is None else _groups(seen, kept)
    row = first(wrong)[0]
    low, high = (bound[row] for bound in seen.bounds)
    taken = torch.zeros_like(low, dtype=torch.bool).scatter_(0, seen.chosen[row], True)
    eligible = ~taken if kept is None else ~taken & kept.touched[row].repeat_interleave(seen.experts // seen.n_group)
    lost = int(low.masked_fill(~eligible, -torch.inf).argmax())
    won = int(high.masked_fill(~taken, torch.inf).argmin())
    message = f"row {row} takes expert {won}, although expert {lost} has a higher score"
    return [
        Violation(
            "selection",
            "inversion",
            message + (" and a group that was kept" if kept else ""),
            "ids",
            (row,),
            f"expert {lost} (score {float(seen.biased[row, lost]):.9g})",
            f"expert {won} (score {float(seen.biased[row, won]):.9g}); ids {row_text(seen.ids[row])}",
        )
    ]


def _groups(seen: RoutingObservation, kept: Kept) -> list[Violation]:
    """No legal choice of groups explains what was selected."""
    wrong = seen.judged & ~kept.lawful
    if not wrong.any():
        return []
    row = first(wrong)[0]
    touched = kept.touched[row]
    won = int(kept.high[row].masked_fill(~touched, torch.inf).argmin())
    lost = int(kept.low[row].masked_fill(touched, -torch.inf).argmax())
    message = f"row {row}: no {seen.topk_group} best of {seen.n_group} groups explain the experts it takes"
    if int(touched.sum()) > seen.topk_group:
        message = f"row {row} takes experts of {int(touched.sum())} groups, where {seen.topk_group} stay"
    return [
        Violation(
            "selection",
            "group",
            message,
            "ids",
            (row,),
            f"group {lost} (score {float(kept.low[row, lost]):.9g} or more)",
            f"group {won} (score {float(kept.high[row, won]):.9g} or less); ids {row_text(seen.ids[row])}",
        )
    ]


@check("routing", "ties")
def ties(seen: RoutingObservation) -> list[Violation]:
    """Of experts with equal logit and equal bias, the lowest index is taken, where the target declares it.

    With groups that holds for a lower expert whose group was kept for certain: another expert of it was taken, or it
    holds the same as the group of the expert that was taken, and is the lower one of the two.
    """
    if seen.info.contract.ties != "lowest_index_first" or seen.top_k == seen.experts or not seen.any_judged:
        return []
    if seen.least_lead > _APART * (1 if seen.bias is None else 1 + float(seen.worst_chosen.abs().amax())):
        return []
    rows = _near(seen).nonzero().flatten()
    if not len(rows):
        return []
    logits, chosen = seen.logits[rows].double(), seen.ids[rows]
    if logits.numel() * seen.top_k <= _AT_ONCE and not _tied(logits, chosen, seen.bias).any():
        return []
    taken = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, chosen, True)
    column = torch.arange(seen.experts, device=logits.device)
    size = seen.experts // seen.n_group
    grouped = seen.topk_group < seen.n_group
    if grouped:
        touched = taken.view(len(rows), seen.n_group, size).any(dim=2)  # [R, G]
        alike = alike_groups(logits, seen.bias, seen.n_group)  # [R, G]
    for slot in range(seen.top_k):
        expert = chosen[:, slot : slot + 1]
        equal = logits == logits.gather(1, expert)
        if seen.bias is not None:
            equal &= seen.bias.view(1, -1) == seen.bias[expert]
        if grouped:
            kept = touched | (alike == alike.gather(1, expert // size))
            equal &= kept.repeat_interleave(size, dim=1)
        passed_over = equal & ~taken & (column < expert)
        if passed_over.any():
            at, lower = first(passed_over)
            row = int(rows[at])
            return [Violation("ties", "higher-index", f"row {row}: expert {lower} is passed over in a tie",
                              "ids", (row, slot), f"expert {lower}", f"expert {int(expert[at])}")]  # fmt: skip
    return []


def _near(seen: RoutingObservation) -> torch.Tensor:
    """bool [T]: an expert that was not taken has about as high a score as one that was. Without that there is no tie:
    of equal logits and biases, float64 scores are the same but for the last bits of an exponential and of a sum."""
    worst = seen.worst_chosen
    return seen.judged & (seen.best_left >= worst - (worst.abs() + 1) * 2.0**-48)


def _tied(logits: torch.Tensor, chosen: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """bool [R, k, E]: a lower expert that was not taken has the same logit and bias, whatever its group."""
    slots = chosen[:, :, None]  # [R, k, 1]
    equal = logits[:, None, :] == logits.gather(1, chosen)[:, :, None]
    equal &= torch.arange(logits.shape[1], device=logits.device) < slots
    if bias is not None:
        equal &= bias == bias[slots]
    return equal.scatter_(2, chosen[:, None, :].expand(-1, chosen.shape[1], -1), False)


@check("routing", "order")
def order(seen: RoutingObservation) -> list[Violation]:
    """Slots stand in descending order of biased score, within ε, where the target declares it (sglang#8125)."""
    if not seen.info.contract.ordered or seen.top_k == 1 or not seen.any_judged:
        return []
    biased = seen.chosen_biased
    ascends = (biased[:, 1:] > biased[:, :-1]) & seen.judged.view(-1, 1)
    if not ascends.any():  # nor does the lower bound of one exceed the higher bound of the one before it
        return []
    wrong = ascends & (seen.lowest[:, 1:] > seen.highest[:, :-1])
    if not wrong.any():
        return []
    row, slot = first(wrong)
    return [
        Violation(
            "order",
            "ascending",
            f"row {row}: slot {slot + 1} has a higher score than slot {slot}",
            "ids",
            (row, slot + 1),
            f"at most {float(biased[row, slot]):.9g}",
            f"{float(biased[row, slot + 1]):.9g}",
        )
    ]


def _weighed(seen: RoutingObservation) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [T, k]: the weights expected, and the share of its bound that each error uses; 0 where none is judged."""
    score, error = seen.chosen_scores, seen.chosen_error
    judged = None if seen.all_judged else seen.judged.view(-1, 1)  # None: every row is
    if seen.renormalize:
        total, total_error = score.sum(1, keepdim=True), error.sum(1, keepdim=True)
        if judged is not None or not float(total.amin()) >= _LEAST:
            judged = seen.judged.view(-1, 1) & (total >= _LEAST)
            total = total.masked_fill(~judged, 1.0)
        expected = score / total
        error = (error + expected * total_error) / (total - total_error).clamp_(min=2.0**-41)
        error += (seen.top_k + 4) * U * expected
    else:
        expected = score
    bound = torch.add(error, expected, alpha=4 * U)  # as exact as a product and a sum: 4u is a power of two
    if seen.scale != 1:
        bound, expected = bound.mul_(seen.scale), seen.scale * expected
    used = (seen.weights - expected).abs_().div_(bound.add_(2.0**-126))
    return expected, used if judged is None else used.masked_fill_(~judged, 0.0)


def misweighted(seen: RoutingObservation) -> torch.Tensor:
    """bool [T]: the rows that `weights` finds wrong."""
    _, used = _weighed(seen)
    return (~(used <= 1) & seen.sound_weights[:, : seen.top_k]).any(dim=1)


@check("routing", "weights", parity=True, rows=misweighted)
def weights(seen: RoutingObservation) -> list[Violation]:
    """Weights against float64 scores of the kernel's own ids, within the rounding bound, elementwise.

    Renormalized rows whose selected scores sum below 2^-40 are left to the target's epsilon: there only `finite` rules.
    """
    expected, used = _weighed(seen)
    if not used.numel():
        return []
    most = float(used.amax())
    if most <= 1:  # NaN is not
        seen.budget["weights"] = most
        return []
    wrong = ~(used <= 1) & seen.sound_weights[:, : seen.top_k]  # what is not sound, `finite` reports
    if wrong.any():
        where = first(wrong)
        row, slot = where
        message = f"row {row}: the weight of expert {int(seen.ids[where])} is off by {float(used[where]):.3g} bounds"
        right = float(expected[where])
        limit = abs(float(seen.weights[where]) - right) / float(used[where])
        return [
            Violation(
                "weights",
                "off",
                message,
                "weights",
                (row, slot),
                f"{float(expected[where]):.9g}",
                f"{float(seen.weights[where]):.9g}",
                float(used[where]),
                allowed=(right - limit, right + limit),
            )
        ]
    seen.budget["weights"] = float(torch.nan_to_num(used).max())
    return []
