"""The space of align and its materialized inputs: functions of labels alone, and each fault lays what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_fuzz import strategies
from moe_fuzz.case import MODES, Case, Fault, Step
from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.fence import open_arena
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.align.inputs import materialize
from moe_fuzz.ops.align.space import BLOCK_SIZES, MAPS, ROW_FAULTS

SPACE = get_space("align")
CAN = Capabilities(alignment=1, max_experts=8192, block_sizes=(), out=True)
INFO = TargetInfo("align@all", "align", "all", contract=Contract(accepts=PADDING_DIALECTS), capabilities=CAN)
INT32 = torch.iinfo(torch.int32)


def case_of(*faults, rows=9, experts=64, top_k=4, seed=5, **config):
    whole = {**SPACE.simplest, "experts": str(Labels.range(experts)), "top_k": top_k} | config
    case = Case("align", whole, (Step(Labels.range(rows), Labels(), faults),), seed)
    SPACE.validate(case)
    return case


def ids_of(case):
    return materialize(case, 0).plain["ids"]


def on_rows(name, rows="2-4"):
    return Fault(name, "ids", Labels.parse(rows))


# ---- the space ----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_drawn_is_valid_and_inside_the_capabilities(data):
    accepts = data.draw(st.sampled_from([PADDING_DIALECTS, ("distinct", "minus_one"), ("distinct",)]))
    can = replace(CAN, max_experts=data.draw(st.sampled_from([8, 992, 8192])), strided=data.draw(st.booleans()),
                  block_sizes=data.draw(st.sampled_from([(), (16, 64), (24,)])),
                  fewer_than_map=data.draw(st.booleans()), int64_ids=data.draw(st.booleans()),
                  expert_map=data.draw(st.booleans()))  # fmt: skip
    info = replace(INFO, contract=Contract(accepts=accepts), capabilities=can)
    device = data.draw(st.sampled_from(["cpu", "cuda"]))
    for case in data.draw(strategies.rounds(SPACE, info, device)):
        SPACE.validate(case)
        assert SPACE.refusal(case, info) == "", SPACE.label(case)
        assert Case.loads(case.inline()) == case


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_simpler_case_is_valid_and_the_way_down_ends(data):
    case = data.draw(strategies.rounds(SPACE, INFO, "cpu"))[0]
    for _ in range(400):
        simpler = list(SPACE.simplify(case))
        for other in simpler[:40]:
            try:
                SPACE.validate(other)
            except CaseError:
                assert "int32_boundary" in other.fault_names or other.mode != case.mode
        valid = [other for other in simpler if not refused(other)]
        if not valid:
            break
        case = data.draw(st.sampled_from(valid[:10]))
    else:
        pytest.fail("it goes on")
    simplest = {**SPACE.simplest, "experts": case.config["experts"], "top_k": 1}
    assert dict(case.config) == simplest
    assert len(case.experts) == 1


def refused(case):
    try:
        SPACE.validate(case)
    except CaseError:
        return True
    return False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 65}, "top_k"), ({"top_k": 0}, "top_k"), ({"block_size": 0}, "block_size"),
        ({"block_size": True}, "block_size"), ({"expert_map": True}, "expert_map"), ({"experts": 9000}, "experts"),
        ({"ids_dtype": "int16"}, "ids_dtype"), ({"scale": 1.0}, "unknown field"),
    ],
)  # fmt: skip
def test_configs_that_are_none_are_refused(change, message):
    with pytest.raises(CaseError, match=message):
        case_of(**change)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("nan_rows", "ids", Labels.range(1)), "knows no fault"), (Fault("all_to_one", "ids"), "must name rows"),
        (Fault("transposed", "ids", Labels.range(1)), "must name no rows"), (on_rows("wide_ids"), "int64"),
        (Fault("zero_rows", "ids", Labels.range(1), 3), "stale_rows"),
        (Fault("noncontiguous", "expert_map"), "config.expert_map"),
    ],
)  # fmt: skip
def test_faults_that_cannot_be_laid_are_refused(fault, message):
    with pytest.raises(CaseError, match=message):
        case_of(fault)


def test_what_a_target_does_not_take_is_said():
    can = replace(CAN, max_experts=8, block_sizes=(16,), int64_ids=False, expert_map=False, out=False,
                  zero_tokens=False, strided=False, alignment=16, duplicate_ids=False)  # fmt: skip
    info = replace(INFO, capabilities=can, contract=Contract())
    faults = [Fault("transposed", "ids"), Fault("misaligned", "ids"), on_rows("minus_one_ids"), on_rows("all_to_one")]
    case = case_of(*faults, experts=9, block_size=3, ids_dtype="int64", expert_map="shard", out=True)
    said = SPACE.refusal(case, info)
    for part in ("9 experts", "block_size 3", "int64 ids", "expert_map=shard", "out", "strided ids", "misaligned ids",
                 "ids of no expert (minus_one_ids)", "an expert twice"):  # fmt: skip
        assert part in said
    assert "no tokens" in SPACE.refusal(case_of(rows=0, experts=4), info)


def test_a_map_whose_entries_stand_apart():
    case = case_of(Fault("noncontiguous", "expert_map"), expert_map="permuted")
    inputs = materialize(case, 0)
    with open_arena("cpu") as arena:
        placed = inputs.place(arena, CAN)
        assert placed["expert_map"].stride(0) > 1
        assert torch.equal(placed["expert_map"], inputs.plain["expert_map"])
        assert placed["ids"].is_contiguous()
    assert "strided expert_map" in SPACE.refusal(case, INFO)
    takes = replace(INFO, capabilities=replace(CAN, any_strides=True))
    assert not SPACE.refusal(case, takes)
    for kind, info, laid in (("shard", takes, True), ("none", takes, False), ("shard", INFO, False)):
        places = SPACE.places_for({**case.config, "expert_map": kind}, info)
        assert ("expert_map" in {place.tensor for place in places}) is laid
    gone = [simpler for simpler in SPACE.simplify(case) if simpler.config["expert_map"] == "none"]
    assert gone
    assert not any(simpler.fault_names for simpler in gone)


def test_one_expert_has_so_many_rows():
    found = set()
    for seed in range(80):
        plain = ids_of(case_of(rows=300, experts=64, block_size=48, seed=seed))
        case = case_of(Fault("exact_count", "ids"), rows=300, experts=64, block_size=48, seed=seed)
        ids = ids_of(case)
        assert all(len(set(row)) == 4 for row in ids.tolist())
        if torch.equal(plain, ids):
            continue
        rows = [row for row in range(300) if not torch.equal(plain[row], ids[row])]
        counts = ids.flatten().bincount(minlength=64).tolist()
        first = [one for one in range(64) if (ids[: counts[one]] == one).any(dim=1).all()]
        assert first  # an expert of the first rows, and of no others
        found |= {counts[one] for one in first}
        kept = case.with_step(0, case.steps[0].keep_rows(Labels.of(rows[::2])))
        assert torch.equal(ids_of(kept), ids[rows[::2]])
    assert len(found) > 9
    assert found & {15, 16, 17, 31, 32, 33}
    assert found & {47, 48, 49, 96}


def test_rows_of_no_expert_are_left_alone_by_an_exact_count():
    for seed in range(9):
        sentinels = ids_of(case_of(on_rows("minus_one_ids"), Fault("exact_count", "ids"), seed=seed))
        assert (sentinels[2:5] == -1).all()


def test_modes_and_features():
    assert SPACE.modes(INFO) == MODES
    assert SPACE.modes(replace(INFO, contract=Contract(graph=False))) == MODES[:1]
    features = SPACE.features(case_of(on_rows("all_to_one"), rows=300, experts=1100, block_size=3, expert_map="local"))
    assert {"E>1023", "slots>1023", "block not a power of two", "expert_map=local", "fault:all_to_one"} <= features
    assert not {feature for feature in features if "1100" in feature}  # never raw shapes


def test_a_tail_is_of_ids():
    """What a static buffer holds past its tokens: never a fault of another op's tensor."""
    found = set()
    for seed in range(60):
        for case in strategies_of(seed):
            found |= {(fault.name, fault.tensor) for step in case.steps for fault in step.faults}
    assert {tensor for _, tensor in found} == {"ids"}
    assert {("minus_one_ids", "ids"), ("stale_rows", "ids"), ("zero_rows", "ids")} <= found


def strategies_of(seed):
    from itertools import islice

    return [case for case in islice(strategies.grid(SPACE, INFO, "cpu", seed), 12) if case.mode != "eager"]


# ---- the tensors --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_left_stays_when_rows_and_experts_go(data):
    case = data.draw(strategies.rounds(SPACE, INFO, "cpu"))[0]
    step = case.steps[0]
    plain = replace(case, steps=(replace(step, faults=()),))
    rows = Labels.of(data.draw(st.lists(st.sampled_from(list(step.rows)), max_size=5)) if step.rows else [])
    whole = ids_of(plain)
    part = ids_of(plain.with_step(0, plain.steps[0].keep_rows(rows)))
    assert torch.equal(part, whole[rows.positions(step.rows)])
    # Experts that no row names can go; each id then says the same expert as before.
    named = Labels.of(list(case.experts)[at] for at in set(whole.flatten().tolist())) or case.experts.first(1)
    fewer = SPACE.keep(plain, "experts", named)
    if fewer.config["top_k"] == plain.config["top_k"] and whole.numel():
        before, after = torch.tensor(list(plain.experts)), torch.tensor(list(fewer.experts))
        assert torch.equal(after[ids_of(fewer).long()], before[whole.long()])


def test_rows_name_distinct_experts_and_steps_differ():
    ids = ids_of(case_of(rows=50, experts=33, top_k=32))
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
    assert ids.dtype == torch.int32
    assert 0 <= int(ids.min()) <= int(ids.max()) < 33
    two = Case("align", case_of().config, case_of().steps * 2, 5)
    assert not torch.equal(materialize(two, 0).plain["ids"], materialize(two, 1).plain["ids"])


@pytest.mark.parametrize("kind", MAPS)
def test_maps(kind):
    inputs = materialize(case_of(expert_map=kind), 0)
    found, experts = inputs.plain.get("expert_map"), inputs.options["num_experts"]
    if kind == "none":
        assert found is None
        return
    assert found.shape == (64,)
    assert found.dtype == torch.int32
    here = found[found >= 0].tolist()
    if kind == "replicas":
        assert set(here) == set(range(experts))
        assert experts < len(here) == 64
        return
    if kind == "spares":
        assert len(set(here)) == 64 < experts
        assert max(here) < experts
        return
    assert sorted(here) == list(range(len(here)))
    assert set(found.tolist()) - set(here) <= {-1}
    assert experts == (len(here) if kind == "local" else 64)
    assert len(here) == 64 if kind == "permuted" else 0 < len(here) < 64
    assert (here == sorted(here)) is (kind == "shard")


def test_replicas_are_of_many_experts_or_of_few():
    """And a row of distinct ids names an expert twice."""
    made = [materialize(case_of(expert_map="replicas", seed=seed), 0) for seed in range(20)]
    assert {inputs.options["num_experts"] for inputs in made} == {1, 16, 32, 48}
    named = torch.cat([inputs.plain["expert_map"][inputs.plain["ids"].long()] for inputs in made])
    assert (named.sort(dim=1).values.diff(dim=1) == 0).any()
    assert "expert_map=replicas" in SPACE.refusal(
        case_of(expert_map="replicas"), replace(INFO, capabilities=replace(CAN, fewer_than_map=False))
    )


def test_spares_are_one_or_many_and_have_numbers_that_are_ids_of_none():
    """An id from G on is below the number of experts, and outside of the map: the first such id is drawn as a fault."""
    made = [materialize(case_of(on_rows("num_experts_ids"), expert_map="spares", seed=seed), 0) for seed in range(20)]
    assert {inputs.options["num_experts"] for inputs in made} == {65, 80, 128}
    assert all(inputs.plain["ids"][2, 0] == 64 < inputs.options["num_experts"] for inputs in made)
    used = torch.stack([inputs.plain["expert_map"].bincount(minlength=128) for inputs in made])
    assert used[:, 0].any()
    assert not used[:, 0].all()  # a spare may come first
    assert made[0].results["expert_ids"][0] == (36,)


def test_spares_need_room():
    can = replace(CAN, max_experts=100)
    assert "twice 64 experts" in SPACE.refusal(case_of(expert_map="spares"), replace(INFO, capabilities=can))
    asked = {**case_of(expert_map="spares").config, "experts": 64}
    assert SPACE.complete(asked, replace(INFO, capabilities=can))["expert_map"] == "permuted"
    with pytest.raises(CaseError, match="no room for spares"):
        case_of(experts=8192, expert_map="spares")


def test_results_and_room():
    inputs = materialize(case_of(block_size=16), 0)
    shapes = {name: shape for name, (shape, _) in inputs.results.items()}
    assert shapes == {"sorted_token_ids": (36 * 16,), "expert_ids": (36,), "num_tokens_post_padded": (1,),
                      "inverse": (9, 4)}  # fmt: skip
    assert inputs.fits("expert_ids", (40,))
    assert not inputs.fits("expert_ids", (35,))
    assert not inputs.fits("expert_ids", (36, 1))
    assert not inputs.fits("num_tokens_post_padded", (2,))


@pytest.mark.parametrize("kind", MAPS)
def test_a_graph_is_captured_on_valid_ids(kind):
    blank = materialize(case_of(on_rows("sentinel_ids"), expert_map=kind), 0).blank().plain["ids"]
    assert blank.shape == (9, 4)
    assert blank.flatten().tolist() == [at % 64 for at in range(36)]


def test_faults_on_rows_leave_the_others():
    plain = ids_of(case_of(ids_dtype="int64"))
    for name in ROW_FAULTS:
        laid = ids_of(case_of(on_rows(name), ids_dtype="int64"))
        assert torch.equal(laid[[0, 1, 5, 6, 7, 8]], plain[[0, 1, 5, 6, 7, 8]]), name
        assert not torch.equal(laid[2:5], plain[2:5]), name


def test_each_fault_lays_what_it_says():
    plain = ids_of(case_of())
    assert (ids_of(case_of(on_rows("zero_rows")))[2:5] == 0).all()
    assert len(ids_of(case_of(on_rows("all_to_one")))[2:5].unique()) == 1
    assert (ids_of(case_of(on_rows("minus_one_ids")))[2:5] == -1).all()
    assert (ids_of(case_of(on_rows("num_experts_ids")))[2:5] == 64).all()
    hot = ids_of(case_of(on_rows("hot_expert", "0-8")))
    assert ((hot != plain).sum(dim=1) <= 1).all()
    assert max((hot == expert).any(dim=1).sum() for expert in range(64)) == 9
    twice = ids_of(case_of(on_rows("duplicate_experts", "0-8")))
    assert all(len(set(row)) <= 2 for row in twice.tolist())
    assert len(ids_of(case_of(on_rows("empty_experts", "0-8"), top_k=32)).unique()) <= 8
    stale = ids_of(case_of(on_rows("stale_rows")))[2:5]
    assert (stale.sort(dim=1).values.diff(dim=1) > 0).all()


def test_sentinels_and_wide_ids():
    found = set(ids_of(case_of(on_rows("sentinel_ids", "0-99"), rows=100)).flatten().tolist())
    assert {-1, -2, 64, 65, 128, -64, -65, INT32.max, INT32.min} <= found
    assert any(0 <= one < 64 for one in found)
    wide = ids_of(case_of(on_rows("wide_ids", "0-8"), ids_dtype="int64"))
    plain = ids_of(case_of(ids_dtype="int64"))
    assert torch.equal(wide.int(), plain.int())  # the low 32 bits are an expert's
    assert ((wide < INT32.min) | (wide > INT32.max)).any()


def test_a_fault_of_one_expert_keeps_it_when_others_go():
    case = case_of(on_rows("all_to_one", "0-8"))
    expert = int(ids_of(case)[0, 0])
    fewer = SPACE.keep(case, "experts", Labels.of([expert, expert + 1 if expert < 63 else 0, 7, 9]))
    assert list(fewer.experts)[int(ids_of(fewer)[0, 0])] == expert


@pytest.mark.parametrize("name", ["noncontiguous", "transposed", "misaligned", "int32_boundary"])
def test_layouts_keep_the_values(name):
    case = case_of(Fault(name, "ids"))
    inputs = materialize(case, 0)
    with open_arena("cpu") as arena:
        placed = inputs.place(arena, CAN)["ids"]
        assert torch.equal(placed, ids_of(case_of()))
        assert (name == "misaligned") is placed.is_contiguous()
        if name == "int32_boundary":
            assert placed.stride(0) * 8 >= 2**31


def test_labels_say_what_a_person_needs():
    case = case_of(on_rows("stale_rows"), expert_map="shard", ids_dtype="int64", edge="left", out=True)
    label = SPACE.label(case)
    for part in ("T=9", "E=64", "k=4", "block=16", "int64", "expert_map=shard", "fenced left", "stale_rows",
                 "rows 2-4"):  # fmt: skip
        assert part in label
    assert BLOCK_SIZES[0] == SPACE.simplest["block_size"]
