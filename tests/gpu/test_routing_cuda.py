"""Runs compiled_routing.py, whose kernels are compiled, in a process without our conftest, which interprets."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

FILE = Path(__file__).with_name("compiled_routing.py")
TESTS = (
    "test_reference_layouts_and_batches", "test_rows_it_cannot_rank", "test_the_best_of_many_rows_is_that_of_a_few",
    "test_waits_for_its_producer_in_a_graph",
)  # fmt: skip
#: A share of a test is a process: they have no binary in common, and compile side by side.
SHARES = [f"{router} and {dtype}" for router in ("softmax", "sigmoid") for dtype in ("single", "brain", "half")]


@pytest.mark.parametrize(("test", "share"), [*itertools.product(TESTS[:2], SHARES), (TESTS[2], ""), (TESTS[3], "")])
def test_the_compiled_kernels(test: str, share: str, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--noconftest", "-c", str(tmp_path / "none.ini"),
               "--rootdir", str(tmp_path), "-p", "no:cacheprovider", f"{FILE}::{test}", "-k", share]  # fmt: skip
    (tmp_path / "none.ini").write_text("[pytest]\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_every_test_of_the_file_is_run() -> None:
    defined = [line[4:].partition("(")[0] for line in FILE.read_text().splitlines() if line.startswith("def test_")]
    assert tuple(defined) == TESTS


def test_every_case_is_in_one_share() -> None:
    """None is lost, and none runs twice."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--noconftest", "--collect-only", "-p", "no:cacheprovider"]

    def collected(*arguments: str) -> list[str]:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=100, check=False)
        return sorted(line for line in done.stdout.splitlines() if "::" in line)

    found = [case for share in SHARES for case in collected(f"{FILE}::{TESTS[0]}", f"{FILE}::{TESTS[1]}", "-k", share)]
    assert found
    assert sorted(found) == collected(f"{FILE}::{TESTS[0]}", f"{FILE}::{TESTS[1]}")
