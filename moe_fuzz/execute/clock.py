"""What does not count against a case's deadline: compiling, loading. The worker tells the parent when that begins and
ends, and meanwhile the case's clock stands still. Free of torch.

    with clock.stopped("compile"):
        …
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

_lock = threading.RLock()
_tell: Callable[[dict[str, Any]], None] | None = None
_depth = 0  # how many of the process's threads, and of their calls, have stopped it


@contextlib.contextmanager
def stopped(why: str) -> Iterator[None]:
    """The clock of the case in flight stands still during the block. Blocks may nest, and overlap in several threads.
    """
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1 and _tell is not None:
            _tell({"still": why})
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0 and _tell is not None:
                _tell({"goes": why})


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
