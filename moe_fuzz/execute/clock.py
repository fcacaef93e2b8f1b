"""What does not count against a deadline: compiling, loading, our own judgement. The worker tells the parent when
that begins and ends, and meanwhile the clock of the case stands still. Free of torch.

    with clock.stopped("compile"):
        …
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_lock = threading.RLock()
_tell: Callable[[dict[str, Any]], None] | None = None
_depth = 0  # how many of the process's threads, and of their calls, have stopped it
_since = 0.0  # when it was stopped
_why = ""
_stood = 0.0  # seconds that it has stood still for the target, up to then
_JUDGE = "judge"
_judging = threading.local()  # .here: whether this thread judges, and no call of the target is under way


@contextlib.contextmanager
def stopped(why: str) -> Iterator[None]:
    """The clock of the case in flight stands still during the block. Blocks may nest, and overlap in several threads.
    """
    _stop(why)
    try:
        yield
    finally:
        _go()


@contextlib.contextmanager
def judging() -> Iterator[None]:
    """The block is ours: the deadline is the target's. Its calls in it go into `calling`."""
    with stopped(_JUDGE):
        _judging.here = True
        try:
            yield
        finally:
            _judging.here = False


@contextlib.contextmanager
def calling() -> Iterator[None]:
    """A call of the target. Its time counts, in a block of `judging` too."""
    if not getattr(_judging, "here", False):
        yield
        return
    _judging.here = False
    _go()
    try:
        yield
    finally:
        _stop(_JUDGE)
        _judging.here = True


def _stop(why: str) -> None:
    global _depth, _since, _why
    with _lock:
        _depth += 1
        if _depth == 1:
            _since, _why = time.perf_counter(), why
            if _tell is not None:
                _tell({"still": why})


def _go() -> None:
    global _depth, _stood
    with _lock:
        _depth -= 1
        if _depth == 0:
            _stood += time.perf_counter() - _since if _why != _JUDGE else 0.0
            if _tell is not None:
                _tell({"goes": _why})


def stood() -> float:
    """Seconds that the clock has stood still in this process while it compiled or loaded."""
    with _lock:
        return _stood + (time.perf_counter() - _since if _depth and _why != _JUDGE else 0.0)


@contextlib.contextmanager
def heard(tell: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """`tell` gets {"still": why} and {"goes": why} during the block, and nothing after it."""
    global _tell
    with _lock:
        _tell = tell
        if _depth:  # a thread of the target compiles from one case into the next
            tell({"still": "compile"})
    try:
        yield
    finally:
        with _lock:
            _tell = None
