"""How far a target of several stages had come, and what the earlier ones had decided: it survives the process.

A layer that takes `observe` calls it between its halves. What it is told stands in a file from then on, so that the
verdict on a worker that died, or on a context that broke, can name both halves: what the router gave, and where it went
wrong. Only eager calls are observed, since a look at the decision waits for the device; a crash of a graph's replay is
seen again in an eager call when its case is made smaller, if it is to be seen there at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

_file: int | None = None
_said = ""


def keep(descriptor: int) -> None:
    """Trails go into this open file from now on."""
    global _file
    _file = descriptor


def clear() -> None:
    """A case begins."""
    _tell("")


def _tell(text: str) -> None:
    global _said
    if text == _said:
        return
    _said = text
    if _file is not None:
        os.ftruncate(_file, 0)
        os.pwrite(_file, text.encode(), 0)


def told() -> str:
    """What the target at hand has said of itself so far; empty if nothing."""
    return _said


def observer(describe: Callable[..., str]) -> Callable[..., None]:
    """What is given to a target as `observe`; describe: what a decision comes to, in one sentence."""

    def observe(*decision: Any) -> None:
        _tell(describe(*decision))

    return observe
