"""`moe-fuzz bench`: refusals, and a run through a process that makes its times up."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_fuzz.bench.drive import Timer
from moe_fuzz.bench.points import Candidate
from moe_fuzz.cli import bench, machine

FAKE = str(Path(__file__).parents[1] / "cpu/bench_child.py")
SOME = ("bench", "topk_softmax", "builtin", "torch", "--preset", "mixtral-8x7b", "--tokens", "1,16", "--rounds", "8")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: (machine.Gpu("imagined"),))
    monkeypatch.setattr(bench, "Timer", lambda: Timer([sys.executable, FAKE]))


def test_without_a_gpu(call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", tuple)
    ran = call("bench", "topk_softmax")
    assert ran.code == 3
    assert "no GPU" in ran.err
    assert "hint" in ran.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("topk_softmacks",), "did you mean 'topk_softmax'"),
        (("topk_softmax", "nobody"), "no target 'nobody'"),
        (("topk_softmax", "--preset", "mixtral"), "did you mean 'mixtral-8x7b'"),
        (("topk_softmax", "--tokens", "1,many"), "write numbers from 1"),
        (("topk_softmax", "--tokens", "0"), "write numbers from 1"),
        (("topk_softmax", "--tokens", ","), "write numbers from 1"),
        (("topk_softmax", "--rounds", "3"), "6<=x<=10000"),
        (("topk_softmax", "--ab", "builtin", "theirs"), "the candidates are 'builtin'"),
        (("topk_softmax", "--out", "no/such/place.json"), "there is no directory"),
    ],
)
def test_usage(call: Callable, gpu: None, arguments: tuple[str, ...], complaint: str) -> None:
    ran = call("bench", *arguments)
    assert ran.code == 2
    assert complaint in ran.err


def test_table_and_file(call: Callable, gpu: None, tmp_path: Path) -> None:
    ran = call(*SOME, "--out", str(tmp_path / "r.json"), "--ab", "torch", "builtin")
    assert ran.code == 0, ran.err
    assert "mixtral-8x7b" in ran.out
    assert "mixtral-8x7b T=16: torch / builtin = 1.99" in ran.out
    assert "2/2 mixtral-8x7b T=16" in ran.err
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["machine"] == {"gpu": "none"}
    assert record["versions"] == {"torch": "0"}
    assert record["method"]["rounds"] == 8
    assert {"command", "date"} <= set(record)
    assert [point["tokens"] for point in record["points"]] == [1, 16]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_nothing_timed(call: Callable, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "candidates", lambda op, targets: (bench_candidate("crashes"), bench_candidate("wrong")))
    ran = call("bench", "topk_softmax", "--preset", "mixtral-8x7b", "--tokens", "1", "--rounds", "6")
    assert ran.code == 3
    assert "SIGSEGV" in ran.out
    assert "ids: twice" in ran.out


def bench_candidate(label: str) -> Candidate:
    return Candidate(label, f"topk_softmax@{label}")
