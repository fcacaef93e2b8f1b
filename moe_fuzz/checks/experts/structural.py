"""Checks of structure: shape and dtype, every element written, finite where it must be, nothing from nothing."""

from __future__ import annotations

import torch

from moe_fuzz.checks import check, outputs
from moe_fuzz.checks.coordinates import first
from moe_fuzz.checks.experts.observation import ExpertsObservation
from moe_fuzz.verdict import Violation


def violation(seen: ExpertsObservation, check_name: str, symptom: str, wrong: torch.Tensor, message: str,
              expected: str) -> list[Violation]:  # fmt: skip
    """Of the first wrong element, bool [T, H]; none where there is none."""
    if not wrong.any():
        return []
    where = first(wrong)
    rows = int(wrong.any(dim=1).sum())
    text = f"token {where[0]}: {message}" + (f" ({rows} tokens in all)" if rows > 1 else "")
    return [Violation(check_name, symptom, text, "y", where, expected, f"{float(seen.outputs.y[where]):.9g}")]


@check("experts", "structure")
def structure(seen: ExpertsObservation) -> list[Violation]:
    """The shape of x, its dtype and its device."""
    return outputs.structure(seen.outputs, seen.inputs.results)


@check("experts", "written")
def written(seen: ExpertsObservation) -> list[Violation]:
    """Every element of y is written, those of padding rows too."""
    return violation(seen, "written", "y:unwritten", seen.missing, "y was not written", "a number")


@check("experts", "finite")
def finite(seen: ExpertsObservation) -> list[Violation]:
    """Where the result is determined there is no NaN, and an infinity only where the dtype may overflow. A NaN in x is
    one in y, and so is one in a scale; an infinity is a NaN there or an infinity: nothing on the way hides them."""
    y = seen.outputs.y
    wrong = seen.claimed & y.isnan() & ~seen.missing
    if wrong.any():
        return violation(seen, "finite", "nan", wrong, "y is NaN, though x and the weights are finite", "a number")
    low, high = seen.limits
    wrong = seen.claimed & y.isinf() & torch.where(y > 0, high < torch.inf, low > -torch.inf)
    if wrong.any():
        return violation(seen, "finite", "infinite", wrong, "y is infinite, and is not near the dtype's largest",
                         f"{float(seen.numbers.value[first(wrong)]):.9g}")  # fmt: skip
    weighty = (seen.kept & (seen.weights != 0)).any(dim=1)
    lost = torch.full_like(weighty, seen.inputs.quantizes)  # a code has no NaN
    wrong = (seen.x.isnan().any(dim=1) & weighty & ~lost)[:, None] & ~y.isnan() & ~seen.missing
    if found := violation(seen, "finite", "nan-lost", wrong, "x has a NaN, which is not seen in y", "nan"):
        return found
    wrong = seen.hopeless & y.isfinite() & ~seen.missing
    message = "y is finite, though a NaN or an infinity in x, in a scale or in a global scale goes into it"
    return violation(seen, "finite", "nonfinite-lost", wrong, message, "nan or inf")


@check("experts", "dropped")
def dropped(seen: ExpertsObservation) -> list[Violation]:
    """A token without an expert here gets exactly 0, whatever its x and its weights hold."""
    alone = ~seen.kept.any(dim=1)[:, None]
    wrong = alone & ~(seen.outputs.y == 0) & ~seen.missing
    return violation(seen, "dropped", "nonzero", wrong, "no slot of it has an expert here, and y is not 0", "0")
