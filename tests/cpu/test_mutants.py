"""benchmarks/mutants.py changes what is run, in one place at a time, and its campaigns find such a change."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from tests.benchmark_script import benchmark

ROOT = Path(__file__).parents[2]

SOURCE = '''"""A kernel, x < 1."""

SIZE: int = 4


@jit(warps=8)
def kernel(x_ptr, count: int = 3):
    """Not x > 2."""
    at = tl.arange(0, 16)
    if count < 0:
        raise ValueError(f"{count + 1}")
    x = tl.where(at >= count, tl.load(x_ptr + at, mask=at < count, other=0.0), 1.5)
    tl.store(x_ptr + at, tl.maximum(x, ~at))
'''


@pytest.fixture(scope="module")
def mutants() -> Any:
    return benchmark("mutants")


def test_it_changes_what_is_run_in_one_place(mutants: Any) -> None:
    found = list(mutants.mutants("kernel.py", SOURCE))
    changes = {(one.line, one.was, one.becomes) for one in found}
    assert changes == {
        (3, "4", "5"), (9, "0", "1"), (9, "16", "17"), (12, ">=", ">"), (12, "+", "-"), (12, "<", "<="),
        (12, "0.0", "1.0"), (12, "1.5", "2.5"), (12, "tl.load(x_ptr + at, mask=at < count, other=0.0)",
                                                "tl.load(x_ptr + at)"),
        (12, "tl.where(at >= count, tl.load(x_ptr + at, mask=at < count, other=0.0), 1.5)",
             "tl.where(at >= count, 1.5, tl.load(x_ptr + at, mask=at < count, other=0.0))"),
        (13, "tl.store(x_ptr + at, tl.maximum(x, ~at))", "pass"), (13, "+", "-"), (13, "tl.maximum", "tl.minimum"),
        (13, "~at", "(at)"),
    }  # fmt: skip
    for one in found:
        changed = one.apply(SOURCE)
        ast.parse(changed)
        assert changed[: one.begin] + one.was + changed[one.begin + len(one.becomes) :] == SOURCE


def test_a_trap_stands_in_front_of_the_statement(mutants: Any) -> None:
    one = next(one for one in mutants.mutants("kernel.py", SOURCE) if one.becomes == "1.0")
    assert "    1 // 0\n    x = tl.where" in one.trap(SOURCE)


@pytest.mark.parametrize("file", ["align.py", "routing_lanes.py", "experts_bf16/kernels.py"])
def test_every_file_has_its_targets_and_the_same_mutants_again(mutants: Any, file: str) -> None:
    assert mutants.targets_of(file)
    assert mutants.chosen(file, 5, 1) == mutants.chosen(file, 5, 1) != mutants.chosen(file, 5, 2)


@pytest.mark.interpreter
def test_a_campaign_finds_one_and_none_where_nothing_is_changed(mutants: Any) -> None:
    source = (ROOT / "kernels" / "align.py").read_text()
    gone = next(one for one in mutants.mutants("align.py", source) if one.becomes == "pass" and "zero_" in one.was)
    found, ran, _ = mutants.try_source("align.py", gone.apply(source), 40, 60.0, 0)
    assert found.startswith("written")
    assert 0 < ran <= 40
    assert mutants.try_source("align.py", source, 12, 60.0, 0)[:2] == ("", 24)  # by two targets
