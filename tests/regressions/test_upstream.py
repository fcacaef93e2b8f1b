"""The seed corpus: upstream defects that the ops here can express, each as its smallest case, by issue number.

A file names the planted bug that has the defect (`twin`), and the check that must fire. On the twin it does; sound
implementations pass. Files without a twin hold an input alone. README.md says which rows of the collected bugs are
expressed, and why the others are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz import planted
from moe_fuzz.campaign import corpus
from moe_fuzz.campaign.confirm import rerun
from moe_fuzz.campaign.locate import is_memory_fault
from moe_fuzz.campaign.selftest import options_of, violations_of
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.planted.catalog import PLANTED, get_planted
from moe_fuzz.planted.entry import Planted
from moe_fuzz.verdict import PASS, VIOLATION, Verdict
from moe_fuzz.worker.pool import Pool
from tests.gpu.telling import told, told_all

HERE = Path(__file__).parent
FILES = sorted((HERE / "upstream").glob("*.json"))
README = (HERE / "README.md").read_text(encoding="utf-8")
#: Nobody's case: the failure needs others before it in its process, or comes less than every other time.
WITHOUT = {"stale_row_max", "arrival_order"}
RECORDS = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in FILES}
TWINS = {stem: record for stem, record in RECORDS.items() if record["twin"]}
HOST = [stem for stem, record in TWINS.items() if record["device"] == "cpu"]
DEVICE = [stem for stem, record in TWINS.items() if record["device"] == "cuda"]
OPS = sorted({record["case"]["op"] for record in RECORDS.values()})
TRIES = 3
#: torch's softmax and division, put together as everybody does, divide 0 by 0 here too.
TOO_HARD_FOR_TORCH = "sglang-31017-renorm-zero-division"


def case_of(record: dict[str, Any], target: str) -> Case:
    return replace(Case.from_json(record["case"]), target=target)


def bug_of(record: dict[str, Any]) -> Planted:
    bug = get_planted(record["twin"].partition("@planted.")[2])
    assert bug is not None
    return bug


def is_it(record: dict[str, Any], verdict: Verdict) -> bool:
    if record["check"] == "fence":  # which tensor, the parent would ask by further runs
        return is_memory_fault(verdict.key)
    found = {(violation.check, violation.symptom) for violation in violations_of(verdict)}
    return any(record["check"] == check and record["symptom"] in (None, symptom) for check, symptom in found)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(1, "cpu", memory_limit=2 << 30) as pool:
        yield pool


def test_every_planted_bug_has_its_case() -> None:
    told = {record["twin"].partition("@planted.")[2] for record in TWINS.values()}
    assert told | WITHOUT == {bug.name for bug in PLANTED}, "python tests/regressions/grow.py makes those that are new"
    assert not told & WITHOUT


@pytest.mark.parametrize("stem", RECORDS)
def test_a_file_is_named_by_its_issue_and_told_in_the_table(stem: str) -> None:
    record = RECORDS[stem]
    project, _, number = record["upstream"].partition("#")
    assert stem.startswith(f"{project.lower()}-{number}-")
    assert re.search(rf"(?<![\w-]){re.escape(record['upstream'])}(?!\d)", README), "README.md has no row for it"
    assert record["cause"]
    if record["twin"]:
        assert bug_of(record).upstream == record["upstream"]


def test_it_is_a_corpus() -> None:
    found = corpus.load(HERE, get_space)
    assert not found.lines()
    assert len(found.entries) >= 150
    assert all(entry.pinned for entry in found.entries.values())


def interpreted(stem: str) -> bool:
    """Whether the twin has kernels, which on a host are interpreted."""
    module = resources.files(planted) / f"{bug_of(TWINS[stem]).module}.py"
    return "import triton" in module.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "stem", [pytest.param(stem, marks=pytest.mark.interpreter if interpreted(stem) else ()) for stem in HOST]
)
def test_the_twin_fails_in_the_same_way(stem: str, pool: Pool) -> None:
    record = TWINS[stem]
    case, options = case_of(record, record["twin"]), options_of(bug_of(record))
    with pool.lease() as worker:
        verdict = worker.run([case], case.target, options)[0]
    for _ in range(TRIES):  # a bug that keeps state shows in a process of its own; one that races, sometimes
        if is_it(record, verdict):
            return
        verdict = rerun(pool, (case,), case.target, options)
    assert is_it(record, verdict), told(verdict, case)


@pytest.mark.parametrize("op", OPS)
def test_sound_implementations_pass(op: str, pool: Pool) -> None:
    target = f"{op}@torch"
    info: TargetInfo = pool.describe(target)
    taken = {
        stem: case
        for stem, case in ((stem, case_of(r, target)) for stem, r in RECORDS.items() if r["case"]["op"] == op)
        if stem != TOO_HARD_FOR_TORCH and not get_space(op).refusal(case, info)
    }
    assert taken
    with pool.lease() as worker:
        verdicts = worker.run(list(taken.values()), target, RunOptions(deadline=60.0))
    for stem, verdict in zip(taken, verdicts, strict=True):
        found = {(violation.check, violation.symptom) for violation in verdict.violations}
        # torch's own routers give NaN weights on rows of NaN, and no more than that
        assert verdict.kind == PASS or (
            verdict.kind == VIOLATION and found == {("finite", "nan on an undefined row")}
        ), (stem, verdict.kind, verdict.detail, found)  # fmt: skip


@pytest.mark.interpreter
def test_our_router_passes_where_torchs_does_not(pool: Pool) -> None:
    case = case_of(RECORDS[TOO_HARD_FOR_TORCH], "topk_softmax@builtin")
    assert rerun(pool, (case,), case.target, RunOptions()).kind == PASS
    torchs = replace(case, target="topk_softmax@torch")
    assert is_it(RECORDS[TOO_HARD_FOR_TORCH], rerun(pool, (torchs,), torchs.target, RunOptions()))


@pytest.mark.gpu
@pytest.mark.parametrize("stem", DEVICE)
def test_the_twin_fails_on_a_gpu(cuda_pool: Pool, stem: str) -> None:
    record = TWINS[stem]
    case, options = case_of(record, record["twin"]), options_of(bug_of(record))
    runs = 1 if record["check"] == "hang" else 2
    verdicts = [rerun(cuda_pool, (case,), case.target, options) for _ in range(runs)]
    assert any(is_it(record, verdict) for verdict in verdicts), told_all(verdicts, [case] * len(verdicts))
