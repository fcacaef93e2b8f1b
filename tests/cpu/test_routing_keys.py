"""What both router kernels weigh by, in the interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch
import triton
import triton.language as tl

from moe_fuzz.kernels.routing_keys import row_sum

pytestmark = pytest.mark.interpreter


@triton.jit
def _sum_kernel(x, y, ROWS: tl.constexpr, LANES: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    tl.store(y + row, row_sum(tl.load(x + row * LANES + tl.arange(0, LANES)[None, :])))


@pytest.mark.parametrize("lanes", [1, 2, 16, 32, 128, 1024])
def test_a_row_is_summed_in_one_order(lanes):
    """As halves, again and again; a row of a block like a row alone."""
    x = torch.randn(8, lanes, generator=torch.Generator().manual_seed(lanes)).exp()
    expected = x
    while expected.shape[1] > 1:
        expected = expected[:, : expected.shape[1] // 2] + expected[:, expected.shape[1] // 2 :]
    whole, alone = torch.empty(8, 1), torch.empty(1, 1)
    _sum_kernel[(1,)](x, whole, ROWS=8, LANES=lanes)
    _sum_kernel[(1,)](x[5:], alone, ROWS=1, LANES=lanes)
    assert torch.equal(whole, expected)
    assert torch.equal(alone, expected[5:6])
