"""The checks of experts: silent on right answers, on a device that rounds as badly as it may, on what is not known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_fuzz.case import Case, Fault
from moe_fuzz.checks import CHECKS
from moe_fuzz.checks.experts import statistical
from moe_fuzz.contract import Contract
from moe_fuzz.labels import Labels
from moe_fuzz.ops.experts.inputs import ExpertsInputs
from moe_fuzz.options import RunOptions
from moe_fuzz.reference.align import expert_of_slot
from moe_fuzz.reference.experts_bf16 import ACTIVATIONS, GATE_LAYOUTS, activate
from tests.benchmark_script import benchmark
from tests.cpu.experts_seen import FAMILY, STEADY, case_of, judge, observe, reference

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- right answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["dense", "integer", "one_hot", "ladder", "fine", "curve"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_check_speaks_of_a_right_answer(activation, recipe):
    """And on each case, every wrong answer that binding makes is rejected."""
    for seed in range(6):
        case = case_of(
            activation=activation, recipe=recipe, seed=seed, gate_layout=GATE_LAYOUTS[seed % 3],
            dtype=("bfloat16", "float16")[seed % 2], bias=("none", "float32", "dtype")[seed % 3],
            weight_on_input=seed % 4 == 1, expert_map=("none", "shard", "permuted")[seed % 3],
            dialect="garbage", padding=2,
            faults=(Fault("nan_rows", "x", Labels.of([6])), Fault("duplicate_experts", "ids", Labels.of([1, 2]))),
        )  # fmt: skip
        seen = observe(case)
        assert judge(seen) == {}, case.dumps()
        assert seen.budget["bound"] <= 1
        if recipe != "ladder":  # where a large term may outweigh all that a wrong answer changes
            assert FAMILY.binding(seen) == [], case.dumps()
        if seen.inputs.exact and activation != "swiglu_oai":
            assert seen.exact[1][seen.inputs.ordinary & seen.real & seen.kept.any(1)].double().mean() > 0.9


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_check_speaks_of_a_device_that_rounds_as_badly_as_it_may(activation):
    """Sums in any order, rounded or cut off, and each contract: benchmarks/prove_bound.py has the device."""
    prove = benchmark("prove_bound")
    random = prove.Random(1)
    for seed in range(12):
        layer, contract = prove.layer_of(random)
        del layer
        contract = replace(contract, truncates=False)
        order = random.among(prove.ORDERS)
        device = prove.Device(random, order, bool(seed % 2), False, getattr(torch, contract.accumulate))

        def target(inputs: ExpertsInputs, contract=contract, device=device) -> Tensor:
            return prove.Target(inputs, contract, device).run().to(inputs.plain["x"].dtype)

        case = case_of(rows=40, activation=activation, seed=seed, recipe=("dense", "integer", "one_hot")[seed % 3],
                       top_k=1 + seed % 4, bias=("none", "float32")[seed % 2],
                       dtype=("bfloat16", "float16")[seed // 2 % 2], weight_on_input=seed % 4 == 1)  # fmt: skip
        assert judge(observe(case, target, contract)) == {}, (order, contract, case.dumps())


def test_brute_force_does_not_leave_the_bound():
    """The sample of benchmarks/prove_bound.py that a test has time for."""
    prove = benchmark("prove_bound")
    assert prove.dot_products(prove.Random(3), 100_000) <= 1
    worst, claimed = prove.layers(prove.Random(3), 60_000)
    assert claimed > 50_000
    assert all(0.3 < share <= 1 for share in worst.values()), worst  # and is not much wider than it must be


def test_plain_matmuls_are_within_the_bound():
    """An expert after the other by torch's own products in float32, as most model files have it."""

    def plain(inputs: ExpertsInputs) -> Tensor:
        p = inputs.plain
        y = torch.zeros(p["x"].shape)
        expert = expert_of_slot(p["ids"], len(p["w2"]), p.get("expert_map"))
        for e in range(len(p["w2"])):
            token, slot = (expert == e).nonzero(as_tuple=True)
            a = p["x"][token].float() @ p["w13"][e].float().t()
            h = activate(a, str(inputs.options["activation"]), str(inputs.options["gate_layout"])).to(p["x"].dtype)
            v = h.float() @ p["w2"][e].float().t() * p["weights"][token, slot][:, None]
            y.index_add_(0, token, v)
        return y.to(p["x"].dtype)

    worst = 0.0
    for seed in range(24):
        case = case_of(rows=24, experts=7, hidden=96, intermediate=64, top_k=3, seed=seed,
                       activation=ACTIVATIONS[seed % 4], magnitude=(0, 4, -4, 7)[seed // 4 % 4],
                       dtype=("bfloat16", "float16")[seed % 2])  # fmt: skip
        seen = observe(case, plain, replace(STEADY, slot="none"))
        assert judge(seen) == {}, case.dumps()
        worst = max(worst, seen.budget["bound"])
    assert 0.2 < worst < 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_errors_of_random_data_are_those_that_the_model_has(activation):
    """At one false alarm in ten, far less than one in ten cases has one; and the mean of z² is near 1."""
    hits, means = 0, []
    for seed in range(25):
        seen = observe(case_of(rows=48, hidden=24, intermediate=20, top_k=2, activation=activation, seed=seed,
                               magnitude=(0, 2, -4, 7)[seed % 4]))  # fmt: skip
        tokens = seen.random.nonzero().flatten()
        z = (seen.y[tokens] - seen.numbers.value[tokens]) / seen.numbers.variance[tokens].sqrt()
        means.append(float(z.square().mean()))
        statistical.ERROR, before = 0.1, statistical.ERROR
        hits += bool(statistical.statistical(seen))
        statistical.ERROR = before
    assert hits <= 2
    assert 0.7 < sum(means) / len(means) < 1.02


# ---- what is not judged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", ["bfloat16", "float16"])
def test_exact_does_not_judge_what_a_narrow_sum_may_round(accumulate):
    """Of a wide layer a sum in these passes 2^8 and 2^11 units, one in float32 never 2^24."""
    case = case_of(recipe="integer", hidden=64, intermediate=2048, experts=2)
    assert not observe(case, contract=Contract(accumulate=accumulate)).exact[1].any()
    assert observe(case).exact[1].all()


def test_stores_that_may_cut_off_are_not_judged_to_the_bit():
    cuts = Contract(truncates=True)
    plain = case_of(recipe="integer", activation="relu2", hidden=16, intermediate=16)
    known = observe(plain, contract=cuts).exact[1]
    assert known.any()
    assert not known.all()
    assert observe(plain).exact[1].all()
    gated = case_of(recipe="integer")  # 32 / (1 + 1e-14) may come out below 32
    assert not observe(gated, contract=cuts).exact[1].any()
    assert observe(gated).exact[1].all()


def test_statistics_are_for_random_data_alone():
    assert observe(case_of()).random.all()
    for case in (case_of(recipe="ladder"), case_of(recipe="integer"), case_of(hidden=8)):
        assert not observe(case).random.any()
    for contract in (Contract(truncates=True), Contract(intermediate="float32"), Contract(weight_dtype="dtype")):
        assert not observe(case_of(), contract=contract).random.any()
    twice = observe(case_of(faults=(Fault("all_to_one", "ids", Labels.of([1])),)))
    assert twice.random.tolist() == [row != 1 for row in range(8)]
    spoiled = observe(case_of(faults=(Fault("zero_rows", "x", Labels.of([2])),)))
    assert spoiled.random.tolist() == [row != 2 for row in range(8)]


def test_near_the_largest_number_infinity_is_accepted_and_the_other_sign_is_not():
    case = case_of(dtype="float16", magnitude=4, weight_scale=2, hidden=64, intermediate=64,
                   faults=(Fault("extreme_weights", "weights", Labels.range(8)),))  # fmt: skip
    seen = observe(case, contract=Contract(slot="none"))
    low, high = seen.limits
    over = seen.claimed & (high == torch.inf) & (low > 0)
    assert over.any()
    y = seen.numbers.value.to(torch.float16)
    relations = {"isolation", "scaling", "relabel", "shards"}
    assert set(judge(seen.with_outputs(y))) <= relations
    assert set(judge(seen.with_outputs(torch.where(over, torch.inf, y)))) <= relations
    assert set(judge(seen.with_outputs(torch.where(over, torch.finfo(y.dtype).max, y)))) <= relations
    assert "finite" in judge(seen.with_outputs(torch.where(over, -torch.inf, y)))
    assert "bound" in judge(seen.with_outputs(torch.where(over, 1.0, y)))


def test_a_case_that_proves_nothing_is_told():
    """Rows of zeros: an answer of zeros is right."""
    zeros = case_of(faults=(Fault("zero_rows", "x", Labels.range(8)),))
    assert "all zero" in FAMILY.binding(observe(zeros))
    nothing = case_of(faults=(Fault("nan_rows", "x", Labels.range(8)),))
    assert FAMILY.binding(observe(nothing)) == ["no row is judged"]
    assert FAMILY.binding(observe(case_of(rows=0))) == ["no row is judged"]
    assert FAMILY.binding(observe(case_of(rows=1, top_k=1, experts=1))) == []


def test_no_tokens():
    assert judge(observe(case_of(rows=0))) == {}


@pytest.mark.parametrize("seed", range(6))
def test_a_product_that_is_stored_before_its_bias_is_not_judged_to_the_bit(seed):
    """Where the sum with the bias fits the dtype and the product alone does not, both stores are right."""

    def stored(inputs: ExpertsInputs) -> torch.Tensor:
        plain, dtype = inputs.plain, inputs.plain["x"].dtype
        y = torch.zeros(plain["x"].shape, dtype=dtype)
        for token, (weights, ids) in enumerate(zip(plain["weights"], plain["ids"].long(), strict=True)):
            for weight, expert in zip(weights, ids, strict=True):
                x = plain["x"][token].double()
                a = (plain["w13"][expert].double() @ x).to(dtype) + plain["b13"][expert]
                gate, up = a.chunk(2)
                v = (plain["w2"][expert].double() @ (gate * up).double()).to(dtype) + plain["b2"][expert]
                y[token] = (y[token].double() + (v.double() * weight).to(dtype).double()).to(dtype)
        return y

    contract = Contract(gate_up="dtype", activation="dtype", down="dtype", reduce="dtype")
    seen = observe(case_of(rows=4, top_k=1, hidden=64, intermediate=64, bias="dtype", recipe="integer", seed=seed),
                   stored, contract)  # fmt: skip
    assert CHECKS["experts"]["bound"](seen) == []
    assert CHECKS["experts"]["exact"](seen) == []


@pytest.mark.parametrize(
    ("narrowed", "bias"),
    [("weights", "none"), ("weights", "dtype"), ("b13", "float32"), ("b2", "float32"), ("b13", "float32/dtype"),
     ("b2", "none/float32")],
)  # fmt: skip
def test_a_coefficient_of_fewer_bits_shows_in_the_bits(narrowed, bias):
    """What each loses is less than a step of the result: no bound can see it."""

    def target(inputs: ExpertsInputs) -> Tensor:
        return reference(inputs.replace(**{narrowed: inputs.plain[narrowed].bfloat16().float()}))

    told = 0
    for seed in range(8):
        case = case_of(rows=16, hidden=48, intermediate=32, experts=4, recipe="fine", bias=bias, seed=seed)
        assert judge(observe(case)) == {}
        found = judge(observe(case, target))
        assert set(found) <= {"exact", "statistical"}, found
        told += "exact" in found
    assert told >= 6


@pytest.mark.parametrize("bias", ["none/dtype", "none/float32", "dtype/none", "float32/none"])
@pytest.mark.parametrize("recipe", ["dense", "integer"])
def test_a_bias_that_is_lost_where_it_stands_alone(bias, recipe):
    """One flag for both, as kernels have it: cases with both or none never show it."""

    def target(inputs: ExpertsInputs) -> Tensor:
        whole = {"b13", "b2"} <= set(inputs.plain)
        return reference(inputs if whole else replace(inputs, plain={
            name: tensor for name, tensor in inputs.plain.items() if name not in ("b13", "b2")}))

    case = case_of(rows=12, hidden=48, intermediate=32, bias=bias, recipe=recipe)
    assert judge(observe(case)) == {}
    assert judge(observe(case, target))


def test_a_product_may_overflow_before_its_weight_makes_it_small():
    """A target may weigh x or the product: of a product without its weight that is infinite, nothing can be asked."""
    from moe_fuzz.execute.runner import Runner

    replayed = Case.loads(
        "mfz1:eNpdUctuwyAQ_BfObm3i1FF86n9UEcJmwag2IFjylP-9i1O1VU8wI2ZndniwxYPQ-X5nPa-YD6xncA0QMYlB845VDGU0gP_49xqXUE_1MFun"
        "-FBP3kHC13DrZ--D0O2OlItXUHTSQCSYABTr22OzbxveHXb7ho5j075VbPROW8P6B5Mj2rNE6x0pk50zCQcrEyFHHoSUlTOMJZCyCa2jK5F4C8Vr0LOX"
        "uOUGZQoTrZnKi2d6scjwO-p7IyIaQkYiiFnefC7DtY2p6CarFFAY3lXMOoS4ACVAeDKLNM5iLns2VF9RajknqFiE0W6RxhzPxQypl8-t5QuUTMI7YV0o"
        "EowZfug00n6sf2lXqgwhULyPB4v-UnJyvqdRWuYZn7yTSzGZsgGxvSEjcMlHIq8E_ujW03oq9Rn6KaLkoVP6yHWzo29ZvwDvkKhG"
    )
    verdict = Runner("cpu").run(replayed, "experts_bf16@torch", RunOptions())
    assert verdict.kind == "pass", verdict


@pytest.mark.parametrize("name", ["b13", "b2"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_in_a_bias_is_that_of_the_tokens_that_name_its_expert(activation, name):
    """Nobody may hide it, also where a gate alone is NaN; all other tokens are judged as ever."""
    told, alone = 0, 0
    for seed in range(12):
        case = case_of(rows=24, experts=12, seed=seed, bias="dtype", activation=activation,
                       faults=(Fault("broken_biases", name),))  # fmt: skip
        seen = observe(case)
        assert judge(seen) == {}
        bias = seen.inputs.plain[name]
        hit = ~bias.isfinite().all(dim=1)
        token = (hit[seen.expert] & seen.kept).any(dim=1)
        assert bool(seen.claimed[~token].all())
        assert not bool(seen.hopeless[~token].any())
        lost = seen.hopeless
        assert bool(seen.outputs.y[~token].isfinite().all())
        assert not bool(seen.outputs.y[lost].isfinite().any())
        if bool(lost.any()):
            told += 1
            hidden = seen.with_outputs(torch.where(lost, 0.0, seen.outputs.y).to(seen.outputs.y.dtype))
            assert "finite" in judge(hidden)
        up = bias.isnan()[:, bias.shape[1] // 2 :]
        alone += name == "b13" and bool(bias.isnan().any()) and not bool(up.any()) and bool(lost.any())
    assert told > 3
    assert alone > 0 or name == "b2"


@pytest.mark.parametrize("name", ["w13", "w2"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_weights_that_are_no_numbers_are_a_matter_of_the_tokens_that_name_their_expert(activation, name):
    told, spared = 0, 0
    for seed in range(6):
        case = case_of(rows=24, experts=12, seed=seed, activation=activation, faults=(Fault("broken_weights", name),))
        seen = observe(case)
        assert judge(seen) == {}
        hit = ~seen.inputs.plain[name].isfinite().flatten(1).all(dim=1)
        assert hit.any()
        token = (hit[seen.expert] & seen.kept).any(dim=1)
        assert bool(seen.claimed[~token].all())
        assert not bool(seen.hopeless[~token].any())
        assert bool(seen.outputs.y[~token].isfinite().all())
        lost = seen.hopeless
        if bool(lost.any()):
            told += 1
            hidden = seen.with_outputs(torch.where(lost, 0.0, seen.outputs.y).to(seen.outputs.y.dtype))
            assert "finite" in judge(hidden)
        if bool(token.any()) and not bool(token.all()):  # a product with 0 is no mask
            spared += 1
            mixed = seen.outputs.y + 0.0 * seen.outputs.y.float().sum(dim=0).to(seen.outputs.y.dtype)
            assert "finite" in judge(seen.with_outputs(mixed))
    assert told > 1
    assert spared > 1


def test_a_nan_beside_a_dropped_weight_is_told_as_what_it_is():
    def careless(inputs: ExpertsInputs) -> Tensor:
        return reference(inputs) + (0.0 * inputs.plain["weights"].sum(dim=1, keepdim=True)).to(inputs.plain["x"].dtype)

    laid = (Fault("nan_dropped", "weights", Labels.parse("0-7")),)
    case = case_of(expert_map="shard", top_k=3, faults=laid)
    assert judge(observe(case)) == {}
    said = judge(observe(case, careless))["finite"].message
    assert "of its experts here are finite; those of slots without one, which touch nothing, are not" in said
    said = judge(observe(case_of(), lambda inputs: reference(inputs) * torch.nan))["finite"].message
    assert said.startswith("token 0: y is NaN, though x and the weights of its experts here are finite (")


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_huge_row_that_changes_another(deterministic):
    """The rounding follows the largest number of the batch: within the bounds, unless a row is huge."""

    def scaled(inputs: ExpertsInputs, most: float) -> Tensor:
        y, amax = reference(inputs), float(inputs.plain["x"].double().abs().max())
        return torch.where(torch.tensor(amax > most), y.float().mul(1 + 2.0**-8).to(y.dtype), y)

    case = case_of(seed=0)
    contract = replace(STEADY, deterministic=deterministic)
    assert judge(observe(case, contract=contract)) == {}
    found = judge(observe(case, lambda inputs: scaled(inputs, 2.0**60), contract))
    assert set(found) == ({"isolation"} if deterministic else set())
    assert not judge(observe(replace(case, seed=1 << 16), lambda inputs: scaled(inputs, 2.0**60), contract))
    wrong = judge(observe(case, lambda inputs: scaled(inputs, 2.0**60) * (1 + (inputs.plain["x"].max() > 2.0**60)),
                          contract))  # fmt: skip
    assert wrong["isolation"].symptom == "off"
    assert "huge numbers in other rows changed this one" in wrong["isolation"].message
