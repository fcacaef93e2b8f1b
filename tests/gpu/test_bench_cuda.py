"""The benchmark on a device: candidates are verified, captured and timed, and a broken one costs only its own line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_fuzz.bench.drive import Timer
from moe_fuzz.bench.points import Candidate, Point, candidates, points
from moe_fuzz.cli.main import main

pytestmark = pytest.mark.gpu

BROKEN = """
import torch, triton, triton.language as tl

@triton.jit
def _kernel(pointer, at):
    tl.store(pointer + at, 1.0)

def illegal(logits, top_k):
    out = torch.zeros(logits.shape[0], top_k, device=logits.device)
    _kernel[(1,)](out, 1 << 44)
    return out, out.int()

def wrong(logits, top_k):
    return torch.zeros(logits.shape[0], top_k, device="cuda"), torch.zeros(
        logits.shape[0], top_k, device="cuda", dtype=torch.int32)

def synchronizes(logits, top_k):
    scores = torch.softmax(logits, -1, dtype=torch.float32)
    best = torch.topk(scores, top_k)
    torch.cuda.synchronize()
    return best.values, best.indices.int()
"""
SMALL = Point("topk_softmax", "small", 64, {"experts": 64, "top_k": 6, "dtype": "bfloat16"})


def test_a_point(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BROKEN)
    broken = [Candidate(name, f"topk_softmax@{file}:{name}") for name in ("illegal", "wrong", "synchronizes")]
    ours = candidates("topk_softmax", ("builtin", "torch", "builtin, NaN-unsafe"))
    with Timer() as timer:
        result = timer.measure(SMALL, [*broken, *ours], rounds=8, launches=20)
        assert timer.environment["machine"]["gpu"]
    assert set(result.times) == {candidate.label for candidate in ours}
    assert {label: status for label, (status, _) in result.left_out.items()} == {
        "illegal": "wrong", "wrong": "wrong", "synchronizes": "error"
    }  # fmt: skip
    assert all(0.5 < sample < 200 for samples in result.times.values() for sample in samples)  # microseconds
    empty, ours_us = min(result.floor["empty"]), min(result.times["builtin"])
    assert empty < ours_us < min(result.times["torch"])
    assert result.floor["bytes_per_us"] > 1e5  # 0.1 TB/s


def test_nan_rows() -> None:
    (point,) = points("topk_softmax", ("nan-rows",))
    with Timer() as timer:
        result = timer.measure(point, candidates("topk_softmax", ("builtin", "builtin, NaN-unsafe")), 6, 10)
    assert result.facts["builtin"]["nan_safe"] == "safe"
    assert result.facts["builtin, NaN-unsafe"]["nan_safe"] == "finite"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    arguments = ["bench", "topk_softmax", "builtin", "torch", "--preset", "mixtral-8x7b", "--tokens", "1,4096"]
    assert main([*arguments, "--rounds", "6", "--out", str(out)]) == 0
    assert "mixtral-8x7b" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert [candidate["status"] for point in record["points"] for candidate in point["candidates"]] == ["ok"] * 4
