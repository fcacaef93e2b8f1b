"""The checks of align: silent on every right plan, in whatever order, and loud on every wrong one."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice

import pytest
import torch

from moe_fuzz import checks as registry
from moe_fuzz import strategies
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.checks.align import family  # noqa: F401 - its checks register
from moe_fuzz.checks.align.binding import binding, wrong_answers
from moe_fuzz.checks.align.observation import AlignObservation, Outputs
from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.align.inputs import materialize
from moe_fuzz.ops.align.space import MAPS
from moe_fuzz.reference.align import align

SPACE = get_space("align")
STRICT = Contract(deterministic=True, ordered=True, stable=True, accepts=PADDING_DIALECTS)
LOOSE = Contract(accepts=PADDING_DIALECTS, tail="any")
CAN = Capabilities(alignment=1, max_experts=8192, block_sizes=(), out=True)
INFO = TargetInfo("align@reference", "align", "reference", contract=STRICT, capabilities=CAN)
CHECKS = registry.CHECKS["align"]
POISON = -0x5A5A5A5B


def reference(inputs):
    return Outputs(*align(inputs.plain["ids"], **inputs.options, expert_map=inputs.plain.get("expert_map")))


def observe(case, contract=STRICT, outputs=None):
    inputs = materialize(case, 0)
    return AlignObservation(case, 0, replace(INFO, contract=contract), inputs, outputs or reference(inputs), reference)


def judge(seen):
    if CHECKS["structure"](seen):
        return {"structure": CHECKS["structure"](seen)[0]}
    return {name: found[0] for name, check in CHECKS.items() if (found := check(seen))}


def case_of(*faults, rows=5, experts=4, top_k=2, seed=3, **config):
    whole = {**SPACE.simplest, "experts": str(Labels.range(experts)), "top_k": top_k, "block_size": 4} | config
    case = Case("align", whole, (Step(Labels.range(rows), Labels(), faults),), seed)
    SPACE.validate(case)
    return case


def on_rows(name, rows="0"):
    return Fault(name, "ids", Labels.parse(rows))


def changed(seen, name, **at):
    """The right outputs with elements of one of them changed: index -> value."""
    tensor = getattr(seen.outputs, name).clone()
    for index, value in at.items():
        tensor.view(-1)[int(index.removeprefix("at"))] = value
    return seen.with_outputs(replace(seen.outputs, **{name: tensor}))


def test_the_spaces_checks_are_the_registered_ones():
    by_worker = {"error", "capture", "fence", "canary"}  # seen where the target runs, not by looking at its outputs
    assert set(SPACE.checks) == set(CHECKS) | by_worker


def test_no_alarm_on_the_reference_over_the_whole_grid():
    proved = 0
    for case in islice(strategies.grid(SPACE, INFO, "cpu", 5), 150):
        seen = observe(case)
        assert not judge(seen), SPACE.label(case)
        proved += not binding(seen)
    assert proved > 90


# ---- any change of a plan, judged by the letter ---------------------------------------------------------------------


def is_right(seen):
    """By the letter of the contract, slot by slot, without the order inside an expert, in Python's integers."""
    held, owner = seen.outputs.sorted_token_ids.tolist(), seen.outputs.expert_ids.tolist()
    total, back = seen.outputs.num_tokens_post_padded.tolist(), seen.outputs.inverse.flatten().tolist()
    block, slots, expert = seen.block_size, seen.slots, seen.expert.tolist()
    wanted = []
    for e in range(seen.experts):
        wanted += [e] * -(-expert.count(e) // block)
    used = len(wanted) * block
    if total != [used] or sorted(owner[: len(wanted)]) != wanted or any(e != -1 for e in owner[len(wanted) :]):
        return False
    places = {}
    for place, slot in enumerate(held):
        if slot == slots:
            continue
        if place >= used or not 0 <= slot < slots or slot in places or expert[slot] != owner[place // block]:
            return False
        places[slot] = place
    return all(places.get(slot, -1) == back[slot] and (expert[slot] < 0) == (back[slot] < 0) for slot in range(slots))


@pytest.mark.parametrize("seed", range(6))
def test_checks_reject_exactly_what_is_wrong(seed):
    """One or two elements of a right plan changed at random, several hundred times: shuffles within an expert pass."""
    chosen = random.Random(seed)
    rejected = accepted = 0
    for _ in range(120):
        faults = [on_rows(name) for name in chosen.sample(("sentinel_ids", "duplicate_experts", "all_to_one"), 1)]
        case = case_of(*faults, rows=chosen.randint(1, 5), experts=chosen.randint(2, 5), seed=chosen.getrandbits(20),
                       block_size=chosen.choice((1, 2, 3, 4)), expert_map=chosen.choice(MAPS))  # fmt: skip
        seen = observe(case, replace(LOOSE, tail="minus_one"))
        outputs = replace(seen.outputs, **{n: t.clone() for n, t in vars(seen.outputs).items()})
        if chosen.random() < 0.4 and len(seen.places) > 1:  # two entries change places, the way back too or not
            a, b = chosen.sample(seen.places.tolist(), 2)
            held = outputs.sorted_token_ids
            held[[a, b]] = held[[b, a]]
            if chosen.random() < 0.7:
                outputs.inverse.view(-1)[held[[a, b]].long()] = torch.tensor([a, b], dtype=torch.int32)
        else:
            tensor = getattr(outputs, chosen.choice(sorted(vars(outputs)))).view(-1)
            if not len(tensor):
                continue
            value = chosen.choice([-1, 0, 1, 2, seen.slots, seen.slots + 1, seen.used, int(tensor[-1])])
            tensor[chosen.randrange(len(tensor))] = value
        other = seen.with_outputs(outputs)
        assert bool(judge(other)) is not is_right(other), (SPACE.label(case), vars(outputs), judge(other))
        rejected, accepted = rejected + (not is_right(other)), accepted + is_right(other)
    assert rejected > 40
    assert accepted > 10


# ---- each check ---------------------------------------------------------------------------------------------------


def test_structure():
    seen = observe(case_of())
    assert judge(seen.with_outputs(replace(seen.outputs, sorted_token_ids=seen.outputs.sorted_token_ids[:-1])))[
        "structure"
    ].symptom == "sorted_token_ids:shape"  # fmt: skip
    assert judge(seen.with_outputs(replace(seen.outputs, expert_ids=seen.outputs.expert_ids.long())))[
        "structure"
    ].symptom == "expert_ids:dtype"  # fmt: skip
    assert not judge(seen.with_outputs(replace(seen.outputs, inverse=None)))
    generous = torch.cat([seen.outputs.sorted_token_ids, torch.full((7,), seen.slots, dtype=torch.int32)])
    assert not judge(observe(case_of(), LOOSE).with_outputs(replace(seen.outputs, sorted_token_ids=generous)))


@pytest.mark.parametrize("name", ["sorted_token_ids", "expert_ids", "num_tokens_post_padded", "inverse"])
def test_what_was_never_written_is_told_once(name):
    seen = observe(case_of(on_rows("minus_one_ids")))
    found = judge(changed(seen, name, at0=POISON))
    assert found["written"].symptom == f"{name}:unwritten"
    assert set(found) <= {"written", "slots", "inverse", "experts"}  # a slot without an entry is lost all the same
    if name != "sorted_token_ids":
        assert "slots" not in found


def test_the_end_of_expert_ids_is_nobodys_unless_it_is_promised():
    last = f"at{len(observe(case_of(rows=9)).outputs.expert_ids) - 1}"
    for value in (0, POISON):
        loose = changed(observe(case_of(rows=9), LOOSE), "expert_ids", **{last: value})
        assert not judge(loose)
        strict = changed(observe(case_of(rows=9)), "expert_ids", **{last: value})
        assert set(judge(strict)) - {"determinism"} == {"tail" if value == 0 else "written"}


def test_a_block_of_no_expert_is_not_one_of_a_lower_expert():
    """What it is, `experts` says; the blocks around it stand in their order all the same."""
    seen = observe(case_of(rows=1, experts=3, top_k=3, block_size=1))
    assert set(judge(changed(seen, "expert_ids", at1=-1))) == {"experts", "determinism"}
    wrong = judge(changed(seen, "expert_ids", at0=2, at1=-1, at2=1))
    assert wrong["order"].message == "block 2 is of a lower expert than block 0"
    assert judge(changed(seen, "expert_ids", at0=1, at1=0))["order"].message.endswith("than the block before it")


def test_order_and_stability_are_asked_where_declared():
    case = case_of(rows=1, experts=2, block_size=1)
    seen = observe(case, replace(LOOSE, tail="minus_one"))
    backwards = Outputs(seen.outputs.sorted_token_ids.flip(0), seen.outputs.expert_ids.flip(0),
                        seen.outputs.num_tokens_post_padded, 1 - seen.outputs.inverse)  # fmt: skip
    assert not judge(seen.with_outputs(backwards))
    assert set(judge(observe(case, STRICT, backwards))) == {"order", "determinism"}
    case = case_of(on_rows("all_to_one"), rows=1, experts=2, block_size=2)
    seen = observe(case, replace(LOOSE, tail="minus_one"))
    held = seen.outputs.sorted_token_ids.clone()
    held[:2] = held[:2].flip(0)
    swapped = replace(seen.outputs, sorted_token_ids=held, inverse=1 - seen.outputs.inverse)
    assert not judge(seen.with_outputs(swapped))
    assert set(judge(observe(case, STRICT, swapped))) == {"stable", "determinism"}


def test_slots_of_no_expert_may_stand_first_where_that_is_the_dialect():
    """As SGLang has them: in blocks of the expert -1."""
    case = case_of(on_rows("minus_one_ids"), rows=2, experts=2, block_size=2)
    inputs = materialize(case, 0)
    found = align(inputs.plain["ids"] + 1, 2, 3)
    outputs = Outputs(found[0], found[1] - (found[1] >= 0).int(), found[2])
    first = observe(case, replace(LOOSE, tail="minus_one", dropped="first"), outputs)
    assert first.leading == 1
    assert not judge(first)
    assert "count" in judge(observe(case, replace(LOOSE, tail="minus_one"), outputs))
    moved = outputs.sorted_token_ids.clone()
    moved[3], moved[0] = moved[0].clone(), 4  # a dropped slot among those of expert 0
    found = judge(first.with_outputs(replace(outputs, sorted_token_ids=moved)))
    assert found["slots"].symptom in ("dropped", "lost")


def test_a_replay_is_held_against_an_eager_call():
    case = case_of()
    seen = observe(case)
    other = replace(seen.outputs, sorted_token_ids=seen.outputs.sorted_token_ids.flip(0))
    assert CHECKS["replay"](seen) == []  # in the eager mode
    assert CHECKS["replay"](replace(seen, eager=reference)) == []
    assert CHECKS["replay"](replace(seen, eager=lambda inputs: other))[0].symptom == "sorted_token_ids"
    answers = iter([other, seen.outputs] * 3)
    assert CHECKS["replay"](replace(seen, eager=lambda inputs: next(answers))) == []  # it does not agree with itself
    assert CHECKS["determinism"](replace(seen, call=lambda inputs: other))[0].symptom == "sorted_token_ids"
    loose = observe(case, LOOSE)
    assert CHECKS["determinism"](replace(loose, call=lambda inputs: other)) == []


# ---- binding ------------------------------------------------------------------------------------------------------


def test_every_wrong_answer_is_rejected_and_is_wrong():
    seen = observe(case_of(rows=6, experts=4))
    names = [name for name, _ in wrong_answers(seen)]
    assert names == ["all zero", "a slot lost", "a slot twice", "two experts exchanged", "two slots exchanged"]
    for _, outputs in wrong_answers(seen):
        assert not is_right(seen.with_outputs(outputs))
    assert binding(seen) == []
    alone = observe(case_of(on_rows("all_to_one", "0-4")))
    assert [name for name, _ in wrong_answers(alone)][-1] == "another expert"
    assert binding(alone) == []


@pytest.mark.parametrize("case", [case_of(rows=0), case_of(on_rows("minus_one_ids", "0-4"))], ids=["T=0", "dropped"])
def test_a_plan_of_nothing_proves_nothing(case):
    assert binding(observe(case)) == ["no slot is kept"]
    assert not judge(observe(case))


def test_vacuity_is_noticed(monkeypatch):
    for name in registry.PARITY["align"]:
        monkeypatch.setitem(CHECKS, name, lambda seen: [])
    assert set(binding(observe(case_of()))) >= {"all zero", "a slot lost", "two experts exchanged"}
