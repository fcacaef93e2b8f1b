"""Defects that campaigns found in released libraries, each as its smallest case: docs/targets.md tells of them.

A file holds the cause, where it was found, the case, and the check that must fire. On its twin (a planted bug, or the
same flaw in `twins.py`) it must; a sound implementation passes; and the library itself, where it is at hand, fails in
that way or not at all, since a later release may have repaired it.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz.case import Case
from moe_fuzz.execute.runner import Runner
from moe_fuzz.options import LIB_VARIABLES, RunOptions
from moe_fuzz.targets import sources
from moe_fuzz.verdict import PASS, VIOLATION, Verdict
from moe_fuzz.worker.pool import Pool
from tests.gpu.telling import told

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("*.json"))
FOUND = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner("cpu")


def read(file: Path) -> tuple[dict[str, Any], Case]:
    record = json.loads(file.read_text())
    return record, Case.from_json(record["case"])


def found(verdict: Verdict) -> set[tuple[str, str]]:
    return {(violation.check, violation.symptom) for violation in verdict.violations}


def is_it(record: dict[str, Any], verdict: Verdict) -> bool:
    """Whether the verdict holds what was recorded. Without a symptom any of the check's will do: errors have names of
    their own in each library, and what is chosen by memory that nobody wrote is wrong in more than one way."""
    want = (record["check"], record["symptom"])
    return any(want in ((check, symptom), (check, None)) for check, symptom in found(verdict))


def test_there_are_cases() -> None:
    assert len(FILES) >= 12
    assert len({read(file)[0]["finding"] for file in FILES}) == len(FILES)


@FOUND
def test_the_twin_fails_in_the_same_way(file: Path, runner: Runner) -> None:
    record, case = read(file)
    if not record["twin"]:
        pytest.skip("no twin: the flaw shows on the library alone")
    target = record["twin"] if "@" in record["twin"] else f"{case.op}@{HERE / record['twin']}"
    case = replace(case, target=target)
    if record["check"] == "crash":  # of a process, which is not to be this one
        with Pool(1, "cpu", memory_limit=2 << 30) as pool, pool.lease(target) as worker:
            verdict = worker.run([case], target, RunOptions())[0]
    else:
        verdict = runner.run(case, target, RunOptions())
        assert verdict.kind == VIOLATION, told(verdict, case)
    assert is_it(record, verdict), found(verdict)


@FOUND
def test_a_sound_implementation_does_not(file: Path, runner: Runner) -> None:
    record, case = read(file)
    target = f"{case.op}@torch"
    verdict = runner.run(replace(case, target=target), target, RunOptions())
    assert verdict.kind in (PASS, VIOLATION), told(verdict, case)
    assert not is_it(record, verdict)
    # torch's own routers give NaN weights on rows of NaN, and no more than that
    assert found(verdict) <= {("finite", "nan on an undefined row")}


@pytest.mark.gpu
@FOUND
def test_the_library_fails_in_that_way_or_not_at_all(cuda_pool: Pool, file: Path) -> None:
    record, case = read(file)
    provider = case.target.partition("@")[2].partition(".")[0]
    variable = LIB_VARIABLES.get(provider, "")
    package = sources.SOURCES[provider].package if variable else provider
    if not (os.environ.get(variable) or sources.installed(package)):
        pytest.skip(f"{provider} is not installed{f', and {variable} is not set' if variable else ''}")
    with cuda_pool.lease(case.target) as worker:
        verdict = worker.run([case], case.target, RunOptions(deadline=20.0, first_deadline=120.0))[0]
    assert verdict.kind == PASS or is_it(record, verdict), told(verdict, case)
