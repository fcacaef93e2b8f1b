"""The sanitizer lane on a GPU: memcheck names the line of a planted overrun; all tools are silent on a sound kernel.

Where the tool is not installed, or refuses the device, that is what the skip says: then nothing was proven.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moe_fuzz.case import Case
from moe_fuzz.sanitize import automatic, lane
from moe_fuzz.worker.pool import Pool

pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer]

UPSTREAM = Path(__file__).parents[1] / "regressions" / "upstream"
OVERRUNS = {
    "vllm-40351-reads-past-logits": "routing_memory.py",
    "flashinfer-3957-writes-past-ids": "routing_memory.py",
}


@pytest.fixture(scope="module")
def pool():
    if lane.find() is None:
        pytest.skip(f"{lane.NAME} is not on the PATH, nor in CUDA_HOME")
    with Pool(1, "cuda") as pool:
        yield pool


def seed(name: str, target: str = "") -> tuple[Case, str]:
    record = json.loads((UPSTREAM / f"{name}.json").read_text())
    target = target or record["twin"]
    return replace(Case.from_json(record["case"]), target=target), target


def ask(pool: Pool, case: Case, target: str, tools=lane.TOOLS):
    outcomes = lane.sanitize(pool, (case,), target, "cuda", tools, 120.0)
    for outcome in outcomes:
        if outcome.kind == lane.REFUSED:
            pytest.skip(outcome.line)
    return outcomes


@pytest.mark.parametrize("name", OVERRUNS)
def test_memcheck_names_the_line_of_an_overrun(pool, name):
    [outcome] = ask(pool, *seed(name), ("memcheck",))
    assert outcome.kind == lane.REPORTS, outcome.line
    [report, *_] = outcome.reports
    assert report.kind == "out of bounds", outcome.line
    assert report.file.endswith(OVERRUNS[name]), outcome.line
    assert automatic.told((outcome,)).site == report.site


@pytest.mark.slow
@pytest.mark.parametrize("tool", lane.TOOLS)
def test_every_tool_is_silent_on_a_sound_kernel(pool, tool):
    case, target = seed("vllm-40351-reads-past-logits", "topk_softmax@builtin")
    [outcome] = ask(pool, case, target, (tool,))
    assert outcome.kind == lane.CLEAN, outcome.line
