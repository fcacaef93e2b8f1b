"""`moe-fuzz sanitize`: its words and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from moe_fuzz.case import Case
from moe_fuzz.cli import params
from moe_fuzz.sanitize import lane
from moe_fuzz.sanitize.lane import ABSENT, CLEAN, FAILED, REFUSED, REPORTS, TIMEOUT, Outcome
from moe_fuzz.sanitize.log import Report

REPORT = Report("memcheck", "out of bounds", "Invalid __global__ read of size 4 bytes", "_kernel", "routing.py", 118)


class NoPool:
    def __init__(self, **options: object) -> None:
        pass

    def __enter__(self) -> NoPool:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def describe(self, target: str) -> None:
        pass


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Answers in the place of the tool."""

    def answer(*outcomes: Outcome) -> None:
        def sanitize(pool, cases, target, device, tools, seconds, told):  # type: ignore[no-untyped-def]
            for outcome in outcomes:
                told(outcome)
            return outcomes

        monkeypatch.setattr("moe_fuzz.cli.sanitize.Pool", NoPool)
        monkeypatch.setattr(params, "pick_device", lambda wanted: "cuda")
        monkeypatch.setattr(lane, "find", lambda: "/bin/compute-sanitizer")
        monkeypatch.setattr(lane, "sanitize", sanitize)

    return answer


@pytest.mark.parametrize(
    ("kinds", "code"),
    [
        ([CLEAN, CLEAN], 0),
        ([CLEAN, REPORTS], 1),
        ([REPORTS, REFUSED], 1),
        ([CLEAN, REFUSED], 3),
        ([FAILED], 3),
        ([TIMEOUT], 3),
        ([ABSENT], 3),
    ],
)
def test_a_report_is_1_and_silence_of_who_could_not_look_is_not_0(
    call: Callable, case: Case, answering: Callable, kinds: list[str], code: int
) -> None:
    answering(*(Outcome("memcheck", kind, (REPORT,) if kind == REPORTS else (), "why") for kind in kinds))
    ran = call("sanitize", case.inline())
    assert ran.code == code
    for kind in kinds:
        assert f"memcheck  {kind}" in ran.out
    assert ("routing.py:118 in _kernel" in ran.out) == (REPORTS in kinds)


def test_one_document(call: Callable, case: Case, answering: Callable) -> None:
    answering(Outcome("memcheck", REPORTS, (REPORT,)), Outcome("racecheck", CLEAN))
    data = json.loads(call("sanitize", case.inline(), "--json").out)
    assert data["exit_code"] == 1
    assert data["tools"][0]["reports"][0]["site"] == "routing.py:118 in _kernel"
    assert data["case"]["digest"] == case.digest


def test_no_gpu_is_told(call: Callable, case: Case) -> None:
    ran = call("sanitize", case.inline(), "--device", "cpu")
    assert ran.code == 3
    assert "kernels on a GPU" in ran.err
    assert "moe-fuzz replay" in ran.err


def test_no_tool_is_told(call: Callable, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "pick_device", lambda wanted: "cuda")
    monkeypatch.setattr(lane, "find", lambda: None)
    ran = call("sanitize", case.inline())
    assert ran.code == 3
    assert "CUDA toolkit" in ran.err


def test_an_unknown_tool_is_refused(call: Callable, case: Case) -> None:
    ran = call("sanitize", case.inline(), "--tool", "memchek")
    assert ran.code == 2
    assert "memcheck" in ran.err
