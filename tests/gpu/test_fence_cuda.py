"""Fences on a GPU: kernels that step out of their memory lose their context; with soft guards they live, and the canary
names what they wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

LOST = "illegal-access"
SIZE = 8 * 16 * 4  # bytes of src and of dst

Run = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("edge", ["right", "left"])
@pytest.mark.parametrize("victim", ["honest", "honest_own", "torch_read_input"])
@pytest.mark.parametrize("hard", [None, ()])
def test_honest_kernel_lives(run: Run, victim: str, edge: str, hard: tuple[str, ...] | None) -> None:
    assert run(victim, edge, hard=hard) == {"lost": "", "violations": [], "unwritten": 0, "nan": 0}


@pytest.mark.parametrize(
    ("victim", "edge"),
    [
        ("read_right", "right"),
        ("read_left", "left"),
        ("read_row_off_by_one", "right"),
        ("read_far", "right"),
        ("read_far", "left"),
        ("write_right", "right"),
        ("write_left", "left"),
        ("write_input", "right"),
        ("write_input", "left"),
        ("torch_write_input", "right"),
        ("read_own_workspace", "right"),
        ("write_own_workspace", "left"),  # own memory lies flush right whatever the edge
        ("write_on_another_stream", "right"),
        ("read_empty", "right"),
    ],
)
def test_hard_fence_kills(run: Run, victim: str, edge: str) -> None:
    assert run(victim, edge) == {"lost": LOST}


@pytest.mark.parametrize(
    ("victim", "edge", "violation"),
    [
        ("write_right", "right", ["dst:right", SIZE]),
        ("write_left", "left", ["dst:left", -4]),
        ("write_left", "right", ["dst:left", -4]),
        ("write_own_workspace", "right", ["own:right", SIZE]),
    ],
)
def test_soft_fence_names_the_write(run: Run, victim: str, edge: str, violation: list[Any]) -> None:
    result = run(victim, edge, hard=())
    assert (result["lost"], result["violations"]) == ("", [violation])


@pytest.mark.parametrize(("victim", "edge"), [("read_right", "right"), ("read_left", "left")])
def test_soft_fence_survives_a_read_that_gives_nan(run: Run, victim: str, edge: str) -> None:
    result = run(victim, edge, hard=())
    assert (result["lost"], result["violations"], result["nan"], result["unwritten"]) == ("", [], 1, 0)


@pytest.mark.parametrize("victim", ["write_input", "torch_write_input"])
def test_inputs_are_read_only_by_option(run: Run, victim: str) -> None:
    assert run(victim, hard=())["lost"] == LOST
    assert run(victim, readonly=("dst",))["lost"] == ""
    assert run(victim, readonly=())["lost"] == ""


def test_reruns_name_tensor_side_and_access(run: Run) -> None:
    assert run("read_right", hard=("src",))["lost"] == LOST
    assert run("read_right", hard=("dst",))["lost"] == ""
    assert run("read_right", sides="right")["lost"] == LOST
    assert run("read_right", sides="left")["lost"] == ""
    assert run("read_right", access="write")["lost"] == ""
    assert run("read_far", access="write")["lost"] == ""
    assert run("write_right", hard=("dst",), access="write")["lost"] == LOST
    assert run("write_right", hard=("src",))["lost"] == ""
    assert run("write_left", "left", hard=("dst",), sides="left", access="write")["lost"] == LOST
    assert run("write_left", "left", sides="right")["violations"] == [["dst:left", -4]]


def test_own_memory_by_option(run: Run) -> None:
    assert run("read_own_workspace", hard=("own0",))["lost"] == LOST
    assert run("read_own_workspace", hard=("src", "dst"))["lost"] == ""
    assert run("read_own_workspace", own="off")["lost"] == ""


@pytest.mark.parametrize("edge", ["right", "left"])
def test_every_dtype_keeps_its_bits(run: Run, edge: str) -> None:
    assert run("dtypes", edge) == {"lost": "", "wrong": [], "violations": []}


def test_canaries_watch_every_byte(run: Run) -> None:
    result = run("canaries")
    assert result["told"] == [
        [-1, [["t0:left", -1]]], [-2, [["t0:left", -2]]], [-33, [["t0:left", -33]]], [60, [["t0:right", 60]]],
        [-1, [["t1:left", -1]]], [-2, [["t1:left", -2]]], [-33, [["t1:left", -33]]],
        [-1, [["t2:left", -1]]], [-2, [["t2:left", -2]]], [-33, [["t2:left", -33]]], [7, [["t2:right", 7]]],
    ]  # fmt: skip
    message = "3 bytes overwritten between the elements of strided [4, 6] float32, 28 to 30 bytes into its storage"
    assert result["gap"] == [["strided:gap", 28, message]]


def test_the_left_edge_has_its_slack_on_the_right(run: Run) -> None:
    assert run("canaries", "left")["told"] == [
        [60, [["t0:right", 60]]], [7, [["t1:right", 7]]], [7, [["t2:right", 7]]],
    ]  # fmt: skip


def test_memory_is_used_again_once_its_tensors_are_dead(run: Run) -> None:
    assert run("pool") == {
        "lost": "", "made": [4, 4, 4], "clean": [True] * 3, "damaged": [["t1:left"]] * 3,
        "shared": False, "stale": ["keeper:left:stale"], "again": [], "intact": True, "kept": [1, 0],
    }  # fmt: skip


def test_own_memory_is_fenced_and_poisoned(run: Run) -> None:
    assert run("own") == {
        "lost": "", "poisoned": True, "zeros": True, "here": "cpu", "symptoms": [["own1", "own:right"]],
    }  # fmt: skip


def test_too_large_a_tensor_is_refused(run: Run) -> None:
    assert run("memory") == {"lost": "", "refused": True, "next": 0}
