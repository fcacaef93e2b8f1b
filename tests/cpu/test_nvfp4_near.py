"""What the contract gives to the bit is within what its looser reading allows: of quantizers, and inside experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moe_fuzz.checks.experts.requantized import quantized, requantized
from moe_fuzz.checks.nvfp4.observation import QuantizeObservation
from moe_fuzz.contract import PADDING_DIALECTS, Contract
from moe_fuzz.ops.nvfp4.inputs import QuantizeInputs
from moe_fuzz.ops.nvfp4.space import FIELDS, GLOBAL_SCALES, ROW_FAULTS
from moe_fuzz.reference.nvfp4 import FLT_MAX, nvfp4_quantize
from tests.cpu.experts_seen import FP4_STRICT, fp4_case_of
from tests.cpu.experts_seen import judge as judge_experts
from tests.cpu.experts_seen import observe as observe_experts
from tests.cpu.test_nvfp4_checks import case_of, judge, observe, on_x
from tests.cpu.test_nvfp4_checks import quantized as outputs_of

NEAR = Contract(deterministic=True, nonfinite="reference", scale_padding="zero", accepts=PADDING_DIALECTS)
EXTREME = (2.0**-126, 2.0**-120, 1.0, 2.0**118, 1.5 * 2.0**121, 2.0**125, 1.7 * 2.0**126, FLT_MAX)
FEW = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def cases(draw):
    config = {name: draw(st.sampled_from(values)) for name, values in FIELDS.items()}
    faults = [on_x(name, "0-2") for name in draw(st.sets(st.sampled_from(ROW_FAULTS[:-1]), max_size=2))]
    return case_of(*faults, rows=draw(st.sampled_from((3, 5))), blocks=draw(st.sampled_from((1, 5))),
                   seed=draw(st.integers(0, 1 << 16)), **config)  # fmt: skip


@settings(FEW, max_examples=400)
@given(cases())
def test_the_contracts_own_bytes_are_near(case):
    assert not judge(observe(case, NEAR), relations=False), case.dumps()


@pytest.mark.parametrize("kind", GLOBAL_SCALES)
@pytest.mark.parametrize("layout", FIELDS["layout"])
def test_they_are_near_under_each_global_scale(kind, layout):
    for dtype in FIELDS["dtype"]:
        for activation in FIELDS["activation"]:
            for seed, fault in enumerate(("code_grid", "code_ties", "scale_ties", "tiny_block", "ladder")):
                case = case_of(on_x(fault, "0-3"), global_scale=kind, layout=layout, dtype=dtype, seed=seed,
                               activation=activation)  # fmt: skip
                assert not judge(observe(case, NEAR), relations=False), case.dumps()


@settings(FEW, max_examples=300)
@given(st.integers(0, 1 << 32), st.sampled_from(EXTREME), st.integers(-13, 10))
def test_they_are_near_whatever_the_numbers(seed, scale, power):
    """power: of amax * global scale, at most."""
    seen = _seen(_numbers(seed, scale, power).float(), scale)
    assert not judge(seen, relations=False)


@pytest.mark.parametrize("scale", EXTREME)
def test_codes_farther_off_than_the_contracts_are_told(scale):
    """What is allowed besides what is nearest ends at the contract's own codes."""
    told = 0
    for seed in range(60):
        seen = _seen(_numbers(seed, scale, 1 + seed % 8).float(), scale)
        other = replace(seen.outputs, codes=seen.outputs.codes ^ 0x77)  # codes c for 7 - c
        told += "codes" in judge(seen.with_outputs(other), relations=False)
    assert told > 50


@settings(FEW, max_examples=300)
@given(st.integers(0, 1 << 32), st.sampled_from(EXTREME), st.integers(-13, 10), st.sampled_from((0.0, 2.0**-9, 0.125)),
       st.sampled_from((torch.bfloat16, torch.float16, torch.float32)))  # fmt: skip
@example(1, EXTREME[-1], 3, 2.0**-9, torch.float32)
def test_what_the_contract_leaves_of_a_number_is_in_its_interval(seed, scale, power, spread, dtype):
    value = _numbers(seed, scale, power).to(dtype).double()
    low, high = ((value + side * spread * value.abs()).to(dtype).double() for side in (-1, 1))
    given_scale = torch.tensor([scale])
    for rounding in ("exact", "near"):
        left, error = requantized(low, high, value, given_scale, dtype, Contract(rounding=rounding))
        made = torch.Generator().manual_seed(seed)
        for _ in range(4):
            share = torch.rand(value.shape, generator=made, dtype=torch.float64)
            had = torch.minimum(torch.maximum((low + share * (high - low)).to(dtype).double(), low), high)
            got = quantized(had, given_scale, dtype)
            assert ((got - left).abs() <= error * (1 + 1e-12) + 1e-300).all()


@settings(FEW, max_examples=60)
@given(st.integers(0, 1 << 16), st.sampled_from(("dense", "integer", "one_hot", "ladder")),
       st.sampled_from((*GLOBAL_SCALES[:5], "zero")), st.sampled_from(("bfloat16", "float16")),
       st.sampled_from(("linear", "swizzled")))  # fmt: skip
def test_experts_that_quantize_as_the_contract_does_are_near(seed, recipe, kind, dtype, layout):
    case = fp4_case_of(seed=seed, recipe=recipe, global_scale=kind, dtype=dtype, scale_layout=layout,
                       activations="nvfp4")  # fmt: skip
    near = replace(FP4_STRICT, rounding="near", nonfinite="any")
    assert judge_experts(observe_experts(case, contract=near)) == {}, case.dumps()


def _numbers(seed: int, scale: float, power: int) -> torch.Tensor:
    """float64 [4, 32], some of them on the grid of codes, whose largest times the scale are about 6 * 2^power."""
    made = torch.Generator().manual_seed(seed)
    share = torch.rand(4, 32, generator=made, dtype=torch.float64) * 2 - 1
    share[::2] = (share[::2] * 24).round() / 24
    return share * (6 * 2.0**power / scale)


def _seen(x: torch.Tensor, scale: float) -> QuantizeObservation:
    inputs = QuantizeInputs({"layout": "linear"}, {"x": x, "global_scale": torch.tensor([scale])})
    return replace(observe(case_of(rows=4, blocks=2), NEAR), inputs=inputs, outputs=outputs_of(inputs, nvfp4_quantize))
