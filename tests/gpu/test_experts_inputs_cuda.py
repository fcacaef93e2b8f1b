"""The tensors of an experts case have the same bits on the device as on the host, and far experts can be laid out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.checks.experts.family import FAMILY
from moe_fuzz.contract import Capabilities
from moe_fuzz.execute.runner import Runner
from moe_fuzz.execute.steps import DEVICE_ELEMENTS
from moe_fuzz.fence import open_arena
from moe_fuzz.labels import Labels
from moe_fuzz.ops.experts.fields import FIELDS
from moe_fuzz.ops.experts.inputs import materialize
from moe_fuzz.ops.inputs import element_bits
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import PASS

pytestmark = [pytest.mark.gpu, pytest.mark.compiled]

ROWS = Labels.range(33)
FAULTS = (
    Fault("sentinel_ids", "ids", Labels.parse("0-9")), Fault("nan_dropped", "weights", ROWS),
    Fault("extreme_weights", "weights", Labels.parse("3-20")), Fault("nan_rows", "x", Labels.parse("30-32")),
)  # fmt: skip


def case(*faults, **config):
    plain = {name: values[0] for name, values in FIELDS.items()}
    sizes = {"experts": "0-12", "top_k": 3, "hidden": 72, "intermediate": 40, "bias": "float32", "dialect": "garbage"}
    return Case("experts_bf16", {**plain, **sizes, **config}, (Step(ROWS, Labels.parse("28-32"), faults),), 11)


@pytest.mark.parametrize("recipe", FIELDS["recipe"])
@pytest.mark.parametrize("dtype", FIELDS["dtype"])
@pytest.mark.parametrize("expert_map", FIELDS["expert_map"])
def test_the_device_makes_the_hosts_bits(recipe, dtype, expert_map):
    drawn = case(*FAULTS, recipe=recipe, dtype=dtype, expert_map=expert_map)
    host, device = materialize(drawn, 0), materialize(drawn, 0, "cuda")
    assert host.plain.keys() == device.plain.keys()
    for name, tensor in host.plain.items():
        assert device.plain[name].is_cuda
        assert torch.equal(element_bits(tensor), element_bits(device.plain[name]).cpu()), name
    assert torch.equal(host.ordinary, device.ordinary.cpu())


@pytest.mark.parametrize("tensor", ["x", "w13", "w2"])
def test_far_rows_and_experts_keep_their_values(tensor):
    inputs = materialize(case(Fault("int32_boundary", tensor)), 0)
    with open_arena("cuda") as arena:
        placed = inputs.place(arena, Capabilities(alignment=1))[tensor]
        assert placed.stride(0) * (placed.shape[0] - 1) >= 2**31 - placed.shape[0]
        assert torch.equal(element_bits(placed).cpu(), element_bits(inputs.plain[tensor]))


def test_refilled_steps_may_be_small_and_large():
    """The small one is made on the host, the large one on the device."""
    drawn = replace(case(), target="experts_bf16@builtin")
    rows = [Labels.range(count) for count in (2, 3000, 2, 3000)]
    drawn = replace(drawn, steps=tuple(Step(one, refilled=True) for one in rows))
    small, large = (FAMILY.elements(drawn, index) for index in (0, 1))
    assert small < DEVICE_ELEMENTS <= large
    verdict = Runner("cuda").run(drawn, drawn.target, RunOptions())
    assert verdict.kind == PASS, verdict.violations
