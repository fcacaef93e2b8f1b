"""Kernels of a program a row take minutes in Triton's interpreter: that is slow, and no hang."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_fuzz import strategies
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import HANG, REJECTED, UNJUDGED
from moe_fuzz.worker.pool import Pool

TARGET = """
import triton
import triton.language as tl
from moe_fuzz.targets.torch import topk_softmax as sound

@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr, SPINS: tl.constexpr):
    value = tl.zeros((BLOCK,), tl.float32)
    for _ in range(20):
        value += tl.load(x_ptr)
    while SPINS:
        value += 1

def slow(logits, top_k):
    kernel[(1 << 20,)](logits, 16, False)
    return sound(logits, top_k)

def spins(logits, top_k):
    kernel[(1 << 20,)](logits, 16, True)
    return sound(logits, top_k)
"""


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["slow", "spins"])
def test_who_begins_another_program_does_not_hang(tmp_path: Path, name: str) -> None:
    file = tmp_path / "kernels.py"
    file.write_text(TARGET)
    target = f"topk_softmax@{file}:{name}"
    with Pool(1, "cpu") as pool:
        info = pool.describe(target)
        case = next(c for c in strategies.grid(get_space("topk_softmax"), info, "cpu", 1) if c.steps[0].tokens)
        with pool.lease(target) as worker:
            [verdict] = worker.run((case,), target, RunOptions(deadline=1.5))
    if name == "slow":
        assert (verdict.kind, verdict.stats.get(UNJUDGED)) == (REJECTED, 1), verdict
        assert "still interpreted, a program after the other, after 3 s" in verdict.detail
        assert 3 <= verdict.seconds < 20
    else:
        assert verdict.kind == HANG
        assert verdict.violations[0].symptom == "deadline"
        assert "kernels.py" in verdict.violations[0].site
