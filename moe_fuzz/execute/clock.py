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
_depth = 0  # how many of the process's threads, and of their calls, have stopped it to compile or load
_why = ""  # the first of them
_judges = 0  # how many threads judge, and have no call of the target under way
_since = 0.0  # when the reason changed
_stood = 0.0  # seconds that it has stood still for the target, up to then
_JUDGE = "judge"
_judging = threading.local()  # .here: whether this thread judges, and no call of the target is under way


@contextlib.contextmanager
def stopped(why: str) -> Iterator[None]:
    """The clock of the case in flight stands still during the block. Blocks may nest, and overlap in several threads.
    """
    _change(depth=1, why=why)
    try:
        yield
    finally:
        _change(depth=-1)


@contextlib.contextmanager
def judging() -> Iterator[None]:
    """The block is ours: the deadline is the target's. Its calls in it go into `calling`. Blocks may nest."""
    if getattr(_judging, "here", False):
        yield
        return
    _change(judges=1)
    _judging.here = True
    try:
        yield
    finally:
        _judging.here = False
        _change(judges=-1)


@contextlib.contextmanager
def calling() -> Iterator[None]:
    """A call of the target. Its time counts, in a block of `judging` too."""
    if not getattr(_judging, "here", False):
        yield
        return
    _judging.here = False
    _change(judges=-1)
    try:
        yield
    finally:
        _change(judges=1)
        _judging.here = True


def _reason() -> str:
    """Judging before all else: whoever compiles beside it, or has patience with all of a case, does not answer for it.
    """
    return _JUDGE if _judges else _why if _depth else ""


def _change(depth: int = 0, judges: int = 0, why: str = "") -> None:
    """So many more, or fewer, have stopped the clock. The parent hears of it when the reason is another one."""
    global _depth, _judges, _since, _stood, _why
    with _lock:
        before, since = _reason(), _since
        _why = why if why and not _depth else _why
        _depth, _judges = _depth + depth, _judges + judges
        after = _reason()
        if after == before:
            return
        _since = time.perf_counter()
        _stood += _since - since if before not in ("", _JUDGE) else 0.0
        if _tell is not None:
            _tell({"still": after} if after else {"goes": before})


_OFTEN = 0.5  # seconds between two times that the parent hears of what goes on
_told = 0.0


def goes_on() -> None:
    """Another program of an interpreted kernel begins: it is slow, perhaps, and does not hang."""
    global _told
    now = time.perf_counter()
    if now - _told < _OFTEN:
        return
    _told = now
    with _lock:
        if _tell is not None:
            _tell({"on": 1})


def stood() -> float:
    """Seconds that the clock has stood still in this process while it compiled or loaded."""
    with _lock:
        return _stood + (time.perf_counter() - _since if _reason() not in ("", _JUDGE) else 0.0)


@contextlib.contextmanager
def heard(tell: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """`tell` gets {"still": why} and {"goes": why} during the block, and nothing after it."""
    global _tell, _why
    with _lock:
        _tell = tell
        if _depth:  # a thread of the target compiles from one case into the next
            _why = "compile"
            tell({"still": _why})
    try:
        yield
    finally:
        with _lock:
            _tell = None
