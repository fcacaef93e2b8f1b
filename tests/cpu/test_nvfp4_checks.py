"""The space, inputs and checks of nvfp4_quantize: silent on every right answer, loud on every wrong one."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch

from moe_fuzz import checks as registry
from moe_fuzz import strategies
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.checks.nvfp4 import family  # noqa: F401 - its checks register
from moe_fuzz.checks.nvfp4.binding import binding, wrong_answers
from moe_fuzz.checks.nvfp4.observation import Outputs, QuantizeObservation
from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.nvfp4.inputs import materialize
from moe_fuzz.ops.nvfp4.space import GLOBAL_SCALES, ID_FAULTS, ROW_FAULTS
from moe_fuzz.reference.nvfp4 import E4M3, nvfp4_quantize, swizzle, unswizzle
from moe_fuzz.targets.torch_nvfp4 import nvfp4_quantize as in_torch

SPACE = get_space("nvfp4_quantize")
EXACT = Contract(deterministic=True, batch_invariant=True, rounding="exact", nonfinite="reference",
                 scale_padding="zero", accepts=PADDING_DIALECTS)  # fmt: skip
NEAR = Contract(deterministic=True)
CAN = Capabilities(alignment=1, out=True, global_scales=GLOBAL_SCALES, scale_dtypes=("float32", "bfloat16"))
INFO = TargetInfo("nvfp4_quantize@reference", "nvfp4_quantize", "reference", contract=EXACT, capabilities=CAN)
CHECKS = registry.CHECKS["nvfp4"]


def quantized(inputs, quantize=nvfp4_quantize):
    return Outputs(*quantize(**inputs.plain, **inputs.options))


def by_bytes(seen):
    """Of an answer that no call gave, what is wrong in itself."""
    return judge(seen, relations=False)


def observe(case, contract=EXACT, outputs=None, quantize=nvfp4_quantize):
    inputs, info = materialize(case, 0), replace(INFO, contract=contract)
    made = outputs or quantized(inputs, quantize)
    return QuantizeObservation(case, 0, info, inputs, made, lambda other: quantized(other, quantize))


def judge(seen, relations=True):
    if CHECKS["structure"](seen):
        return {"structure": CHECKS["structure"](seen)[0]}
    names = [name for name in CHECKS if relations or name not in registry.RELATIONS["nvfp4"]]
    return {name: found[0] for name in names if (found := CHECKS[name](seen))}


def case_of(*faults, rows=5, blocks=5, seed=3, **config):
    whole = {**SPACE.simplest, "blocks": str(Labels.range(blocks))} | config
    case = Case("nvfp4_quantize", whole, (Step(Labels.range(rows), Labels(), faults),), seed)
    SPACE.validate(case)
    return case


def on_x(name, rows="0"):
    return Fault(name, "x", Labels.parse(rows))


def with_byte(seen, name, where, value):
    tensor = getattr(seen.outputs, name).clone()
    tensor.view(torch.uint8)[where] = value
    return seen.with_outputs(replace(seen.outputs, **{name: tensor}))


def test_the_spaces_checks_are_the_registered_ones():
    by_worker = {"error", "capture", "fence", "canary"}  # seen where the target runs, not by looking at its outputs
    assert set(SPACE.checks) == set(CHECKS) | by_worker
    assert {place.fault for place in SPACE.places} == set(SPACE.faults)


def test_scales_are_those_of_up_to_a_thousand_experts():
    counts = Counter(len(materialize(case_of(seed=seed, expert_ids="int32"), 0).plain["global_scale"])
                     for seed in range(400))  # fmt: skip
    assert {1, 4, 16, 17, 40, 128, 129, 256, 257, 1025} <= set(counts)
    assert 20 < sum(number for count, number in counts.items() if count > 128) < 100
    ids = torch.cat([materialize(case_of(seed=seed, rows=40, expert_ids="int64"), 0).plain["expert_ids"]
                     for seed in range(60)])  # fmt: skip
    assert ids.amax() >= 128


def test_no_alarm_on_the_reference_over_the_grid():
    proved = 0
    for case in islice(strategies.grid(SPACE, INFO, "cpu", 5), 120):
        SPACE.validate(case)
        seen = observe(case)
        assert not judge(seen), SPACE.label(case)
        proved += not binding(seen)
    assert proved > 50


@pytest.mark.parametrize("quantize", [nvfp4_quantize, in_torch], ids=["reference", "torch"])
def test_no_alarm_on_what_float32_may_give(quantize):
    can = replace(CAN, global_scales=GLOBAL_SCALES[:5], expert_scales=False)
    info, proved = replace(INFO, contract=NEAR, capabilities=can), 0
    for case in islice(strategies.grid(SPACE, info, "cpu", 6), 120):
        seen = observe(case, NEAR, quantize=quantize)
        assert not judge(seen), SPACE.label(case)
        proved += not binding(seen)
    assert proved > 60


@pytest.mark.parametrize("fault", [name for name in ROW_FAULTS if name != "stale_rows"])
@pytest.mark.parametrize("kind", ["six", "power", "fitted"])
def test_no_alarm_on_a_fault_in_torch(fault, kind):
    for dtype in ("float32", "bfloat16", "float16"):
        case = case_of(on_x(fault, "0-4"), global_scale=kind, dtype=dtype, layout="swizzled")
        assert not judge(observe(case, NEAR, quantize=in_torch))
        assert not judge(observe(case))


def test_the_exact_contract_tells_torchs_arithmetic_from_ours():
    """By ties; on random data hardly ever."""
    ties = case_of(on_x("scale_ties", "0-39"), rows=40, blocks=8, global_scale="fitted")
    assert "scale" in judge(observe(ties, replace(EXACT, deterministic=False), quantize=in_torch))


@pytest.mark.parametrize("contract", [EXACT, NEAR], ids=["exact", "near"])
@pytest.mark.parametrize("layout", ["linear", "swizzled"])
def test_every_wrong_answer_is_rejected(contract, layout):
    seen = observe(case_of(layout=layout), contract)
    assert not binding(seen)
    assert len(list(wrong_answers(seen))) == 4


def test_a_scale_a_step_off_is_named():
    for contract in (EXACT, NEAR):
        seen = observe(case_of(), contract)
        byte = int(seen.bytes[2, 3])
        found = by_bytes(with_byte(seen, "scales", (2, 3), byte + 1))["scale"]
        assert (found.symptom, found.where) == ("large", (2, 3))
        assert found.got == f"{byte + 1:#04x} = {float(E4M3[byte + 1]):g}"
        assert by_bytes(with_byte(seen, "scales", (2, 3), byte - 1))["scale"].symptom == "small"


def test_a_scale_beside_a_tie_may_fall_either_way_unless_it_is_exact():
    case = case_of(on_x("scale_ties", "0-39"), rows=40, global_scale="six")
    near, exact = observe(case, NEAR), observe(case)
    tie = ((near.ideal * 2).frac() != 0) & (near.ideal > 1)  # some of them
    moved = 0
    for row, block in tie.nonzero().tolist():
        byte = int(near.bytes[row, block])
        for other in (byte - 1, byte + 1):
            if "scale" not in by_bytes(with_byte(near, "scales", (row, block), other)):
                moved += 1
                assert "scale" in by_bytes(with_byte(exact, "scales", (row, block), other))
    assert 0 < moved <= len(tie.nonzero())


def test_codes_are_judged_under_the_targets_own_scale():
    case = case_of(rows=3, blocks=2)
    seen = observe(case, NEAR)
    step = with_byte(seen, "scales", (1, 1), int(seen.bytes[1, 1]) - 8)  # half the scale: other codes are right
    assert "codes" in by_bytes(step)
    right = step.right_codes[1, 1]
    codes = seen.outputs.codes.clone()
    codes[1, 8:] = right[::2] | right[1::2] << 4
    assert set(by_bytes(step.with_outputs(replace(step.outputs, codes=codes)))) == {"scale"}


def test_a_code_that_is_off_is_named():
    for contract in (EXACT, NEAR):
        seen = observe(case_of(on_x("code_grid", "1")), contract)
        byte = int(seen.outputs.codes[1, 18])
        found = by_bytes(with_byte(seen, "codes", (1, 18), byte ^ 0x20))["codes"]
        assert (found.where, found.symptom) == ((1, 18), "value")
        assert "column 37 of row 1" in found.message


@pytest.mark.parametrize("contract", [EXACT, NEAR])
def test_a_wrong_code_tells_which_are_right(contract):
    """Those, and no others, that the check lets pass at that place."""
    seen = observe(case_of(on_x("code_ties", "0-4")), contract)
    byte = int(seen.outputs.codes[1, 3])
    answers = [with_byte(seen, "codes", (1, 3), byte & 0xF0 | code) for code in range(16)]
    right = tuple(code for code, answer in enumerate(answers) if "codes" not in by_bytes(answer))
    wrong = next(code for code in range(16) if code not in right)
    found = by_bytes(replace(answers[wrong], brief=False))["codes"]  # what binding makes is brief: nobody reads it
    assert (found.right, found.chosen) == (right, (int(seen.bytes[1, 0]), 6))


def test_exchanged_nibbles_are_called_that():
    seen = observe(case_of(on_x("code_grid", "0-4")))
    codes = seen.outputs.codes
    found = by_bytes(seen.with_outputs(replace(seen.outputs, codes=codes >> 4 | codes << 4)))["codes"]
    assert found.symptom == "swapped"


def test_a_zero_of_the_other_sign_is_an_exact_matter():
    case = case_of(on_x("zero_rows", "0"))
    for contract, expected in ((EXACT, {"codes"}), (NEAR, set())):
        seen = observe(case, contract)
        assert set(by_bytes(with_byte(seen, "codes", (0, 3), 0x80))) == expected


@pytest.mark.parametrize("byte", [0, 1, 8, 0x38])
def test_the_scale_of_a_zero_block_is_a_librarys_own(byte):
    seen = observe(case_of(on_x("zero_rows", "0")), NEAR)
    assert not by_bytes(with_byte(seen, "scales", (0, 1), byte))
    exact = observe(case_of(on_x("zero_rows", "0")))
    assert set(by_bytes(with_byte(exact, "scales", (0, 1), byte))) == ({"scale"} if byte else set())


def test_a_scale_that_is_no_number():
    seen = observe(case_of(layout="swizzled"))
    for byte, symptom in ((0x7F, "NaN"), (0xB8, "negative")):
        assert by_bytes(with_byte(seen, "scales", (0, 1), byte))["finite"].symptom == symptom
    nan = observe(case_of(on_x("nan_rows")), NEAR)  # whose own policy is not promised
    assert not by_bytes(with_byte(nan, "scales", (0, 1), 0x7F))


def test_rows_that_lie_elsewhere_are_named():
    seen = observe(case_of(rows=6, layout="swizzled"))
    table = seen.outputs.scales.view(torch.uint8).clone()
    exchanged = unswizzle(table, 6, 5)
    exchanged[[1, 4]] = exchanged[[4, 1]]
    scales = swizzle(exchanged).view(seen.outputs.scales.dtype)
    found = by_bytes(seen.with_outputs(replace(seen.outputs, scales=scales)))
    assert "row 1 has the scales that row 4 should have" in found["scale"].message
    one = by_bytes(with_byte(observe(case_of()), "scales", (0, 1), 0x08))["scale"]
    assert "should have" not in one.message


def test_padding_and_poison():
    case = case_of(layout="swizzled")
    seen = observe(case)
    assert int(seen.padding.sum()) == 128 * 8 - 25
    place = seen.padding.nonzero()[7].tolist()
    assert by_bytes(with_byte(seen, "scales", tuple(place), 0x7F))["padding"].symptom == "nan"
    assert by_bytes(with_byte(seen, "scales", tuple(place), 0x01))["padding"].symptom == "stale"
    for poison in (0xFF, 0xA5):
        found = by_bytes(with_byte(seen, "scales", tuple(place), poison))
        assert set(found) == {"written"}
        assert found["written"].symptom == "scales:padding"
    loose = observe(case, NEAR)
    for byte in (0x7F, 0xFF, 0xA5, 3):
        assert not by_bytes(with_byte(loose, "scales", tuple(place), byte))
    left = seen.outputs.codes.clone()
    left[2, 8:16] = 0xA5
    assert by_bytes(seen.with_outputs(replace(seen.outputs, codes=left)))["written"].symptom == "codes:unwritten"


def test_a_wrong_shape_or_dtype_is_structure():
    seen = observe(case_of(layout="swizzled"))
    codes, scales = seen.outputs.codes, seen.outputs.scales
    for outputs in (Outputs(codes[:, :-1], scales), Outputs(codes, scales.view(torch.uint8)),
                    Outputs(codes, scales[:5, :5])):  # fmt: skip
        assert set(by_bytes(seen.with_outputs(outputs))) == {"structure"}


def leaky(x, global_scale, layout, **more):
    """What one NaN does where a maximum is that of the batch."""
    if x.isnan().any():
        return nvfp4_quantize(x * 2, global_scale, layout, **more)
    return nvfp4_quantize(x, global_scale, layout, **more)


def test_isolation_by_rows_and_blocks():
    contract = replace(EXACT, rounding="near", nonfinite="any", batch_invariant=False)
    case = case_of(on_x("nan_rows", "1"))
    assert judge(observe(case, contract, quantize=leaky))["isolation"].symptom == "row"
    inside = case_of(on_x("nonfinite_block", "0"), rows=1, blocks=40)
    seen = observe(inside, contract, quantize=leaky)
    assert 0 < int(seen.sound.sum()) < 40
    assert judge(seen)["isolation"].symptom == "block"


def test_values_stay_when_rows_and_blocks_go():
    case = case_of(on_x("code_ties", "1-3"), on_x("lone_number", "2"), Fault("sentinel_ids", "expert_ids",
                   Labels.parse("2")), rows=4, blocks=6, expert_ids="int64")  # fmt: skip
    whole = materialize(case, 0)
    less = SPACE.keep(case, "blocks", Labels.parse("1,4-5"))
    part = materialize(less.with_step(0, less.steps[0].keep_rows(Labels.parse("1-2"))), 0)
    columns = [16 * block + at for block in (1, 4, 5) for at in range(16)]
    assert torch.equal(part.plain["x"], whole.plain["x"][1:3][:, columns])
    assert torch.equal(part.plain["expert_ids"], whole.plain["expert_ids"][1:3])
    assert torch.equal(part.plain["global_scale"], whole.plain["global_scale"])


def test_faults_hit_what_they_aim_at():
    seen = observe(case_of(on_x("scale_ties", "0-39"), rows=40, blocks=8, global_scale="six"))
    middle = (E4M3[1:] + E4M3[:-1]) / 2
    assert torch.isin(seen.ideal.float(), middle).float().mean() > 0.3
    ties = observe(case_of(on_x("code_ties", "0-39"), rows=40, blocks=8))
    scaled = ties.values.double() * ties.row_scales.double()[..., None] / E4M3[ties.bytes.long()].double()[..., None]
    assert torch.isin(scaled.abs(), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]).double()).float().mean() > 0.3
    tiny = observe(case_of(on_x("tiny_block", "0-39"), rows=40, blocks=8)).bytes
    assert {0, 1, 2, 8} <= set(tiny.flatten().tolist())
    large = observe(case_of(on_x("scale_saturation", "0-39"), rows=40, blocks=8))
    assert (large.ideal > 464).any()
    assert ((large.ideal > 448) & (large.ideal <= 464)).any()


@pytest.mark.parametrize(("change", "where"), [
    ({"blocks": ""}, "blocks"), ({"blocks": 3}, "blocks"), ({"layout": "tiled"}, "layout"), ({"extra": 1}, "extra"),
    ({"magnitude": 1}, "magnitude"), ({"out": 1}, "out"),
])  # fmt: skip
def test_a_bad_config_is_refused(change, where):
    case = case_of()
    with pytest.raises(CaseError, match=where):
        SPACE.validate(replace(case, config={**case.config, **change}))


def test_faults_on_ids_need_ids():
    fault = Fault("sentinel_ids", "expert_ids", Labels.parse("0"))
    with pytest.raises(CaseError, match="needs config"):
        case_of(fault)
    case = case_of(fault, expert_ids="int32")
    assert not case.with_config().steps[0].faults[0].stream
    gone = [c for c in SPACE.simplify(case) if c.config["expert_ids"] == "none"]
    assert gone
    assert not any(c.steps[0].faults for c in gone)


def test_wide_ids_need_int64():
    fault = Fault("wide_ids", "expert_ids", Labels.parse("0-7"))
    with pytest.raises(CaseError, match="int64"):
        case_of(fault, rows=8, expert_ids="int32")
    case = case_of(fault, rows=8, expert_ids="int64")
    ids = materialize(case, 0).plain["expert_ids"]
    plain = materialize(case_of(rows=8, expert_ids="int64"), 0).plain["expert_ids"]
    assert torch.equal(ids.int(), plain.int())  # the low 32 bits are an expert's
    assert 0 < int((ids != plain).sum()) < 8
    assert not judge(observe(case))
    narrow = [c for c in SPACE.simplify(case) if c.config["expert_ids"] == "int32"]
    assert narrow
    assert not any(c.steps[0].faults for c in narrow)


def test_capabilities_bound_what_is_drawn():
    can = Capabilities(layouts=("linear",), expert_scales=False, max_blocks=64, strided=False)
    info = replace(INFO, capabilities=can, contract=NEAR)
    for case in islice(strategies.grid(SPACE, info, "cpu", 1), 60):
        assert not SPACE.refusal(case, info), SPACE.label(case)
        assert case.config["layout"] == "linear"
    refused = case_of(Fault("num_experts_ids", "expert_ids", Labels.parse("0")), expert_ids="int32", layout="swizzled")
    assert "layout=swizzled" in SPACE.refusal(refused, info)
    assert "rows of no expert" in SPACE.refusal(refused, info)
    assert set(ID_FAULTS) <= {place.fault for place in SPACE.places}


def test_simpler_cases_are_valid_and_end():
    chosen = random.Random(1)
    case = list(islice(strategies.grid(SPACE, INFO, "cpu", 2), 20))[chosen.randrange(20)]
    for _ in range(200):
        simpler = list(SPACE.simplify(case))
        for one in simpler:
            SPACE.validate(one)
        if not simpler:
            break
        case = simpler[0]
    assert not list(SPACE.simplify(case))


@pytest.mark.parametrize("name", ["global_scale", "expert_ids"])
def test_vectors_whose_numbers_stand_apart(name):
    case = case_of(Fault("noncontiguous", name), expert_ids="int32")
    inputs, packed = materialize(case, 0), materialize(case_of(expert_ids="int32"), 0)
    for one, tensor in inputs.plain.items():
        assert torch.equal(tensor, packed.plain[one])
        apart = one in inputs.lies and inputs.lies[one].strides(tensor.shape)[-1] > 1
        assert apart == (one == name)
    loose = replace(INFO, capabilities=replace(CAN, any_strides=True))
    for info, takes in ((INFO, False), (loose, True)):
        assert (SPACE.refusal(case, info) == "") == takes, SPACE.refusal(case, info)
        places = {(place.fault, place.tensor) for place in SPACE.places_for(case.config, info)}
        assert (("noncontiguous", name) in places) == takes
    assert f"strided {name}" in SPACE.refusal(case, INFO)
    with pytest.raises(CaseError, match=r"needs config\.expert_ids"):
        case_of(Fault("noncontiguous", name))
