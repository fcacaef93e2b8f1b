"""repro.py: a finding shows with torch and the target alone, in an environment that has no moe-fuzz."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from moe_fuzz.campaign.repro import render
from moe_fuzz.case import Fault, Step
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import CRASH, VIOLATION, Verdict, Violation
from tests.cpu.conftest import PYTHON, Batch
from tests.cpu.repro_cases import (
    HEALTHY,
    NAN_ARGMAX,
    ROOT,
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


# ---- each planted bug -----------------------------------------------------------------------------------------------

@pytest.mark.interpreter
@pytest.mark.parametrize("bare", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fenced", "bare"])
def test_every_planted_bug_shows_without_moe_fuzz(
    runner: Runner, tmp_path: Path, batch: Batch, bare: bool
) -> None:
    """And a healthy router passes the same scripts. `stale_row_max`, which needs a call before, has its own test. Bare
    scripts are the others without their guards: half of the bugs are shown by these. On a GPU all are shown by both."""
    bugs = [bug for bug in SCRIPTED if "cpu" in bug.devices]
    assert {bug.check for bug in bugs} == set(SAYS)
    bugs = [bug for at, bug in enumerate(bugs) if bare == (at % 2 == 1 and bug.check not in ("fence", "canary"))]
    runs = []
    for bug in bugs:
        case, verdict = failing(runner, bug)
        text = render(finding_of(case, verdict), exhibit_of(runner, case), bare=bare)
        assert "import moe_fuzz" not in text
        script = write(tmp_path, bug.name, text)
        runs += [[script], [script, healthy(bug.op)]]
    answers = batch(*runs)
    for bug, (code, said), (code_of_healthy, said_of_healthy) in zip(bugs, answers[::2], answers[1::2], strict=True):
        assert (code, said[:5]) == (1, "BUG: "), f"{bug.name}: {said}"
        assert bug.name in said
        assert SAYS[bug.check] in said
        assert code_of_healthy == 0, f"{bug.name}: {said_of_healthy}"
        assert said_of_healthy.startswith("fixed: ")


def test_it_runs_by_itself(runner: Runner, tmp_path: Path, without_us: dict[str, str], elsewhere: Path) -> None:
    """As a maintainer runs it: python repro.py, and nothing of ours is installed."""

    def python(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PYTHON, *words], cwd=elsewhere, env=without_us, capture_output=True, text=True, timeout=120, check=False
        )

    done = python("-c", "import importlib.util as u; print(u.find_spec('torch') is not None, u.find_spec('moe_fuzz'))")
    assert done.stdout == "True None\n"
    case, verdict = failing(runner, NAN_ARGMAX)
    script = write(tmp_path, "repro", render(finding_of(case, verdict), exhibit_of(runner, case)))
    done = python(script)
    assert (done.returncode, done.stderr) == (1, "")
    assert "names an expert twice" in done.stdout


@pytest.mark.interpreter
def test_a_call_before_it(runner: Runner, tmp_path: Path, batch: Batch) -> None:
    """A huge row leaves its maximum behind; the case alone passes."""
    target = "topk_softmax@planted.stale_row_max"
    culprit = case_of(target, faults=(Fault("huge_rows", "logits", Labels.range(3)),))
    victim = case_of(target)
    verdict = Verdict(VIOLATION, (Violation("weights", "off", "the weight is off"),))
    finding = finding_of(victim, verdict, sequence=(culprit,))
    before, exhibit = exhibit_of(runner, culprit), exhibit_of(runner, victim)
    together = write(tmp_path, "together", render(finding, exhibit, [before]))
    alone = write(tmp_path, "alone", render(replace(finding, sequence=()), exhibit))
    (code, said), (code_of_healthy, _), (code_alone, _) = batch([together], [together, HEALTHY], [alone])
    assert (code, code_of_healthy, code_alone) == (1, 0, 0)
    assert "the weight of expert" in said
    assert "1 other call in the same process" in together.read_text()


@pytest.mark.interpreter
def test_the_second_step(runner: Runner, tmp_path: Path, batch: Batch) -> None:
    """Every step of a case is judged, and each has names of its own."""
    target = "topk_softmax@planted.nan_argmax"
    rows = Labels.range(2)
    steps = (Step(rows), Step(rows, Labels(), (Fault("nan_rows", "logits", Labels.of([1])),)), Step(rows))
    case = replace(case_of(target), steps=steps)
    verdict = runner.run(case, target, RunOptions())
    assert verdict.key == ("ids", "duplicate")
    script = write(tmp_path, "steps", render(finding_of(case, verdict), exhibit_of(runner, case)))
    assert "LOGITS_3 = " in script.read_text()
    assert [code for code, _ in batch([script], [script, HEALTHY])] == [1, 0]


@pytest.mark.interpreter
def test_memory_of_the_targets_own(
    runner: Runner, tmp_path: Path, batch: Batch
) -> None:
    """Nothing is given as `out`: the target writes past, or leaves unwritten, what it allocated itself."""
    past, left = case_of("topk_softmax@planted.writes_past_ids", tokens=6), case_of(
        "topk_softmax@planted.id_left_unwritten", top_k=3)
    verdict = Verdict(CRASH, (Violation("fence", "own:right:write", "writes past the right edge of memory"),))
    scripts = [write(tmp_path, "past", render(finding_of(past, verdict), exhibit_of(runner, past)))]
    # three rows of two ids end 8 bytes before the end of the fourth's: into the slack, which canaries watch
    slack = case_of(past.target, tokens=3)
    verdict = runner.run(slack, past.target, RunOptions())
    assert verdict.key[0] == "canary"
    assert verdict.key[1].startswith("own")
    scripts.append(write(tmp_path, "slack", render(finding_of(slack, verdict), exhibit_of(runner, slack))))
    verdict = runner.run(left, left.target, RunOptions())
    assert verdict.key == ("written", "ids:unwritten")
    scripts.append(write(tmp_path, "left", render(finding_of(left, verdict), exhibit_of(runner, left))))
    # a crash that could not be located: everything is fenced
    verdict = Verdict(CRASH, (Violation("crash", "SIGSEGV", "the worker died of SIGSEGV"),))
    scripts.append(write(tmp_path, "crash", render(finding_of(past, verdict), exhibit_of(runner, past))))
    answers = batch(*([script, *more] for script in scripts for more in ([], [HEALTHY])))
    assert [code for code, _ in answers] == [1, 0] * len(scripts)


@pytest.mark.interpreter
@pytest.mark.parametrize(("layout", "argument"), [("noncontiguous", "gap"), ("transposed", "column_stride")])
def test_the_torch_provider_is_copied(
    runner: Runner, tmp_path: Path, batch: Batch, layout: str, argument: str
) -> None:
    """It lives in a module of ours; its source needs only torch, so the script holds it. Strided, and not aligned."""
    target = "topk_softmax@torch"
    nan_row = Fault("nan_rows", "logits", Labels.of([1]))
    faults = (nan_row, Fault(layout, "logits"), Fault("misaligned", "logits"))
    case = case_of(target, faults=faults, bias=True, scale=2.5, dtype="bfloat16", renormalize=True)
    verdict = runner.run(case, target, RunOptions())
    assert verdict.key[0] == "finite"
    exhibit = exhibit_of(runner, case)
    assert exhibit["load"]["kind"] == "source"
    script = write(tmp_path, "torch", render(finding_of(case, verdict), exhibit))
    text = script.read_text()
    assert "def topk_softmax(" in text
    assert "@declares" not in text
    assert f", {argument}=" in text
    assert ", offset=" in text
    answers = batch([script], [script, HEALTHY], [script, "/no/such/file.py:f"], [script, "no_such_module:f"],
                    [script, HEALTHY + "x"], [script, f"{ROOT}/reference/routing.py:topk_softmax"])  # fmt: skip
    assert [code for code, _ in answers] == [1, 0, 3, 3, 3, 0]
    assert "row 1 has weights that are not finite" in answers[0][1]
    assert "cannot be loaded: FileNotFoundError" in answers[2][1]


def test_another_failure_is_neither(runner: Runner, tmp_path: Path, batch: Batch) -> None:
    """A target that crashes, raises or loads badly where wrong ids were found: not the bug, and not fixed."""
    case, verdict = failing(runner, NAN_ARGMAX)
    script = write(tmp_path, "repro", render(finding_of(case, verdict), exhibit_of(runner, case), bare=True))
    other = tmp_path / "other.py"
    other.write_text(
        "import os, sys\n"
        "def raises(logits, top_k, **rest): raise ValueError('no')\n"
        "def aborts(logits, top_k, **rest): os.abort()\n"
        "def exits(logits, top_k, **rest): sys.exit(0)\n"
        "def interrupts(logits, top_k, **rest): raise KeyboardInterrupt\n"
        "def make():\n    return raises\n"
    )
    ends = tmp_path / "ends.py"
    ends.write_text("import os\nos._exit(0)\n")
    names = ("raises", "aborts", "exits", "interrupts", "make()")
    answers = batch(*([script, f"{other}:{name}"] for name in names), [script, f"{ends}:f"])
    assert [code for code, _ in answers] == [2, 2, 2, 2, 2, 3]
    words = ("ValueError", "SIGABRT", "SystemExit", "KeyboardInterrupt", "ValueError", "exit code 0")
    for (_, said), word in zip(answers, words, strict=True):
        assert word in said


@pytest.mark.interpreter
def test_a_buffer_that_was_not_used_shows(runner: Runner, tmp_path: Path, batch: Batch) -> None:
    path = tmp_path / "routers.py"
    path.write_text("import torch\n\n\ndef plain(logits, k, out=None):\n"
                    "    weights, ids = torch.softmax(logits.float(), -1).topk(k)\n    return weights, ids.int()\n")
    case = case_of(f"topk_softmax@{path}:plain", out=True)
    verdict = runner.run(case, case.target, RunOptions())
    assert verdict.key == ("structure", "weights:out")
    script = write(tmp_path, "out", render(finding_of(case, verdict), exhibit_of(runner, case)))
    (code, said), (code_of_healthy, _) = batch([script], [script, HEALTHY])
    assert (code, code_of_healthy) == (1, 0)
    assert "weights did not come back in the buffer `out`" in said
