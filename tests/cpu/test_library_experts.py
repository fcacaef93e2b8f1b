"""What is said of the experts of serving libraries, by the signature of the release that is installed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moe_fuzz.contract import DECLARATION
from moe_fuzz.targets import extension, library_experts


def newest(x, w13, w2, topk_output, moe_runner_config, b1=None, b2=None):
    weights, ids, _ = topk_output
    return x, weights, ids, b1, b2, moe_runner_config.inplace


def without_biases(x, w13, w2, topk_output, moe_runner_config):
    return newest(x, w13, w2, topk_output, moe_runner_config)


def older(x, w13, w2, topk_weights, topk_ids):
    return x, topk_weights, topk_ids, None, None, False


@pytest.mark.parametrize(("function", "biases", "reduce"), [
    (newest, True, "float32"), (without_biases, False, "float32"), (older, False, "dtype"),
])  # fmt: skip
def test_sglang_is_given_what_its_signature_takes(monkeypatch, function, biases, reduce):
    runner = ModuleType("sglang.srt.layers.moe.moe_runner")
    runner.MoeRunnerConfig = SimpleNamespace
    monkeypatch.setitem(sys.modules, runner.__name__, runner)
    monkeypatch.setattr(extension, "function", lambda package, places: (function, "0"))
    experts = library_experts.sglang()
    said = getattr(experts, DECLARATION)
    assert (said["capabilities"].biases, said["contract"].reduce) == (biases, reduce)
    assert ("minus_one" in said["contract"].accepts) == (function is not older)
    x, w13, w2, weights, ids, b13, b2 = (torch.zeros(number) for number in range(7))
    more = {"b13": b13, "b2": b2} if biases else {}
    found = experts(x, w13, w2, weights, ids, **more)
    right = (x, weights, ids, *((b13, b2) if biases else (None, None)), False)
    assert all(one is other for one, other in zip(found, right, strict=True))
