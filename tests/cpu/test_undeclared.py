"""A target that declares no contract may leave out what the op's own stores on the way: that is no finding, and nothing
else changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_fuzz import strategies
from moe_fuzz.campaign.events import CampaignStarted
from moe_fuzz.case import Case
from moe_fuzz.checks.allreduce.observation import AllreduceObservation
from moe_fuzz.checks.allreduce.observation import Outputs as Reduced
from moe_fuzz.checks.experts.observation import ExpertsObservation
from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.ops import get_space
from moe_fuzz.ops.experts.fp4_inputs import Fp4Inputs
from moe_fuzz.ops.experts.inputs import ExpertsInputs
from moe_fuzz.planted.experts_catalog import EXPERTS
from moe_fuzz.reference.align import expert_of_slot
from moe_fuzz.reference.allreduce_rmsnorm import allreduce_rmsnorm
from moe_fuzz.reference.experts_bf16 import ACTIVATIONS, _scaled, activate
from moe_fuzz.reference.nvfp4 import dequantize, nvfp4_quantize
from moe_fuzz.report.text import header, unasked
from moe_fuzz.targets.bind import bind
from tests.benchmark_script import benchmark
from tests.cpu.experts_seen import FAMILY, case_of, fp4_case_of, judge, observe
from tests.cpu.test_allreduce_cases import case as reduce_case
from tests.cpu.test_allreduce_cases import fired
from tests.cpu.test_allreduce_cases import seen as reduced

pytestmark = pytest.mark.usefixtures("one_thread")
DEFAULT = Contract(padding=("garbage",), graph=False)
WAYS = [replace(DEFAULT, intermediate=h, slot=slot) for h, slot in product(("dtype", "float32"), ("dtype", "none"))]
PLAIN = '''
from moe_fuzz import Capabilities, Contract, declares

def experts_bf16(x, w13, w2, weights, ids): ...

declared = declares(contract=Contract())(lambda x, w13, w2, weights, ids: None)
limited = declares(capabilities=Capabilities(max_top_k=8))(lambda x, w13, w2, weights, ids: None)
'''


# ---- who has declared -----------------------------------------------------------------------------------------------


def test_who_says_nothing_of_a_contract_has_declared_none(tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text(PLAIN)
    for name, declared in (("experts_bf16", False), ("declared", True), ("limited", False)):
        info = bind(f"experts_bf16@{path}:{name}").info
        assert info.declared == declared
        assert TargetInfo.from_json(info.to_json()) == info
    for name in ("topk_softmax@torch", "experts_bf16@torch", EXPERTS[0].target):
        assert bind(name).info.declared


def test_a_campaign_tells_what_it_does_not_ask_for_want_of_a_contract() -> None:
    """Else a clean campaign on experts that read expert -1 says nothing of the serving that they are made for."""
    router, experts = (TargetInfo("f@file", op, "user", contract=DEFAULT, declared=False)
                       for op in ("topk_softmax", "experts_bf16"))  # fmt: skip
    assert [name in unasked(router) for name in ("accepts", "padding)", "graph)")] == [False, True, True]
    assert [name in unasked(experts) for name in ("accepts", "padding)", "graph)")] == [True, False, True]
    assert not unasked(replace(experts, declared=True, contract=replace(DEFAULT, accepts=("distinct", "minus_one"))))
    assert not unasked(replace(router, declared=True))
    started = CampaignStarted("0", (experts,), "cpu", 1, 1, 1, None, ".moe-fuzz", False)
    assert f"note: f@file {unasked(experts)}" in header(started)


@pytest.mark.parametrize("op", ["align", "experts_bf16", "experts_nvfp4", "nvfp4_quantize"])
def test_who_declares_a_contract_is_told_that_it_is_given_no_ids_of_padding(op: str) -> None:
    """A quantizer that read the scale of the expert E passed, as it had declared all but what it accepts."""
    own = TargetInfo("f@file", op, "user")
    assert "accepts" in unasked(own)
    assert not unasked(replace(own, clauses={"*": "its documentation"})), "who quotes its project knows what it takes"
    assert not unasked(replace(own, contract=Contract(accepts=PADDING_DIALECTS)))
    idless = replace(own, capabilities=Capabilities(expert_scales=False))
    assert bool(unasked(idless)) == (op != "nvfp4_quantize")


def test_the_contracts_of_which_one_is_kept() -> None:
    info = TargetInfo("experts_bf16@x", "experts_bf16", "user", contract=DEFAULT)
    assert info.choices("intermediate", "slot") == (DEFAULT,)
    undeclared = replace(info, declared=False)
    assert list(undeclared.choices("intermediate", "slot")) == WAYS
    assert undeclared.choices("rounds") == (DEFAULT, replace(DEFAULT, rounds=()))
    assert undeclared.choices() == (DEFAULT,)


# ---- experts --------------------------------------------------------------------------------------------------------


def in_float32(inputs: ExpertsInputs) -> Tensor:
    """All of it in float32, and one store at the end; what NVFP4 leaves of an activation's result is of that."""
    p, options, dtype = inputs.plain, inputs.options, inputs.plain["x"].dtype
    expert = expert_of_slot(p["ids"], len(p["w2"]), p.get("expert_map"))
    y, rows = torch.zeros(p["x"].shape), p["x"].float()
    if inputs.quantizes:
        rows = quantized(rows, p["x_global"])
    for e in expert.unique().tolist():
        if e < 0:
            continue
        token, slot = (expert == e).nonzero(as_tuple=True)
        weight = p["weights"][token, slot][:, None]
        a = rows[token] @ projection(inputs, "w13", e).t()
        if options["apply_weight_on_input"]:
            a = _scaled(a, weight)
        if "b13" in p:
            a = a + p["b13"][e].float()
        h = activate(a, str(options["activation"]), str(options["gate_layout"]))
        v = (quantized(h, p["h_global"]) if inputs.quantizes else h) @ projection(inputs, "w2", e).t()
        if "b2" in p:
            v = v + p["b2"][e].float()
        y.index_add_(0, token, v if options["apply_weight_on_input"] else _scaled(v, weight))
    return y.to(dtype)


def quantized(rows: Tensor, scale: Tensor) -> Tensor:
    return dequantize(*nvfp4_quantize(rows, scale), scale)


def projection(inputs: ExpertsInputs, name: str, expert: int) -> Tensor:
    if not isinstance(inputs, Fp4Inputs):
        return inputs.plain[name][expert].float()
    return inputs.matrix(name)[expert].float() * inputs.plain[f"{name}_alpha"][expert]


def undeclared(seen: ExpertsObservation) -> ExpertsObservation:
    return replace(seen, info=replace(seen.info, declared=False))


def drawn(op: str, count: int) -> Iterator[Case]:
    info = TargetInfo(f"{op}@x", op, "user", contract=DEFAULT, capabilities=Capabilities(alignment=1))
    return islice(strategies.grid(get_space(op), info, "cpu", 7), count)


@pytest.mark.parametrize("op", ["experts_bf16", "experts_nvfp4"])
def test_a_target_that_stores_less_is_clean(op: str) -> None:
    """Over the grid; and declared as the op's own contract has it, the same answers are wrong."""
    strict, proved, exact = set(), 0, 0
    for case in drawn(op, 150):
        seen = observe(case, in_float32, DEFAULT)
        strict |= set(judge(seen))
        found = undeclared(seen)
        assert judge(found) == {}, case.dumps()
        exact += found.inputs.exact and bool(found.exact[1].any())
        proved += not FAMILY.binding(found)
    assert proved > 60
    assert exact > 20
    if op == "experts_bf16":
        assert strict == {"exact"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.intermediate}-{way.slot}")
def test_no_check_speaks_of_a_device_that_keeps_any_of_them(activation: str, way: Contract) -> None:
    """The worst that sums, exponentials and divisions may be: benchmarks/prove_bound.py."""
    prove = benchmark("prove_bound")
    random = prove.Random(2)
    for seed in range(12):
        device = prove.Device(random, random.among(prove.ORDERS), bool(seed % 2), False, torch.float32)

        def target(inputs: ExpertsInputs, device=device) -> Tensor:  # type: ignore[no-untyped-def]
            return prove.Target(inputs, way, device).run().to(inputs.plain["x"].dtype)  # type: ignore[no-any-return]

        case = case_of(rows=24, activation=activation, seed=seed, recipe=("integer", "one_hot", "dense")[seed % 3],
                       top_k=1 + seed % 4, bias=("none", "float32")[seed % 2],
                       dtype=("bfloat16", "float16")[seed // 2 % 2], weight_on_input=seed % 4 == 1)  # fmt: skip
        assert judge(undeclared(observe(case, target, DEFAULT))) == {}, case.dumps()


def test_nearly_all_known_bits_stay_known_and_none_is_added() -> None:
    known = left = 0
    for seed, recipe in product(range(12), ("integer", "one_hot")):
        seen = observe(case_of(rows=8, seed=seed, recipe=recipe, activation=("silu", "gelu", "relu2")[seed % 3],
                               dtype=("bfloat16", "float16")[seed % 2]), contract=DEFAULT)  # fmt: skip
        y, before = seen.exact
        other, after = undeclared(seen).exact
        assert torch.equal(y, other)
        assert not (after & ~before).any()
        known, left = known + int(before.sum()), left + int(after.sum())
    assert 0.8 * known < left < known


def test_a_bit_of_a_known_answer_is_told() -> None:
    seen = undeclared(observe(case_of(recipe="integer"), in_float32, DEFAULT))
    token, column = seen.exact[1].nonzero()[-1].tolist()
    y = seen.outputs.y.clone()
    y.view(torch.int16)[token, column] ^= 1
    assert judge(replace(seen, outputs=replace(seen.outputs, y=y)))["exact"].where == (token, column)


@pytest.mark.parametrize("seed", range(6))
def test_codes_of_what_was_not_stored_are_within_the_bound(seed: int) -> None:
    """A store before a quantization moves numbers over a tie: then a block's codes are others."""
    case = fp4_case_of(activations="nvfp4", rows=64, hidden=64, intermediate=64, seed=seed, global_scale="fitted")
    seen = observe(case, in_float32, DEFAULT)
    assert "bound" in judge(seen)
    assert judge(undeclared(seen)) == {}


# ---- all-reduces ----------------------------------------------------------------------------------------------------


def normed_before_the_store(made: Case, declared: bool) -> AllreduceObservation:
    """The norm of the sum as it is in float32, as fused kernels have it."""
    one = reduced(made, replace(DEFAULT, rounds=()))
    return replace(one, info=replace(one.info, contract=DEFAULT, declared=declared))


def test_the_norm_of_a_sum_that_was_not_rounded_is_clean() -> None:
    strict = set()
    for number, case in enumerate(drawn("allreduce_rmsnorm", 200)):
        strict |= set(fired(normed_before_the_store(case, declared=True)))
        assert fired(normed_before_the_store(case, declared=False)) == [], (number, case.dumps())
        stored = reduced(case, DEFAULT)
        assert fired(replace(stored, info=replace(stored.info, declared=False))) == [], case.dumps()
    assert strict == {"bound"}


def test_a_row_is_judged_by_one_of_them() -> None:
    """Every second column by the norm of what was stored, the others by that of the sum: no contract gives that."""
    made = reduce_case(hidden=512, ranks=3, tokens=8, dtype="bfloat16", recipe="dense")
    one, other = normed_before_the_store(made, declared=False), reduced(made, DEFAULT)
    mixed = one.outputs.normed.clone()
    mixed[..., ::2] = other.outputs.normed[..., ::2]
    assert fired(one) == []
    assert fired(one.with_outputs(Reduced(mixed, one.outputs.residual_out))) == ["bound"]
    for eps in (1e-6, 1.0):  # and what neither gives is told as ever
        plain = one.inputs.plain
        normed, total = allreduce_rmsnorm(plain["x"][:2], plain["residual"], plain["gamma"], eps, rounds=())
        assert "bound" in fired(one.with_outputs(Reduced(normed.repeat(3, 1, 1), total.repeat(3, 1, 1))))
