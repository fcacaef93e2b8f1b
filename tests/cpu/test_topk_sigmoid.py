"""The sigmoid router: the reference against loops, the Triton kernel against the reference, in the interpreter."""

from __future__ import annotations

import math
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz.kernels.routing import topk_sigmoid
from moe_fuzz.reference.routing import sigmoid_scores
from moe_fuzz.reference.routing import topk_sigmoid as reference

# float32 max minus its opposite is the infinity that the kernel means it to be; numpy would mention it
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

NAN, INF = math.nan, math.inf
BOTH = pytest.mark.parametrize(
    "router", [pytest.param(topk_sigmoid, marks=pytest.mark.interpreter), reference], ids=["kernel", "reference"]
)


def logits_of(tokens: int, experts: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, experts, generator=generator) * 3).to(dtype)


def by_loops(logits, top_k, renormalize, bias, scale):
    """The contract in plain Python, for finite logits."""
    weights, ids = [], []
    for row in logits.tolist():
        scores = [1 / (1 + math.exp(-x)) for x in row]
        key = row if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        chosen = sorted(range(len(row)), key=lambda e, key=key: (-key[e], e))[:top_k]
        total = sum(scores[e] for e in chosen) if renormalize else 1.0
        ids.append(chosen)
        weights.append([scores[e] / total * scale for e in chosen])
    return torch.tensor(weights), torch.tensor(ids, dtype=torch.int32)


@pytest.mark.interpreter
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(1, 1, 1), (7, 3, 1), (5, 7, 7), (33, 60, 4), (17, 128, 1), (3, 257, 9), (2, 1024, 32)],
)
def test_agrees_with_loops(tokens, experts, top_k, with_bias, renormalize):
    logits = logits_of(tokens, experts, seed=experts)
    bias = logits_of(1, experts, seed=9)[0] / 30 if with_bias else None
    expected = by_loops(logits, top_k, renormalize, bias, 2.5)
    for router in (topk_sigmoid, reference):
        weights, ids = router(logits, top_k, renormalize=renormalize, bias=bias, scale=2.5)
        assert torch.equal(ids, expected[1])
        assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
        torch.testing.assert_close(weights, expected[0], rtol=40 * 2**-24, atol=0)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_upcast_not_rounded(dtype):
    logits = logits_of(12, 60, dtype=dtype)
    weights, ids = topk_sigmoid(logits, 6)
    exact = sigmoid_scores(logits, None)[0].gather(1, ids.long())
    torch.testing.assert_close(weights.double(), exact, rtol=2e-6, atol=0)


@BOTH
def test_a_saturated_score_is_one_and_equal_logits_tie(router):
    weights, ids = router(torch.tensor([[30.0, 50.0, 50.0, -1e30]]), 3)
    assert ids.tolist() == [[1, 2, 0]]
    assert weights.tolist() == [[1.0, 1.0, 1.0]]


@BOTH
@pytest.mark.parametrize("depth", [-100.0, -300.0, -1e30])
def test_bias_that_selects_underflowing_scores_keeps_the_ratio(router, depth):
    """sglang#31017: logits near -100 and a bias near +11; the sigmoids are 0 in float32, and so is their sum."""
    logits = torch.tensor([[depth, 5.0, depth, 5.0]])
    weights, ids = router(logits, 2, renormalize=True, bias=torch.tensor([11.0, 0.0, 12.0, 0.0]), scale=3.0)
    assert ids.tolist() == [[2, 0]]
    torch.testing.assert_close(weights, torch.tensor([[1.5, 1.5]]))


@BOTH
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("experts", [5, 8, 17])
def test_undefined_rows_give_distinct_ids_and_finite_weights(router, experts, with_bias, renormalize):
    big = torch.finfo(torch.float32).max
    rows = [[NAN], [-NAN], [-INF], [INF], [INF, NAN, -INF], [big, -big], [NAN, 1.0], [-INF, INF, 0.0]]
    logits = torch.tensor([(row * experts)[:experts] for row in rows])
    healthy = logits_of(3, experts)
    bias = torch.tensor(([NAN, INF, -INF, 1.0, -big, big] * experts)[:experts]) if with_bias else None
    weights, ids = router(torch.cat([healthy, logits]), 5, bias=bias, renormalize=renormalize)
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    assert ((ids >= 0) & (ids < experts)).all()
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    alone = router(healthy, 5, bias=bias, renormalize=renormalize)
    assert torch.equal(weights[:3], alone[0])
    assert torch.equal(ids[:3], alone[1])


@pytest.mark.interpreter
@pytest.mark.parametrize("renormalize", [False, True])
def test_bits_of_a_row_depend_on_that_row_alone(renormalize):
    logits, bias = logits_of(70, 61, dtype=torch.bfloat16), logits_of(1, 61)[0] / 40
    whole = topk_sigmoid(logits, 6, bias=bias, renormalize=renormalize)
    for rows in (range(1), range(40, 57), range(69, -1, -7)):
        part = topk_sigmoid(logits[list(rows)], 6, bias=bias, renormalize=renormalize)
        assert torch.equal(part[0], whole[0][list(rows)])
        assert torch.equal(part[1], whole[1][list(rows)])


@BOTH
@pytest.mark.parametrize(("dialect", "sentinel"), [("minus_one", -1), ("num_experts", 6), ("zero_weight", 0)])
def test_padding_dialects(router, dialect, sentinel):
    logits, flags = logits_of(4, 6), torch.tensor([False, True, False, True])
    weights, ids = router(logits, 2, is_padding=flags, padding=dialect)
    assert (ids[flags] == sentinel).all()
    assert (weights[flags] == 0).all()
    assert torch.equal(ids[~flags], router(logits[~flags], 2)[1])
