"""Cases and observations of the experts ops for the tests of their checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.checks import CHECKS
from moe_fuzz.checks.experts.family import FAMILY
from moe_fuzz.checks.experts.observation import ExpertsObservation, Outputs
from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.labels import Labels
from moe_fuzz.ops.experts.fp4_inputs import Fp4Inputs
from moe_fuzz.ops.experts.inputs import ExpertsInputs
from moe_fuzz.reference.experts_bf16 import experts_bf16
from moe_fuzz.reference.experts_nvfp4 import experts_nvfp4
from moe_fuzz.verdict import Violation

STRICT = Contract(deterministic=True, batch_invariant=True, accepts=PADDING_DIALECTS)
#: For targets whose rows are not all alike.
STEADY = Contract(deterministic=True, accepts=PADDING_DIALECTS)
_CONFIG = {
    "hidden": 32, "intermediate": 24, "top_k": 2, "dtype": "bfloat16", "activation": "silu", "gate_layout": "first",
    "bias": "none", "weight_on_input": False, "expert_map": "none", "recipe": "dense", "dialect": "distinct",
    "edge": "right", "out": False, "magnitude": 0, "weight_scale": -3,
}  # fmt: skip

_FP4 = {"hidden": 48, "intermediate": 32, "scale_layout": "linear", "activations": "as_given", "global_scale": "power"}
#: What the reference promises.
FP4_STRICT = replace(STRICT, rounding="exact", nonfinite="reference")

Target = Callable[[ExpertsInputs], torch.Tensor]


def case_of(rows: int = 8, experts: int = 6, seed: int = 3, faults: tuple[Fault, ...] = (), padding: int = 0,
            **config: Any) -> Case:  # fmt: skip
    """`padding` of the rows, the last ones, are flagged."""
    labels = Labels.range(rows)
    whole = {**_CONFIG, "experts": str(Labels.range(experts)), **config}
    return Case("experts_bf16", whole, (Step(labels, labels.last(padding), faults),), seed)


def fp4_case_of(**config: Any) -> Case:
    """As `case_of`, of `experts_nvfp4`."""
    return replace(case_of(**{**_FP4, **config}), op="experts_nvfp4")


def reference(inputs: ExpertsInputs) -> torch.Tensor:
    if isinstance(inputs, Fp4Inputs):
        return experts_nvfp4(**inputs.plain, **{k: v for k, v in inputs.options.items() if k != "backend"})
    return experts_bf16(**inputs.plain, **inputs.options)


def observe(case: Case, target: Target = reference, contract: Contract = STRICT, **can: Any) -> ExpertsObservation:
    info = TargetInfo(f"{case.op}@x", case.op, "x", contract=contract, capabilities=Capabilities(alignment=1, **can))
    inputs = FAMILY.materialize(case, 0, "cpu")
    assert isinstance(inputs, ExpertsInputs)
    return ExpertsObservation(case, 0, info, inputs, Outputs(target(inputs)), lambda other: Outputs(target(other)))


def judge(seen: ExpertsObservation) -> dict[str, Violation]:
    """The first violation of each check that has one."""
    return {name: found[0] for name, check in CHECKS["experts"].items() if (found := check(seen))}


__all__ = ["FAMILY", "FP4_STRICT", "STEADY", "STRICT", "case_of", "fp4_case_of", "judge", "observe", "reference"]
