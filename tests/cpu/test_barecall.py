"""A finding in a library's operator: the script calls the operator itself, and has no trace of the adapter."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from moe_fuzz.campaign.repro import render
from moe_fuzz.case import Fault
from moe_fuzz.errors import UsageError
from moe_fuzz.execute.barecall import ROUTED, BareCall
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.options import RunOptions
from tests.cpu.conftest import PYTHON
from tests.cpu.repro_cases import HEALTHY, case_of, exhibit_of, finding_of, write

#: Registers an operator as a library's extension does: it writes into what it is given, and trusts NaN.
LIBRARY = """
import torch

library = torch.library.Library("moe_fuzz_fake", "FRAGMENT")
library.define("topk_softmax(Tensor(a!) weights, Tensor(b!) ids, Tensor(c!) rows, Tensor gating, bool renormalize, "
               "float cap, Tensor? bias) -> ()")

@torch.library.impl(library, "topk_softmax", "CPU")
def topk_softmax(weights, ids, rows, gating, renormalize, cap, bias):
    assert cap == 0.0 and rows.dtype == torch.int32
    scores = torch.softmax(gating.float(), -1)
    chosen = (scores if bias is None else scores + bias).nan_to_num(0.0).topk(weights.shape[1]).indices
    values = scores.gather(1, chosen)
    weights.copy_(values / values.sum(1, keepdim=True) if renormalize else values)
    ids.copy_(chosen)
"""
ADAPTER = """
import torch
import a_fake_library  # noqa: F401 - registers it
from moe_fuzz.contract import Capabilities, declares
from moe_fuzz.execute.barecall import ROUTED, BareCall, looks_like

@declares(capabilities=Capabilities(out=True))
@looks_like(BareCall(
    "torch.ops.moe_fuzz_fake.topk_softmax",
    ("weights", "ids", "rows", "logits", "renormalize", "0.0", "bias"),
    buffers={**ROUTED, "rows": ("int32", ("tokens", "top_k"))},
    libraries={"MOE_FUZZ_FAKE_LIB": "/no/such/folder/lib.so"},
    environment={"FAKE_LIBRARY_SAYS": "hello"},
))
def topk_softmax(logits, top_k, *, renormalize=False, correction_bias=None, out=None):
    weights, ids = out or (torch.empty(len(logits), top_k), torch.empty(len(logits), top_k, dtype=torch.int32))
    rows = torch.empty(len(logits), top_k, dtype=torch.int32)
    torch.ops.moe_fuzz_fake.topk_softmax(weights, ids, rows, logits, renormalize, 0.0, correction_bias)
    return weights, ids
"""


@pytest.mark.interpreter
def test_the_operator_is_called_without_us(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_us: dict[str, str]
) -> None:
    (tmp_path / "a_fake_library.py").write_text(LIBRARY)
    (tmp_path / "adapter.py").write_text(ADAPTER)
    monkeypatch.syspath_prepend(tmp_path)
    faults = (Fault("nan_rows", "logits", Labels.of([1])),)
    case = case_of(f"topk_softmax@{tmp_path}/adapter.py:topk_softmax", faults=faults, bias=True, renormalize=True)
    verdict = runner.run(case, case.target, RunOptions())
    assert verdict.key[0] == "finite"
    exhibit = exhibit_of(runner, case)
    assert list(exhibit["steps"][0]["keywords"]) == ["renormalize", "bias"]  # in the op's spelling
    text = render(finding_of(case, verdict), exhibit)
    assert "moe_fuzz_fake.topk_softmax(weights, ids, rows, logits, renormalize, 0.0, bias)" in text
    assert "target(logits, 2, renormalize=True, bias=bias)" in text
    assert 'os.environ.setdefault("FAKE_LIBRARY_SAYS", "hello")' in text
    script = write(tmp_path, "repro", text.replace("import moe_fuzz", "!"))
    env = without_us | {"PYTHONPATH": f"{without_us['PYTHONPATH']}:{tmp_path}"}
    real = f"{Path(torch.__file__).parent / 'lib' / 'libtorch.so'}:{tmp_path / 'a_fake_library.py'}"

    def python(*words: str, **more: str) -> tuple[int, str]:
        done = subprocess.run([*PYTHON, str(script), *words], env=env | more, capture_output=True, text=True,
                              cwd=tmp_path, timeout=120, check=False)  # fmt: skip
        return done.returncode, done.stdout

    code, said = python()
    assert (code, "/no/such/folder/lib.so" in said) == (3, True)
    code, said = python(MOE_FUZZ_FAKE_LIB=real)
    assert code == 1
    assert "BUG: topk_softmax: row 1 has weights that are not finite" in said
    assert python(HEALTHY)[0] == 0  # needs no library
    code, said = python(MOE_FUZZ_FAKE_LIB=real.partition(":")[0])
    assert (code, "moe_fuzz_fake" in said) == (3, True)  # a library that has no such operator


def test_buffers_and_results() -> None:
    call = BareCall("torch.ops.a.b", ("scores", "scale=scale"), results=("result[0]", "result[1].int()"), buffers={})
    assert call.names() == {"scale", "scores"}
    assert not call.takes_out
    assert call.source("b", out=False) == (
        "def b(logits, top_k, *, scale=None, scores=None):\n    tokens, experts = logits.shape\n"
        "    result = torch.ops.a.b(scores, scale=scale)\n    return result[0], result[1].int()\n"
    )
    buffers = {**ROUTED, "work": ("uint8", (7,))}
    of_a_module = BareCall("kernels.route", ("logits", "weights", "ids", "work"), buffers=buffers)
    assert of_a_module.modules == ("kernels",)
    text = of_a_module.source("route", out=True)
    assert "    import kernels\n" in text
    assert "    weights = out[0] if out else torch.empty((tokens, top_k), dtype=torch.float32, device=" in text
    assert "    work = torch.empty((7,), dtype=torch.uint8, device=logits.device)" in text


@pytest.mark.parametrize("wrong", [{"arguments": ("logits, (",)}, {"buffers": {"a b": ("uint8", (1,))}}])
def test_what_is_no_python_is_refused(wrong: dict) -> None:
    with pytest.raises(UsageError, match=r"torch\.ops\.a\.b"):
        BareCall(**{"function": "torch.ops.a.b", "arguments": ("logits",), **wrong})
