"""Checks of structure: shape and dtype, every element written, finite where it must be, nothing from nothing."""

from __future__ import annotations

import torch

from moe_fuzz.checks import check, outputs
from moe_fuzz.checks.coordinates import first
from moe_fuzz.checks.experts.flags import wrong
from moe_fuzz.checks.experts.observation import ExpertsObservation
from moe_fuzz.verdict import Violation

#: What `finite` finds, in the order in which it is looked for.
_NONFINITE = {
    "nan": "y is NaN, though x and the weights of its experts here are finite",
    "infinite": "y is infinite, and is not near the dtype's largest",
    "nan-lost": "x has a NaN, which is not seen in y",
    "nonfinite-lost": "y is finite, though a NaN or an infinity in x, a bias, a scale or a global scale goes into it",
}


def violation(seen: ExpertsObservation, check_name: str, symptom: str, there: torch.Tensor, message: str,
              expected: str, allowed: tuple[float, float] | None = None) -> list[Violation]:  # fmt: skip
    """Of the first wrong element, bool [T, H]."""
    if seen.brief:
        return [Violation(check_name, symptom, message)]
    where = first(there)
    rows = int(there.any(dim=1).sum())
    text = f"token {where[0]}: {message}" + (f" ({rows} tokens in all)" if rows > 1 else "")
    got = f"{float(seen.outputs.y[where]):.9g}"
    return [Violation(check_name, symptom, text, "y", where, expected, got, allowed=allowed)]


@check("experts", "structure")
def structure(seen: ExpertsObservation) -> list[Violation]:
    """The shape of x, its dtype and its device."""
    return outputs.structure(seen.outputs, seen.inputs.results)


@check("experts", "written")
def written(seen: ExpertsObservation) -> list[Violation]:
    """Every element of y is written, those of padding rows too."""
    if not seen.flags["written"]:
        return []
    return violation(seen, "written", "y:unwritten", seen.missing, "y was not written", "a number")


@check("experts", "finite")
def finite(seen: ExpertsObservation) -> list[Violation]:
    """Where the result is determined there is no NaN, and an infinity only where the dtype may overflow. A NaN in x is
    one in y, and so is one in a scale; an infinity is a NaN there or an infinity: nothing on the way hides them."""
    symptom = next((name for name in _NONFINITE if seen.flags[name]), None)
    if symptom is None:
        return []
    where, expected = wrong(seen)[symptom], "nan or inf" if symptom == "nonfinite-lost" else "nan"
    message = _NONFINITE[symptom]
    if symptom == "nan":
        expected = "a number"
        kept, token = seen.kept, first(where)[0]
        if not bool(seen.weights[token][~kept[token]].isfinite().all()):
            message += "; those of slots without one, which touch nothing, are not"
    elif symptom == "infinite":
        expected = f"{float(seen.numbers.value[first(where)]):.9g}"
    most = torch.finfo(seen.outputs.y.dtype).max
    return violation(seen, "finite", symptom, where, message, expected,
                     (-most, most) if symptom in ("nan", "infinite") else None)  # fmt: skip


@check("experts", "dropped")
def dropped(seen: ExpertsObservation) -> list[Violation]:
    """A token without an expert here gets exactly 0, whatever its x and its weights hold."""
    if not seen.flags["dropped"]:
        return []
    message = "no slot of it has an expert here, and y is not 0"
    return violation(seen, "dropped", "nonzero", wrong(seen)["dropped"], message, "0", (0.0, 0.0))
