"""Wrong answers of experts: 18 seeded bugs, for each check one that it alone catches, and the words for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moe_fuzz.reference.experts_bf16 as experts_bf16
from moe_fuzz.case import Case, Fault
from moe_fuzz.labels import Labels
from moe_fuzz.ops.experts.inputs import ExpertsInputs
from moe_fuzz.reference.align import expert_of_slot
from moe_fuzz.reference.experts_bf16 import activate
from tests.cpu.experts_seen import STEADY, STRICT, case_of, judge, observe, reference

PARITY = {"exact", "bound", "statistical"}
pytestmark = pytest.mark.usefixtures("one_thread")
Bug = Callable[[ExpertsInputs], Tensor]


def changed(**change: Callable[[Tensor], Tensor]) -> Bug:
    """The right answer to other tensors."""

    def bug(inputs: ExpertsInputs) -> Tensor:
        return reference(inputs.replace(**{name: how(inputs.plain[name].clone()) for name, how in change.items()}))

    return bug


def with_option(**options: object) -> Bug:
    return lambda inputs: reference(replace(inputs, options=inputs.options | options))


def put(tensor: Tensor, where: object, value: object) -> Tensor:
    tensor[where] = value
    return tensor


def staged(
    h_of: Callable[[Tensor], Tensor] = lambda h: h, y_of: Callable[[Tensor, Tensor], Tensor] = torch.matmul
) -> Bug:  # fmt: skip
    """The layer with another store of h, or another second product."""

    def bug(inputs: ExpertsInputs) -> Tensor:
        p, dtype = inputs.plain, inputs.plain["x"].dtype
        expert = expert_of_slot(p["ids"], len(p["w2"]), p.get("expert_map"))
        a = torch.einsum("th,tkih->tki", p["x"].double(), p["w13"][expert].double())
        h = h_of(activate(a, str(inputs.options["activation"]), str(inputs.options["gate_layout"]))).to(dtype)
        y = y_of(p["w2"][expert].double(), h.double()[..., None])[..., 0]
        y = (y * p["weights"].double()[..., None]).masked_fill((expert < 0)[..., None], 0.0)
        return y.to(dtype).double().sum(1).to(dtype)

    return bug


def cut_off(h: Tensor) -> Tensor:
    return (h.float().view(torch.int32) & -0x10000).view(torch.float32)


def in_bfloat16(w: Tensor, h: Tensor) -> Tensor:
    total = torch.zeros_like(w[..., :1])
    for at in range(0, w.shape[-1], 16):
        total = (total + w[..., at : at + 16] @ h[..., at : at + 16, :]).bfloat16().double()
    return total


#: As in the table of docs/numerics.md: what a judge by tolerances lets pass.
BUGS: dict[str, Bug] = {
    "routing weights 1.004 times too large": changed(weights=lambda w: w * 1.004),
    "routing weights rounded to bfloat16 in a layer of float16": changed(weights=lambda w: w.bfloat16().float()),
    "routing weights ignored": changed(weights=torch.ones_like),
    "routing weights applied twice": changed(weights=torch.square),
    "the last column of x left out": changed(x=lambda x: put(x, (slice(None), -1), 0)),
    "a tail of the second product left out": changed(w2=lambda w: put(w, (..., slice(80, None)), 0)),
    "two experts swapped": changed(ids=lambda i: torch.where(i < 2, 1 - i, i)),
    "another expert for one token": changed(ids=lambda i: put(i, (5, 1), (int(i[5, 1]) + 1) % 8)),
    "one slot of a token left out": changed(ids=lambda i: put(i, (9, 0), -1)),
    "a row of w2 one step of its scale off": changed(w2=lambda w: put(w, (3, 17), w[3, 17] * 1.125)),
    "a block of w2 one step of its scale off": changed(
        w2=lambda w: put(w, (slice(None), slice(None), slice(0, 16)), w[..., :16] * 1.125)),
    "gate and up-projection exchanged": with_option(gate_layout="up_first"),
    "another activation": with_option(activation="gelu"),
    "the second product summed up in bfloat16": staged(y_of=in_bfloat16),
    "h cut off instead of rounded": staged(h_of=cut_off),
    "h through float8": staged(h_of=lambda h: h.to(torch.float8_e4m3fn).double()),
    "the last column of y not computed": lambda inputs: put(reference(inputs), (slice(None), -1), 0),
    "a token with the answer of the one before": lambda inputs: put(y := reference(inputs), 7, y[6].clone()),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_seeded_bug_is_rejected(name):
    for seed in range(2):
        dtype = "float16" if "bfloat16 in" in name else "bfloat16"
        case = case_of(rows=64, experts=8, hidden=128, intermediate=96, top_k=2, seed=seed, dtype=dtype)
        found = judge(observe(case, BUGS[name], STEADY))
        assert set(found) & PARITY, name


def test_the_layer_that_the_bugs_change_is_right():
    """What `staged` is without a bug."""
    case = case_of(rows=64, experts=8, hidden=128, intermediate=96)
    seen = observe(case, staged(), STEADY)
    assert judge(seen) == {}


def one_step(inputs: ExpertsInputs) -> Tensor:
    y = reference(inputs)
    bits = y.view(torch.int16)
    bits[3, 4] += 1
    return y


def only_with(change: Callable[[Tensor], Tensor], when: Callable[[ExpertsInputs], object]) -> Bug:
    """Wrong in its second value where a condition holds, by `change`."""

    def bug(inputs: ExpertsInputs) -> Tensor:
        y = reference(inputs)
        if len(y) and when(inputs):
            y[0, 1] = change(y[0, 1])
        return y

    return bug


def nudged(value: Tensor) -> Tensor:
    return (value.view(torch.int16) + 1).view(value.dtype)


class Sometimes:
    """Another answer at half of the calls, at the second among them."""

    def __init__(self) -> None:
        self.coins = iter("01101001110100101011" * 9)

    def __call__(self, inputs: ExpertsInputs) -> Tensor:
        return only_with(nudged, lambda _: next(self.coins) == "1")(inputs)


def hides_nan(inputs: ExpertsInputs) -> Tensor:
    return reference(inputs.replace(x=inputs.plain["x"].nan_to_num(0.0)))


def never_written(inputs: ExpertsInputs) -> Tensor:
    y = reference(inputs)
    y.view(torch.int16)[2, 3] = 0x7FA5
    return y


def adds_dropped(inputs: ExpertsInputs) -> Tensor:
    y = reference(inputs)
    return torch.where((inputs.plain["ids"] < 0).all(1)[:, None], 1.0, y).to(y.dtype)


NAN_TAIL = (Fault("nan_rows", "x", Labels.of([6, 7])),)
FEW = (Fault("empty_experts", "ids", Labels.range(8)),)

#: For each check, what it alone finds: (check, case, bug).
ALONE: list[tuple[str, Case, Bug]] = [
    ("structure", case_of(), lambda inputs: reference(inputs).float()),
    ("written", case_of(), never_written),
    ("finite", case_of(), lambda inputs: put(reference(inputs), (1, 2), torch.nan)),
    ("finite", case_of(), lambda inputs: put(reference(inputs), (1, 2), torch.inf)),
    ("finite", case_of(faults=(Fault("partial_nan", "x", Labels.of([6])),)), hides_nan),
    ("dropped", case_of(dialect="minus_one", padding=2), adds_dropped),
    ("exact", case_of(recipe="integer"), one_step),
    ("bound", case_of(recipe="ladder"), BUGS["gate and up-projection exchanged"]),
    ("statistical", case_of(rows=128, hidden=64, intermediate=64), BUGS["routing weights 1.004 times too large"]),
    ("determinism", case_of(), Sometimes()),
    ("isolation", case_of(faults=NAN_TAIL, padding=2), only_with(nudged, lambda i: i.plain["x"].isnan().any())),
    ("batch_invariance", case_of(), only_with(nudged, lambda i: len(i.plain["x"]) < 8)),
    ("shards", case_of(seed=4), only_with(torch.neg, lambda i: "expert_map" in i.plain)),
    ("scaling", case_of(seed=5), changed(weights=lambda w: w.clamp(max=1.0))),
]  # fmt: skip


@pytest.mark.parametrize(("check", "case", "bug"), ALONE, ids=[check for check, _, _ in ALONE])
def test_each_check_alone_finds_a_bug(check, case, bug):
    contract = STRICT if check == "batch_invariance" else STEADY
    assert set(judge(observe(case, bug, contract))) == {check}


def test_relabelling_alone_finds_an_expert_that_no_token_had():
    """The last expert's weights are read wrong, and in the case itself nobody reads them."""
    case = case_of(faults=FEW, experts=9)
    seen = observe(case)
    used = set(seen.expert.unique().tolist())
    last = 8
    assert last not in used
    if 7 not in used:  # the relation turns by one place, so the bug is put where that brings a used one
        last = max(used) + 1
    found = judge(observe(case, changed(w2=lambda w: put(w, last, -w[last]) if last < len(w) else w)))
    assert set(found) == {"relabel"}


def test_replay_alone_finds_a_graph_that_differs():
    seen = observe(case_of())
    seen = replace(seen, eager=lambda inputs: replace(seen.outputs, y=only_with(nudged, lambda _: True)(inputs)))
    assert set(judge(seen)) == {"replay"}


# ---- formulas -------------------------------------------------------------------------------------------------------


def _by_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


#: Formulas that are nearly those of the activation, and off by up to a few hundredths of a small result.
FORMULAS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "gelu by tanh": ("gelu", _by_tanh),
    "gelu by a sigmoid": ("gelu", lambda gate, up: gate * (1.702 * gate).sigmoid() * up),
    "gelu for silu": ("silu", lambda gate, up: F.gelu(gate) * up),
    "silu with a slope": ("silu", lambda gate, up: gate * (1.01 * gate).sigmoid() * up),
    "silu by pieces": ("silu", lambda gate, up: F.hardswish(gate) * up),
    "a slope of 1.71": ("swiglu_oai", lambda gate, up: gate.clamp(max=7) * (1.71 * gate.clamp(max=7)).sigmoid()
                       * (up.clamp(-7, 7) + 1)),
    "gates not clamped": ("swiglu_oai", lambda gate, up: gate * (1.702 * gate).sigmoid() * (up.clamp(-7, 7) + 1)),
    "gates clamped below": ("swiglu_oai", lambda gate, up: gate.clamp(-3, 7) * (1.702 * gate.clamp(-3, 7)).sigmoid()
                            * (up.clamp(-7, 7) + 1)),
    "up-projections not clamped": ("swiglu_oai", lambda gate, up: gate.clamp(max=7)
                                   * (1.702 * gate.clamp(max=7)).sigmoid() * (up + 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("top_k", [1, 6])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_wrong_formula_shows_on_a_curve(name, top_k, dtype, monkeypatch):
    """In every case, whatever its seed: of six terms no one hides what another is off by."""
    activation, formula = FORMULAS[name]
    for seed in range(4):
        case = case_of(
            activation=activation, recipe="curve", top_k=top_k, dtype=dtype, seed=seed, rows=6, hidden=64,
            intermediate=48, bias=("none", "dtype", "float32")[seed % 3], weight_on_input=seed == 3,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(experts_bf16, "activate", lambda a, *_: formula(*a.chunk(2, dim=-1)))
            assert "bound" in judge(observe(case)), case.dumps()


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["one_hot", "integer", "dense"])
def test_a_wrong_source_is_named(recipe):
    case = case_of(experts=8, recipe=recipe)
    ids = observe(case).inputs.plain["ids"]
    right = int(ids[7, 1])
    wrong = next(e for e in range(8) if e not in ids[7].tolist())
    for bug, words in (
        (changed(ids=lambda i: put(i, (7, 1), wrong)), f"slot 1 read expert {wrong}, not {right}"),
        (changed(ids=lambda i: put(i, (7, 1), -1)), "slot 1 is missing"),
        (changed(weights=lambda w: put(w, 7, 1.0)), "the weights were ignored"),
        (lambda inputs: put(y := reference(inputs), 7, y[2].clone()), "got what token 2 should have"),
        (lambda inputs: put(reference(inputs), 7, 0.0), "the row is all zero"),
    ):
        found = judge(observe(case, bug, STEADY))
        message = (found.get("exact") or found["bound"]).message
        assert message.startswith("token 7, ")
        assert words in message
