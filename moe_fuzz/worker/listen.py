"""Waits for what a worker's process says next: for its word, its death, or the end of its time. Free of torch."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from moe_fuzz.worker.clock import CaseClock, Reading
from moe_fuzz.worker.launch import Process
from moe_fuzz.worker.protocol import ChannelClosed

_SLICE = 0.25  # seconds between two looks at a silent worker
_RUNAWAY_LOG = 64 << 20  # bytes a case may print before its log is cut


class Expired(Exception):
    """The deadline passed."""


class TimeIsUp(Exception):
    """Of all cases, as RunOptions.until has it: the one in flight has no verdict."""


def next_event(process: Process, clock: CaseClock, log: Path, reading: Reading | None = None) -> dict[str, Any]:
    """The next event. Raises Expired when the clock has run out, ChannelClosed when the process is dead, Garbled,
    ZygoteGone."""
    channel = process.channel
    while (event := channel.receive(min(max(0.0, clock.until - time.monotonic()), _SLICE))) is None:
        # A child of the target may hold the socket open, so its end is not the only sign of death.
        if process.status() is not None and (event := channel.receive(0)) is None:
            raise ChannelClosed("the process ended")
        if event is not None:
            break
        clock.look(reading is not None and reading.grew())
        if clock.expired:
            raise Expired
        if log_size(log) > _RUNAWAY_LOG:
            os.truncate(log, 0)
    return event


def log_size(log: Path) -> int:
    """Bytes."""
    try:
        return log.stat().st_size
    except FileNotFoundError:
        return 0  # not made yet
