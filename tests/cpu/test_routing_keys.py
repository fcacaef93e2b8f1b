"""What the router kernels have in common, in the interpreter."""

from __future__ import annotations

import os
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch
import triton
import triton.language as tl

from moe_fuzz.kernels import routing
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


class _Spy:
    """A kernel, and the grids it was launched on."""

    def __init__(self, kernel, launched):
        self._kernel, self._launched = kernel, launched

    def __getitem__(self, grid):
        self._launched.append(grid)
        return self._kernel[grid]


@pytest.mark.parametrize("experts", [32, 64, 128, 256])
def test_the_best_of_many_rows_as_they_lie_on_a_gpu(experts, monkeypatch):
    """The last program has fewer rows than it could take."""
    logits = torch.randint(-3, 4, (1030, experts), generator=torch.Generator().manual_seed(experts)).bfloat16()
    logits[1::7] = -torch.nan
    logits[2::7, experts // 2 :] = torch.inf
    parts = [routing.topk_sigmoid(part, 1) for part in logits.split(515)]  # by the other kernel
    monkeypatch.setattr(routing, "_top1", partial(routing._top1, interpreted=False))
    found = routing.topk_sigmoid(logits, 1)
    for one, pieces in zip(found, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(pieces))


@pytest.mark.parametrize("router", [routing.topk_softmax, routing.topk_sigmoid])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", [32, 128])
def test_the_best_of_many_rows_is_that_of_a_few(router, renormalize, dtype, experts, monkeypatch):
    """Two kernels, which the number of tokens chooses between: same bits, on any logits, strided ones too."""
    generator = torch.Generator().manual_seed(experts)
    logits = (torch.randn(1030, experts, generator=generator) * 5).to(dtype)
    logits[1], logits[2, ::2], logits[3], logits[4], logits[5, 3:] = -torch.nan, torch.nan, -torch.inf, torch.inf, 0.0
    logits[6, 7], logits[7] = torch.inf, torch.finfo(dtype).max
    flags = torch.arange(1030) % 5 == 4
    launched = []
    monkeypatch.setattr(routing, "top1", _Spy(routing.top1, launched))
    for padding in ("distinct", "minus_one"):
        options = {"renormalize": renormalize, "scale": 2.5, "padding": padding}
        whole = router(logits, 1, is_padding=flags, **options)
        assert bool(launched) == (renormalize or router is routing.topk_sigmoid)
        launched.clear()
        strided = router(logits.repeat_interleave(2, 1)[:, ::2], 1, is_padding=flags, **options)
        part = router(logits[:40], 1, is_padding=flags[:40], **options)
        assert not launched
        for one, other, few in zip(whole, strided, part, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one[:40], few)
