"""Findings in serving libraries: the script needs torch and the library, and another one can be put in its place."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.findings import load_findings
from moe_fuzz.campaign.repro import render, renderer
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.cli.main import main
from moe_fuzz.execute.runner import Runner
from moe_fuzz.ops import get_space
from moe_fuzz.options import LIB_VARIABLES, RunOptions
from moe_fuzz.targets import sources
from moe_fuzz.verdict import VIOLATION, Verdict, Violation
from moe_fuzz.worker.pool import Pool
from tests.cpu import fake_library
from tests.cpu.conftest import Batch
from tests.cpu.repro_cases import case_of, exhibit_of, finding_of, write

pytestmark = pytest.mark.skipif(
    any(sources.installed(name) for name in ("vllm", "sgl_kernel", "sglang")), reason="a serving library is installed"
)
Run = Callable[..., list[tuple[int, str]]]
NAMESPACES = {"vllm": "_moe_C", "sglang": "sgl_kernel"}
#: Replaces an operator: the first two ids of a row are the same.
DOUBLES = """
def change(name, right):
    def operator(*given):
        result = right(*given)
        ids = given[1] if result is None else result[1]
        ids[:, 1:2] = ids[:, :1]
        return result
    return operator
"""


@pytest.fixture
def run(batch: Batch, tmp_path: Path) -> Run:
    """Runs scripts under more environment variables, and with more places to import from."""

    def scripts(*paths: Path, place: Path | None = None, **variables: object) -> list[tuple[int, str]]:
        wrapper = tmp_path / "wrapper.py"
        more = {name: str(value) for name, value in variables.items()}
        wrapper.write_text(
            "import os, runpy, sys\n"
            f"before, places = dict(os.environ), list(sys.path)\nos.environ.update({more!r})\n"
            f"sys.path += {[str(place)] if place else []!r}\n"
            "try:\n    del sys.argv[0]\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "finally:\n    os.environ.clear()\n    os.environ.update(before)\n    sys.path[:] = places\n"
        )
        return batch(*([wrapper, path] for path in paths))

    return scripts


def library(folder: Path, release: str, lines: str = "change = None") -> Path:
    folder.mkdir()
    return fake_library.stub(folder, NAMESPACES["vllm" if release.startswith("vllm") else "sglang"], release, lines)


def found_in(pool: Pool, target: str) -> Finding:
    """A finding of the check `ids`, from the grid."""
    info, only = pool.describe(target), RunOptions(checks=("ids",))
    cases = list(itertools.islice(strategies.grid(get_space(info.op), info, "cpu", seed=3), 40))
    cases = [case for case in cases if case.mode == "eager"]
    with pool.lease(target) as worker:
        verdicts = worker.run(cases, target, only)
    case, verdict = next(pair for pair in zip(cases, verdicts, strict=True) if pair[1].kind == VIOLATION)
    return replace(finding_of(case, verdict), target=target)


@pytest.mark.parametrize(
    ("release", "ops"),
    [("vllm 0.10.2", ("topk_softmax", "grouped_topk")),
     ("vllm 0.33.0", ("topk_softmax", "topk_sigmoid", "grouped_topk")),
     ("sglang-kernel 0.4.2", ("topk_softmax", "topk_sigmoid", "grouped_topk"))],
)  # fmt: skip
def test_the_operator_is_called_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run, release: str, ops: tuple[str, ...]
) -> None:
    provider = "vllm" if release.startswith("vllm") else "sglang"
    variable = LIB_VARIABLES[provider]
    wrong, right = library(tmp_path / "wrong", release, DOUBLES), library(tmp_path / "right", release)
    monkeypatch.setenv(variable, str(wrong))
    scripts = []
    with Pool(1, "cpu") as pool:
        for op in ops:
            text = renderer(pool)(found_in(pool, f"{op}@{provider}"))
            scripts.append(write(tmp_path, op, text))
            assert "import moe_fuzz" not in text
            assert f"(another one: {variable}=PATH)" in " ".join(text.split())
            assert f"torch.ops.{NAMESPACES[provider]}." in text
    for op, (code, said) in zip(ops, run(*scripts), strict=True):
        assert (code, f"BUG: {op}: row" in said) == (1, True), said
    assert run(*scripts, **{variable: right}) == [(0, f"fixed: {op} passes on this input\n") for op in ops]


def test_a_campaign_writes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run) -> None:
    wrong, right = library(tmp_path / "wrong", "vllm 0.33.0", DOUBLES), library(tmp_path / "right", "vllm 0.33.0")
    monkeypatch.setenv("MOE_FUZZ_VLLM_LIB", str(wrong))
    assert main(["run", "topk_softmax@vllm", "--device", "cpu", "--cases", "60", "--seed", "1", "--workers", "1",
                 "--minimize-time", "3", "--state-dir", str(tmp_path / "state")]) == 1  # fmt: skip
    found = load_findings(StateDir(tmp_path / "state"))
    scripts = [tmp_path / "state" / "findings" / one.id / "repro.py" for one in found]
    assert scripts
    assert {code for code, _ in run(*scripts)} == {1}
    assert {code for code, _ in run(*scripts, MOE_FUZZ_VLLM_LIB=right)} == {0}
    wrong.unlink()
    assert {code for code, _ in run(*scripts)} == {3}


FUNCTIONS = """
import torch

WRONG = True

def fused_topk(hidden_states, gating_output, topk, renormalize, indices_type=None, scoring_func="softmax"):
    assert hidden_states.size(0) == gating_output.size(0) and scoring_func == "softmax" and indices_type is None
    scores = torch.softmax(gating_output.float(), -1).nan_to_num(0.0)
    weights, ids = scores.sort(dim=-1, descending=True, stable=True)
    weights, ids = weights[:, :topk], ids[:, :topk].int()
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    if WRONG:
        ids[:, 1:2] = ids[:, :1]
    return weights, ids, torch.zeros_like(ids)
"""
GATE = """
import torch

WRONG = True

def moe_fused_gate(scores, bias, topk, scoring_func="sigmoid", num_fused_shared_experts=0, renormalize=True,
                   routed_scaling_factor=1.0, apply_routed_scaling_factor_on_output=False, num_expert_group=1,
                   topk_group=1):
    assert apply_routed_scaling_factor_on_output and (bias is None) == (scoring_func == "softmax")
    score = scores.float().sigmoid() if scoring_func == "sigmoid" else scores.float().softmax(-1)
    chosen = score if bias is None else score + bias
    if num_expert_group > 1:
        split = chosen.view(len(chosen), num_expert_group, -1)
        kept = split.topk(2, -1).values.sum(-1).topk(topk_group).indices
        mask = torch.ones(split.shape[:2], dtype=torch.bool).scatter_(1, kept, False)
        chosen = chosen.masked_fill(mask.repeat_interleave(split.shape[2], 1), -1e30)
    routed = topk - num_fused_shared_experts
    ids = chosen.nan_to_num(-2e30).sort(dim=-1, descending=True, stable=True).indices[:, :routed]
    weights = score.gather(1, ids)
    if WRONG:
        ids[:, 1:2] = ids[:, :1]
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    shared = torch.arange(num_fused_shared_experts).expand(len(ids), -1)
    weights = torch.cat([weights * routed_scaling_factor, torch.ones(shared.shape)], 1)
    return weights, torch.cat([ids, scores.shape[1] + shared], 1).int()
"""


@pytest.mark.parametrize(
    ("targets", "module", "code"),
    [(("topk_softmax@vllm.fused_topk",), "vllm/model_executor/layers/fused_moe/router/fused_topk_router", FUNCTIONS),
     (("topk_softmax@sglang.triton", "topk_sigmoid@sglang.triton", "grouped_topk@sglang.triton"),
      "sglang/kernels/ops/moe/moe_fused_gate", GATE)],
)  # fmt: skip
def test_a_python_function_of_the_package_is_called_itself(
    monkeypatch: pytest.MonkeyPatch, runner: Runner, tmp_path: Path, run: Run,
    targets: tuple[str, ...], module: str, code: str,
) -> None:  # fmt: skip
    """The exhibit is made in this process: one of these functions is declared for a GPU alone, as a release has it."""
    file = tmp_path / f"{module}.py"
    file.parent.mkdir(parents=True)
    file.write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    verdict = Verdict(VIOLATION, (Violation("ids", "duplicate", "row 0 names an expert twice"),))
    before, scripts = set(sys.modules), []
    for target in targets:
        groups = {"scoring": "sigmoid", "n_group": 4, "topk_group": 2, "group_score": "top2_sum", "n_shared": 1}
        case = case_of(target, renormalize=True, scale=2.5, **(groups if target.startswith("grouped") else {}))
        text = render(finding_of(case, verdict), exhibit_of(runner, case))
        scripts.append(write(tmp_path, target.replace("@", "_").replace(".", "_"), text))
        assert "import moe_fuzz" not in text
        assert f"import {module.replace('/', '.')}" in text
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == module.partition("/")[0]:
            monkeypatch.delitem(sys.modules, name)
    assert [code for code, _ in run(*scripts)] == [3] * len(scripts)  # the package is not there
    assert [code for code, _ in run(*scripts, place=tmp_path)] == [1] * len(scripts)
    file.write_text(code.replace("WRONG = True", "WRONG = False"))
    assert [code for code, _ in run(*scripts, place=tmp_path)] == [0] * len(scripts)
