"""Device code of these tests runs in processes of its own: an illegal access takes the CUDA context with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz.options import FenceOptions


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., dict[str, Any]]]:
    """run(victim, edge, **fence options): what became of the victim, in a process that nobody used before."""
    script = Path(__file__).with_name("cuda_victims.py")
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
            assert result.pop("status") == 0, f"{victim} raised; its traceback is on stderr"
            return result

        yield ask
        process.stdin.close()
