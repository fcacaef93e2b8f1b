"""Rules of a layer that need no reference."""

from __future__ import annotations

from moe_fuzz.checks import check, outputs
from moe_fuzz.checks.layer.observation import LayerObservation
from moe_fuzz.checks.routing import structural as router
from moe_fuzz.fence import unwritten
from moe_fuzz.verdict import Violation


@check("layer", "structure")
def structure(seen: LayerObservation) -> list[Violation]:
    """y [T, H] in the dtype of hidden, weights [T, k] float32, ids [T, k] int32."""
    return outputs.structure(seen.outputs, seen.inputs.results)


@check("layer", "written")
def written(seen: LayerObservation) -> list[Violation]:
    """No element still holds the poison it had before the call. What is in y's padding rows is no one's business, nor
    is the decision there under the dialect `garbage`."""
    found = router.written(seen.decision)
    left = unwritten(seen.outputs.y) & ~seen.flagged.view(-1, 1)
    return found + outputs.never_written({"y": left})


@check("layer", "finite")
def finite(seen: LayerObservation) -> list[Violation]:
    """The router's half: weights are finite and >= 0."""
    return router.finite(seen.decision)


@check("layer", "padding")
def padding(seen: LayerObservation) -> list[Violation]:
    """The router's half: a row flagged as padding carries the dialect's id and weight."""
    return router.padding(seen.decision)


def decided(seen: LayerObservation, row: int) -> str:
    """What the router's half gave this row, for a person."""
    ids, weights = seen.outputs.ids[row], seen.outputs.weights[row]
    pairs = ", ".join(f"{int(i)} ({float(w):.4g})" for i, w in zip(ids[:8], weights[:8], strict=True))
    return f"experts {pairs}" + (", …" if len(ids) > 8 else "")
