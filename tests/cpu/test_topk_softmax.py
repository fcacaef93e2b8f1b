"""The Triton router against the float64 reference, in the interpreter."""

from __future__ import annotations

import math
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz.kernels import routing
from moe_fuzz.kernels.routing import topk_sigmoid, topk_softmax
from moe_fuzz.kernels.routing_lanes import list_length, network
from moe_fuzz.reference.routing import defined_rows, softmax_scores
from moe_fuzz.reference.routing import topk_softmax as reference

# float32 max minus its opposite is the infinity that the kernel means it to be; numpy would mention it
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

NAN, INF = math.nan, math.inf
BOTH = pytest.mark.parametrize(
    "router", [pytest.param(topk_softmax, marks=pytest.mark.interpreter), reference], ids=["kernel", "reference"]
)
BOTH_UNLAUNCHED = pytest.mark.parametrize("router", [topk_softmax, reference], ids=["kernel", "reference"])


def logits_of(tokens: int, experts: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, experts, generator=generator) * 3).to(dtype)


def assert_same(got, expected, logits, bias, top_k, renormalize, scale=1.0, ulps=4.0):
    """Same ids wherever the float64 order is clear, and weights within a few float32 roundings of the same ids."""
    weights, ids = got
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32
    scores, biased = softmax_scores(logits, bias)
    rank = logits.double() if bias is None else biased
    torch.testing.assert_close(rank.gather(1, ids.long()), rank.gather(1, expected[1].long()), rtol=0, atol=1e-6)
    if bias is None:
        assert torch.equal(ids, expected[1])
    picked = scores.gather(1, ids.long())
    exact = picked / picked.sum(1, keepdim=True) * scale if renormalize else picked * scale
    # float32: the exponent's rounding grows with the distance to the row's maximum, at most 40 here
    assert ((weights.double() - exact).abs() <= exact * (ulps + logits.shape[1] + 80) * 2**-24 + 1e-37).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(1, 1, 1), (2, 2, 2), (7, 3, 1), (5, 7, 7), (33, 60, 4), (9, 61, 6), (17, 128, 8), (3, 257, 9), (2, 1024, 32)],
)
def test_agrees_with_the_reference(tokens, experts, top_k, with_bias, renormalize):
    logits = logits_of(tokens, experts, seed=experts)
    bias = logits_of(1, experts, seed=9)[0] / 30 if with_bias else None
    got = topk_softmax(logits, top_k, renormalize=renormalize, bias=bias, scale=2.5)
    expected = reference(logits, top_k, renormalize=renormalize, bias=bias, scale=2.5)
    assert defined_rows(logits, bias, top_k).all()
    assert_same(got, expected, logits, bias, top_k, renormalize, scale=2.5)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_upcast_not_rounded(dtype):
    logits = logits_of(12, 60, dtype=dtype)
    got = topk_softmax(logits, 6, renormalize=True)
    assert_same(got, reference(logits, 6, renormalize=True), logits, None, 6, True)


@pytest.mark.interpreter
@pytest.mark.parametrize("view", ["columns", "rows", "transposed", "offset", "expanded"])
def test_any_strides(view):
    views = {
        "columns": logits_of(9, 80)[:, ::2],
        "rows": logits_of(18, 40)[::2],
        "transposed": logits_of(40, 9).t(),
        "offset": logits_of(9, 43)[:, 3:],
        "expanded": logits_of(1, 40).expand(9, 40),
    }
    logits = views[view]
    bias = (logits_of(1, 80) / 50)[0, ::2]
    flags = (torch.arange(27) % 4 == 0)[::3]
    assert (bias.stride(), flags.stride()) == ((2,), (3,))
    got = topk_softmax(logits, 5, bias=bias, is_padding=flags, padding="minus_one")
    packed = topk_softmax(logits.contiguous(), 5, bias=bias.contiguous(), is_padding=flags.contiguous(),
                          padding="minus_one")  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(got, packed, strict=True))
    got = topk_softmax(logits, 5, bias=bias)
    packed = topk_softmax(logits.contiguous(), 5, bias=bias.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, packed, strict=True))
    assert_same(got, reference(logits, 5, bias=bias), logits, bias, 5, False)


@BOTH
def test_known_answer(router):
    logits = torch.tensor([[0.0, math.log(2), math.log(5), -INF]])
    weights, ids = router(logits, 2)
    assert ids.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[5 / 8, 2 / 8]]))
    weights, ids = router(logits, 2, renormalize=True, scale=2.0)
    torch.testing.assert_close(weights, torch.tensor([[10 / 7, 4 / 7]]))
    weights, ids = router(logits, 2, bias=torch.tensor([0.6, 0.0, -0.5, 0.0]))
    assert ids.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[1 / 8, 2 / 8]]))


@BOTH
@pytest.mark.parametrize("with_bias", [False, True])
def test_ties_fall_to_the_lowest_id(router, with_bias):
    logits = torch.zeros(2, 5)
    logits[1] = torch.tensor([1.0, 0.0, -0.0, 0.0, -0.0])
    bias = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0]) if with_bias else None
    assert router(logits, 4, bias=bias)[1].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


@BOTH
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("experts", [5, 8, 17])
def test_undefined_rows_give_distinct_ids_and_finite_weights(router, experts, with_bias, renormalize):
    negative_nan = torch.tensor(-1, dtype=torch.int32).view(torch.float32).item()
    big = torch.finfo(torch.float32).max
    rows = [[NAN], [negative_nan], [-INF], [INF], [INF, NAN, -INF], [big, -big], [NAN, 1.0], [-INF, INF, 0.0]]
    logits = torch.tensor([(row * experts)[:experts] for row in rows])
    healthy = logits_of(3, experts)
    both = torch.cat([healthy, logits])
    bias = torch.tensor(([NAN, INF, -INF, 1.0, -big, big] * experts)[:experts]) if with_bias else None
    weights, ids = router(both, 5, bias=bias, renormalize=renormalize)
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    assert ((ids >= 0) & (ids < experts)).all()
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    alone = router(healthy, 5, bias=bias, renormalize=renormalize)
    assert torch.equal(weights[:3], alone[0])
    assert torch.equal(ids[:3], alone[1])


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NaN - x in the sum of a row with NaN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", [4, 5, 40])
def test_nan_ranks_below_every_number(experts, dtype):
    """Whatever its sign and its payload: the kernel's keys are integers."""
    bits, width = (torch.int32, 23) if dtype == torch.float32 else (torch.int16, 7 if dtype == torch.bfloat16 else 10)
    infinity = torch.tensor(INF, dtype=dtype).view(bits).item()
    nans = torch.tensor([infinity + 1, infinity + (1 << width) - 1], dtype=bits).view(dtype)  # [2], signaling and not
    for nan in (*nans, *-nans):
        logits = torch.full((3, experts), nan.item(), dtype=dtype)
        logits.view(bits)[:] = nan.view(bits)
        logits[0, 1], logits[0, 3], logits[1, 2], logits[1, 3] = -3e4, 3.0, -INF, INF
        ids = topk_softmax(logits, 4)[1]
        assert ids[:2, :2].tolist() == [[3, 1], [3, 2]]
        assert ids[2].tolist() == [0, 1, 2, 3]  # among equal ones the lowest, and never one past the last
        assert (ids.sort(1).values.diff(dim=1) > 0).all()


def test_defined_rows():
    logits = torch.tensor([[1.0, -INF, 2.0], [1.0, -INF, -INF], [NAN, 1.0, 2.0], [INF, 1.0, 2.0], [-3e38, 3e38, 0.0]])
    assert defined_rows(logits, None, 2).tolist() == [True, False, False, False, True]
    assert defined_rows(logits, torch.tensor([0.0, 0.0, -INF]), 2).tolist() == [False, False, False, False, True]
    assert not defined_rows(logits, torch.tensor([0.0, NAN, 0.0]), 1).any()


@BOTH
def test_bias_that_selects_underflowing_scores_keeps_the_ratio(router):
    """sglang#31017, flashinfer#3803: the selected scores are all 0 in float32, so their quotient is 0/0."""
    logits = torch.tensor([[200.0, 0.0, math.log(3), 0.0]])
    weights, ids = router(logits, 2, renormalize=True, bias=torch.tensor([-9.0, 1.0, 1.5, 0.0]))
    assert ids.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]]))


@BOTH
@pytest.mark.parametrize(
    ("dialect", "sentinel"), [("minus_one", -1), ("num_experts", 6), ("zero_weight", 0), ("garbage", 77)]
)
def test_padding_dialects(router, dialect, sentinel):
    logits = logits_of(10, 6)
    flags = torch.tensor([False, False, True, False, False, True, True, False, True, True])
    logits[5] = NAN
    out = torch.full((10, 2), 0.5), torch.full((10, 2), 77, dtype=torch.int32)
    weights, ids = router(logits, 2, is_padding=flags, padding=dialect, out=out)
    assert weights is out[0]
    assert ids is out[1]
    plain = router(logits, 2)
    assert torch.equal(weights[~flags], plain[0][~flags])
    assert torch.equal(ids[~flags], plain[1][~flags])
    assert (weights[flags] == (0.5 if dialect == "garbage" else 0.0)).all()
    assert (ids[flags] == sentinel).all()


@BOTH
def test_padding_distinct_routes_flagged_rows_too(router):
    logits, flags = logits_of(4, 6), torch.tensor([True, False, True, True])
    got = router(logits, 2, is_padding=flags, padding="distinct")
    assert all(torch.equal(a, b) for a, b in zip(got, router(logits, 2), strict=True))


@BOTH_UNLAUNCHED
def test_no_tokens(router):
    weights, ids = router(torch.empty(0, 9), 3, is_padding=torch.empty(0, dtype=torch.bool), padding="minus_one")
    assert weights.shape == ids.shape == (0, 3)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)


@pytest.mark.interpreter
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("experts", [1, 6, 61, 128, 320])
def test_bits_of_a_row_depend_on_that_row_alone(experts, renormalize):
    logits = logits_of(70, experts, dtype=torch.bfloat16)
    bias = logits_of(1, experts)[0] / 40
    top_k = min(experts, 6)
    whole = topk_softmax(logits, top_k, bias=bias, renormalize=renormalize)
    for rows in (range(1), range(3), range(40, 57), range(69, -1, -7)):
        picked = list(rows)
        part = topk_softmax(logits[picked], top_k, bias=bias, renormalize=renormalize)
        assert torch.equal(part[0], whole[0][picked])
        assert torch.equal(part[1], whole[1][picked])


@pytest.mark.interpreter
def test_inputs_stay_as_they_are():
    logits, bias = logits_of(5, 12), logits_of(1, 12)[0]
    before = logits.clone(), bias.clone()
    topk_softmax(logits, 4, bias=bias, renormalize=True)
    assert torch.equal(logits, before[0])
    assert torch.equal(bias, before[1])


@BOTH_UNLAUNCHED
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"logits": torch.zeros(8)}, "logits must be"),
        ({"logits": torch.zeros(2, 8, dtype=torch.float64)}, "logits must be"),
        ({"logits": torch.zeros(2, 0)}, "logits must be"),
        ({"logits": torch.zeros(1, 1025)}, "logits must be"),
        ({"top_k": 0}, "top_k must be from 1 to min"),
        ({"top_k": 9}, "top_k must be from 1 to min"),
        ({"logits": torch.zeros(1, 64), "top_k": 33}, "= 32, not 33"),
        ({"scale": NAN}, "scale must be"),
        ({"scale": -1.0}, "scale must be"),
        ({"scale": 1e39}, "scale must be"),
        ({"padding": "zeros"}, "padding must be one of distinct, minus_one"),
        ({"bias": torch.zeros(7)}, "bias must be"),
        ({"bias": torch.zeros(8, dtype=torch.bfloat16)}, "bias must be"),
        ({"is_padding": torch.zeros(3, dtype=torch.bool)}, "is_padding must be"),
        ({"is_padding": torch.zeros(2)}, "is_padding must be"),
        ({"out": (torch.zeros(2, 2), torch.zeros(2, 2))}, r"out\[1\] must be"),
        ({"out": (torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.int32))}, r"out\[0\] must be"),
        ({"out": (torch.zeros(2, 2, device="meta"), torch.zeros(2, 2, dtype=torch.int32))}, "on meta"),
        ({"out": (torch.zeros(2, 4)[:, ::2], torch.zeros(2, 2, dtype=torch.int32))}, "out must be contiguous"),
    ],
)
def test_refuses_what_is_outside_the_contract(router, arguments, complaint):
    call = {"logits": torch.zeros(2, 8), "top_k": 2, **arguments}
    with pytest.raises(ValueError, match=complaint):
        router(call.pop("logits"), call.pop("top_k"), **call)


# ---- the layout of a GPU, and the sigmoid ----------------------------------------------------------------------------

@pytest.fixture
def like_a_gpu(monkeypatch):
    """Lists of experts a lane, as on a device; the interpreter's own choice has one expert a lane."""

    monkeypatch.setattr(routing, "_INTERPRETED", False)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("experts", "top_k"),
    [(6, 6), (8, 2), (16, 10), (33, 9), (60, 4), (128, 8), (160, 6), (257, 12), (400, 8)],
)
def test_lists_of_a_gpu(like_a_gpu, experts, top_k, with_bias, dtype):
    """Lists of many lengths, sorted and not, and rows in a thread, with NaN, infinities and ties in them."""
    logits = logits_of(12, experts, seed=experts, dtype=dtype)
    bias = logits_of(1, experts, seed=9)[0] / 30 if with_bias else None
    logits[7] = logits[7].round()
    healthy = logits.clone()
    logits[1], logits[3, ::2], logits[4], logits[5, 1::3] = NAN, NAN, -INF, INF
    for renormalize in (False, True):
        weights, ids = topk_softmax(logits, top_k, renormalize=renormalize, bias=bias)
        expected = reference(logits, top_k, renormalize=renormalize, bias=bias)
        assert (ids.sort(1).values.diff(dim=1) > 0).all()
        assert ((ids >= 0) & (ids < experts)).all()
        assert weights.isfinite().all()
        assert (weights >= 0).all()
        sound = [0, 2, 6, 7, 8, 9, 10, 11]
        got, want = (weights[sound], ids[sound]), (expected[0][sound], expected[1][sound])
        assert_same(got, want, healthy[sound], bias, top_k, renormalize)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8, 12, 16])
def test_network_sorts(n):
    """By the 0-1 principle: what sorts every sequence of zeros and ones sorts everything."""
    sequences = torch.arange(2**n).view(-1, 1) >> torch.arange(n) & 1  # [2^n, n]
    for a, b in network(n):
        one, other = sequences[:, a].clone(), sequences[:, b].clone()
        sequences[:, a], sequences[:, b] = torch.maximum(one, other), torch.minimum(one, other)
    assert (sequences.diff(dim=1) <= 0).all()


def test_list_lengths_cover_every_expert():
    lengths = {list_length(each) for each in range(1, 17)}
    assert all(each <= list_length(each) < each * 2 for each in range(1, 17))
    assert lengths == {1, 2, 3, 4, 6, 8, 12, 16}


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (61, 6), (160, 8)])
def test_sigmoid(like_a_gpu, experts, top_k, with_bias, renormalize):
    logits = logits_of(9, experts, seed=3) * 3
    bias = logits_of(1, experts, seed=9)[0] / 30 if with_bias else None
    weights, ids = topk_sigmoid(logits, top_k, renormalize=renormalize, bias=bias, scale=2.5)
    scores = logits.double().sigmoid()
    rank = logits.double() if bias is None else scores + bias.double()
    best = rank.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(rank.gather(1, ids.long()), best.values[:, :top_k], rtol=0, atol=1e-6)
    picked = scores.gather(1, ids.long())
    exact = 2.5 * (picked / picked.sum(1, keepdim=True) if renormalize else picked)
    assert ((weights.double() - exact).abs() <= exact * (top_k + 120) * 2**-24).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("renormalize", [False, True])
def test_sigmoid_on_rows_it_cannot_rank(like_a_gpu, renormalize):
    rows = [[NAN], [-INF], [INF], [INF, NAN, -INF], [3e38, -3e38], [-200.0, -201.0]]
    logits = torch.tensor([(row * 40)[:40] for row in rows])
    weights, ids = topk_sigmoid(logits, 5, renormalize=renormalize)
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    if renormalize:  # the exact ratio even where every selected score underflows
        torch.testing.assert_close(weights[5], torch.full((5,), 0.2))
