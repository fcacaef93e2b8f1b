"""What does not count against a case's deadline: compiling, loading. The worker tells the parent when that begins and
ends, and meanwhile the case's clock stands still. Free of torch.

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
_stood = 0.0  # seconds that it has stood still, up to then


@contextlib.contextmanager
def stopped(why: str) -> Iterator[None]:
    """The clock of the case in flight stands still during the block. Blocks may nest, and overlap in several threads.
    """
    global _depth, _since, _stood
    with _lock:
        _depth += 1
        if _depth == 1:
            _since = time.perf_counter()
            if _tell is not None:
                _tell({"still": why})
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _stood += time.perf_counter() - _since
                if _tell is not None:
                    _tell({"goes": why})


def stood() -> float:
    """Seconds that the clock has stood still in this process."""
    with _lock:
        return _stood + (time.perf_counter() - _since if _depth else 0.0)


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
