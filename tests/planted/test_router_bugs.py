"""The planted bugs of sigmoid and grouped routers, of shared experts and mapped ids: each on its own input."""

from __future__ import annotations

import importlib
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz.planted.catalog import get_planted
from moe_fuzz.reference.grouped_topk import grouped_topk
from moe_fuzz.reference.routing import sigmoid_scores, topk_sigmoid

NAN = torch.nan


def load(name):
    planted = get_planted(name)
    return getattr(importlib.import_module(f"moe_fuzz.planted.{planted.module}"), planted.function)


def logits_of(tokens, experts, seed=0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2


def test_the_fallback_of_the_sigmoid_knows_no_nan():
    router, logits = load("sigmoid_nan_fallback"), logits_of(2, 6)
    logits[1] = NAN
    assert router(logits, 3)[1][1].tolist() == [0, 0, 0]
    assert router(logits[:1], 3)[1].tolist() == topk_sigmoid(logits[:1], 3)[1].tolist()
    assert len(set(load("sigmoid_nan_fallback")(torch.full((1, 8), NAN), 3)[1][0].tolist())) == 3


def test_all_saturated_experts_leave_with_the_first():
    assert load("saturated_ties")(torch.tensor([[20.0, 30.0, 40.0, 0.0]]), 2)[1].tolist() == [[0, 3]]


def test_the_sigmoids_of_chosen_experts_underflow():
    logits, bias = torch.tensor([[-300.0, 1.0, -300.0]]), torch.tensor([9.0, 0.0, 9.0])
    assert load("sigmoid_zero_division")(logits, 2, renormalize=True, bias=bias)[0].isnan().all()


def test_the_sigmoid_is_rounded_to_the_dtype_of_the_logits():
    logits = logits_of(3, 8).bfloat16()
    weights, ids = load("sigmoid_in_input_dtype")(logits, 2)
    assert torch.equal(weights, weights.bfloat16().float())
    assert torch.equal(ids, topk_sigmoid(logits, 2)[1])


def test_a_search_from_minus_one_ends_at_expert_0():
    router, bias = load("floor_of_minus_one"), torch.tensor([-2.1, -3.0, -0.5, -2.5, -2.2, -2.3])
    logits = torch.zeros(1, 6)
    assert router(logits, 3, bias=bias)[1].tolist() == [[2, 0, 0]]
    assert router(logits, 2, bias=bias + 2)[1].tolist() == topk_sigmoid(logits, 2, bias=bias + 2)[1].tolist()
    assert router(torch.zeros(1, 4), 2, bias=bias[:4])[1].tolist() == [[2, 0]]  # a power of two


def test_a_bias_takes_the_digits_of_a_score_with_it():
    logits, bias = torch.tensor([[-40.0, 1.0]]), torch.tensor([0.5, 0.0])
    weights, ids = load("bias_taken_back")(logits, 2, bias=bias)
    assert ids.tolist() == [[1, 0]]
    assert weights[0, 1] == 0
    assert topk_sigmoid(logits, 2, bias=bias)[0][0, 1] > 0


def test_a_scale_of_zero_is_none():
    weights, ids = load("no_scale_of_zero")(logits_of(2, 6), 2, scale=0.0)
    assert (weights > 0).all()
    assert torch.equal(ids, topk_sigmoid(logits_of(2, 6), 2, scale=0.0)[1])
    halved = load("no_scale_of_zero")(logits_of(2, 6), 2, scale=0.5)[0]
    torch.testing.assert_close(halved, topk_sigmoid(logits_of(2, 6), 2, scale=0.5)[0])


def test_indices_wrap_at_16_bits():
    logits = torch.zeros(8200, 8)
    logits[:, 0] = 1.0
    logits[8192:, 7] = 2.0
    assert load("narrow_index")(logits, 8)[1][0, 0] == 7  # of token 8192
    assert load("narrow_index")(logits[:8192], 8)[1][0, 0] == 0


def grouped(name, logits, top_k, **more):
    """(what the bug selects, what is right)"""
    want = {key: value for key, value in more.items() if key != "expert_map"}
    return load(name)(logits, top_k, **more)[1].tolist(), grouped_topk(logits, top_k, **want)[1].tolist()


TWO = {"n_group": 2, "topk_group": 1}
LOW = torch.full((6,), -9.0)


def test_groups_of_nan_are_group_0_and_its_expert_0():
    logits = logits_of(1, 6)
    logits[0] = NAN
    assert load("nan_groups")(logits, 3, n_group=3, topk_group=2)[1].tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("name", "logits", "top_k", "more"),
    [
        ("masked_groups_zero", [1.0, 1.0, 1.0, 0.0, 0.0, 0.0], 2, {**TWO, "bias": LOW}),
        ("top2_for_every_rule", [4.0, -9.0, -9.0, 3.9, 3.9, 3.9], 2, {**TWO, "scoring": "sigmoid"}),
        ("tied_best_counted_once", [2.0, 2.0, -9.0, 2.0, 0.0, -9.0], 2,
         {**TWO, "scoring": "sigmoid", "group_score": "top2_sum"}),
        ("groups_before_bias", [2.0, 0.0, 0.0, 0.0, 0.0, 0.0], 1, {**TWO, "bias": torch.tensor([0, 0, 0, 5.0, 0, 0])}),
        ("padded_group_lanes", [0.0, 0.0, 0.0, 1.0, 1.0, 1.0], 2, {**TWO, "bias": LOW}),
        ("last_of_tied_groups", [1.0, 0.0, 0.0, 1.0, 0.0, 0.0], 1, TWO),
        ("bits_of_negative_scores", [3.0, 0.0, 0.0, -1.0, -1.0, -1.0], 1, {**TWO, "bias": LOW}),
        ("shared_guard_missing", [4.0, -9.0, -9.0, 3.0, 3.0, 3.0], 2, {**TWO, "n_shared": 1}),
    ],
)
def test_the_wrong_experts_of_the_wrong_groups(name, logits, top_k, more):
    got, right = grouped(name, torch.tensor([logits]), top_k, **more)
    assert got != right
    assert len(set(got[0])) == len(got[0])


def test_the_ninth_group_is_never_chosen():
    logits = torch.zeros(1, 18)
    logits[0, 16:], logits[0, 4] = 5.0, 1.0
    got, right = grouped("groups_beyond_eight", logits, 2, n_group=9, topk_group=1)
    assert (got, right) == ([[4, 5]], [[16, 17]])
    got, right = grouped("groups_beyond_eight", logits[:, 2:], 2, n_group=8, topk_group=1)
    assert got == right


def test_of_six_groups_four_are_kept():
    logits = torch.arange(12.0, 0.0, -1.0)[None]
    logits[0, 11] = 3.5  # the sixth group: one of its two is better than both of the fifth, but not their best two
    groups = {"n_group": 6, "group_score": "top2_sum"}
    got, right = grouped("four_groups_kept", logits, 9, topk_group=5, **groups)
    assert got == right  # of what is out the lowest come first, and that is the ninth
    bias = torch.cat([torch.full((8,), 2.0), torch.tensor([0.0, 0.0, -1.0, 9.0])])
    got, right = grouped("four_groups_kept", logits[:, :].clone().fill_(1.0), 1, topk_group=5, bias=bias, **groups)
    assert got == right == [[11]]
    for kept, same in ((4, True), (5, False)):
        scores = torch.tensor([[6.0, 0, 6, 0, 6, 0, 6, 0, 2, 2, 0, 0]])
        got, right = grouped("four_groups_kept", scores, 5, topk_group=kept, **groups)
        assert (got == right) is same, kept


def test_what_no_warp_wrote_is_expert_0():
    logits, one, rest = logits_of(3, 129), {"n_group": 1, "topk_group": 1}, {"scoring": "sigmoid"}
    got, right = grouped("unwritten_candidates", logits, 2, **one, **rest)
    assert got == [[0, 0]] * 3 != right
    for top_k, more in ((2, {**one, "bias": torch.full((129,), 9.0)}), (8, one), (2, {"n_group": 3, "topk_group": 2})):
        got, right = grouped("unwritten_candidates", logits, top_k, **more, **rest)
        assert got == right, (top_k, more)
    got, right = grouped("unwritten_candidates", logits[:, 1:], 2, **one, **rest)
    assert got == right


def test_a_group_of_one_has_no_two_best():
    with pytest.raises(RuntimeError, match="out of range"):
        load("group_of_one")(logits_of(1, 8), 2, n_group=8, topk_group=8, group_score="top2_sum")
    got, right = grouped("group_of_one", logits_of(3, 8), 2, n_group=4, topk_group=2, group_score="top2_sum")
    assert got == right


def test_weights_of_the_grouped_path():
    logits, bias = torch.tensor([[-300.0, 1.0, -300.0, 0.0]]), torch.tensor([9.0, 0.0, 9.0, 0.0])
    groups = {"n_group": 2, "topk_group": 2, "scoring": "sigmoid", "bias": bias}
    assert load("grouped_zero_division")(logits, 2, renormalize=True, **groups)[0].isnan().all()
    one = groups | {"n_group": 1, "topk_group": 1}
    assert load("grouped_zero_division")(logits, 2, renormalize=True, **one)[0].isfinite().all()
    weights, ids = load("grouped_biased_weight")(logits, 2, **groups)
    torch.testing.assert_close(weights.double(), sigmoid_scores(logits, bias)[1].gather(1, ids.long()))


def test_shared_experts():
    logits = logits_of(3, 8)
    weights, ids = load("shared_id_off_by_one")(logits, 2, n_shared=2)
    assert ids[:, 2:].tolist() == [[7, 8]] * 3
    weights, ids = load("renormalized_with_shared")(logits, 2, renormalize=True, n_shared=1)
    assert (weights[:, :2].sum(1) < 0.9).all()
    assert torch.equal(ids, grouped_topk(logits, 2, n_group=1, topk_group=1, n_shared=1)[1])


def test_two_shared_experts_take_turns():
    logits = logits_of(3, 8)
    for n_shared, same in ((2, True), (3, False)):
        got = load("two_shared_in_turns")(logits, 2, n_shared=n_shared)[1]
        assert torch.equal(got, grouped_topk(logits, 2, n_group=1, topk_group=1, n_shared=n_shared)[1]) is same
    assert got[:, 2:].tolist() == [[8, 9, 8]] * 3


def test_mapped_ids():
    logits, table = logits_of(4, 6), torch.arange(106, 100, -1, dtype=torch.int32)
    two = {"n_group": 2, "topk_group": 2, "expert_map": table}
    right = grouped_topk(logits, 3, **two)[1]
    assert torch.equal(load("unmapped_on_one_path")(logits, 3, **two)[1], right)
    assert (load("unmapped_on_one_path")(logits, 3, expert_map=table)[1] < 6).all()
    assert torch.equal(load("mapped_in_place")(logits, 3, **two)[1], right)
    shifted = two | {"expert_map": torch.arange(1, 7, dtype=torch.int32)}
    assert (load("mapped_in_place")(logits, 3, **shifted)[1] == 6).all()
    assert torch.equal(load("shared_ids_looked_up")(logits, 3, **two)[1], right)
