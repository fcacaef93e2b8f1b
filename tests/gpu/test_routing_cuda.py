"""Runs compiled_routing.py, whose kernels are compiled, in a process without our conftest, which interprets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

FILE = Path(__file__).with_name("compiled_routing.py")
TESTS = ("test_reference_layouts_and_batches", "test_rows_it_cannot_rank", "test_waits_for_its_producer_in_a_graph")


@pytest.mark.parametrize("test", TESTS)
def test_the_compiled_kernels(test: str, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--noconftest", "-c", str(tmp_path / "none.ini"),
               "--rootdir", str(tmp_path), "-p", "no:cacheprovider", f"{FILE}::{test}"]  # fmt: skip
    (tmp_path / "none.ini").write_text("[pytest]\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_every_test_of_the_file_is_run() -> None:
    defined = [line[4:].partition("(")[0] for line in FILE.read_text().splitlines() if line.startswith("def test_")]
    assert tuple(defined) == TESTS
