"""δ of the sigmoid, by brute force: no sane float32 computation leaves it, and it is not much wider than they need. Of
softmax, the forms by the logarithm."""

from __future__ import annotations

import pytest
import torch

from moe_fuzz.case import Case
from moe_fuzz.checks.routing.observation import Outputs, RoutingObservation
from moe_fuzz.contract import Contract, TargetInfo
from moe_fuzz.ops.routing.inputs import RoutingInputs

_NOTHING = Outputs(torch.empty(0, 0), torch.empty(0, 0, dtype=torch.int32))


def bound(x: torch.Tensor, sigmoid: str = "exp") -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 score, and how far from it a float32 one may be."""
    seen = observed("topk_sigmoid", x.view(1, -1), Contract(sigmoid=sigmoid))
    return seen.scores[0], seen.error[0]


def observed(op: str, logits: torch.Tensor, contract: Contract) -> RoutingObservation:
    info = TargetInfo(f"{op}@x", op, "x", contract=contract)
    options = {"top_k": 1, "renormalize": False, "scale": 1.0, "padding": "distinct"}
    inputs = RoutingInputs(options, {"logits": logits})
    return RoutingObservation(Case(op, {}, (), 0), 0, info, inputs, _NOTHING, lambda _: _NOTHING)


def points() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    dense = torch.linspace(-110, 40, 200_001)
    near = torch.randn(100_000, generator=generator) * 2
    powers = torch.cat([sign * torch.pow(2.0, torch.linspace(-30, 7, 5_000)) for sign in (-1, 1)])
    return torch.cat([dense, near, powers, torch.tensor([0.0, -0.0, 88.7, -88.7, -87.3, -103.9, -104.1, 3e38, -3e38])])


X = points()
G = torch.Generator().manual_seed(1)


def spoiled(value: torch.Tensor, relative: float) -> torch.Tensor:
    """The value with a relative error of up to `relative`, as of an approximate instruction: its extremes as often."""
    error = torch.randint(-1, 2, value.shape, generator=G).double() * relative
    return (value.double() * (1 + error)).float()


def rough_exp(x: torch.Tensor) -> torch.Tensor:
    """exp by ex2.approx, good to 2^-22, of the rounded product with log2(e)."""
    return spoiled(torch.exp2((x * 1.4426950408889634).double()).float(), 2.0**-22)


FORMS = {
    "torch": torch.sigmoid,
    "plain": lambda x: 1 / (1 + torch.exp(-x)),
    "two sides": lambda x: torch.where(x < 0, torch.exp(x) / (1 + torch.exp(x)), 1 / (1 + torch.exp(-x))),
    "shared exponential": lambda x: torch.exp(x.clamp(max=0)) / (1 + torch.exp(-x.abs())),
    "by the logarithm": lambda x: torch.exp(torch.nn.functional.logsigmoid(x)),
    "approximate": lambda x: spoiled(1 / (1 + rough_exp(-x)), 2.0**-22),
    "approximate, two exponentials": lambda x: spoiled(
        rough_exp(x.clamp(max=0)) / (1 + rough_exp(-x.abs())), 2.0**-22),
    "flushed": lambda x: (s := 1 / (1 + torch.exp(-x))).masked_fill(s.abs() < 2.0**-126, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("form", sorted(FORMS))
def test_no_computation_in_float32_leaves_the_bound(form):
    score, error = bound(X)
    used = (FORMS[form](X).double() - score).abs() / error
    assert used.max() <= 1, f"x = {X[used.argmax()]}"


def test_the_bound_is_not_idle():
    score, error = bound(X)
    rough = ((FORMS["approximate, two exponentials"](X).double() - score).abs() / error).max()
    assert 0.5 < rough <= 1
    for wrong in (torch.sigmoid(X.bfloat16()).double(), torch.sigmoid(X).double() * (1 + 2.0**-16)):
        assert ((wrong - score).abs() > error).any()


def test_the_form_by_tanh_is_accurate_in_the_absolute_alone():
    """0.5 * tanh(x / 2) + 0.5 cancels below 0: a target that computes so declares it, and only then it passes."""
    got = (0.5 * torch.tanh(0.5 * X) + 0.5).double()
    score, error = bound(X)
    assert ((got - score).abs() > error).any()
    score, error = bound(X, "tanh")
    assert ((got - score).abs() <= error).all()


@pytest.mark.parametrize("experts", [2, 3, 8])
@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_a_softmax_by_the_logarithm_subtracts_the_maximum_first(experts, size):
    """Its denominator's logarithm is small then; else it is as large as the logits, and so is its rounding."""
    logits = torch.randn(20_000, experts, generator=torch.Generator().manual_seed(2)) + size
    seen = observed("topk_softmax", logits, Contract())
    first = torch.log_softmax(logits, dim=1).exp()
    behind = (logits - logits.logsumexp(dim=1, keepdim=True)).exp()
    used, missed = (((form.double() - seen.scores).abs() / seen.error).max() for form in (first, behind))
    assert used <= 1
    assert (missed > 1) == (size > 1)
