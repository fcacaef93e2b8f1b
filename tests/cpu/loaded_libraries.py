"""Serving libraries for tests: none is loaded from before, and what is said of one that cannot be bound."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import pytest

from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.targets import extension
from moe_fuzz.targets.bind import bind

VARIABLE = {"vllm": "MOE_FUZZ_VLLM_LIB", "sglang": "MOE_FUZZ_SGLANG_LIB"}


@contextlib.contextmanager
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No library is named by the environment, and none is known that was loaded before, or while it lasts."""
    for variable in VARIABLE.values():
        monkeypatch.delenv(variable, raising=False)
    extension.load.cache_clear()
    before = set(sys.modules)
    yield
    extension.load.cache_clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "vllm":
            del sys.modules[name]


def refused(target: str) -> str:
    """What is said of a target that cannot be bound, and the way out."""
    with pytest.raises(EnvironmentProblem) as caught:
        bind(target)
    return f"{caught.value.message} | {caught.value.hint}"
