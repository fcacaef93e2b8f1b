"""allreduce_rmsnorm across real ranks, one process a GPU, over symmetric memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz.bench.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu(2)]

PROGRAM = Path(__file__).with_name("rank_program.py")


def played(scene: str, world: int = 2) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = json.loads(run_ranks(PROGRAM, world, [scene], 120.0).splitlines()[-1])
    assert len(answers) == world
    return answers


def test_every_shape_is_exact_and_the_same_on_all_ranks() -> None:
    for answer in played("shapes"):
        assert answer == {"bad": [], "calls": 72, "settled": True}


def test_a_thousand_calls_of_two_groups_with_slow_ranks() -> None:
    for answer in played("loop"):
        assert answer == {"wrong": [0, 0], "settled": True}


def test_replays_of_a_graph_with_changed_data() -> None:
    for answer in played("graph"):
        assert answer == {"wrong": 0, "settled": True}


def test_a_late_rank_is_waited_for_and_a_missing_one_named() -> None:
    first, second = played("late")
    assert (first["wrong"], second["wrong"], first["again"], second["again"]) == (0, 0, 0, 0)
    assert first["named"] == 1
    assert first["nan"]
    assert 0.9 < first["seconds"] < 5
    assert first["settled"]
    assert second["settled"]


@pytest.mark.multigpu(4)
def test_four_ranks() -> None:
    for answer in played("shapes", 4):
        assert answer == {"bad": [], "calls": 72, "settled": True}
    for answer in played("loop", 4):
        assert answer == {"wrong": [0, 0], "settled": True}
