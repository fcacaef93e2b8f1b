"""The checks of `experts_nvfp4`: silent on right answers, however they round; each wrong one is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_fuzz.case import Fault
from moe_fuzz.checks.experts.binding import miswritten
from moe_fuzz.checks.experts.requantized import quantized, requantized
from moe_fuzz.checks.experts.structural import finite
from moe_fuzz.contract import Contract, TargetInfo
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.experts.fp4_inputs import Fp4Inputs, decoded, linear, materialize, swizzled
from moe_fuzz.ops.experts.inputs import ExpertsInputs
from moe_fuzz.reference.experts_bf16 import ACTIVATIONS, GATE_LAYOUTS
from moe_fuzz.reference.experts_nvfp4 import values
from moe_fuzz.reference.nvfp4 import E4M3, dequantize, nvfp4_quantize, swizzle
from tests.cpu.experts_seen import FAMILY, FP4_STRICT, fp4_case_of, judge, observe, reference

FORMATS = pytest.mark.parametrize("activations", ["as_given", "nvfp4"])
FP4, TAKES = get_space("experts_nvfp4"), TargetInfo("experts_nvfp4@test", "experts_nvfp4", "test")
NEAR = replace(FP4_STRICT, rounding="near", nonfinite="any")
pytestmark = pytest.mark.usefixtures("one_thread")


# ---- inputs ---------------------------------------------------------------------------------------------------------


def test_scales_lie_as_the_reference_swizzles_them() -> None:
    made = torch.randint(0, 127, (3, 130, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tables = swizzled(made)
    for one, table in zip(made, tables, strict=True):
        assert torch.equal(table, swizzle(one))
    assert torch.equal(linear(tables, 130, 5), made)
    codes = torch.randint(0, 256, (3, 130, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for mine, code, scale in zip(decoded(codes, made), codes, made, strict=True):
        assert torch.equal(mine.double(), values(code, scale))


@pytest.mark.parametrize("recipe", ["integer", "one_hot", "curve"])
def test_recipes_of_few_numbers_have_the_values_of_bf16(recipe: str) -> None:
    """Codes, scales and global scales say the same numbers, and no two neighbouring blocks need have one scale."""
    case = fp4_case_of(recipe=recipe, experts=20, hidden=64)
    fp4 = materialize(case, 0)
    config = {name: v for name, v in case.config.items()
              if name not in ("scale_layout", "activations", "global_scale")}  # fmt: skip
    plain = FAMILY.materialize(replace(case, op="experts_bf16", config=config), 0, "cpu")
    everyone = torch.arange(20)
    for name in ("w13", "w2"):
        found = fp4.matrix(name) * fp4.plain[f"{name}_alpha"].double()[:, None, None]
        assert torch.equal(found, plain.plain[name].double())
        factor = fp4.factor(name, everyone)
        assert factor is not None
        assert len(factor.unique()) == 5
        assert len(fp4.plain[f"{name}_scales"].unique()) > 5


@pytest.mark.parametrize("recipe", ["dense", "ladder"])
def test_every_code_and_many_scales_occur(recipe: str) -> None:
    found = set()
    for seed in range(8):
        inputs = materialize(fp4_case_of(recipe=recipe, experts=20, seed=seed), 0)
        assert len(inputs.plain["w13"].unique()) == 256
        largest = inputs.matrix("w13").abs().amax() * inputs.plain["w13_alpha"].max()
        assert float(largest) <= (0.125 if recipe == "dense" else 64)
        found |= set(inputs.plain["w13_scales"].unique().tolist())
    assert max(found) <= 126
    assert len(found) > (30 if recipe == "dense" else 120)


def test_faults_of_scales() -> None:
    def made(*faults: Fault) -> Fp4Inputs:
        return materialize(fp4_case_of(scale_layout="swizzled", activations="nvfp4", experts=12, faults=faults), 0)

    plain = made()
    real = swizzled(torch.ones((12, 64, 3), dtype=torch.uint8)) > 0
    for name in ("poison_scales", "stale_scales"):
        other = made(Fault(name, "w13_scales")).plain["w13_scales"]
        assert torch.equal(other[real], plain.plain["w13_scales"][real])
        assert (other[~real] == 0x7F).float().mean() > (0.99 if name == "poison_scales" else 1e-4)
        assert not plain.plain["w13_scales"][~real].any()
    for name, value in (("zero_scale", 0.0), ("infinite_scale", torch.inf), ("nan_scale", torch.nan)):
        alpha = made(Fault(name, "w2_alpha")).plain["w2_alpha"]
        hit = (alpha == value) | (alpha.isnan() & (value != value))
        assert torch.equal(alpha[~hit], plain.plain["w2_alpha"][~hit])
        assert 0 < int(hit.sum()) < 12
        scale = made(Fault(name, "x_global")).plain["x_global"]
        assert bool((scale == value) | (scale.isnan() & (value != value)))


def test_blocks_of_x_at_the_ends_and_ties_of_the_format() -> None:
    """Where x is quantized, by its own global scale; no check speaks of the right answer, or of other arithmetic."""
    def amax(fault: str) -> tuple[Tensor, Tensor]:
        """Of the blocks of rows 0 and 1, and of the others: 448 is the largest scale."""
        laid = Fault(fault, "x", Labels.parse("0-1"))
        case = fp4_case_of(activations="nvfp4", recipe="dense", rows=6, hidden=256, faults=(laid,))
        seen = observe(case, contract=FP4_STRICT)
        assert judge(seen) == {}
        assert judge(replace(seen, info=replace(seen.info, contract=NEAR))) == {}
        scale = seen.inputs.plain["x_global"].double() / 6
        found = seen.inputs.plain["x"].double().unflatten(1, (-1, 16)).abs().amax(dim=2) * scale
        return found[:2], found[2:]

    most, others = amax("scale_saturation")
    assert (most > 448).any()
    assert (others <= 448).all()
    assert (amax("tiny_block")[0] <= 2.0**-10).any()
    middle = (E4M3[1:] + E4M3[:-1]).double() / 2
    near = (amax("scale_ties")[0][..., None] / middle - 1).abs().amin(dim=-1)
    assert (near < 2.0**-7).all()
    power = amax("code_ties")[0].log2()
    assert (power - power.round()).abs().max() < 2.0**-6
    given = fp4_case_of(activations="as_given").config
    assert not {"scale_ties", "tiny_block"} & {place.fault for place in FP4.places_for(given, TAKES)}


@pytest.mark.parametrize("layout", ["linear", "swizzled"])
def test_blocks_of_nan(layout: str) -> None:
    """Of some experts; and where a NaN reaches y, nobody may hide it, while all else is judged as ever."""
    case = fp4_case_of(scale_layout=layout, experts=12, rows=24, recipe="dense")
    plain = materialize(case, 0)
    for name, whole_rows in (("w13", True), ("w2", False)):
        broken = case.with_step(0, replace(case.steps[0], faults=(Fault("nan_blocks", f"{name}_scales"),)))
        inputs = materialize(broken, 0)
        nan = inputs.matrix(name).isnan()
        hit = nan.flatten(1).any(dim=1)
        assert 0 < int(hit.sum()) < 12
        assert torch.equal(inputs.matrix(name)[~nan], plain.matrix(name)[~nan])
        seen = observe(broken, contract=FP4_STRICT)
        assert judge(seen) == {}
        token = (hit[seen.expert] & seen.kept).any(dim=1)
        lost = seen.hopeless
        assert torch.equal(lost.any(dim=1), token)
        assert torch.equal(lost, seen.outputs.y.isnan())
        assert bool(lost[token].all()) == whole_rows
        assert bool(seen.claimed[~lost].all())  # of a token with a NaN in one column, the others too
        hidden = seen.with_outputs(torch.where(lost, 0.0, seen.outputs.y).to(seen.outputs.y.dtype))
        assert [found.symptom for found in finite(hidden)] == ["nonfinite-lost"]


@pytest.mark.parametrize("layout", ["linear", "swizzled"])
@pytest.mark.parametrize("recipe", ["dense", "one_hot", "curve"])
def test_scales_below_zero_change_no_weight(layout: str, recipe: str) -> None:
    """Codes make up for the signs of scales and of factors; who drops the sign of a scale is off."""
    case = fp4_case_of(scale_layout=layout, experts=12, rows=9, recipe=recipe)
    plain = materialize(case, 0)
    for name in ("w13", "w2"):
        signed = case.with_step(0, replace(case.steps[0], faults=(Fault("signed_blocks", f"{name}_scales"),)))
        inputs, every = materialize(signed, 0), torch.arange(12)
        scales, alpha = inputs.linear_scales(name), inputs.plain[f"{name}_alpha"]
        assert 0.3 < (scales >= 0x80).float().mean() < 0.7
        assert set(alpha.sign().tolist()) == {-1.0, 1.0}
        weights, wanted = (of.matrix(name) * of.factor(name, every) for of in (inputs, plain))
        assert torch.equal(weights, wanted)
        assert torch.equal(inputs.plain[f"{name}_scales"] % 128, plain.plain[f"{name}_scales"] % 128)
        assert judge(observe(signed, contract=FP4_STRICT)) == {}


def test_blocks_of_nan_are_of_one_sign_and_of_one_row_too() -> None:
    """A NaN that a kernel keeps hides one that it loses: of the other sign, or of the gate where up has one too."""
    signs, halves = set(), set()
    for seed in range(40):
        made = replace(fp4_case_of(experts=12, rows=2, recipe="dense", faults=(Fault("nan_blocks", "w13_scales"),)),
                       seed=seed)  # fmt: skip
        inputs = materialize(made, 0)
        table = inputs.plain["w13_scales"]
        signs.add(frozenset(table[table % 128 == 127].tolist()))
        gate, up = inputs.matrix("w13").isnan().any(dim=2).chunk(2, dim=1)  # [E, I] each
        halves |= set(zip(gate.any(dim=1).tolist(), up.any(dim=1).tolist(), strict=True))
    assert {frozenset({0x7F}), frozenset({0xFF}), frozenset({0x7F, 0xFF})} <= signs
    assert halves == {(False, False), (True, False), (False, True), (True, True)}


@FORMATS
@pytest.mark.parametrize("fault", ["nan_scale", "infinite_scale"])
def test_a_global_scale_that_is_not_finite_is_not_hidden(fault: str, activations: str) -> None:
    for name in ("w13_alpha", "w2_alpha"):
        seen = observe(fp4_case_of(experts=12, rows=24, recipe="dense", activations=activations,
                                   faults=(Fault(fault, name),)), contract=FP4_STRICT)  # fmt: skip
        assert judge(seen) == {}
        quantized_away = name == "w13_alpha" and activations == "nvfp4"
        assert bool(seen.hopeless.any()) != quantized_away
        assert not (seen.hopeless & seen.outputs.y.isfinite()).any()


def test_an_infinity_in_x_is_not_hidden() -> None:
    """Not where the activation clamps either: an infinity times a weight of 0 is a NaN."""
    for activation in ACTIVATIONS:
        infinite = Fault("inf_rows", "x", Labels.of([2]))
        case = fp4_case_of(activation=activation, recipe="dense", rows=9, faults=(infinite,))
        seen = observe(case, contract=FP4_STRICT)
        assert judge(seen) == {}
        assert bool(seen.hopeless[2].any())
        assert not seen.hopeless[torch.arange(9) != 2].any()
        hidden = seen.with_outputs(seen.outputs.y.nan_to_num(0.0, 1.0, -1.0))
        assert [found.symptom for found in finite(hidden)] == ["nonfinite-lost"]


# ---- right answers --------------------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("recipe", ["dense", "integer", "one_hot", "ladder", "fine", "curve", "cancel"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_check_speaks_of_a_right_answer(activation: str, recipe: str, activations: str) -> None:
    """And on each case, every wrong answer that binding makes is rejected."""
    known = []
    for seed in range(4):
        case = fp4_case_of(
            activation=activation, recipe=recipe, seed=seed, gate_layout=GATE_LAYOUTS[seed % 3],
            activations=activations, scale_layout=("linear", "swizzled")[seed % 2],
            global_scale=("power", "fitted")[seed % 2 and recipe in ("dense", "ladder")],
            dtype=("bfloat16", "float16")[seed // 2 % 2], bias=("none", "float32", "dtype")[seed % 3],
            weight_on_input=seed % 4 == 1, expert_map=("none", "permuted")[seed % 2], dialect="garbage", padding=2,
            faults=(Fault("nan_rows", "x", Labels.of([6])), Fault("poison_scales", "w2_scales")),
        )  # fmt: skip
        seen = observe(case, contract=FP4_STRICT, backends=("small", "large"))
        assert judge(seen) == {}, case.dumps()
        if recipe != "ladder":
            assert FAMILY.binding(seen) == [], case.dumps()
        if seen.inputs.exact and activation != "swiglu_oai":
            known.append(float(seen.exact[1][seen.inputs.ordinary & seen.real & seen.kept.any(1)].double().mean()))
    assert not known or sum(known) / len(known) > 0.8


def nearly(inputs: ExpertsInputs) -> Tensor:
    """Products in float32, quantized by reciprocals: what a library may give."""
    from moe_fuzz.targets.torch_experts import experts_nvfp4

    return experts_nvfp4(**inputs.plain, **{k: v for k, v in inputs.options.items() if k != "backend"})


@FORMATS
def test_no_check_speaks_of_other_arithmetic(activations: str) -> None:
    near = replace(NEAR, slot="float32")
    for seed in range(30):
        case = fp4_case_of(seed=seed, rows=40, activations=activations, recipe=("dense", "ladder", "one_hot")[seed % 3],
                           global_scale=("power", "small", "large", "power")[seed % 4], magnitude=0 if seed % 3 else 2,
                           hidden=96)  # fmt: skip
        assert judge(observe(case, nearly, near)) == {}, case.dumps()


def test_what_is_quantized_is_judged_by_statistics_as_well() -> None:
    """Where no code falls either way, errors are those of the stores alone."""
    judged = 0
    for seed in range(6):
        seen = observe(fp4_case_of(seed=seed, rows=64, activations="nvfp4", global_scale="fitted"), contract=FP4_STRICT)
        assert judge(seen) == {}
        assert "statistical" in seen.budget
        judged += int((seen.random & ~seen.numbers.open).sum())
    assert judged > 100

    def larger(inputs: ExpertsInputs) -> Tensor:
        return (reference(inputs).float() * 1.006).to(inputs.plain["x"].dtype)

    case = fp4_case_of(rows=64, activations="nvfp4", global_scale="fitted")
    assert {"bound", "statistical"} & set(judge(observe(case, larger, FP4_STRICT)))


# ---- quantization ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_left_lies_within_its_error(exact: bool, dtype: torch.dtype) -> None:
    """Whatever a target may have had in the place of a number: ties, blocks at the end of the range, tiny ones."""
    contract = Contract(rounding="exact" if exact else "near")
    made = torch.Generator().manual_seed(7)
    open_ = 0
    for trial in range(60):
        scale = torch.tensor([[2.0**8, 37.5, 2.0**-3, 2688.0][trial % 4]])
        value = torch.randn(16, 64, generator=made, dtype=torch.float64) * [1.0, 40.0, 2.0**-12][trial % 3]
        if trial % 5 == 0:  # scales and codes on ties
            value[:, ::16] = (E4M3[40:56].double() + E4M3[41:57].double())[:, None] / 2 * 6 / scale.double()
            value[:, 1::16] = value[:, ::16] * 2.5 / 6
        value = value.to(dtype).double()
        spread = [0.0, 2.0**-9, 2.0**-4][trial % 3 if trial % 2 else 0]
        low, high = value - spread * value.abs(), value + spread * value.abs()
        left, error = requantized(low, high, value, scale, dtype, contract)
        assert torch.equal(left, quantized(value, scale, dtype))
        open_ += int((error > 0).sum())
        for _ in range(6):
            share = torch.rand(value.shape, generator=made, dtype=torch.float64)
            share = share.round() if trial % 2 else share
            had = (low + share * (high - low)).float()
            codes, scales = nvfp4_quantize(had, scale)
            got = dequantize(codes, scales, torch.ones(1)).double() / scale.double()
            assert ((got - left).abs() <= error * (1 + 1e-12) + 1e-300).all()
        if not spread and exact:
            assert not error.any()
    assert open_


# ---- wrong answers --------------------------------------------------------------------------------------------------


@FORMATS
def test_weights_read_otherwise_are_told(activations: str) -> None:
    for recipe, check in (("one_hot", "exact"), ("integer", "exact"), ("dense", "bound")):
        case = fp4_case_of(recipe=recipe, scale_layout="swizzled", activations=activations)
        for name in miswritten(materialize(case, 0)):
            found = judge(observe(case, lambda inputs, name=name: reference(miswritten(inputs)[name]), FP4_STRICT))
            assert check in found, (name, recipe)


def test_a_backend_that_is_not_chosen_is_called() -> None:
    def target(inputs: ExpertsInputs) -> Tensor:
        y = reference(inputs)
        return y * 1.01 if inputs.options.get("backend") == "large" else y

    found = judge(observe(fp4_case_of(seed=3), target, FP4_STRICT, backends=("small", "large")))
    assert set(found) == {"backends"}
    assert "large" in found["backends"].message
    assert judge(observe(fp4_case_of(seed=3), target, FP4_STRICT)) == {}


def test_a_nan_of_one_expert_is_no_one_elses() -> None:
    faults = (Fault("nan_scale", "w13_alpha"),)
    case = fp4_case_of(experts=12, rows=24, faults=faults)
    seen = observe(case, contract=FP4_STRICT)
    assert judge(seen) == {}
    assert 0 < int(seen.claimed.all(dim=1).sum()) < 24
    assert "finite" in judge(observe(case, lambda inputs: reference(inputs) * torch.nan, FP4_STRICT))
