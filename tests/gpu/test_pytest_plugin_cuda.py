"""`@fuzz` on a GPU: the workers import the test's file, and the router runs there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cpu.test_pytest_plugin import ROUTERS, pytest_in

pytestmark = pytest.mark.gpu

TEST = '''
def on_the_device(logits, top_k, renormalize=False):
    assert logits.is_cuda
    return good(logits, top_k, renormalize)

@fuzz("topk_softmax", max_cases=20)
def test_good(): return on_the_device
'''


def test_a_router_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(ROUTERS + TEST)
    done = pytest_in(tmp_path, device="cuda")
    assert "1 passed" in done.stdout, done.stdout + done.stderr
