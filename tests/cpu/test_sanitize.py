"""The sanitizer lane: what the tool writes in its several forms, when its silence counts, what a campaign does."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
from pathlib import Path

import pytest

import moe_fuzz
from moe_fuzz.campaign.findings import load_findings
from moe_fuzz.campaign.interfaces import Sanitized
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case, Step
from moe_fuzz.labels import Labels
from moe_fuzz.sanitize import automatic, lane, log
from moe_fuzz.sanitize.lane import CLEAN, FAILED, REFUSED, REPORTS, TIMEOUT
from moe_fuzz.sanitize.spec import Result
from tests.cpu.campaign_fakes import campaign, crash, nan_on_odd, when

BANNER = "========= COMPUTE-SANITIZER\n"
NONE = "========= ERROR SUMMARY: 0 errors\n"
LATER = BANNER + """\
========= Invalid __global__ read of size 16 bytes
=========     at matmul_kernel+0xec0 in matmul_triton2.py:43
=========     by thread (18,0,0) in block (0,0,0)
=========     Access to 0x74505bcccca0 is out of bounds
=========     and is 161 bytes after the nearest allocation at 0x74505bccc800 of size 1,024 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: main at somewhere.py:12 [0x2f26f0] in libcuda.so.1
=========
========= Invalid __global__ read of size 16 bytes
=========     at matmul_kernel+0xec0 in matmul_triton2.py:43
=========     by thread (19,0,0) in block (0,0,0)
=========     Access to 0x74505bcccca0 is out of bounds
=========
the program prints this
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call to cudaS.
=========     Saved host backtrace up to driver entry point at error
=========
========= ERROR SUMMARY: 3 errors
"""
EARLIER = BANNER + """\
========= Invalid __global__ write of size 2 bytes
=========     at 0xda0 in /opt/sglang/python/sglang/fused_moe.py:175:fused_moe_kernel
=========     by thread (96,0,0) in block (44,0,0)
=========     Address 0x763995f9f000 is out of bounds
=========     and is 1,241,911,296 bytes before the nearest allocation at 0x7639e0000000 of size 5,033,164,800 bytes
=========     Host Frame: [0x2f26f0]
=========                in /usr/lib/x86_64-linux-gnu/libcuda.so.1
========= ERROR SUMMARY: 1 error
"""
NO_LINES = BANNER + """\
========= Invalid __global__ read of size 8 bytes
=========     at void at::native::<unnamed>::ctc_loss<float, long>(T1 *, const T1 *, long)+0x70
=========     by thread (0,60,0) in block (0,8,0)
=========     Address 0x7f0605dfbde0 is out of bounds
========= Invalid __global__ read of size 8 bytes
=========     at 0x3b0 in void device_bootstrap<unsigned long,Degree<int=2048>>(unsigned long*)
=========     by thread (251,0,0) in block (0,0,0)
========= ERROR SUMMARY: 2 errors
"""
RACE = BANNER + """\
========= Error: Race reported between Write access at sum_kernel(int *, int *)+0xf0 in race.cu:23
=========     and Read access at sum_kernel(int *, int *)+0x150 in race.cu:27 [508 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
INIT = BANNER + """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at _combine+0x70 in moe_layer.py:88
=========     by thread (64,0,0) in block (0,0,0)
=========     Access at 0x7f8d23a00100
=========
========= ERROR SUMMARY: 1 error
"""
SYNC = BANNER + """\
========= Barrier error detected. Divergent thread(s) in warp.
=========     at divergent(int)+0x150 in divergent.cu:59
=========     by thread (32,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error
"""
MISALIGNED = BANNER + """\
========= Invalid __global__ read of size 8 bytes
=========     at _words+0x40 in words.py:7
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f00000002 is misaligned
========= ERROR SUMMARY: 1 error
"""
UNSUPPORTED = BANNER + """\
========= Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
=========
========= ERROR SUMMARY: 0 errors
"""
UNATTACHED = BANNER + """\
========= Error: Target application terminated before first instrumented API call
"""


@pytest.mark.parametrize(
    ("text", "tool", "kind", "site", "note"),
    [
        (LATER, "memcheck", "out of bounds", "matmul_triton2.py:43 in matmul_kernel", "161 bytes after"),
        (EARLIER, "memcheck", "out of bounds", "fused_moe.py:175 in fused_moe_kernel", "1,241,911,296 bytes before"),
        (RACE, "racecheck", "race", "race.cu:23 in sum_kernel", "race.cu:27 [508 hazards]"),
        (INIT, "initcheck", "uninitialized", "moe_layer.py:88 in _combine", "Access at"),
        (SYNC, "synccheck", "barrier", "divergent.cu:59 in divergent", ""),
        (MISALIGNED, "memcheck", "out of bounds", "words.py:7 in _words", "is misaligned"),
    ],
)
def test_every_form_of_report_is_read(text, tool, kind, site, note):
    [report] = log.parse(text, tool)
    assert (report.kind, report.site) == (kind, site)
    assert note in report.note
    assert site in report.sentence


def test_reports_of_one_place_are_one():
    [report] = log.parse(LATER, "memcheck")
    assert report.times == 2
    assert report.sentence.endswith("(2x)")
    assert (report.where, log.counted(LATER)) == ("thread (18,0,0) in block (0,0,0)", 3)


def test_kernels_without_lines_are_named_and_come_last():
    assert [report.kernel for report in log.parse(NO_LINES, "memcheck")] == ["ctc_loss", "device_bootstrap"]
    both = log.parse(NO_LINES + LATER, "memcheck")
    assert both[0].site
    assert not both[1].site


def test_what_the_program_prints_is_no_report():
    assert not log.parse(BANNER + "Invalid __global__ read of size 4 bytes\n   at f+0x1 in f.py:1\n" + NONE, "memcheck")


WHOLE = Result("t", 2, 2)


@pytest.mark.parametrize(
    ("text", "result", "late", "kind", "said"),
    [
        (BANNER + NONE, WHOLE, False, CLEAN, ""),
        (LATER, WHOLE, False, REPORTS, ""),
        (LATER, None, False, REPORTS, "without its answer"),  # a kernel's fault took the process: the report counts
        (LATER, None, True, REPORTS, "without its answer"),
        (LATER, Result("t", 1, 2, "AcceleratorError: 719"), False, REPORTS, "719 after 1 of 2 calls"),
        (UNSUPPORTED, WHOLE, False, REFUSED, "Device not supported"),  # the process ran well, unwatched
        (UNATTACHED, None, False, REFUSED, "before first instrumented"),
        ("", WHOLE, False, REFUSED, "wrote nothing"),
        ("", None, False, REFUSED, "wrote nothing"),
        (BANNER, WHOLE, False, REFUSED, "summary"),
        (BANNER + NONE, None, False, FAILED, "without its answer"),
        (BANNER + NONE, Result("t", 0, 2, "OutOfMemoryError: x"), False, FAILED, "OutOfMemoryError: x after 0 of 2"),
        (BANNER + NONE, Result("t", 1, 2), False, FAILED, "stopped after 1 of 2"),
        (BANNER, None, True, TIMEOUT, "in time"),
        (BANNER + "========= ERROR SUMMARY: 4 errors\n", WHOLE, False, FAILED, "4 errors"),
    ],
)
def test_silence_counts_only_where_the_tool_looked_and_the_case_ran(text, result, late, kind, said):
    found, reports, message = lane.judge("memcheck", text, result, late, "")
    assert found == kind
    assert said in message
    assert bool(reports) == (kind == REPORTS)


# ---- with a tool in the place of the real one -----------------------------------------------------------------------

CASE = Case(
    "topk_softmax",
    {"experts": "0-3", "top_k": 2, "dtype": "float32", "renormalize": False, "bias": False, "scale": 1.0,
     "is_padding": False, "padding": "distinct", "edge": "right", "out": False, "magnitude": 2},
    (Step(Labels.range(3)), Step(Labels.range(1))), 7,
)  # fmt: skip

#: Reads its arguments as the real one does, runs the program and writes the log that the test gave it.
FAKE = """\
#!{python}
import os, subprocess, sys
arguments = sys.argv[1:]
at = arguments.index("--log-file")
program = arguments[at + 2:]
tool = arguments[arguments.index("--tool") + 1]
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
{before}
if {run}:
    subprocess.run(program, check=False)
text = {logs!r}.get(tool, {default!r})
if text is not None:
    with open(arguments[at + 1], "w") as file:
        file.write(text)
sys.exit({code})
"""


class Here:
    """A pool's place: this interpreter, this moe-fuzz."""

    @contextlib.contextmanager
    def place(self, target):
        root = str(Path(moe_fuzz.__file__).parents[1])
        yield sys.executable, os.environ | {"PYTHONPATH": root, "MOE_FUZZ_DEVICE": "cpu"}


@pytest.fixture
def tool(tmp_path, monkeypatch):
    def make(logs=None, default=BANNER + NONE, code=0, run=True, before=""):
        file = tmp_path / "bin" / lane.NAME
        file.parent.mkdir(exist_ok=True)
        text = FAKE.format(python=sys.executable, logs=logs or {}, default=default, code=code, run=run, before=before)
        file.write_text(textwrap.dedent(text))
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")

    return make


def run(target="topk_softmax@torch", cases=(CASE,), tools=("memcheck",), seconds=60.0):
    return lane.sanitize(Here(), cases, target, "cpu", tools, seconds)


def test_a_clean_case_under_a_tool_that_looked(tool):
    tool(code=1)  # its exit code is nothing to go by
    [outcome] = run()
    assert (outcome.kind, outcome.message) == (CLEAN, "")


def test_each_tool_is_asked_and_names_its_line(tool):
    tool({"memcheck": LATER, "racecheck": RACE})
    heard = []
    both = ("memcheck", "racecheck")
    outcomes = lane.sanitize(Here(), (CASE,), "topk_softmax@torch", "cpu", both, 60.0, heard.append)
    assert [outcome.kind for outcome in outcomes] == [REPORTS, REPORTS]
    assert tuple(heard) == outcomes
    said = automatic.told(outcomes)
    assert said.site == "matmul_triton2.py:43 in matmul_kernel"
    assert len(said.lines) == 2


def test_a_target_that_raises_is_no_clean_case(tool):
    tool()
    empty = Case("topk_softmax", CASE.config, (Step(Labels()),), 1)
    [outcome] = run("topk_softmax@planted.zero_tokens_raises", (empty,))
    assert outcome.kind == FAILED
    assert "after 0 of 1 calls" in outcome.message


def test_a_tool_that_never_runs_the_program(tool):
    tool(run=False)
    [outcome] = run()
    assert (outcome.kind, "without its answer" in outcome.message) == (FAILED, True)


def test_a_tool_that_takes_too_long_is_ended(tool):
    tool(before="import time; time.sleep(60)", default=None)
    [outcome] = run(seconds=0.5)
    assert outcome.kind == TIMEOUT
    assert outcome.seconds < 10


def test_no_tool(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    [outcome] = run()
    assert outcome.kind == lane.ABSENT
    assert "not on the PATH" in outcome.line


def test_the_tool_of_a_toolkit_is_found(tmp_path):
    file = tmp_path / "bin" / lane.NAME
    file.parent.mkdir()
    file.write_text("")
    file.chmod(0o755)
    assert lane.find({"PATH": "/nowhere", "CUDA_HOME": str(tmp_path)}) == str(file)
    assert lane.find({"PATH": "/nowhere"}) is None


# ---- in a campaign --------------------------------------------------------------------------------------------------


def test_a_finding_about_memory_gets_its_line_and_keeps_its_id(tmp_path):
    judge = when(nan_on_odd, crash("illegal-access", "routing.py:40 in topk"))
    asked = []

    def sanitize(cases, target):
        asked.append((cases, target))
        return Sanitized("routing.py:118 in _kernel", ("memcheck: Invalid read", "racecheck: clean"))

    made = campaign(tmp_path, judge, cases=60)
    [plain] = made.run().new
    made = campaign(tmp_path / "named", judge, cases=60)
    made._sanitize = sanitize
    [named] = made.run().new
    assert named.id == plain.id
    assert named.verdict.violations[0].site == "routing.py:118 in _kernel"
    assert [(cases[-1], target) for cases, target in asked] == [(named.case, named.target)]
    [again] = load_findings(StateDir(tmp_path / "named"))
    assert again == named
    report = (tmp_path / "named" / "findings" / named.id / "report.md").read_text()
    assert "- memcheck: Invalid read" in report
    assert "routing.py:118 in _kernel" in report


def test_other_findings_are_not_sanitized(tmp_path):
    made = campaign(tmp_path, when(nan_on_odd), cases=60)

    def never(cases, target):
        raise AssertionError

    made._sanitize = never
    assert len(made.run().new) == 1
