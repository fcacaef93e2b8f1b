"""How long a case may still take, as the parent counts it. Free of torch.

Two allowances: the case's own seconds, and those it may stand still: while the worker says that it compiles or loads
(execute/clock.py), or is seen to read files. Nothing that spins or waits on a device reads files; whoever imports a
module or loads a library does, be it through a hook of ours or not.

Who is interpreted a program of a grid after the other is slow, and hangs no more than that: as long as another program
begins, its own seconds begin anew, up to a limit. A kernel that spins begins no other.
"""

from __future__ import annotations

import math
import time

_READ = 4096  # bytes in a slice: more is no counter of an event, but a file
_FORWARD = 2  # times its own seconds: how long a case may go on and on
_FAULTS = 8  # pages in a slice that had to come from a disk


class CaseClock:
    """The clock of one case. Times are those of time.monotonic()."""

    def __init__(self, own: float, still: float, end: float = math.inf) -> None:
        """own, still: seconds of each kind that a case gets. end: when all is over, whatever the case has left."""
        self._given = {False: own, True: still}
        self._end = end
        self._spent = {False: 0.0, True: 0.0}
        self._forward = 0.0  # of its own seconds, those that were given back
        self._still = ""
        self._since = self._began = time.monotonic()

    def restart(self) -> None:
        """A case begins."""
        self._spent = {False: 0.0, True: 0.0}
        self._forward = 0.0
        self._still = ""
        self._since = self._began = time.monotonic()

    def stand(self, still: str) -> None:
        """From now on the clock stands still, for this reason; or it goes again, where there is none."""
        self._settle(bool(self._still))
        self._still = still

    def go_on(self) -> None:
        """Another program of an interpreted kernel began: what was done until then was work."""
        self._settle(bool(self._still))
        self._forward += self._spent[False]
        self._spent[False] = 0.0

    def look(self, reads: bool) -> None:
        """The process was silent since the last event or look; `reads`: it read files meanwhile."""
        self._settle(bool(self._still) or reads)

    @property
    def until(self) -> float:
        """When the present allowance ends."""
        return min(self._end, self._since + self._given[bool(self._still)] - self._spent[bool(self._still)])

    @property
    def over(self) -> bool:
        """Whether the time of all is at its end, and not this case's own."""
        return time.monotonic() >= self._end

    @property
    def limit(self) -> float:
        """Seconds of the present allowance."""
        return _FORWARD * self._given[False] if self.slow else self._given[bool(self._still)]

    @property
    def slow(self) -> bool:
        """Whether it went on and on for too long."""
        return self._forward >= _FORWARD * self._given[False]

    @property
    def still(self) -> str:
        """Why it stands still, or "interpret" where it is slow; empty: it goes."""
        return self._still or "interpret" * self.slow

    @property
    def expired(self) -> bool:
        """Whether an allowance is at its end: that of a process that reads and reads, too."""
        return time.monotonic() >= self.until or self._spent[True] >= self._given[True]

    @property
    def seconds(self) -> float:
        """Since the case began, of both kinds."""
        return time.monotonic() - self._began

    def _settle(self, still: bool) -> None:
        now = time.monotonic()
        self._spent[still] += now - self._since
        self._since = now


class Reading:
    """Whether a process reads files, from what the kernel counts of it."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._last: tuple[int, int] | None = None

    def grew(self) -> bool:
        """Since the last time this was asked. The first answer is no."""
        last, self._last = self._last, _counters(self._pid)
        if last is None or self._last is None:
            return False
        return self._last[0] - last[0] >= _READ or self._last[1] - last[1] >= _FAULTS


def _counters(pid: int) -> tuple[int, int] | None:
    """Bytes read by system calls, and page faults that waited for a disk; None where the kernel does not tell."""
    try:
        with open(f"/proc/{pid}/io", "rb") as file:
            read = int(file.read().split(b"\n", 1)[0].split()[1])
        with open(f"/proc/{pid}/stat", "rb") as file:
            faults = int(file.read().rpartition(b")")[2].split()[9])
    except (OSError, ValueError, IndexError):  # it is gone, or hides: nothing is known
        return None
    return read, faults


