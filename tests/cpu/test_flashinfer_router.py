"""FlashInfer's router of DeepSeek-V3 as a target: bound, given what its docstring admits, and judged by tanh.approx."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_fuzz import strategies
from moe_fuzz.contract import Capabilities, Contract, TargetInfo
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.targets import sources
from moe_fuzz.targets.bind import bind
from moe_fuzz.worker.pool import Pool
from tests.cpu.test_score_bounds import X, bound, spoiled

SPACE = get_space("grouped_topk")
#: As fused_topk_deepseek is declared in 0.7.2; what it does is the reference's.
PACKAGE = '''
import torch

def fused_topk_deepseek(
    scores, bias, n_group, topk_group, topk, routed_scaling_factor, topk_values, topk_indices, launch_with_pdl=True,
    routing_replay_out=None, *, backend="default",
):
    assert (scores.dtype, topk_indices.dtype, backend) == (torch.float32, torch.int32, "default")
    from moe_fuzz.reference.grouped_topk import grouped_topk
    weights, ids = grouped_topk(
        scores, topk, n_group=n_group, topk_group=topk_group, scoring="sigmoid", group_score="top2_sum", bias=bias,
        renormalize=True, scale=routed_scaling_factor)
    topk_values.copy_(weights)
    topk_indices.copy_(ids)
'''


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    if sources.installed("flashinfer"):
        pytest.skip("flashinfer is installed here")
    folder = tmp_path / "flashinfer" / "fused_moe"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "flashinfer"]:
        del sys.modules[name]


def test_it_writes_into_what_it_is_given(package: None) -> None:
    target = bind("grouped_topk@flashinfer")
    assert "fused_topk_deepseek(scores, bias, n_group" in target.info.origin
    given = {"logits": torch.randn(5, 16), "top_k": 3, "n_group": 4, "topk_group": 2, "scoring": "sigmoid",
             "group_score": "top2_sum", "bias": torch.randn(16), "scale": 2.5, "renormalize": True}  # fmt: skip
    out = (torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.int32))
    weights, ids = target({**given, "out": out})
    assert weights is out[0]
    assert ids is out[1]
    assert torch.allclose(weights.sum(1), torch.full((5,), 2.5))
    again = target(given)
    assert torch.equal(again[0], weights)
    assert torch.equal(again[1], ids)


def test_without_the_package_it_says_the_way_out() -> None:
    if sources.installed("flashinfer"):
        pytest.skip("flashinfer is installed here")
    with pytest.raises(EnvironmentProblem, match="no package here has") as caught:
        bind("grouped_topk@flashinfer")
    assert "pip install flashinfer-python" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["grouped_topk@flashinfer", "grouped_topk@flashinfer.one_group"])
def test_it_is_given_all_that_its_docstring_admits_and_nothing_else(package: None, name: str) -> None:
    info = bind(name).info
    met = []
    for case in itertools.islice(strategies.grid(SPACE, info, "cuda", seed=1), 400):
        config, experts = case.config, len(case.experts)
        n_group, kept, top_k = (int(config[field]) for field in ("n_group", "topk_group", "top_k"))
        assert top_k <= min(8, kept * n_group, kept * experts // n_group)
        assert config["bias"]
        assert config["renormalize"]
        assert config["dtype"] == "float32"
        assert config["scoring"] == "sigmoid"
        if n_group > 1:
            assert experts // n_group <= 32
            assert kept * experts // n_group <= 128
            assert experts <= 256
        else:
            assert experts <= 384
        met.append((n_group, kept, top_k, experts))
    if name.endswith("one_group"):
        assert max(met)[:3] == (1, 1, 1)
        assert max(experts for *_, experts in met) == 384
    else:
        assert {n_group for n_group, *_ in met} >= {2, 4, 8, 16, 32}
        assert max(kept for _, kept, *_ in met) > 4
        assert max(top_k for *_, top_k, _ in met) == 8
        assert (8, 4) in {(n_group, kept) for n_group, kept, *_ in met}  # DeepSeek-V3's own


def test_a_case_outside_says_what_it_lacks() -> None:
    can = Capabilities(max_kept=32, top_k_by_groups=True)
    info = TargetInfo("grouped_topk@x", "grouped_topk", "x", capabilities=can)
    case = next(case for case in strategies.grid(SPACE, info, "cpu", seed=2) if int(case.config["topk_group"]) > 1)
    wide = case.with_config(experts="0-63", n_group=4, topk_group=3, top_k=4)
    assert "3 groups of 16" in SPACE.refusal(wide, info)
    few = case.with_config(experts="0-63", n_group=4, topk_group=1, top_k=5)
    assert "top_k over n_group * topk_group = 4" in SPACE.refusal(few, info)


def test_tanh_approx_lies_within_its_bound_and_not_far_within() -> None:
    score, error = bound(X, "tanh.approx")
    rough = 0.5 * spoiled(torch.tanh(X.double() / 2).float(), 2.0**-11) + 0.5
    off = (rough.double() - score).abs()
    assert (off <= error).all()
    assert (off / error).max() > 0.99
    assert (off > bound(X, "tanh")[1]).any()  # a bound of its own is needed


ROUTER = '''
import torch
from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.reference.grouped_topk import grouped_topk

CAN = Capabilities(dtypes=("float32",), scorings=("sigmoid",), is_padding=False)

def router_with(error):
    @declares(Contract(sigmoid="tanh.approx"), CAN)
    def route(logits, top_k, **options):
        x = logits.double().clamp(-1e4, 1e4)
        sign = torch.where(torch.arange(logits.shape[1]) % 2 == 0, 1.0, -1.0)
        moved = (0.5 * torch.tanh(x / 2) * (1 + sign * error) + 0.5).clamp(2.0**-60, 1 - 2.0**-50)
        moved = torch.where(logits.isfinite(), torch.logit(moved).float(), logits)  # what has that sigmoid
        return grouped_topk(moved, top_k, **options)
    return route

def within():
    return router_with(2.0**-11)

def beyond():
    return router_with(2.0**-8)
'''


def test_a_router_by_tanh_approx_is_clean_and_a_worse_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "rough.py"
    file.write_text(ROUTER)
    kinds = {}
    with Pool(1, "cpu") as pool:
        for name in ("within", "beyond"):
            target = f"grouped_topk@{file}:{name}()"
            info = pool.describe(target)
            assert info.contract == Contract(sigmoid="tanh.approx")
            cases = list(itertools.islice(strategies.grid(SPACE, info, "cpu", seed=4), 60))
            with pool.lease(target) as worker:
                verdicts = worker.run(cases, target, RunOptions(deadline=60.0))
            kinds[name] = [violation.check for verdict in verdicts for violation in verdict.violations]
    assert kinds["within"] == []
    assert {"selection", "weights"} <= set(kinds["beyond"])
