"""Device code of these tests runs in processes of its own: an illegal access takes the CUDA context with it.

In pytest's own process kernels are interpreted (conftest.py in the root). A test that launches one itself is marked
`compiled`: it is handed to a child that drops the variable and runs nothing but such tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz.options import FenceOptions
from moe_fuzz.worker.gpus import gpus
from moe_fuzz.worker.leases import default_directory
from moe_fuzz.worker.pool import Pool
from moe_fuzz.worker.turns import beside

ROOT = Path(__file__).resolve().parents[2]


COMPILED = "MOE_FUZZ_TESTS_COMPILED"  # set in the child, where a marked test just runs


def compiling() -> dict[str, str]:
    """The environment of a process whose kernels are compiled; in pytest's own they are interpreted."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


class Child:
    """The process for tests marked `compiled`. One that a test has killed is replaced for the next."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, test: str) -> tuple[str, str]:
        """The outcome of a test, and what is to be said of it."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("compiled_child.py"))], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=compiling() | {COMPILED: "1"}, cwd=ROOT,
            )  # fmt: skip
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, which is told below
            print(test, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            self._process = None
            return "failed", f"the process ended with status {status}; what it said is on stderr"
        outcome, text = json.loads(answer).values()
        if outcome == "failed":  # a fault of the device would fail whatever comes after
            self.close()
        return outcome, text

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None


CHILD = Child()


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if COMPILED in os.environ or pyfuncitem.get_closest_marker("compiled") is None:
        return None
    # No group of ranks runs there meanwhile. A pool's worker waits for its turn itself: who held one around that would
    # wait for a group that waits for them.
    has_pool = "pool" in pyfuncitem.fixturenames
    with contextlib.nullcontext() if has_pool else beside(default_directory(), gpus()[0].uuid):
        outcome, text = CHILD.run(pyfuncitem.nodeid)
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True


def pytest_unconfigure() -> None:
    CHILD.close()


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the processes that a test starts."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def pool(cuda_pool: Pool) -> Pool:
    """For tests that do not ask for one of their own."""
    return cuda_pool


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., dict[str, Any]]]:
    """run(victim, edge, **fence options): what became of the victim, in a process that nobody used before."""
    script = Path(__file__).with_name("cuda_victims.py")
    with subprocess.Popen(
        [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=compiling(),
    ) as process:
        assert process.stdin
        assert process.stdout

        def ask(victim: str, edge: str = "right", **options: Any) -> dict[str, Any]:
            request = {"victim": victim, "edge": edge, "options": FenceOptions(**options).to_json()}
            with beside(default_directory(), gpus()[0].uuid):
                print(json.dumps(request), file=process.stdin, flush=True)
                answer = process.stdout.readline()
            assert answer, "the victims' process is gone"
            result: dict[str, Any] = json.loads(answer)
            assert result.pop("status") == 0, f"{victim} raised; its traceback is on stderr"
            return result

        yield ask
        process.stdin.close()
