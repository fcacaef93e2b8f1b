"""benchmarks/interpreter_against_gpu.py: what differs is told, and is allowed for a reason alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmark_script import benchmark

FOUR = torch.tensor([1.0, -2.0, torch.nan, 1e-40])


@pytest.fixture(scope="module")
def script() -> Any:
    return benchmark("interpreter_against_gpu")


def operation(script: Any, name: str, x: torch.Tensor = FOUR) -> Any:
    return script.Operation(name, "", x, torch.full_like(x, torch.nan), x.dtype)


def bits(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32).view(torch.float32)


def test_the_same_bits_and_two_errors_are_no_difference(script: Any) -> None:
    same = torch.tensor([0.0, torch.nan, torch.inf, -0.0])
    assert script.compare(operation(script, "float32: tl.exp(x)"), same, same.clone()) is None
    assert script.compare(operation(script, "float32: tl.exp(x)"), "InterpreterError: a", "CompilationError: b") is None


def test_an_error_on_one_side_is_not_allowed(script: Any) -> None:
    found = script.compare(operation(script, "float32: tl.exp(x)"), "OverflowError: too large", FOUR)
    assert (found.kinds, found.reason) == ({"error": 1}, "")
    assert "OverflowError" in found.example


@pytest.mark.parametrize(
    ("name", "theirs", "kinds", "allowed"),
    [
        ("float32: tl.exp(x)", [1.0 + 2**-22, -2.0, 5.0, 1e-40], {"number": 1}, True),
        ("float32: tl.exp(x)", [1.0 + 2**-12, -2.0, 5.0, 1e-40], {"number": 1}, False),  # too far
        ("float32: tl.exp(x)", [1.0, torch.inf, 5.0, 1e-40], {"inf or NaN": 1}, False),
        ("float32: tl.exp(x)", [1.0, -2.0, -5.0, 1e-40], {"of NaN": 1}, False),
        ("float32: tl.clamp(x, -1.0, 1.0)", [1.0, -2.0, -5.0, 1e-40], {"of NaN": 1}, True),
        ("float32: tl.floor(x)", [1.0, -2.0, 5.0, 1.0], {"subnormal": 1}, True),
        ("float32: tl.floor(x)", [1.0, -3.0, 5.0, 1e-40], {"number": 1}, False),
        ("float32: x + 1", [1.0 + 2**-23, -2.0, 5.0, 1e-40], {"number": 1}, False),
        ("float32: x + 1", [1.0, -2.0, 5.0, 0.0], {"subnormal": 1}, False),
    ],
)  # fmt: skip
def test_a_difference_has_a_kind_and_perhaps_a_reason(
    script: Any, name: str, theirs: list[float], kinds: dict[str, int], allowed: bool
) -> None:
    found = script.compare(operation(script, name), torch.tensor([1.0, -2.0, 5.0, 1e-40]), torch.tensor(theirs))
    assert (found.kinds, bool(found.reason)) == (kinds, allowed)


def test_bits_of_nan_and_signs_of_zero_are_seen(script: Any) -> None:
    name, ordinary = "float32: tl.exp(x)", torch.ones(2)
    found = script.compare(operation(script, name, ordinary), bits(0x7FC00000, 0), bits(0x7FFFFFFF, -(2**31)))
    assert (found.kinds, found.reason) == ({"bits of NaN": 1, "sign of 0": 1}, "")


def test_a_product_is_held_to_its_largest_number(script: Any) -> None:
    one = operation(script, "float32: tl.dot() of 16, tf32")
    ours = torch.tensor([8.0, 1e-3, 1.0, 1.0])
    assert script.compare(one, ours, ours + torch.tensor([0.0, 1e-6, 0.0, 0.0])).reason
    assert not script.compare(one, ours, ours + torch.tensor([0.0, 1e-4, 0.0, 0.0])).reason  # as TF32 is off


@pytest.mark.interpreter
def test_what_is_interpreted_is_compared_with_a_file(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with a GPU, whose side comes from a file: first what the interpreter itself gave, then some of it wrong."""
    only = ["--only", r"tl\.sum|umulhi|of 16, tf32$"]
    compiled = tmp_path / "interpreted.pt"
    if not torch.cuda.is_available():
        assert script.main([*only, "--keep", str(tmp_path)]) == 3
    else:
        script._start("interpreted", compiled, only[1])
    assert script.main([*only, "--compiled", str(compiled)]) == 0
    assert "11 operations: 11 have the same bits" in capsys.readouterr().out
    results = torch.load(compiled)
    results["int32: (tl.sum(x, 0)).to(tl.int64)"] = "OverflowError: out of bounds"
    torch.save(results, compiled)
    assert script.main([*only, "--compiled", str(compiled)]) == 1
    told = capsys.readouterr().out
    assert told.startswith("NOT ALLOWED\n  int32: (tl.sum(x, 0)).to(tl.int64)")
    assert "10 have the same bits, 0 differ and may, 1 may not" in told
