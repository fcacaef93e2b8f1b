"""nvfp4_quantize fused with an activation: what is quantized is known to an interval, which is hardly ever wide."""

from __future__ import annotations

import pytest
import torch

from moe_fuzz.checks.nvfp4.activated import activated_span
from moe_fuzz.checks.nvfp4.binding import binding
from moe_fuzz.ops.nvfp4.inputs import materialize
from moe_fuzz.ops.nvfp4.space import ROW_FAULTS
from moe_fuzz.reference.nvfp4 import nvfp4_quantize
from moe_fuzz.targets.torch_nvfp4 import nvfp4_quantize as in_torch
from tests.cpu.test_nvfp4_checks import NEAR, by_bytes, case_of, judge, observe, on_x, with_byte


def fused(x, global_scale, layout, activation, **more):
    """silu by another formula, in float32."""
    gate, up = x.float().chunk(2, dim=1)
    held = (gate * torch.sigmoid(gate) * up).to(x.dtype)
    return nvfp4_quantize(held, global_scale, layout, **more)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["power", "fitted"])
def test_no_alarm_on_a_fused_activation(dtype, kind):
    faults = [name for name in ROW_FAULTS if name != "stale_rows"]
    for number, fault in enumerate(faults):
        case = case_of(on_x(fault, "0-8"), rows=9, blocks=3, activation="silu", dtype=dtype, global_scale=kind,
                       seed=number, layout=("linear", "swizzled")[number % 2],
                       magnitude=(0, 6)[number % 3 == 2])  # fmt: skip
        assert not judge(observe(case)), fault
        other = fused if "nan" not in fault and "inf" not in fault and "nonfinite" not in fault else nvfp4_quantize
        assert not judge(observe(case, quantize=other)), fault
        assert not judge(observe(case, NEAR, quantize=in_torch)), fault


def test_a_fused_activation_is_judged_to_the_bit_in_16_bits():
    """Where nothing is open but beside a tie: hardly any byte may be another."""
    for dtype, share in (("bfloat16", 0.001), ("float16", 0.005), ("float32", 1.0)):
        seen = observe(case_of(rows=60, blocks=8, activation="silu", dtype=dtype))
        low, high = seen.span
        assert (low != high).float().mean() <= share
        assert (seen.scale_bytes[0] != seen.scale_bytes[1]).float().mean() < 0.01
        assert (seen.span_codes[0] != seen.span_codes[1]).float().mean() < 0.01
        wrong = with_byte(seen, "scales", (3, 1), int(seen.bytes[3, 1]) + 1)
        assert "scale" in by_bytes(wrong)
        assert not binding(seen)


def test_the_exponentials_error_covers_float32():
    gate = torch.linspace(-120, 120, 4001).repeat(3)
    up = torch.cat([torch.full((4001,), size) for size in (1.0, 2.0**100, -(2.0**-100))])
    low, high = activated_span(torch.stack([gate, up], dim=1))
    for held in (gate / (1 + (-gate).exp()) * up, gate * torch.sigmoid(gate) * up, gate * up * torch.sigmoid(gate)):
        assert ((low[:, 0] <= held) & (held <= high[:, 0])).all()


def test_halves_of_a_fused_activation_are_what_they_should_be():
    seen = observe(case_of(rows=60, blocks=2, activation="silu", magnitude=6))
    gate = seen.inputs.plain["x"][:, :32]
    known = (gate == 32).all(dim=1)
    assert 10 < int(known.sum()) < 30  # of the rows, one in three
    plain = materialize(case_of(rows=60, blocks=2, magnitude=6), 0).plain["x"]
    assert torch.equal(seen.values.flatten(1)[known], plain[known])
    assert seen.outputs.codes.shape == (60, 16)
    healed = observe(case_of(on_x("nan_rows", "0-8"), rows=9, activation="silu"))
    assert bool(healed.healed_inputs.plain["x"].isfinite().all())
