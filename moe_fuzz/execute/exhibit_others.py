"""What a script needs to make the calls of a relation, and to compare them: `others` of a step of an exhibit.

    {"healed": {"x": {"rows": [2], "values": TENSOR}, …},    what stands there instead of padding, NaN, dropped slots
     "kept": [0, 1],                                         rows that this must not change
     "huge": {"rows": [0], "kept": [1]} or null,             rows that hold huge numbers instead, and the others
     "fewer": [1] or null,                                   the rows of a call with fewer, in their order
     "compared": [0, 1] or null,                             rows that a second call must repeat; null: all of them
     "backends": ["cutlass"],                                those that are forced in turn
     "rounds": [["residual"]],                               of an all-reduce: of its contracts one is kept
     "spoilt": [[0, 3]]}                                     of a quantizer: row and block of those with NaN or Inf
"""

from __future__ import annotations

from typing import Any

import torch

from moe_fuzz.case import Case
from moe_fuzz.checks.allreduce.observation import AllreduceObservation
from moe_fuzz.checks.experts.observation import ExpertsObservation
from moe_fuzz.checks.families import FAMILIES
from moe_fuzz.checks.layer.observation import LayerObservation
from moe_fuzz.checks.nvfp4.observation import QuantizeObservation
from moe_fuzz.execute.exhibit_tensor import tensor
from moe_fuzz.ops.inputs import Inputs, element_bits
from moe_fuzz.targets.bind import Target

_NONE: dict[str, Any] = {"healed": {}, "kept": [], "huge": None, "fewer": None, "compared": None,
                         "backends": [], "rounds": [], "spoilt": []}  # fmt: skip


def others_of(case: Case, index: int, target: Target, inputs: Inputs) -> dict[str, Any]:
    """As the relations of its family take them; they know it of the inputs alone."""
    seen = FAMILIES[case.op].observe(case, index, target.info, inputs, None, _no_call)
    invariant = target.info.contract.batch_invariant and inputs.tokens > 1
    if isinstance(seen, AllreduceObservation):
        return _NONE | {
            "healed": _healed(seen),
            "kept": _places(seen.defined),
            "fewer": seen.fewer[0].tolist() if invariant else None,
            "backends": [seen.forced[0]] if seen.forced else [],
            "rounds": [list(contract.rounds) for contract in target.info.choices("rounds")],
        }
    if not inputs.tokens:
        return _NONE
    if isinstance(seen, ExpertsObservation):
        return _NONE | {
            "healed": _changed(inputs, seen.healed_inputs),
            "kept": _places(seen.real),
            "huge": _huge(seen.neighbours[0], seen.real) if seen.neighbours else None,
            "fewer": seen.fewer[0].tolist() if invariant and bool(seen.real.any()) else None,
            "backends": list(seen.forced),
        }
    if isinstance(seen, LayerObservation):
        kept = torch.zeros_like(seen.defined)
        if seen.neighbours:
            kept[seen.neighbours[0]] = True
        return _NONE | {
            "healed": _changed(inputs, seen.healed_inputs),
            "kept": _places(seen.defined),
            "huge": _huge(kept, seen.defined) if seen.neighbours else None,
            "compared": _places(~seen.flagged),
        }
    if isinstance(seen, QuantizeObservation):
        return _NONE | {
            "healed": _changed(inputs, seen.healed_inputs),
            "spoilt": _places(~seen.sound),
            "fewer": seen.fewer[0].tolist() if invariant else None,
        }
    return _NONE


def _changed(inputs: Inputs, other: Inputs) -> dict[str, Any]:
    """The rows of each tensor that differ."""
    found = {}
    for name, old in inputs.plain.items():
        new = other.plain[name]
        if old is new:
            continue
        rows = (element_bits(old) != element_bits(new)).flatten(1).any(dim=1).nonzero().flatten()
        if len(rows):
            found[name] = {"rows": rows.tolist(), "values": tensor(new[rows])}
    return found


def _healed(seen: AllreduceObservation) -> dict[str, Any]:
    """The rows that are not defined, of every rank."""
    rows, other = (~seen.defined).nonzero().flatten(), seen.healed_inputs
    names = [name for name in ("x", "residual") if len(rows) and name in other.plain]
    return {name: {"rows": rows.tolist(), "values": tensor(other.plain[name][..., rows, :])} for name in names}


def _huge(kept: torch.Tensor, real: torch.Tensor) -> dict[str, Any]:
    return {"rows": _places(real & ~kept), "kept": _places(kept)}


def _places(there: torch.Tensor) -> list[Any]:
    found = there.nonzero()
    return list((found.flatten() if there.dim() == 1 else found).tolist())


def _no_call(inputs: Inputs) -> Any:
    raise AssertionError("what a relation calls hangs on the inputs alone")
