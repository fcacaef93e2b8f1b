"""The experts as a family."""

from __future__ import annotations

import torch

from moe_fuzz.case import Case
from moe_fuzz.checks.experts import (  # noqa: F401 - they register
    bound,
    determinism,
    exact,
    metamorphic,
    statistical,
    structural,
)
from moe_fuzz.checks.experts.binding import binding
from moe_fuzz.checks.experts.observation import ExpertsObservation, Outputs
from moe_fuzz.checks.experts.together import together
from moe_fuzz.checks.family import Family
from moe_fuzz.ops.experts import fp4_inputs, inputs

_MATERIALIZE = {"experts_bf16": inputs.materialize, "experts_nvfp4": fp4_inputs.materialize}


def materialize(case: Case, step_index: int, device: torch.device | str = "cpu") -> inputs.ExpertsInputs:
    """The inputs of one step of a case of either op."""
    return _MATERIALIZE[case.op](case, step_index, device)


FAMILY = Family(
    name="experts",
    materialize=materialize,
    outputs=Outputs,
    observe=ExpertsObservation,
    binding=binding,
    ahead=metamorphic.ahead,
    elements=inputs.elements,
    together=together,
    inference=True,
)
