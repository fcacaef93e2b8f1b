"""The check on groups, by brute force: it accepts what some legal choice of groups explains, and nothing else."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from moe_fuzz.checks.routing.groups import alike_groups, group_bounds, kept_groups

SHAPES = [(4, 2, 1), (6, 3, 1), (6, 3, 2), (6, 2, 1), (8, 4, 2), (8, 4, 3), (8, 8, 3), (8, 2, 2), (9, 3, 2)]
EVERY = pytest.mark.parametrize(("experts", "n_group", "topk_group"), SHAPES)
RULES = pytest.mark.parametrize("group_score", ["max", "top2_sum"])


def subsets(experts: int, top_k: int) -> torch.Tensor:
    """bool [C, E]: every choice of top_k experts."""
    taken = torch.zeros(0, experts, dtype=torch.bool)
    rows = [torch.zeros(experts, dtype=torch.bool).scatter_(0, torch.tensor(c), True)
            for c in combinations(range(experts), top_k)]  # fmt: skip
    return torch.cat([taken, torch.stack(rows)])


def explained(low, high, taken, n_group, topk_group, group_score) -> bool:
    """Of one row: whether a legal choice of groups exists, by trying them all."""
    size = len(low) // n_group
    group_low, group_high = (b[0].tolist() for b in group_bounds(low[None], high[None], n_group, group_score))
    worst = min(h for h, t in zip(high.tolist(), taken.tolist(), strict=True) if t)
    for kept in combinations(range(n_group), topk_group):
        out = [g for g in range(n_group) if g not in kept]
        inside = [e for e in range(len(low)) if e // size in kept]
        if (
            all(e in inside for e in range(len(low)) if taken[e])
            and all(low[e] <= worst for e in inside if not taken[e])
            and all(group_low[g] <= min(group_high[h] for h in kept) for g in out)
        ):
            return True
    return False


@RULES
@EVERY
def test_the_threshold_finds_what_trying_every_choice_finds(experts, n_group, topk_group, group_score):
    generator = torch.Generator().manual_seed(experts * 100 + n_group * 10 + topk_group)
    answers = set()
    for top_k in range(1, min(4, topk_group * (experts // n_group)) + 1):
        taken = subsets(experts, top_k)[:40]
        for width in (0.0, 0.5, 3.0):
            centre = torch.randint(-3, 4, (experts,), generator=generator).double()
            slack = width * torch.rand(experts, generator=generator).double()
            low, high = centre - slack, centre + slack
            low[0], high[-1] = (-torch.inf, high[-1]) if width else (low[0], high[-1])  # a masked expert, now and then
            many = low.expand(len(taken), -1), high.expand(len(taken), -1)
            got = kept_groups(*many, taken, n_group, topk_group, group_score).lawful.tolist()
            expected = [explained(low, high, row, n_group, topk_group, group_score) for row in taken]
            assert got == expected
            answers |= set(expected)
    assert answers == {True, False} or topk_group == n_group


@RULES
@EVERY
def test_no_rounding_within_the_bounds_is_an_alarm(experts, n_group, topk_group, group_score):
    """Any values within the bounds, any order of ties, sums in float32: what a router then selects is lawful."""
    generator = torch.Generator().manual_seed(experts + n_group)
    rows, size = 400, experts // n_group
    centre = torch.randint(-2, 3, (rows, experts), generator=generator).double()
    slack = torch.rand(rows, experts, generator=generator).double() * torch.tensor([0.0, 1e-7, 0.7]).double()[
        torch.randint(0, 3, (rows, 1), generator=generator)]  # fmt: skip
    low, high = centre - slack - 2.0**-22, centre + slack + 2.0**-22
    value = (centre + slack * (2 * torch.rand(rows, experts, generator=generator) - 1)).float()
    best = value.view(rows, n_group, size).topk(1 if group_score == "max" or size == 1 else 2, dim=2).values.sum(dim=2)
    top_k = min(3, topk_group * size)
    shuffled = torch.rand(rows, n_group, generator=generator).argsort(dim=1)  # ties fall anywhere
    kept = shuffled.gather(1, best.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)[:, :topk_group])
    inside = torch.zeros(rows, n_group, dtype=torch.bool).scatter_(1, kept, True).repeat_interleave(size, dim=1)
    ids = value.masked_fill(~inside, -torch.inf).topk(top_k, dim=1).indices
    taken = torch.zeros(rows, experts, dtype=torch.bool).scatter_(1, ids, True)
    found = kept_groups(low, high, taken, n_group, topk_group, group_score)
    assert found.lawful.all()
    assert (found.touched.sum(dim=1) <= topk_group).all()


@RULES
@EVERY
def test_of_separate_scores_only_the_right_experts_pass(experts, n_group, topk_group, group_score):
    generator = torch.Generator().manual_seed(experts - n_group)
    size, top_k = experts // n_group, min(3, topk_group * (experts // n_group))
    taken = subsets(experts, top_k)
    for _ in range(10):
        scores = torch.pow(2.0, torch.randperm(experts, generator=generator).double())  # every sum of two is another
        best = scores.view(n_group, size).topk(1 if group_score == "max" or size == 1 else 2, dim=1).values.sum(dim=1)
        inside = torch.zeros(n_group, dtype=torch.bool).scatter_(0, best.topk(topk_group).indices, True)
        right = scores.masked_fill(~inside.repeat_interleave(size), -1).topk(top_k).indices
        low, high = (scores * (1 + sign * 1e-7) for sign in (-1, 1))
        many = low.expand(len(taken), -1), high.expand(len(taken), -1)
        lawful = kept_groups(*many, taken, n_group, topk_group, group_score).lawful
        assert lawful.sum() == 1
        assert taken[lawful][0].nonzero().flatten().tolist() == sorted(right.tolist())


def test_alike_groups_hold_the_same_in_any_order():
    def alike(logits, bias=None):
        first, *others = alike_groups(torch.tensor([logits]), None if bias is None else torch.tensor(bias), 3)[0]
        return [bool(other == first) for other in others]

    logits = [1.0, 2.0, 2.0, 1.0, 1.0, 1.0]
    assert alike(logits) == [True, False]
    assert alike(logits, [0.5, 0.0, 0.0, 0.5, 0.0, 0.0]) == [True, False]
    assert alike(logits, [0.5, 0.0, 0.5, 0.0, 0.0, 0.0]) == [False, False]
    assert alike([0.0, 1.0, 1.0, -0.0, 0.0, 2.0], [-0.0, 0.0, 0.0, 0.0, 0.0, 0.0]) == [True, False]
