"""Device code of these tests runs in processes of its own: an illegal access takes the CUDA context with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz.options import FenceOptions


def compiling() -> dict[str, str]:
    """The environment of a process whose kernels are compiled; in pytest's own they are interpreted."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the processes that a test starts."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


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
            print(json.dumps(request), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, "the victims' process is gone"
            result: dict[str, Any] = json.loads(answer)
            assert result.pop("status") == 0, f"{victim} raised; its traceback is on stderr"
            return result

        yield ask
        process.stdin.close()
