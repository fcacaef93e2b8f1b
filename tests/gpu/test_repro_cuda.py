"""repro.py on a GPU: every planted bug shows with torch and the target alone, and a healthy router passes.

A worker on the GPU finds the cases and writes down their tensors: Triton's interpreter may be broken where a GPU is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz.campaign.repro import render
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import CRASH, Verdict, Violation
from moe_fuzz.worker.pool import Pool
from tests.cpu.conftest import Batch, driving, elsewhere, without_us  # noqa: F401 - fixtures
from tests.cpu.repro_cases import HEALTHY, SAYS, SCRIPTED, case_of, exhibit_of, failing, finding_of, healthy, write

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

GPU = {"device": "cuda", "memory_limit": None}
SAYS_HERE = SAYS | {
    "fence": "(illegal-access, and the CUDA context is lost)", "replay": "from a replay; from an eager call, ",
    "capture": "cannot be captured into a CUDA graph: ",
}  # fmt: skip
BUGS = [bug for bug in SCRIPTED if "cuda" in bug.devices]
PARTS = 6  # which run side by side
HANG = 20  # seconds: compiled by then, or never


class Runner:
    """A worker of a pool, asked as the runner in a worker is."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def describe(self, target: str) -> TargetInfo:
        return self._pool.describe(target)

    def run(self, case: Case, target: str, options: RunOptions) -> Verdict:
        with self._pool.lease() as worker:
            return worker.run([case], target, options)[0]

    def exhibit(self, case: Case, target: str) -> dict[str, Any]:
        with self._pool.lease(target) as worker:
            return worker.exhibit(case, target)


@pytest.fixture(scope="module")
def runner(cuda_pool: Pool) -> Runner:
    return Runner(cuda_pool)


@pytest.fixture(scope="module")
def batch(without_us: dict[str, str], elsewhere: Path) -> Iterator[Batch]:  # noqa: F811
    compiled = {name: value for name, value in without_us.items() if name != "TRITON_INTERPRET"}
    with driving(elsewhere, compiled) as run:
        yield run


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("bare", [False, True], ids=["fenced", "bare"])
def test_every_planted_bug_shows(runner: Runner, tmp_path: Path, batch: Batch, bare: bool, part: int) -> None:
    runs = []
    bugs = [bug for bug in BUGS if not bare or bug.check not in ("fence", "canary", "hang")]  # whose scripts are alike
    bugs = bugs[part::PARTS]
    for bug in bugs:
        case, verdict = failing(runner, bug)
        text = render(finding_of(case, verdict), exhibit_of(runner, case) | GPU, bare=bare)
        script = write(tmp_path, bug.name, re.sub(r"DEADLINE = \d+", f"DEADLINE = {HANG}", text))
        runs += [[script], [script, healthy(bug.op)]]
    answers = batch(*runs)
    wrong = []
    for bug, (code, said), (code_of_healthy, said_of_healthy) in zip(bugs, answers[::2], answers[1::2], strict=True):
        if code != 1 or SAYS_HERE[bug.check] not in said:
            wrong.append(f"{bug.name}: {code} {said}")
        if code_of_healthy != 0:
            wrong.append(f"{bug.name}, healthy: {code_of_healthy} {said_of_healthy}")
    assert not wrong, "\n".join(wrong)


def memory_fault(target: str, symptom: str, **config: object) -> tuple[Case, Verdict]:
    return case_of(target, **config), Verdict(CRASH, (Violation("fence", symptom, f"faults: {symptom}"),))


def test_edges_own_memory_and_faults_without_a_place(runner: Runner, tmp_path: Path, batch: Batch) -> None:
    target = tmp_path / "kernels_of_mine.py"
    target.write_text(
        "import torch\nimport triton\nimport triton.language as tl\n\n\n"
        "@triton.jit\n"
        "def _peek(x, y, offset):\n    tl.store(y, tl.load(x + offset).to(tl.float32))\n\n\n"
        "def _route(logits, k):\n    w, i = torch.softmax(logits.float(), -1).topk(k)\n    return w, i.int()\n\n\n"
        "def before(logits, k):\n"
        "    _peek[(1,)](logits, torch.empty(1, device='cuda'), -1)\n    return _route(logits, k)\n\n\n"
        "def own(logits, k):\n    mine = torch.empty(4, device='cuda')\n"
        "    _peek[(1,)](mine, torch.empty(4, device='cuda'), 4)\n    return _route(logits, k)\n\n\n"
        "def index(logits, k):\n"
        "    logits[:, torch.full((1,), logits.shape[1], device='cuda')]\n    return _route(logits, k)\n"
    )
    found = {
        "left": memory_fault(f"topk_softmax@{target}:before", "logits:left:read", edge="left"),
        "own": memory_fault(f"topk_softmax@{target}:own", "own:right:read"),
    }
    case = case_of(f"topk_softmax@{target}:index")
    found["assert"] = case, Verdict(CRASH, (Violation("crash", "device-assert", "a kernel broke the CUDA context"),))
    runs = []
    for name, (case, verdict) in found.items():
        text = render(finding_of(case, verdict), exhibit_of(runner, case) | GPU, bare=name == "assert")
        runs += [[write(tmp_path, name, text)], [tmp_path / f"{name}.py", HEALTHY]]
    answers = batch(*runs)
    assert [code for code, _ in answers] == [1, 0, 1, 0, 1, 0], answers
    assert "illegal-access" in answers[0][1]
    assert "illegal-access" in answers[2][1]
    assert "device-assert, and the CUDA context is lost" in answers[4][1]


def test_fixed_and_other_failures(runner: Runner, tmp_path: Path, batch: Batch) -> None:
    """A lost context is not the finding of another check, and neither is an error."""
    bug = next(bug for bug in BUGS if bug.name == "nan_argmax")
    case, verdict = failing(runner, bug)
    script = write(tmp_path, "repro", render(finding_of(case, verdict), exhibit_of(runner, case) | GPU, bare=True))
    other = tmp_path / "other.py"
    other.write_text(
        "import torch\n\n\n"
        "def breaks(logits, k, **rest):\n"
        "    logits[:, torch.full((1,), 10**6, device='cuda')]\n    raise ValueError('later')\n\n\n"
        "def raises(logits, k, **rest):\n    raise ValueError('no')\n"
    )
    answers = batch([script, f"{other}:breaks"], [script, f"{other}:raises"], [script, HEALTHY])
    assert [code for code, _ in answers] == [2, 2, 0], answers
    assert "died: device-assert" in answers[0][1]
    assert "raised: ValueError" in answers[1][1]
