"""Steps and units of numbers, against what frexp and ldexp make of them."""

from __future__ import annotations

import pytest
import torch

from moe_fuzz.checks.experts.rounding import PRECISION, _lowest, ulp, unit_of


def _numbers() -> torch.Tensor:
    """Both signs, 1 to 53 bits, exponents from far below float32's to far above."""
    torch.manual_seed(1)
    kept = torch.exp2(torch.randint(1, 54, (4000,)).double())
    power = torch.exp2(torch.randint(-500, 400, (4000,)).double())
    values = (torch.randn(4000, dtype=torch.float64) * kept).round() * power
    values[::40], values[1::40] = 0.0, -0.0
    return values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_is_the_distance_of_neighbours(dtype: torch.dtype) -> None:
    values = _numbers()
    least = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}[dtype]
    expected = torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - PRECISION[dtype]).clamp(min=least)
    assert torch.equal(ulp(values, dtype), torch.where(values == 0, least, expected))
    held = torch.tensor([1.0, 1.5, 255.0, 2.0**-20], dtype=dtype)
    after = (held.view(torch.int16) + 1).view(dtype)
    assert torch.equal(ulp(held.double(), dtype), after.double() - held.double())
    infinite = torch.tensor(torch.inf, dtype=torch.float64)
    assert infinite - ulp(infinite, dtype) == torch.inf


def test_a_unit_is_the_lowest_bit() -> None:
    values = _numbers()
    unit = unit_of(values)
    as_on_a_device = _lowest(values, torch).masked_fill_(values == 0, torch.inf)
    assert torch.equal(unit, as_on_a_device)
    assert torch.equal(unit_of(values.view(100, 40).T), unit.view(100, 40).T)
    assert torch.equal(unit == torch.inf, values == 0)
    assert (unit_of(torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=torch.float64)) == torch.inf).all()
    real, unit = values[values != 0], unit[values != 0]
    assert (torch.frexp(unit).mantissa == 0.5).all()
    whole = real / unit
    assert torch.equal(whole, whole.round())
    assert (whole.abs() % 2 == 1).all()
