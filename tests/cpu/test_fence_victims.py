"""Kernels that step out of their memory die; with soft guards they live, and the canary names what they wrote."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz.options import FenceOptions

SEGV = int(signal.SIGSEGV)
SIZE = 8 * 16 * 4  # bytes of src and of dst

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    script = Path(__file__).with_name("fence_victims.py")
    with subprocess.Popen(
        [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout

        def ask(victim: str, edge: str = "right", **options: Any) -> dict[str, Any]:
            request = {"victim": victim, "edge": edge, "options": FenceOptions(**options).to_json()}
            print(json.dumps(request), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, "the victims' process is gone"
            result: dict[str, Any] = json.loads(answer)
            assert result["status"] == 0, f"{victim} raised; its traceback is on stderr"
            return result

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("edge", ["right", "left"])
@pytest.mark.parametrize("victim", ["honest", "honest_own", "torch_read_input"])
@pytest.mark.parametrize("hard", [None, ()])
def test_honest_kernel_lives(run: Run, victim: str, edge: str, hard: tuple[str, ...] | None) -> None:
    assert run(victim, edge, hard=hard) == {"signal": 0, "status": 0, "violations": [], "unwritten": 0, "nan": 0}


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
        ("read_empty", "right"),
    ],
)
def test_hard_fence_kills(run: Run, victim: str, edge: str) -> None:
    assert run(victim, edge)["signal"] == SEGV


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
    assert (result["signal"], result["violations"]) == (0, [violation])


@pytest.mark.parametrize(("victim", "edge"), [("read_right", "right"), ("read_left", "left")])
def test_soft_fence_survives_a_read_that_gives_nan(run: Run, victim: str, edge: str) -> None:
    result = run(victim, edge, hard=())
    assert (result["signal"], result["violations"], result["nan"], result["unwritten"]) == (0, [], 1, 0)


@pytest.mark.parametrize("victim", ["write_input", "torch_write_input"])
def test_inputs_are_read_only_by_option(run: Run, victim: str) -> None:
    assert run(victim, hard=())["signal"] == SEGV
    assert run(victim, readonly=())["signal"] == 0


def test_reruns_name_tensor_side_and_access(run: Run) -> None:
    assert run("read_right", hard=("src",))["signal"] == SEGV
    assert run("read_right", hard=("dst",))["signal"] == 0
    assert run("read_right", sides="right")["signal"] == SEGV
    assert run("read_right", sides="left")["signal"] == 0
    assert run("read_right", access="write")["signal"] == 0
    assert run("write_right", hard=("dst",), access="write")["signal"] == SEGV
    assert run("write_right", hard=("src",))["signal"] == 0
    assert run("write_left", "left", hard=("dst",), sides="left", access="write")["signal"] == SEGV
    assert run("write_left", "left", sides="right")["violations"] == [["dst:left", -4]]


def test_own_memory_by_option(run: Run) -> None:
    assert run("read_own_workspace", hard=("own0",))["signal"] == SEGV
    assert run("read_own_workspace", hard=("src", "dst"))["signal"] == 0
    assert run("read_own_workspace", own="off")["signal"] == 0
