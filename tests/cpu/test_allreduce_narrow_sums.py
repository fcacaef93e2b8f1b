"""An all-reduce that adds up in 16 bits, as NCCL does, can say so."""

from __future__ import annotations

import pytest
import torch

from moe_fuzz.checks.allreduce.bounds import bounded_sum
from moe_fuzz.contract import Contract


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world", [3, 8])
def test_sums_in_the_dtype_are_within_the_bound_of_who_declares_them(dtype, world):
    generator = torch.Generator().manual_seed(world)
    x = torch.randn(world, 64, 128, generator=generator).to(dtype)
    residual = torch.randn(64, 128, generator=generator).to(dtype)
    total = x[0]
    for part in x[1:]:
        total = total + part
    total = total + residual
    said = Contract(rounds=("sum", "residual"), reduce="dtype")
    _, narrow = bounded_sum(x, residual, said)
    _, wide = bounded_sum(x, residual, Contract(rounds=("sum", "residual")))
    assert ((total.double() - narrow.value).abs() <= narrow.bound).all()
    assert ((total.double() - wide.value).abs() > wide.bound).any()  # else the declaration means nothing
    assert (narrow.bound < 0.1 * x.abs().double().sum(dim=0)).all()  # and it is no licence
