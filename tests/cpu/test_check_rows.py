"""Routing checks that look at all rows before they look at one: the short way says what the long one would."""

from __future__ import annotations

import random
from itertools import islice

import pytest
import torch

from moe_fuzz import strategies
from moe_fuzz.checks import ROWS
from moe_fuzz.checks.routing import binding
from moe_fuzz.checks.routing.observation import REFERENCES, Outputs, RoutingObservation
from moe_fuzz.ops import get_space
from moe_fuzz.reference import routing
from tests.cpu.test_checks import CHECKS, INFO, grouped_case, observe, plain_case

CASES = [
    grouped_case(),
    grouped_case(n_shared=0, expert_map=False, renormalize=True),
    plain_case(is_padding=True, padding="minus_one"),
    plain_case(renormalize=True, bias=True),
    plain_case(rows=1),
]


def spoilt(seen: RoutingObservation, seed: int) -> Outputs:
    """The answer with one element of a row changed, or a row of it."""
    draw = random.Random(seed)
    weights, ids = seen.outputs.weights.clone(), seen.outputs.ids.clone()
    row, slot = draw.randrange(len(ids)), draw.randrange(ids.shape[1])
    kind = draw.choice(["id", "none", "twice", "other", "order", "weight", "nan", "infinite", "negative", "nothing"])
    if kind in ("id", "none", "twice"):
        ids[row, slot] = {"id": (int(ids[row, slot]) + 1) % 16, "none": -1, "twice": int(ids[row, slot - 1])}[kind]
    elif kind in ("other", "order"):
        ids[row] = ids[row - 1] if kind == "other" else ids[row].flip(0)
    elif kind != "nothing":
        more = float(weights[row, slot]) * 1.001
        weights[row, slot] = {"weight": more, "nan": torch.nan, "infinite": torch.inf, "negative": -1.0}[kind]
    return Outputs(weights, ids)


@pytest.mark.parametrize("at", range(len(CASES)))
def test_a_check_finds_something_where_a_row_of_it_is_wrong(at):
    seen = observe(CASES[at])
    judges = {name: judge for name, judge in CHECKS.items() if judge in ROWS}
    assert set(judges) == {"ids", "selection", "weights", "shared", "expert_map", "finite"}
    told = set()
    for seed in range(60):
        other = seen.with_outputs(spoilt(seen, seed))
        for name, judge in judges.items():
            found = bool(judge(other))
            assert bool(ROWS[judge](other).any()) == found, (name, seed)
            told |= {name} if found else set()
    assert {"ids", "finite"} <= told


@pytest.mark.parametrize("at", range(len(CASES)))
def test_answers_are_rejected_together_as_they_are_one_by_one(at):
    seen = observe(CASES[at])
    answers = [spoilt(seen, seed) for seed in range(40)]
    expected = [any(CHECKS[name](seen.with_outputs(one)) for name in ("selection", "weights", *binding._JUDGES))
                for one in answers]  # fmt: skip
    assert binding.rejected(seen, answers) == expected
    assert {False, True} == set(expected)


@pytest.mark.parametrize("at", range(len(CASES)))
def test_the_best_that_was_left_is_found_and_no_score_is_another_one_after_that(at):
    seen = observe(CASES[at])
    for seed in range(20):
        other = seen.with_outputs(spoilt(seen, seed))
        scores, biased = other.scores.clone(), other.biased.clone()
        expected = biased.scatter(1, other.chosen, -torch.inf).amax(dim=1)
        assert torch.equal(other.best_left, expected)
        assert torch.equal(other.scores, scores)
        assert torch.equal(other.biased, biased)


@pytest.mark.parametrize("op", sorted(REFERENCES))
def test_rows_are_defined_as_the_reference_has_it(op):
    finite = set()
    for case in islice(strategies.grid(get_space(op), INFO, "cpu", 7), 40):
        seen = observe(case)
        if op != "grouped_topk":
            assert torch.equal(seen.defined, routing.defined_rows(seen.logits, seen.bias, seen.top_k) & ~seen.flagged)
        scores, biased = routing.SCORES[seen.scoring](seen.logits, seen.bias)
        assert torch.equal(seen.scores, scores)  # also where nobody looked for what is not finite
        assert torch.equal(seen.biased, biased)
        low, high = seen.bounds
        assert (low <= seen.biased).all()  # so a selection that is best by the scores is so by their bounds
        assert (seen.biased <= high).all()
        assert not (low[seen.defined] > high[seen.defined]).any()
        assert (low[seen.logits == -torch.inf] == -torch.inf).all()
        finite.add(seen.finite)
    assert finite == {False, True}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ties_are_seen_wherever_they_are(bias, dtype):
    """Against a look at every pair; few different values, so that there are many ties."""
    told = 0
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        seen = observe(plain_case(bias=bias, dtype=dtype, seed=seed, top_k=3, experts=12))
        levels = torch.randint(0, 3 + 20 * (seed % 3), seen.logits.shape, generator=draw)
        logits = (levels / 2).to(seen.logits.dtype)
        plain = {"logits": logits}
        if bias:
            plain["bias"] = torch.randint(0, 2, (12,), generator=draw) / 4
        inputs = seen.inputs.replace(**plain)
        ids = torch.stack([torch.randperm(12, generator=draw)[:3] for _ in range(len(logits))])
        right = REFERENCES["topk_softmax"](logits, 3, bias=plain.get("bias"))[1]
        keep = torch.rand(len(ids), generator=draw) < 0.7
        ids = torch.where(keep[:, None], right.long(), ids)
        outputs = Outputs(torch.full(ids.shape, 0.1), ids.int())
        other = RoutingObservation(seen.case, 0, INFO, inputs, outputs, seen.call)
        passed_over = [
            (slot, row)
            for slot in range(3)
            for row in range(len(ids))
            for lower in range(int(ids[row, slot]))
            if other.judged[row] and lower not in ids[row] and logits[row, lower] == logits[row, ids[row, slot]]
            and (not bias or plain["bias"][lower] == plain["bias"][ids[row, slot]])
        ]  # fmt: skip
        found = CHECKS["ties"](other)
        assert bool(found) == bool(passed_over)
        if found:
            told += 1
            assert found[0].where == min(passed_over)[::-1]
    assert told > 5
