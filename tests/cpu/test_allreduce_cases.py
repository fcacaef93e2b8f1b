"""allreduce_rmsnorm through the engine: inputs, known answers, bounds, wrong answers; a campaign's cases."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz import strategies
from moe_fuzz.campaign.drive import drive
from moe_fuzz.campaign.selftest import draw
from moe_fuzz.case import RANKS, Case, Fault, Step, in_mode
from moe_fuzz.checks import CHECKS, PARITY
from moe_fuzz.checks.allreduce.binding import binding, wrong_answers
from moe_fuzz.checks.allreduce.bounds import Bounded, bounded_norm, bounded_sum
from moe_fuzz.checks.allreduce.family import FAMILY
from moe_fuzz.checks.allreduce.observation import AllreduceObservation, Outputs
from moe_fuzz.contract import Capabilities, Contract, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.execute.peers import TAIL, Peers
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.allreduce.inputs import WHOLE, materialize
from moe_fuzz.ops.inputs import element_bits
from moe_fuzz.options import RunOptions
from moe_fuzz.reference.allreduce_rmsnorm import allreduce_rmsnorm
from moe_fuzz.restriction import Restriction
from moe_fuzz.targets.bind import Target
from moe_fuzz.verdict import PASS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SPACE = get_space("allreduce_rmsnorm")
RANKED = Contract(deterministic=True, isolated=True, sum_order="rank")
INFO = TargetInfo("allreduce_rmsnorm@test", "allreduce_rmsnorm", "test", contract=RANKED)


def case(*faults: Fault, tokens: int = 6, seed: int = 3, mode: str = "eager", **changes: object) -> Case:
    config = {**SPACE.simplest, **changes}
    found = Case("allreduce_rmsnorm", config, (Step(Labels.range(tokens), faults=faults),), seed, mode)
    SPACE.validate(found)
    return found


def seen(made: Case, contract: Contract = RANKED) -> AllreduceObservation:
    """The reference's answer to a case, as the checks see it."""
    inputs = materialize(made, 0)
    plain = inputs.plain
    normed, total = allreduce_rmsnorm(plain["x"], plain.get("residual"), plain["gamma"], float(made.config["eps"]),
                                      rounds=contract.rounds)  # fmt: skip
    ranks = (len(plain["x"]), 1, 1)
    outputs = Outputs(normed.repeat(ranks), total.repeat(ranks))
    return FAMILY.observe(made, 0, replace(INFO, contract=contract), inputs, outputs, lambda _: None)


def fired(one: AllreduceObservation) -> list[str]:
    names = ("structure", "written", "ranks", *PARITY["allreduce"])
    return [name for name in names if CHECKS["allreduce"][name](one)]


# ---- inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_whole_numbers_can_be_summed_exactly(dtype, ranks):
    inputs = materialize(case(dtype=dtype, ranks=ranks, recipe="integer", hidden=64), 0)
    parts = torch.cat([inputs.plain["x"], inputs.plain["residual"][None]]).double()
    assert (parts == parts.round()).all()
    assert parts.abs().sum(dim=0).max() <= WHOLE[getattr(torch, dtype)]
    assert parts.abs().max() > WHOLE[getattr(torch, dtype)] // (2 * (ranks + 1))


def test_a_fault_on_one_rank_stays_on_it_and_rows_keep_their_values():
    made = case(Fault("nan_rows", "x1", Labels.parse("2")), ranks=3)
    clean, hurt = materialize(case(ranks=3), 0), materialize(made, 0)
    assert hurt.plain["x"][2, 2].isnan().all()
    assert not hurt.plain["x"][:2].isnan().any()
    fewer = materialize(replace(made, steps=(Step(Labels.parse("0,3"),),)), 0)
    assert torch.equal(fewer.plain["x"], clean.plain["x"][:, [0, 3]])
    less = materialize(case(ranks=2), 0)
    assert torch.equal(less.plain["x"], clean.plain["x"][:2])


_ON_ROWS = {place.fault for place in SPACE.places if place.on_rows}


@pytest.mark.parametrize("name", [name for name in SPACE.faults if name in _ON_ROWS and name != "stale_rows"])
def test_every_fault_on_rows_changes_numbers(name):
    place = next(place for place in SPACE.places if place.fault == name)
    inputs = materialize(case(Fault(name, place.tensor, Labels.parse("1-4"))), 0)
    assert not torch.equal(element_bits(inputs.plain["x"]), element_bits(materialize(case(), 0).plain["x"]))


def test_the_mode_ranks_wants_two_and_captures_nowhere_else():
    assert in_mode({"ranks": 1, "captured": True, "launches": "single"}, RANKS)["ranks"] == 2
    assert in_mode({"ranks": 8, "captured": True}, RANKS, 4)["ranks"] == 4
    assert in_mode({"ranks": 1, "captured": True}, "graph")["captured"] is False
    with pytest.raises(CaseError, match="more than 1"):
        case(ranks=1, mode=RANKS)
    assert case(ranks=3, mode=RANKS).processes == 3
    assert case(ranks=3).processes == 1


def test_memory_has_a_tail_that_is_watched():
    from moe_fuzz.execute import peers

    group = Peers(2, None, torch.device("cpu"), 32, "phases", "together", 0)
    peers._present[:] = [group]
    try:
        first, second = group.memory("buffer", 32)
        assert group.memory("buffer", 32)[0] is first
        assert not first.any()
        assert not peers.tails()
        second.as_strided((33,), (1,))[32] = 0
        (violation,) = peers.tails()
        assert (violation.symptom, violation.where) == ("buffer:right", (0,))
        assert "rank 1" in violation.message
        assert TAIL >= 64
        group.signals.append(torch.tensor([0, 3], dtype=torch.int32))
        assert peers.pads()[0].where == (1,)
    finally:
        peers._present.clear()


@pytest.mark.parametrize(("capacity", "rows"), [("exact", 6), ("double", 12), ("half", 3), ("short", 5)])
def test_buffers_have_room_for_so_many_rows(capacity: str, rows: int) -> None:
    from moe_fuzz.execute import peers

    groups: list[Peers] = []

    def function(x, residual, gamma, eps, *, group):
        groups.append(group)
        return x, x

    with peers.staged(case(capacity=capacity, hidden=512), Target(INFO, function, {"group": "group"}, ()), "cpu",
                      RunOptions()) as around:  # fmt: skip
        around.function(torch.zeros(2, 6, 512), None, torch.ones(512), 1e-6)
    assert groups[0].capacity == rows * 512 * 2


def test_a_burst_is_long_once_a_case_in_the_first_call_that_has_rows():
    from moe_fuzz.execute import peers

    sizes: list[int] = []

    def function(x, residual, gamma, eps):
        sizes.append(x.shape[-2])
        return x, x

    target = Target(INFO, function, {}, ())
    made = case(burst=1000, hidden=32, ranks=2)
    with peers.staged(made, target, "cpu", RunOptions()) as around:
        calls = []
        for rows in (0, 4, 4):
            before = len(sizes)
            x = torch.zeros(2, rows, 32)
            around.function(x, None, torch.ones(32), 1e-6)
            calls.append(len(sizes) - before)
    assert calls == [1001, 1001, 9]


def test_calls_around_its_own_have_other_weights():
    """A group serves every layer of a model: what it keeps of one must not reach the next. Of one other call it stands
    before in some cases, and behind in others."""
    from moe_fuzz.execute import peers

    given: list[torch.Tensor] = []

    def function(x, residual, gamma, eps):
        given.append(gamma)
        return x, x

    gamma, x = torch.arange(1.0, 33.0), torch.zeros(2, 4, 32)
    for burst, seed, at in ((1, 2, 1), (1, 3, 0), (3, 2, 2), (3, 3, 1), (8, 2, 4), (8, 3, 4)):
        given.clear()
        target, made = Target(INFO, function, {}, ()), case(burst=burst, hidden=32, ranks=2, seed=seed)
        with peers.staged(made, target, "cpu", RunOptions()) as around:
            around.function(x, None, gamma, 1e-6)
        assert [torch.equal(one, gamma) for one in given] == [number == at for number in range(burst + 1)]


IN_PLACE = '''
import torch
from moe_fuzz.contract import Capabilities, Contract, declares


@declares(contract=Contract(deterministic=True, batch_invariant=True, isolated=True),
          capabilities=Capabilities(out=True, alignment=1, residual_in_place=True, one_host_path=True))
def in_place(x, residual, gamma, eps, *, out=None):
    normed, residual_out = out
    assert residual.data_ptr() == residual_out.data_ptr()
    assert residual.shape == x.shape
    total = x.float().sum(dim=0) + residual.float()
    residual_out.copy_(total)
    value = residual_out.float()
    normed.copy_(value * torch.rsqrt(value.square().mean(dim=-1, keepdim=True) + eps) * gamma.float())
    return out
'''


@pytest.mark.parametrize(("mode", "refilled"), [("eager", False), ("eager", True), ("graph", False),
                                                ("piecewise", False)])  # fmt: skip
def test_a_residual_in_place_is_as_it_was_before_each_call(runner, tmp_path, mode, refilled):
    """Every rank has its own, in the buffer of the result. It is written anew for calls and replays that come again."""
    (tmp_path / "mine.py").write_text(IN_PLACE)
    target = f"allreduce_rmsnorm@{tmp_path / 'mine.py'}:in_place"
    steps = tuple(Step(Labels.range(tokens), refilled=refilled and index > 0) for index, tokens in enumerate((5, 5, 3)))
    made = Case("allreduce_rmsnorm", {**SPACE.simplest, "out": "in_place", "ranks": 3}, steps, 4, mode)
    SPACE.validate(made)
    verdict = runner.run(made, target, RunOptions())
    assert verdict.kind == PASS, verdict
    assert verdict.parity


def test_a_residual_in_place_is_packed_and_there() -> None:
    with pytest.raises(CaseError, match="needs config\\.residual"):
        case(out="in_place", residual=False)
    with pytest.raises(CaseError, match="lies as results do"):
        case(Fault("noncontiguous", "residual"), out="in_place")
    info = replace(INFO, capabilities=replace(INFO.capabilities, out=True))
    assert "does not take out=in_place" in SPACE.refusal(case(out="in_place"), info)
    assert {one.config["out"] for one in SPACE.simplify(case(out="in_place"))} >= {False, True}


# ---- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["dense", "integer", "wide"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rounds", [("residual",), ("sum", "residual", "normed"), ()])
def test_the_reference_passes_and_wrong_answers_do_not(recipe, dtype, rounds):
    contract = replace(RANKED, rounds=rounds, sum_order="any")
    one = seen(case(recipe=recipe, dtype=dtype, hidden=33, ranks=3), contract)
    assert fired(one) == []
    assert not binding(one)
    for name, outputs in wrong_answers(one):
        assert fired(one.with_outputs(outputs)), name


def test_a_bit_of_one_rank_is_seen():
    one = seen(case(hidden=64))
    flipped = one.outputs.residual_out.clone()
    element_bits(flipped)  # a copy: the bits below are of the tensor itself
    flipped.view(torch.int16)[1, 2, 3] ^= 1
    wrong = one.with_outputs(replace(one.outputs, residual_out=flipped))
    (violation,) = CHECKS["allreduce"]["ranks"](wrong)
    assert violation.where == (1, 2, 3)
    assert CHECKS["allreduce"]["residual"](wrong)


def test_a_missing_rank_is_named():
    one = seen(case(recipe="integer", ranks=3, hidden=64))
    plain = one.inputs.plain
    normed, total = allreduce_rmsnorm(plain["x"][:2], plain["residual"], plain["gamma"], 1e-6)
    wrong = one.with_outputs(Outputs(normed.repeat(3, 1, 1), total.repeat(3, 1, 1)))
    assert "the part of rank 2 is missing" in CHECKS["allreduce"]["exact"](wrong)[0].message


def test_rows_that_are_not_defined_are_judged_by_equality_alone():
    made = case(Fault("nan_rows", "x1", Labels.parse("1")), Fault("overflowing_squares", "x0", Labels.parse("4")))
    one = seen(made)
    assert one.defined.tolist() == [True, False, True, True, False, True]
    garbage = one.outputs.normed.clone()
    garbage[:, [1, 4]] = 7.0
    assert fired(one.with_outputs(replace(one.outputs, normed=garbage))) == []
    garbage[1, 4] = 8.0
    assert fired(one.with_outputs(replace(one.outputs, normed=garbage))) == ["ranks"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_order_of_float32_sums_leaves_the_bound(dtype):
    """Brute force: orders of ranks and of columns at random, on numbers of many sizes."""
    gen = torch.Generator().manual_seed(1)
    contract = replace(RANKED, sum_order="any")
    for _ in range(60):
        ranks, hidden = int(torch.randint(1, 9, (1,), generator=gen)), int(torch.randint(1, 70, (1,), generator=gen))
        scale = torch.exp2(-torch.randint(0, 14, (ranks, 64, hidden), generator=gen).float())
        x = (torch.randn(ranks, 64, hidden, generator=gen) * scale).to(dtype)
        gamma = torch.randn(hidden, generator=gen)
        total = torch.zeros(64, hidden)
        residual = x[-1] if ranks > 1 else None  # which may be added anywhere
        for rank in torch.randperm(ranks, generator=gen).tolist():
            total = total + x[rank].float()
        before, after = bounded_sum(x if residual is None else x[:-1], residual, contract)
        assert ((total.double() - before.value).abs() <= before.bound).all()
        stored = total.to(dtype)
        assert ((stored.double() - after.value).abs() <= after.bound).all()
        value, squares = stored.float(), torch.zeros(64)
        for column in torch.randperm(hidden, generator=gen).tolist():
            squares = squares + value[:, column].square()
        normed = (value * torch.rsqrt(squares / hidden + 1e-6)[:, None] * gamma).to(dtype)
        known = Bounded(stored.double(), torch.zeros(64, hidden, dtype=torch.float64))
        limit = bounded_norm(known, gamma, 1e-6, dtype, contract)
        assert ((normed.double() - limit.value).abs() <= limit.bound).all()
        wide = bounded_norm(before, gamma, 1e-6, dtype, contract)  # of a target that takes the norm of the sum itself
        unrounded = (total * torch.rsqrt(total.square().mean(dim=1, keepdim=True) + 1e-6) * gamma).to(dtype)
        assert ((unrounded.double() - wide.value).abs() <= wide.bound).all()


# ---- campaigns ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runner():
    """A worker's runner, in this process."""
    from moe_fuzz.execute.runner import Runner

    return Runner("cpu")


@pytest.mark.parametrize(("target", "count"), [
    ("torch", 40), pytest.param("builtin", 10, marks=pytest.mark.interpreter),
    pytest.param("builtin.one_shot", 4, marks=pytest.mark.interpreter),
    pytest.param("builtin.split", 4, marks=pytest.mark.interpreter),
    pytest.param("builtin.two_shot", 4, marks=pytest.mark.interpreter),
])  # fmt: skip
def test_ours_pass_a_campaigns_cases(runner, target, count):
    name = f"allreduce_rmsnorm@{target}"
    drawn = (one for one in draw("allreduce_rmsnorm", runner.describe(name), "cpu", 11) if one.processes == 1)
    verdicts = [(one, runner.run(one, name, RunOptions())) for one in itertools.islice(drawn, count)]
    bad = [(SPACE.label(one), verdict) for one, verdict in verdicts if verdict.kind != PASS]
    assert not bad, bad[:2]
    assert sum(verdict.parity for _, verdict in verdicts) > count // 4


def test_the_grid_covers_every_value():
    info = replace(INFO, capabilities=replace(INFO.capabilities, launches=("phases", "single"), out=True, cuts=True))
    drawn = list(itertools.islice(strategies.grid(SPACE, info, "cuda", 3), 400))
    for axis in SPACE.axes(info):
        assert {one.config[axis.name] for one in drawn} >= set(axis.values) - {1000, True}, axis.name
    for one in drawn:
        SPACE.validate(one)
        for simpler in itertools.islice(SPACE.simplify(one), 40):
            SPACE.validate(simpler)


def test_blocks_have_several_tiles_and_the_last_one_is_not_whole() -> None:
    """In the interpreter 8 blocks in all take 8 rows at a time: as many rows are rare where each case costs ranks."""
    can = Capabilities(launches=("phases",), max_burst=1, max_world=4)
    drawn: list[Case] = []
    drive(strategies.rounds(SPACE, replace(INFO, capabilities=can), "cpu", 1), 5, 100, drawn.extend)
    behind = [one for one in drawn
              if any(s.tokens * int(one.config["ranks"]) > 64 and s.tokens % 8 for s in one.steps)]  # fmt: skip
    assert len(behind) > 0.08 * len(drawn)
    assert {int(one.config["ranks"]) for one in behind} == {1, 2, 3, 4}
    assert SPACE.seams(SPACE.simplest, (1, 16, 33, 64, 65)) == [33, 65]


@pytest.mark.interpreter
def test_what_a_target_is_not_given_on_a_cpu_is_told() -> None:
    """Both where a campaign has nothing left, and where one case is refused; it is the device's fault, not its own."""
    runner = Runner("cpu")
    ours = runner.describe("allreduce_rmsnorm@builtin")
    assert ours.narrowed == "interpreted, phase by phase: at most 4 ranks, and a burst of one other call"
    assert TargetInfo.from_json(ours.to_json()) == ours
    refusal = Restriction(values=(("ranks", ("8",)),)).refusal(SPACE, ours)
    assert refusal.endswith(f"takes no ranks=8, but 2 or 1 or 3 or 4 (here it is {ours.narrowed})")
    assert SPACE.refusal(case(ranks=8), ours).endswith(f"does not take ranks=8; here it is {ours.narrowed}")
    theirs = runner.describe("allreduce_rmsnorm@torch")
    assert theirs.narrowed == ""
    assert not SPACE.refusal(case(ranks=8), theirs)


def lies(*faults: Fault, **changes: object) -> dict[str, tuple[int, ...]]:
    inputs = materialize(case(*faults, **changes), 0)
    return {name: inputs.lies[name].strides(tensor.shape) for name, tensor in inputs.plain.items()}


def test_inputs_that_are_not_packed() -> None:
    packed = {"x": (6 * 16, 16, 1), "residual": (16, 1), "gamma": (1,)}
    assert lies() == packed
    apart = lies(Fault("noncontiguous", "x"))
    assert apart["x"][0] == 6 * apart["x"][1] > 6 * 16
    assert {**apart, "x": packed["x"]} == packed
    turned = lies(Fault("transposed", "x"), Fault("transposed", "residual"))
    assert turned["x"] == (16 * turned["x"][2], 1, turned["x"][2])
    assert turned["x"][2] >= 6
    assert turned["residual"][0] == 1
    assert lies(Fault("noncontiguous", "gamma"))["gamma"][0] > 1


def test_only_what_takes_strides_is_given_any() -> None:
    strict = replace(INFO, capabilities=replace(INFO.capabilities, strided=False))
    loose = replace(INFO, capabilities=replace(INFO.capabilities, any_strides=True))
    for fault, tensor, takers in (("noncontiguous", "x", (INFO, loose)), ("transposed", "residual", (INFO, loose)),
                                  ("noncontiguous", "gamma", (loose,))):  # fmt: skip
        made = case(Fault(fault, tensor))
        for info in (strict, INFO, loose):
            assert (not SPACE.refusal(made, info)) == (info in takers)
            offered = {(place.fault, place.tensor) for place in SPACE.places_for(made.config, info)}
            assert ((fault, tensor) in offered) == (info in takers)


def spoiled(seen: AllreduceObservation, name: str, values: dict[int, float]) -> list[str]:
    """What `ranks` says where these ranks have another number in row 2, column 5."""
    outputs = {one: getattr(seen.outputs, one).clone() for one in ("normed", "residual_out")}
    for rank, value in values.items():
        outputs[name][rank, 2, 5] += value
    changed = seen.with_outputs(replace(seen.outputs, **outputs))
    return [(one.where, one.message) for one in CHECKS["allreduce"]["ranks"](changed)]


def test_half_of_the_cases_force_a_backend_each_in_its_turn() -> None:
    info = replace(INFO, capabilities=replace(INFO.capabilities, backends=("one", "two")))
    forced = [replace(seen(case(seed=seed)), info=info).forced for seed in range(4)]
    assert [one and one[0] for one in forced] == ["one", "two", None, None]
    assert forced[0] is not None
    assert forced[0][1].options["backend"] == "one"
    for given in ({"mode": "graph"}, {"tokens": 0}):
        assert not replace(seen(case(seed=0, **given)), info=info).forced
    assert seen(case(seed=0)).forced is None


def test_the_rank_that_is_wrong_is_named() -> None:
    four = seen(case(ranks=4, dtype="float32"))
    [(where, said)] = spoiled(four, "residual_out", {2: 4.0})
    assert where == (2, 2, 5)
    assert said.startswith("row 2, column 5: residual_out of rank 2 is not that of ranks 0, 1, 3; rank 2 of 4 off, it ")
    [(where, said)] = spoiled(four, "normed", {0: 4.0})
    assert where == (0, 2, 5)
    assert "normed of rank 0 is not that of ranks 1, 2, 3; rank 0 of 4 off" in said
    [(where, said)] = spoiled(four, "residual_out", {0: 4.0, 1: 4.0, 3: 8.0})
    assert "residual_out of ranks 2, 3 is not that of ranks 0, 1; ranks 0, 1, 3 of 4 off" in said
    [(where, said)] = spoiled(four, "residual_out", {3: 1e-7})  # all within the bound
    assert said == "row 2, column 5: residual_out of rank 3 is not that of ranks 0, 1, 2"
    assert not spoiled(four, "residual_out", {})
    of_nan = seen(case(Fault("nan_rows", "x0", Labels.parse("2")), ranks=2, dtype="float32"))
    assert not spoiled(of_nan, "residual_out", {1: 4.0})
