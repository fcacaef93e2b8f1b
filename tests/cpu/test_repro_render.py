"""What a script is made of: the exhibit, the text, the same judgement as the checks, and who asks for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from moe_fuzz.campaign.repro import render, renderer, tensors
from moe_fuzz.case import Case, Fault
from moe_fuzz.checks.routing.observation import Outputs, RoutingObservation
from moe_fuzz.errors import CaseError, EnvironmentProblem
from moe_fuzz.execute.exhibit import tensor as exhibited
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.ops.routing.inputs import materialize
from moe_fuzz.options import RunOptions
from moe_fuzz.targets.registry import locate
from moe_fuzz.verdict import VIOLATION, Verdict, Violation
from tests.cpu.conftest import Batch
from tests.cpu.repro_cases import (
    NAN_ARGMAX,
    ROOT,
    SCRATCH_IN_INPUT,
    case_of,
    exhibit_of,
    failing,
    finding_of,
    write,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: NaN and overflows

NOTHING = Outputs(torch.empty(0), torch.empty(0))


# ---- the same judgement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_the_reference_is_that_of_the_checks(runner: Runner, bias: bool) -> None:
    """float64 scores and error bounds, to the bit, on ordinary, masked, huge and tiny logits."""
    rows = Labels.range(5)
    for name in ("masked_experts", "huge_rows", "ladder", "ties"):
        faults = (Fault(name, "logits", rows), *([Fault("extreme_bias", "bias")] if bias else []))
        case = case_of("topk_softmax@builtin", tokens=5, experts=33, faults=faults, bias=bias)
        verdict = Verdict(VIOLATION, (Violation("weights", "off", "is off"),))
        script: dict[str, Any] = {"__name__": "repro"}
        exec(compile(render(finding_of(case, verdict), exhibit_of(runner, case)), "repro", "exec"), script)
        inputs = materialize(case, 0)
        seen = RoutingObservation(case, 0, runner.describe(case.target), inputs, NOTHING, lambda _: NOTHING)
        assert list(script["DEFINED"]) == seen.defined.nonzero().flatten().tolist()
        defined = seen.defined
        score, biased, error = script["reference"]()
        torch.testing.assert_close(score[defined], seen.scores[defined], rtol=1e-14, atol=0)
        torch.testing.assert_close(biased[defined], seen.biased[defined], rtol=1e-14, atol=0)
        torch.testing.assert_close(error[defined], seen.error[defined], rtol=1e-13, atol=0)
        for tensor_name, plain in inputs.plain.items():
            assert torch.equal(script[tensor_name.upper()].view(torch.uint8), plain.contiguous().view(torch.uint8))


# ---- exhibits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_an_exhibit(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.5, -0.0, math.inf], [-math.inf, math.nan, 3e-5]], dtype=dtype)
    integers = values.view({4: torch.int32, 2: torch.int16}[dtype.itemsize])
    integers[1, 1] = -1  # a NaN with its sign bit set
    small = exhibited(values)
    assert tensors.rows(small)[0] == ["1.5", "-0", "inf"]
    assert tensors.rows(small)[1][:2] == ["-inf", "-nan"]
    long = exhibited(values.repeat(50, 1))
    assert "zlib" in long
    assert tensors.rows(long) == tensors.rows(small) * 50
    assert "50 x NaN" in tensors.summary(long)
    assert tensors.rows(exhibited(torch.tensor([True, False]))) == [["1", "0"]]
    assert tensors.rows(exhibited(torch.empty(0, 3, dtype=dtype))) == []


def test_tables(runner: Runner) -> None:
    case = case_of("topk_softmax@torch", bias=True, faults=(Fault("noncontiguous", "logits"),))
    tables = tensors.tables(runner.exhibit(case, case.target))
    assert list(tables) == ["logits", "bias"]
    first, *rows = tables["logits"].splitlines()
    assert first.startswith("float32 [3, 8], strides (")
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]
    assert float(rows[0].split()[1]) == pytest.approx(float(materialize(case, 0).plain["logits"][0, 0]), rel=1e-5)


def test_how_a_target_is_loaded(runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(target: str) -> dict[str, Any]:
        return runner.exhibit(case_of(target), target)["load"]

    assert load("topk_softmax@builtin")["path"] == f"{ROOT}/kernels/routing.py"
    assert locate("topk_softmax@builtin").startswith("moe_fuzz.targets.builtin")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_package_of_kernels.py").write_text(
        "other = None\n\ndef route(logits, top_k):\n    return LIMIT\n\nLIMIT = 3\n"
    )
    assert load("topk_softmax@a_package_of_kernels:route") == {
        "kind": "module", "module": "a_package_of_kernels", "attribute": "route", "factory": False,
    }  # fmt: skip
    test = tmp_path / "test_router.py"
    test.write_text(
        "import torch\nimport a_package_of_kernels\n"
        "from a_package_of_kernels import route\nfrom moe_fuzz import fuzz\n\n"
        "LIMIT = 3\n\n"
        "def beside(logits, top_k):\n    return a_package_of_kernels.other(logits, top_k)\n\n"
        "def beside_later(logits, top_k):\n    import a_package_of_kernels as it\n    return it.other(logits, 1)\n\n"
        "def plain(logits, top_k):\n    return torch.topk(logits, top_k)\n\n"
        "def bound(logits, top_k):\n    return torch.topk(logits, LIMIT)\n\n"
        "def make_route():\n    return route\n\n"
        "def make_closure():\n    return lambda logits, top_k: plain(logits, top_k)\n"
    )
    assert load(f"topk_softmax@{test}:make_route()")["module"] == "a_package_of_kernels"
    assert load(f"topk_softmax@{test}:plain")["kind"] == "source"
    assert load(f"topk_softmax@{test}:beside")["kind"] == "file", "its neighbour is found beside the file alone"
    assert load(f"topk_softmax@{test}:beside_later")["kind"] == "file"
    for name, factory in (("bound", False), ("make_closure()", True)):
        found = load(f"topk_softmax@{test}:{name}")
        assert (found["kind"], found["factory"], found["needs_moe_fuzz"]) == ("file", factory, True)


# ---- what comes from outside cannot garble the script ---------------------------------------------------------------


@pytest.mark.interpreter
def test_hostile_text(runner: Runner, tmp_path: Path, batch: Batch) -> None:
    hostile = 'it says """\nimport os; os.abort()\n""" \\N{no such} \\ \x00 \ud800 {{ 7 * 7 }} {% if %}'
    case, verdict = failing(runner, SCRATCH_IN_INPUT)
    finding = replace(finding_of(case, verdict), message=hostile, clause=hostile, env={"torch": hostile})
    text = render(finding, exhibit_of(runner, case))
    script = write(tmp_path, "hostile", text.encode().decode())
    (code, said), = batch([script])
    assert (code, said[:5]) == (1, "BUG: ")
    assert "{{ 7 * 7 }}" in text


def test_what_a_script_cannot_do_is_refused(runner: Runner) -> None:
    case, verdict = failing(runner, NAN_ARGMAX)
    exhibit = exhibit_of(runner, case)
    with pytest.raises(CaseError, match=r"allocates in C\+\+"):
        render(finding_of(case, verdict, own="all"), exhibit)


def test_no_script_for_another_device(runner: Runner) -> None:
    case, verdict = failing(runner, NAN_ARGMAX)
    with pytest.raises(CaseError, match="xpu"):
        render(finding_of(case, verdict), exhibit_of(runner, case) | {"device": "xpu"})


@pytest.mark.parametrize("fault", ["int32_boundary", "far_columns"])
def test_no_script_for_what_lies_gigabytes_apart(runner: Runner, fault: str) -> None:
    case = case_of("topk_softmax@torch", faults=(Fault(fault, "logits"),))
    verdict = Verdict(VIOLATION, (Violation("weights", "off", "is off"),))
    with pytest.raises(CaseError, match="gigabytes apart"):
        render(finding_of(case, verdict), exhibit_of(runner, case))


# ---- the pool -------------------------------------------------------------------------------------------------------


class OneProcess:
    """A pool whose workers are the runner of this process."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.options: list[RunOptions] = []

    @contextmanager
    def fresh(self, *_: object) -> Iterator[OneProcess]:
        yield self

    def run(self, cases: tuple[Case, ...], target: str, options: RunOptions) -> list[Verdict]:
        self.options.append(options)
        # Memory of a fresh worker holds no poison of runs before; what was freed here may.
        with mock.patch.object(torch, "empty", torch.zeros) if options.fence.own == "off" else nullcontext():
            return [self.runner.run(case, target, options) for case in cases]

    def exhibit(self, case: Case, target: str) -> dict[str, Any]:
        return self.runner.exhibit(case, target)


@pytest.mark.interpreter
def test_the_renderer_asks_a_worker(runner: Runner) -> None:
    """And leaves out guards and poison where the finding shows without them."""
    pool = OneProcess(runner)
    case, verdict = failing(runner, NAN_ARGMAX)
    text = renderer(pool)(finding_of(case, verdict))
    assert "def judge(target)" in text
    assert "FreshMemory" not in text
    assert pool.options[0].fence.hard == ()
    assert pool.options[0].fence.own == "off"
    left = case_of("topk_softmax@planted.id_left_unwritten", top_k=3)  # shows by the poison alone
    text = renderer(pool)(finding_of(left, runner.run(left, left.target, RunOptions())))
    assert "FreshMemory" in text


def test_a_finding_outlives_its_script(
    runner: Runner, tmp_path: Path, batch: Batch
) -> None:
    case, verdict = failing(runner, NAN_ARGMAX)
    pool = OneProcess(runner)

    def gone(case: Case, target: str) -> dict[str, Any]:
        raise EnvironmentProblem("the target is gone")

    pool.exhibit = gone  # type: ignore[method-assign]
    script = write(tmp_path, "none", renderer(pool)(finding_of(case, verdict)))
    (code, said), = batch([script])
    assert code == 3
    assert "the target is gone" in said
    assert case.inline() in said
