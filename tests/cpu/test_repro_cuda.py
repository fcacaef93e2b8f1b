"""repro.py of findings on a GPU, on a stand-in for one: CPU memory, mapped and protected as the driver is asked to.

What the stand-in cannot show (that the driver takes the calls, that a fault is an illegal access) is shown by
tests/gpu/test_repro_cuda.py.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe_fuzz.campaign.repro import render
from moe_fuzz.case import Fault
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import CRASH, Verdict, Violation
from tests.cpu.conftest import Batch
from tests.cpu.repro_cases import (
    HEALTHY,
    NAN_ARGMAX,
    SAYS,
    SCRIPTED,
    case_of,
    exhibit_of,
    failing,
    finding_of,
    healthy,
    write,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: NaN and overflows

STAND_IN = Path(__file__).with_name("cuda_stand_in.py").read_text()
GPU = {"device": "cuda", "memory_limit": None}


def pretended(text: str) -> str:
    """The script with its GPU replaced."""
    head, line, rest = text.partition("import torch  # noqa: E402\n")
    assert line
    begin = "    faulthandler.enable()\n"
    return head + line + STAND_IN + rest.replace('"cuda"', '"cpu"').replace(begin, begin + "    pretend()\n")


@pytest.mark.interpreter
def test_every_planted_bug_shows_on_the_stand_in(runner: Runner, tmp_path: Path, batch: Batch) -> None:
    """Hangs are left to the GPU, where a script gives kernels the time to compile, and so is running out of memory; and
    what a capture alone shows, which the stand-in has not. One bug of each check and every second: a GPU has all."""
    bugs = [bug for bug in SCRIPTED if "cpu" in bug.devices and bug.check not in ("hang", "oom")
            and not bug.capabilities.get("one_host_path")]  # fmt: skip
    each = {bug.check: bug for bug in bugs}
    bugs = [bug for at, bug in enumerate(bugs) if at % 2 == 0 or each[bug.check] is bug]
    runs = []
    for bug in bugs:
        case, verdict = failing(runner, bug)
        script = write(tmp_path, bug.name, pretended(render(finding_of(case, verdict), exhibit_of(runner, case) | GPU)))
        runs += [[script], [script, healthy(bug.op)]]
    answers = batch(*runs)
    for bug, (code, said), (code_of_healthy, said_of_healthy) in zip(bugs, answers[::2], answers[1::2], strict=True):
        assert (code, said[:5]) == (1, "BUG: "), f"{bug.name}: {said}"
        assert SAYS[bug.check] in said
        assert code_of_healthy == 0, f"{bug.name}: {said_of_healthy}"


@pytest.mark.interpreter
def test_layouts_and_edges(runner: Runner, tmp_path: Path, batch: Batch) -> None:
    """Strided and misaligned inputs come to the target as they were; what is read past each edge is a fault."""
    router = tmp_path / "router.py"
    router.write_text(
        "import torch\n"
        "def route(logits, k, bias=None):\n"
        "    weights, ids = torch.softmax(logits.float(), -1).topk(k)\n"
        "    return weights, ids.int()\n"
        "def looks(logits, k, bias=None):\n"
        "    last = logits.data_ptr() + 4 * sum((n - 1) * s for n, s in zip(logits.shape, logits.stride()))\n"
        "    raise ValueError([list(logits.stride()), (last + 4) % 4096 == 0])\n"
        "def peeks(logits, k, bias=None):\n"
        "    import ctypes\n"
        "    (ctypes.c_ubyte * 1).from_address(logits.data_ptr() - 1)[0]\n"
        "    return route(logits, k)\n"
    )
    scripts, wanted = [], []
    for layout in ("noncontiguous", "transposed"):
        case = case_of(f"topk_softmax@{router}:looks", faults=(Fault(layout, "logits"), Fault("misaligned", "logits")))
        case = replace(case, steps=(replace(case.steps[0], rows=Labels.range(4)),))
        verdict = Verdict(CRASH, (Violation("fence", "logits:right:read", "reads past the right edge of logits"),))
        exhibit = exhibit_of(runner, case) | GPU
        seen = exhibit["steps"][0]["tensors"]["logits"]
        seen["alignment"] = 4  # no slack
        wanted.append(str([list(seen["strides"]), True]))
        text = render(finding_of(case, verdict), exhibit)
        scripts.append(write(tmp_path, layout, pretended(text)))
    left = case_of(f"topk_softmax@{router}:peeks", edge="left")
    verdict = Verdict(CRASH, (Violation("fence", "logits:left:read", "reads past the left edge of logits"),))
    text = render(finding_of(left, verdict), exhibit_of(runner, left) | GPU)
    scripts.append(write(tmp_path, "left", pretended(text)))
    answers = batch(*([script] for script in scripts), [scripts[-1], HEALTHY])
    assert [code for code, _ in answers] == [2, 2, 1, 0]
    for (_, said), laid in zip(answers[:2], wanted, strict=False):
        assert laid in said


def test_a_lost_context_is_told_as_such(runner: Runner, tmp_path: Path, batch: Batch) -> None:
    """Whatever the target raised: the error is only the consequence."""
    router = tmp_path / "router.py"
    router.write_text(
        "def lose(code):\n"
        "    import ctypes\n"
        "    ctypes.CDLL('libcuda.so.1').lost = code\n"
        "def asserts(logits, k, **rest): lose(710)\n"
        "def reads(logits, k, **rest):\n    lose(700)\n    raise RuntimeError('CUDA error')\n"
        "def strange(logits, k, **rest): lose(999)\n"
    )
    case = case_of(f"topk_softmax@{router}:asserts")
    verdict = Verdict(CRASH, (Violation("crash", "device-assert", "a kernel broke the CUDA context"),))
    script = write(tmp_path, "lost", pretended(render(finding_of(case, verdict), exhibit_of(runner, case) | GPU)))
    wrong = case_of(NAN_ARGMAX.target, faults=(Fault("nan_rows", "logits", Labels.of([1])),))
    other = finding_of(wrong, runner.run(wrong, wrong.target, RunOptions()))
    ids = write(tmp_path, "ids", pretended(render(other, exhibit_of(runner, wrong) | GPU)))
    names = ("asserts", "reads", "strange")
    answers = batch(*([script, f"{router}:{name}"] for name in names), [ids, f"{router}:reads"])
    assert [code for code, _ in answers] == [1, 1, 1, 2]
    words = ("device-assert", "illegal-access", "CUDA error 999", "illegal-access")
    for (_, said), word in zip(answers, words, strict=True):
        assert f"{word}, and the CUDA context is lost" in said


def test_without_a_gpu_nothing_is_claimed(runner: Runner, tmp_path: Path, batch: Batch) -> None:
    case, verdict = failing(runner, NAN_ARGMAX)
    script = write(tmp_path, "repro", render(finding_of(case, verdict), exhibit_of(runner, case) | GPU))
    ((code, said),) = batch([script])
    assert code == 3
    assert "no CUDA device" in said


@pytest.mark.interpreter
def test_the_scripts_name_nothing_that_they_do_not_define(runner: Runner, tmp_path: Path) -> None:
    """What no test here can run on a GPU is at least read by a linter: undefined and unused names, in every variant."""
    for bug in SCRIPTED:
        case, verdict = failing(runner, bug)
        for bare in (False, True):
            finding = replace(finding_of(case, verdict), sequence=(case,) if bare else ())
            before = [exhibit_of(runner, case) | GPU] if bare else []
            text = render(finding, exhibit_of(runner, case) | GPU, before, bare=bare)
            write(tmp_path, f"{bug.name}_{int(bare)}", text)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "--quiet", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
