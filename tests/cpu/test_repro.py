"""repro.py: a finding shows with torch and the target alone, in an environment that has no moe-fuzz."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz import strategies
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.repro import render, renderer, tensors
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.checks.observation import Outputs, RoutingObservation
from moe_fuzz.errors import CaseError, EnvironmentProblem
from moe_fuzz.execute.exhibit import tensor as exhibited
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.routing.inputs import materialize
from moe_fuzz.options import RunOptions
from moe_fuzz.planted.catalog import PLANTED, Planted
from moe_fuzz.targets.registry import locate
from moe_fuzz.verdict import CRASH, VIOLATION, Verdict, Violation

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: NaN and overflows

ROOT = Path(__file__).resolve().parents[2]
HEALTHY = f"{ROOT}/kernels/routing.py:topk_softmax"
SPACE = get_space("topk_softmax")


def healthy(op: str) -> str:
    return f"{ROOT}/kernels/{'grouped_topk' if op == 'grouped_topk' else 'routing'}.py:{op}"


PYTHON = (sys.executable, "-S", "-P")
NOTHING = Outputs(torch.empty(0), torch.empty(0))
Batch = Callable[..., list[tuple[int, str]]]

#: Runs the scripts it is told, one after another, so that torch is imported once. A line each way:
#: [[script, argument…], …] in, [[exit code, what it printed], …] out.
DRIVER = """
import contextlib, io, json, runpy, sys
import torch, torch._dynamo, triton, triton.language
torch.set_num_threads(1)
for line in sys.stdin:
    answers = []
    for words in json.loads(line):
        sys.argv, out, code = words, io.StringIO(), None
        try:
            with contextlib.redirect_stdout(out):
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
        answers.append([code, out.getvalue()])
    print(json.dumps([answers, "moe_fuzz" in sys.modules]), flush=True)
"""


@pytest.fixture(scope="session")
def without_us(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables under which everything is installed but moe-fuzz."""
    folder = tmp_path_factory.mktemp("site-packages")
    for origin in {Path(module.__file__).parents[1] for module in (torch, pytest, sys.modules["numpy"])}:
        for entry in origin.iterdir():
            if not entry.name.startswith(("moe_fuzz", "__editable__", "__pycache__")):
                (folder / entry.name).symlink_to(entry)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST", "MOE_FUZZ"))}
    return kept | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="session")
def batch(without_us: dict[str, str], elsewhere: Path) -> Iterator[Batch]:
    """Runs scripts, each a list of words, in the environment without moe-fuzz: their exit codes and outputs."""
    with subprocess.Popen(
        [*PYTHON, "-c", DRIVER], cwd=elsewhere, env=without_us, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as driver:  # fmt: skip

        def run(*scripts: Sequence[str | Path]) -> list[tuple[int, str]]:
            assert driver.stdin is not None
            assert driver.stdout is not None
            driver.stdin.write(json.dumps([[str(word) for word in words] for words in scripts]) + "\n")
            driver.stdin.flush()
            answers, ours = json.loads(driver.stdout.readline())
            assert not ours
            return [(code, said) for code, said in answers]

        yield run
        assert driver.stdin is not None
        driver.stdin.close()


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner("cpu")


# ---- cases that fail ------------------------------------------------------------------------------------------------


def case_of(target: str, tokens: int = 3, experts: int = 8, faults: tuple[Fault, ...] = (), **config: Any) -> Case:
    op = target.partition("@")[0]
    config = {**get_space(op).simplest, "top_k": 2, **config, "experts": str(Labels.range(experts))}
    return Case(op, config, (Step(Labels.range(tokens), Labels(), faults),), 7, target=target)


#: Cases written by hand: of bugs that would take this process down, and of those that the grid does not meet.
FATAL: dict[str, tuple[dict[str, Any], str]] = {
    "reads_past_logits": ({"experts": 6, "tokens": 2}, "logits:right:read"),  # 48 bytes: no slack
    "writes_past_ids": ({"tokens": 6, "out": True}, "ids:right:write"),
    "scratch_in_input": ({}, "logits:inside:write"),
    "null_workspace": ({"experts": 16, "top_k": 9}, "SIGSEGV"),
    "aborts_on_one_token": ({"tokens": 1}, "SIGABRT"),
    "exits_on_launch_error": ({"tokens": 17, "experts": 60}, "exit:3"),
    "waits_for_a_tile": ({"experts": 7}, "deadline"),
    "counts_below_zero": ({"experts": 7}, "out-of-memory"),
    "shared_ids_looked_up": ({"experts": 8, "n_shared": 1, "expert_map": True}, "expert_map:right:read"),
}
NAN_ARGMAX, SCRATCH_IN_INPUT = (
    next(bug for bug in PLANTED if bug.name == name) for name in ("nan_argmax", "scratch_in_input")
)
WRITTEN_BY_HAND = {
    "branch_128_8": {"experts": 128, "top_k": 8},
    "mapped_in_place": {"n_group": 2, "topk_group": 2, "expert_map": True,
                        "faults": (Fault("overlapping_map", "expert_map"),)},
    "id_left_unwritten": {"experts": 3, "top_k": 3, "out": True},  # its own memory, when bare, may hold anything
}


def failing(runner: Runner, bug: Planted) -> tuple[Case, Verdict]:
    return _failing(runner, bug.name)


@cache
def _failing(runner: Runner, name: str) -> tuple[Case, Verdict]:
    bug = next(bug for bug in PLANTED if bug.name == name)
    if bug.name in FATAL:
        config, symptom = FATAL[bug.name]
        violation = Violation(bug.check, symptom, f"{bug.story} ({bug.upstream})")
        return case_of(bug.target, **config), Verdict(VIOLATION, (violation,), seconds=1.0)
    only = RunOptions(checks=(bug.check,))
    cases = [case_of(bug.target, **WRITTEN_BY_HAND[bug.name])] if bug.name in WRITTEN_BY_HAND else strategies.grid(
        get_space(bug.op), runner.describe(bug.target), "cpu", 0)
    for case in cases:
        verdict = runner.run(case, bug.target, only)
        if verdict.kind == VIOLATION:
            return case, verdict
    raise AssertionError(f"no case shows {bug.name}")


def finding_of(case: Case, verdict: Verdict, **more: Any) -> Finding:
    violation = verdict.violations[0]
    return Finding(
        id="0123456789", target=case.target, check=violation.check, symptom=violation.symptom,
        message=violation.message, finding_class="robustness", clause="", case=case, verdict=verdict, raw=verdict.key,
        features=(), scope=(), **more,
    )  # fmt: skip


def exhibit_of(runner: Runner, case: Case, target: str = "") -> dict[str, Any]:
    return runner.exhibit(case, target or case.target) | {"memory_limit": 1 << 30}


def write(folder: Path, name: str, text: str) -> Path:
    compile(text, name, "exec")
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


# ---- each planted bug -----------------------------------------------------------------------------------------------

SAYS = {
    "error": "raises on a valid input", "structure": " is torch.", "written": "never written",
    "ids": "names an expert", "finite": "not finite", "shared": "shared experts", "expert_map": "not in expert_map",
    "padding": "padding row", "selection": "takes expert",
    "ties": "comes first", "order": "before it", "weights": "the weight of expert", "canary": "were overwritten",
    "fence": "(SIGSEGV)", "isolation": "with other contents in the padding rows", "batch_invariance": "; among ",
    "determinism": "called again with the same input", "crash": "takes its process down", "hang": "does not come back",
    "oom": "runs out of memory, with 1024 MiB at hand",
}  # fmt: skip


@pytest.mark.parametrize("bare", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fenced", "bare"])
def test_every_planted_bug_shows_without_moe_fuzz(
    runner: Runner, tmp_path: Path, batch: Batch, bare: bool
) -> None:
    """And a healthy router passes the same scripts. `stale_row_max`, which needs a call before, has its own test."""
    bugs = [bug for bug in PLANTED if bug.name != "stale_row_max" and "cpu" in bug.devices]
    assert {bug.check for bug in bugs} == set(SAYS)
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
        "def make():\n    return raises\n"
    )
    ends = tmp_path / "ends.py"
    ends.write_text("import os\nos._exit(0)\n")
    names = ("raises", "aborts", "exits", "make()")
    answers = batch(*([script, f"{other}:{name}"] for name in names), [script, f"{ends}:f"])
    assert [code for code, _ in answers] == [2, 2, 2, 2, 3]
    words = ("ValueError", "SIGABRT", "SystemExit", "ValueError", "exit code 0")
    for (_, said), word in zip(answers, words, strict=True):
        assert word in said


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
            assert torch.equal(script[tensor_name.upper()].view(torch.uint8), plain.view(torch.uint8))


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
    (tmp_path / "a_package_of_kernels.py").write_text("def route(logits, top_k):\n    return LIMIT\n\nLIMIT = 3\n")
    assert load("topk_softmax@a_package_of_kernels:route") == {
        "kind": "module", "module": "a_package_of_kernels", "attribute": "route", "factory": False,
    }  # fmt: skip
    test = tmp_path / "test_router.py"
    test.write_text(
        "import torch\nfrom a_package_of_kernels import route\nfrom moe_fuzz import fuzz\n\nLIMIT = 3\n\n"
        "def plain(logits, top_k):\n    return torch.topk(logits, top_k)\n\n"
        "def bound(logits, top_k):\n    return torch.topk(logits, LIMIT)\n\n"
        "def make_route():\n    return route\n\n"
        "def make_closure():\n    return lambda logits, top_k: plain(logits, top_k)\n"
    )
    assert load(f"topk_softmax@{test}:make_route()")["module"] == "a_package_of_kernels"
    assert load(f"topk_softmax@{test}:plain")["kind"] == "source"
    for name, factory in (("bound", False), ("make_closure()", True)):
        found = load(f"topk_softmax@{test}:{name}")
        assert (found["kind"], found["factory"], found["needs_moe_fuzz"]) == ("file", factory, True)


# ---- what comes from outside cannot garble the script ---------------------------------------------------------------


def test_hostile_text(runner: Runner, tmp_path: Path, batch: Batch) -> None:
    hostile = 'it says """\nimport os; os.abort()\n""" \\N{no such} \\ \x00 \ud800 {{ 7 * 7 }} {% if %}'
    case, verdict = failing(runner, SCRATCH_IN_INPUT)
    finding = replace(finding_of(case, verdict), message=hostile, clause=hostile, env={"torch": hostile})
    text = render(finding, exhibit_of(runner, case))
    script = write(tmp_path, "hostile", text.encode().decode())
    (code, said), = batch([script])
    assert (code, said[:5]) == (1, "BUG: ")
    assert "{{ 7 * 7 }}" in text


def test_no_script_for_another_device(runner: Runner) -> None:
    case, verdict = failing(runner, NAN_ARGMAX)
    with pytest.raises(CaseError, match="cuda"):
        render(finding_of(case, verdict), exhibit_of(runner, case) | {"device": "cuda"})


# ---- the pool -------------------------------------------------------------------------------------------------------


class OneProcess:
    """A pool whose workers are the runner of this process."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.options: list[RunOptions] = []

    @contextmanager
    def fresh(self) -> Iterator[OneProcess]:
        yield self

    def run(self, cases: tuple[Case, ...], target: str, options: RunOptions) -> list[Verdict]:
        self.options.append(options)
        return [self.runner.run(case, target, options) for case in cases]

    def exhibit(self, case: Case, target: str) -> dict[str, Any]:
        return self.runner.exhibit(case, target)


def test_the_renderer_asks_a_worker(runner: Runner) -> None:
    """And leaves out guards and poison where the finding shows without them."""
    pool = OneProcess(runner)
    case, verdict = failing(runner, NAN_ARGMAX)
    text = renderer(pool)(finding_of(case, verdict))
    assert "def judge(target)" in text
    assert "FreshMemory" not in text
    assert pool.options[0].fence.hard == ()
    assert not pool.options[0].fence.own
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
