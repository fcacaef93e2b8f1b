"""How much padding a campaign's batches had, and what stood in it: the figures of vllm#37758, for our own cases."""

from __future__ import annotations

from collections.abc import Mapping

from moe_fuzz.case import Case
from moe_fuzz.ops.inputs import Inputs
from moe_fuzz.verdict import PADDING


def statistics(case: Case, step_index: int, inputs: Inputs) -> Mapping[str, float]:
    """Of one step, if it has padding, for its kind of run: `padding/ranks dp=2 +ep/nan` and the like."""
    step = case.steps[step_index]
    padded = step.padding.positions(step.rows)
    if not padded:
        return {}
    tail = inputs.plain["hidden"][padded]
    kind = f"{PADDING}/{run_kind(case)}"
    return {f"{kind}/steps": 1, f"{kind}/nan": int(bool(tail.isnan().any())),
            f"{kind}/inf": int(bool(tail.isinf().any())), f"{kind}/tokens": len(padded)}  # fmt: skip


def run_kind(case: Case) -> str:
    """`eager`, `sequence`, `graph`, `piecewise`, `ranks dp=2`; with `+ep` where experts are spread, too."""
    kind = "sequence" if case.mode == "eager" and len(case.steps) > 1 else case.mode
    ranks = f" dp={case.config['dp']}" if case.config["dp"] != 1 else ""
    return kind + ranks + (" +ep" if case.config["ep"] != 1 else "")
