"""The grouped router: the reference against loops, the Triton kernel against the reference, in the interpreter."""

from __future__ import annotations

import math
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz.kernels.grouped_topk import grouped_topk
from moe_fuzz.reference.grouped_topk import defined_rows
from moe_fuzz.reference.grouped_topk import grouped_topk as reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy mentions the overflows that are meant here

NAN, INF = math.nan, math.inf
BIG = torch.finfo(torch.float32).max
BOTH = pytest.mark.parametrize(
    "router", [pytest.param(grouped_topk, marks=pytest.mark.interpreter), reference], ids=["kernel", "reference"]
)
BOTH_UNLAUNCHED = pytest.mark.parametrize("router", [grouped_topk, reference], ids=["kernel", "reference"])
RULES = pytest.mark.parametrize("group_score", ["max", "top2_sum"])
SCORINGS = pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
#: experts, groups, groups kept, k: powers of two and not, one group, groups of one, everything taken, and models
SHAPES = [(1, 1, 1, 1), (6, 3, 1, 2), (8, 8, 3, 3), (8, 8, 8, 8), (33, 3, 2, 7), (60, 5, 2, 4), (64, 2, 1, 32),
          (160, 8, 3, 6), (256, 8, 4, 8), (384, 1, 1, 8), (96, 32, 7, 9), (1024, 64, 16, 32)]  # fmt: skip


def logits_of(tokens: int, experts: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, experts, generator=generator) * 3).to(dtype)


def by_loops(logits, top_k, n_group, topk_group, scoring, group_score, renormalize=False, bias=None, scale=1.0):
    """The contract in plain Python, for finite logits: ids and weights of the routed slots."""
    size = logits.shape[1] // n_group
    weights, ids = [], []
    for row in logits.tolist():
        if scoring == "softmax":
            parts = [math.exp(x - max(row)) for x in row]
            scores = [part / math.fsum(parts) for part in parts]
        else:
            scores = [1 / (1 + math.exp(-x)) for x in row]
        biased = scores if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        ranks = []
        for group in range(n_group):
            best = sorted(biased[group * size : (group + 1) * size], reverse=True)
            ranks.append((-sum(best[: 2 if group_score == "top2_sum" else 1]), group))
        kept = {group for _, group in sorted(ranks)[:topk_group]}
        key = row if bias is None else biased
        chosen = sorted((e for e in range(len(row)) if e // size in kept), key=lambda e, key=key: (-key[e], e))[:top_k]
        total = sum(scores[e] for e in chosen) if renormalize else 1.0
        ids.append(chosen)
        weights.append([scores[e] / total * scale for e in chosen])
    return torch.tensor(weights), torch.tensor(ids, dtype=torch.int32)


@pytest.mark.interpreter
@RULES
@SCORINGS
@pytest.mark.parametrize(("experts", "n_group", "topk_group", "top_k"), SHAPES)
def test_agrees_with_loops(experts, n_group, topk_group, top_k, scoring, group_score):
    logits, renormalize, scale = logits_of(5, experts, seed=experts), experts % 3 != 0, 2.5
    groups = {"n_group": n_group, "topk_group": topk_group, "scoring": scoring, "group_score": group_score}
    for bias in (None, logits_of(1, experts, seed=9)[0] / 30, -3 - logits_of(1, experts, seed=8)[0].abs()):
        expected = by_loops(logits, top_k, **groups, renormalize=renormalize, bias=bias, scale=scale)
        for router in (grouped_topk, reference):
            weights, ids = router(logits, top_k, **groups, renormalize=renormalize, bias=bias, scale=scale)
            assert torch.equal(ids, expected[1]), router.__module__
            torch.testing.assert_close(weights, expected[0], rtol=(experts + 80) * 2**-24, atol=0)
        assert defined_rows(logits, bias, top_k, n_group, topk_group, group_score).all()


@BOTH
def test_the_groups_decide(router):
    """Expert 0 is the best of all; `max` keeps its group, `top2_sum` the other, and k experts come out of one group."""
    logits = torch.tensor([[4.0, -9.0, -9.0, 2.0, 2.0, 2.0]])
    groups = {"n_group": 2, "topk_group": 1, "scoring": "sigmoid"}
    assert router(logits, 2, **groups, group_score="max")[1].tolist() == [[0, 1]]
    assert router(logits, 2, **groups, group_score="top2_sum")[1].tolist() == [[3, 4]]


@BOTH
@RULES
def test_a_group_that_is_out_never_wins(router, group_score):
    """sglang#3705: all biased scores are negative; what stands for the experts that are out must be lower still."""
    logits = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    ids = router(logits, 2, n_group=2, topk_group=1, group_score=group_score, bias=torch.full((4,), -9.0))[1]
    assert ids.tolist() == [[0, 1]]


@BOTH
@RULES
@pytest.mark.parametrize("size", [3, 8, 24])  # of a group: the kernel for any sizes, then that of whole lanes
def test_ties_fall_to_the_lowest_group_and_id(router, group_score, size):
    logits = torch.zeros(2, 4 * size)
    logits[1] = torch.tensor(([0.0, -0.0, 1.0] + [0.0] * size)[:size] * 4)
    groups = {"n_group": 4, "topk_group": 2, "group_score": group_score}
    assert router(logits, 4, **groups)[1].tolist() == [[0, 1, 2, 3], [2, size + 2, 0, 1]]


@BOTH
@pytest.mark.parametrize("experts", [8, 64])
def test_shared_slots_follow_and_are_not_looked_up(router, experts):
    logits = logits_of(3, experts)
    table = 100 + torch.randperm(experts, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    plain = router(logits, 3, n_group=2, topk_group=1, renormalize=True, scale=2.5)
    weights, ids = router(logits, 3, n_group=2, topk_group=1, renormalize=True, scale=2.5, n_shared=2, expert_map=table)
    assert ids[:, 3:].tolist() == [[experts, experts + 1]] * 3
    assert weights[:, 3:].tolist() == [[1.0, 1.0]] * 3
    assert torch.equal(ids[:, :3], table[plain[1].long()])
    assert torch.equal(weights[:, :3], plain[0])
    torch.testing.assert_close(plain[0].sum(1), torch.full((3,), 2.5))


@BOTH
@pytest.mark.parametrize(("experts", "n_group"), [(6, 3), (64, 4)])
@pytest.mark.parametrize(
    ("dialect", "sentinel"), [("minus_one", -1), ("num_experts", None), ("zero_weight", 0), ("garbage", 77)]
)
def test_a_dialect_rules_all_slots(router, experts, n_group, dialect, sentinel):
    sentinel = experts if sentinel is None else sentinel
    logits, flags = logits_of(5, experts), torch.tensor([False, True, False, True, False])
    logits[3] = NAN
    out = torch.full((5, 4), 0.5), torch.full((5, 4), 77, dtype=torch.int32)
    table = torch.arange(10, 10 + experts, dtype=torch.int32)
    groups = {"n_group": n_group, "topk_group": 2, "n_shared": 2, "expert_map": table}
    weights, ids = router(logits, 2, **groups, is_padding=flags, padding=dialect, out=out)
    assert weights is out[0]
    assert ids is out[1]
    assert (ids[flags] == sentinel).all()
    assert (weights[flags] == (0.5 if dialect == "garbage" else 0.0)).all()
    plain = router(logits, 2, **groups)
    assert torch.equal(ids[~flags], plain[1][~flags])
    assert torch.equal(weights[~flags], plain[0][~flags])


@BOTH
@RULES
@SCORINGS
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("experts", "n_group", "topk_group", "top_k"),
    [(5, 1, 1, 5), (12, 4, 2, 5), (15, 5, 5, 15), (8, 8, 4, 4), (64, 4, 2, 8), (32, 32, 4, 4)],
)
def test_undefined_rows_give_distinct_ids(router, experts, n_group, topk_group, top_k, with_bias, scoring, group_score):
    rows = [[NAN], [-NAN], [-INF], [INF], [INF, NAN, -INF], [BIG, -BIG], [NAN, 1.0], [-INF, INF, 0.0]]
    logits = torch.tensor([(row * experts)[:experts] for row in rows])
    healthy = logits_of(3, experts)
    bias = torch.tensor(([NAN, INF, -INF, 1.0, -BIG, BIG] * experts)[:experts]) if with_bias else None
    groups = {"n_group": n_group, "topk_group": topk_group, "scoring": scoring, "group_score": group_score}
    groups |= {"bias": bias}
    for renormalize in (False, True):
        weights, ids = router(torch.cat([healthy, logits]), top_k, **groups, renormalize=renormalize, n_shared=1)
        routed = ids[:, :top_k]
        assert (routed.sort(1).values.diff(dim=1) > 0).all()
        assert ((routed >= 0) & (routed < experts)).all()
        assert (ids[:, top_k] == experts).all()
        assert weights.isfinite().all()
        assert (weights >= 0).all()
        assert all(len({i // (experts // n_group) for i in row}) <= topk_group for row in routed.tolist())
        alone = router(healthy, top_k, **groups, renormalize=renormalize, n_shared=1)
        assert torch.equal(weights[:3], alone[0])
        assert torch.equal(ids[:3], alone[1])


def test_defined_rows():
    def defined(row, top_k, n_group, topk_group, group_score="max", bias=None):
        return defined_rows(torch.tensor([row]), bias, top_k, n_group, topk_group, group_score).item()

    full, masked = [1.0, 2.0], [-INF, -INF]
    assert defined([*full, *masked, *full, *masked], 4, 4, 2)
    assert not defined([*full, *masked, *masked, *masked], 2, 4, 2)  # which group is the second?
    assert defined([*full, *full, 1.0, -INF, *masked], 3, 4, 2)
    assert not defined([*full, *full, 1.0, -INF, *masked], 4, 4, 2)  # the third group may be one of the two
    assert defined([*full, *full, 1.0, -INF, *masked], 4, 4, 2, "top2_sum")  # there it cannot
    assert not defined([*full, 1.0, -INF, *masked, *masked], 2, 4, 2, "top2_sum")
    assert defined([1.0, -INF, 2.0], 2, 3, 2, "top2_sum")  # groups of one have the score of that one
    assert not defined([NAN, 1.0, 2.0, 3.0], 1, 2, 1)
    assert not defined([INF, 1.0, 2.0, 3.0], 1, 2, 1)
    gone = torch.tensor([0.0, 0.0, -INF, 0.0])
    assert not defined([1.0, 1.0, 1.0, 1.0], 2, 2, 1, bias=gone)
    assert defined([1.0, 1.0, 1.0, 1.0], 1, 2, 1, bias=gone)
    # With a bias, a masked expert may be in the race: the second group can be kept, and has one expert only.
    assert not defined([1.0, 1.0, -INF, -INF], 2, 2, 1, bias=gone)


@BOTH
def test_renormalized_weights_that_underflow_keep_the_ratio(router):
    """flashinfer#3946: the epsilon is missing on the grouped path, and the selected scores are all 0 in float32."""
    logits = torch.tensor([[-300.0, 5.0, -300.0, 5.0]])
    bias = torch.tensor([11.0, 0.0, 12.0, 0.0])
    weights, ids = router(logits, 2, n_group=2, topk_group=2, scoring="sigmoid", renormalize=True, bias=bias)
    assert ids.tolist() == [[2, 0]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5]]))


@pytest.mark.interpreter
@RULES
@pytest.mark.parametrize(("experts", "n_group"), [(6, 3), (160, 8), (257, 1)])
def test_bits_of_a_row_depend_on_that_row_alone(experts, n_group, group_score):
    logits, bias = logits_of(70, experts, dtype=torch.bfloat16), logits_of(1, experts)[0] / 40
    groups = {"n_group": n_group, "topk_group": (n_group + 1) // 2, "group_score": group_score, "bias": bias}
    whole = grouped_topk(logits, 2, **groups, renormalize=True)
    for rows in (range(1), range(40, 57), range(69, -1, -7)):
        part = grouped_topk(logits[list(rows)], 2, **groups, renormalize=True)
        assert torch.equal(part[0], whole[0][list(rows)])
        assert torch.equal(part[1], whole[1][list(rows)])


@pytest.mark.interpreter
@pytest.mark.parametrize("experts", [40, 64])
@pytest.mark.parametrize("view", ["columns", "transposed", "offset", "expanded"])
def test_any_strides(view, experts):
    logits = {
        "columns": logits_of(9, 2 * experts)[:, ::2],
        "transposed": logits_of(experts, 9).t(),
        "offset": logits_of(9, experts + 3)[:, 3:],
        "expanded": logits_of(1, experts).expand(9, experts),
    }[view]
    bias, table = (logits_of(1, 2 * experts) / 50)[0, ::2], torch.randperm(4 * experts).int()[::4]
    assert (bias.stride(), table.stride()) == ((2,), (4,))
    groups = {"n_group": 4, "topk_group": 2, "group_score": "top2_sum"}
    got = grouped_topk(logits, 5, **groups, bias=bias, expert_map=table)
    packed = grouped_topk(logits.contiguous(), 5, **groups, bias=bias.contiguous(), expert_map=table.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, packed, strict=True))
    assert torch.equal(got[1], reference(logits, 5, **groups, bias=bias, expert_map=table)[1])


@BOTH_UNLAUNCHED
def test_no_tokens(router):
    weights, ids = router(torch.empty(0, 9), 3, n_group=3, topk_group=2, n_shared=1)
    assert weights.shape == ids.shape == (0, 4)


@BOTH_UNLAUNCHED
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"n_group": 3}, "n_group must divide"),
        ({"n_group": 0}, "n_group must divide"),
        ({"topk_group": 0}, "topk_group must be"),
        ({"topk_group": 5}, "topk_group must be"),
        ({"top_k": 5}, "top_k must be"),
        ({"top_k": 0}, "top_k must be"),
        ({"scoring": "relu"}, "scoring must be one of softmax, sigmoid"),
        ({"group_score": "mean"}, "group_score must be one of max, top2_sum"),
        ({"n_shared": -1}, "n_shared must be"),
        ({"n_shared": 9}, "n_shared must be"),
        ({"expert_map": torch.zeros(8)}, "expert_map must be"),
        ({"expert_map": torch.zeros(9, dtype=torch.int32)}, "expert_map must be"),
        ({"padding": "zeros"}, "padding must be one of distinct"),
        ({"n_shared": 1, "out": (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32))}, r"out\[0\] must be"),
    ],
)
def test_refuses_what_is_outside_the_contract(router, arguments, complaint):
    call = {"logits": torch.zeros(2, 8), "top_k": 2, "n_group": 4, "topk_group": 2, **arguments}
    with pytest.raises(ValueError, match=complaint):
        router(call.pop("logits"), call.pop("top_k"), **call)
