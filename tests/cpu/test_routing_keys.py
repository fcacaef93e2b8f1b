"""What the router kernels have in common, in the interpreter."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch
import triton
import triton.language as tl

from moe_fuzz.kernels import routing
from moe_fuzz.kernels.routing_keys import float_of, order_of, row_sum
from moe_fuzz.ops.routing.space import EXPERTS, TOP_K

# inf - inf of a row's scores is the NaN that the kernels mean it to be; numpy would mention it
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning"),
]


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


@triton.jit
def _order_kernel(x, orders, back, N: tl.constexpr, BEYOND: tl.constexpr, MANY: tl.constexpr):
    at = tl.arange(0, N)
    order = order_of(tl.load(x + at), BEYOND, MANY)
    tl.store(orders + at, order)
    tl.store(back + at, float_of(order, BEYOND))


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("low", "beyond"), [(0, 0x7FE000), (0, 0x7FFFFF), (0xE000, 0x7FE000), (0xFFFF, 0x7FFFFF)])
def test_an_order_of_all_floats(low, beyond, many):
    """All upper halves of a float32, with the same lower half."""
    bits = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16) | low
    x = bits.view(torch.float32)
    order, back = torch.empty(2**16, dtype=torch.int32), torch.empty(2**16)
    _order_kernel[(1,)](x, order, back, N=2**16, BEYOND=beyond, MANY=many)
    by_order = x[order.argsort()]
    nans = int(x.isnan().sum())
    assert by_order[:nans].isnan().all()
    assert torch.equal(by_order[nans:], x[~x.isnan()].sort().values)
    same = torch.where(bits == -(2**31), 0, bits)  # -0 is +0
    assert torch.equal(back.view(torch.int32), same)
    assert torch.equal(order[x == 0].unique(), torch.tensor([beyond], dtype=torch.int32)[: int(low == 0)])
    assert beyond != 0x7FE000 or not (order & 0x1FFF).any()


@pytest.mark.parametrize(
    ("experts", "top_k", "dtype", "options"),
    [
        (512, 10, torch.bfloat16, {"renormalize": True}),
        (60, 4, torch.float16, {}),
        (100, 5, torch.bfloat16, {"renormalize": True}),
        (128, 6, torch.float32, {"renormalize": True, "biased": True}),
        (512, 22, torch.float32, {"renormalize": True, "biased": True}),
        (8, 3, torch.bfloat16, {}),
    ],
)
@pytest.mark.parametrize("router", [routing.topk_softmax, routing.topk_sigmoid])
def test_rows_of_a_program_change_no_bit(router, experts, top_k, dtype, options, monkeypatch):
    """In lanes as on a GPU, by 4 warps and by 16; the last program has fewer rows than it could take."""
    generator = torch.Generator().manual_seed(experts)
    tokens = 1 + 16 * max(1, 32 // experts)
    logits = (torch.randn(tokens, experts, generator=generator) * 4).to(dtype)
    logits[1::6, ::2], logits[2::6, 1:], logits[3::6, 2] = -torch.nan, torch.inf, torch.nan
    logits[4::6, ::3] = -torch.inf
    logits[5::6] = torch.randint(-2, 3, logits[5::6].shape, generator=generator).to(dtype)
    bias = torch.randn(experts, generator=generator) if options.get("biased") else None
    keywords = {"renormalize": options.get("renormalize", False), "bias": bias, "scale": 2.5}
    reference = router(logits, top_k, **keywords)  # as interpreted
    monkeypatch.setattr(routing, "_lanes", partial(routing._lanes, interpreted=False))
    launched: list[tuple[int, ...]] = []
    monkeypatch.setattr(routing, "topk_by_lanes", _Spy(routing.topk_by_lanes, launched))
    found = []
    for warps in (4, 16):
        routing._lanes.func.cache_clear()
        monkeypatch.setattr(routing, "warps_for", lambda work, processors, warps=warps: warps)
        found.append(router(logits, top_k, **keywords))
    routing._lanes.func.cache_clear()
    assert launched == [(5,), (2,)]
    for few, many, whole in zip(*found, reference, strict=True):
        assert torch.equal(few, many)
        assert torch.equal(few, whole) if whole.dtype == torch.int32 else torch.allclose(few, whole, rtol=1e-5)


def test_warps_of_a_program():
    """16 where all run at once and no multiprocessor has more of them than with 4; few rows never meet a second."""
    H200 = 132
    chosen = {tokens: routing.warps_for(tokens, H200) for tokens in range(1, 40000)}
    assert [chosen[tokens] for tokens in (1, 128, 1024, 1584, 1585, 2112, 2113, 3696, 3697, 4096, 4224, 4225)] == [
        4, 4, 4, 4, 16, 16, 4, 4, 16, 16, 16, 4]  # fmt: skip
    assert [chosen[tokens] for tokens in (6144, 8192, 8448, 8449, 16384)] == [16, 16, 16, 4, 4]
    for tokens, warps in chosen.items():
        programs = -(-tokens // warps)
        assert warps * -(-programs // H200) == 4 * -(-tokens // (4 * H200))
    blocks = [routing._lanes(tokens, 128, 8, False, H200, interpreted=False) for tokens in range(1, 9000, 7)]
    assert {(block["ROWS"], block["num_warps"]) for block in blocks} == {(4, 4), (16, 16)}
    assert routing._lanes(4096, 1024, 8, False, H200, interpreted=False)["num_warps"] == 4


def test_lists_of_every_length_are_interpreted_and_most_shapes_are_not():
    """Lists cost the interpreter two to three times as much."""
    drawn = [(experts, top_k) for experts in EXPERTS for top_k in TOP_K if experts > 32 and top_k <= experts]
    lengths = Counter(routing._lanes(8, *shape, True, 1, interpreted=True)["EACH"] for shape in drawn)
    assert min(lengths[each] for each in (2, 3, 4, 6, 8, 12)) >= 4
    assert lengths[1] > 0.7 * len(drawn)
    known = {(block["EACH"], block["SORTED"]) for block in (routing._lanes(8, *shape, True, 1, interpreted=True)
                                                            for shape in drawn)}  # fmt: skip
    assert {(each, sorted_) for each in (2, 3, 4, 6, 8, 12) for sorted_ in (False, True)} <= known


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
    monkeypatch.setattr(routing, "_MANY", 1024)  # as on a GPU
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
    monkeypatch.setattr(routing, "_MANY", 1024)  # as on a GPU
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
