"""Standard output that neither a closed pipe nor a terminal's encoding can turn into an exit code.

`moe-fuzz run | head` must end as the campaign ends: Python's BrokenPipeError would otherwise become exit code 1, which
means a finding. So once the reader has gone, what is written goes nowhere.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO

_GONE = (errno.EPIPE, errno.ESHUTDOWN)


class _QuietRaw(io.RawIOBase):
    """Raw bytes to a file descriptor until it fails, then to nowhere. That its reader has gone is no failure."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._gone = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        if not self._gone:
            try:
                return os.write(self._descriptor, view)
            except OSError as error:
                self._gone = True  # whatever it is, it is told once; a second time, at exit, would change the exit code
                if error.errno not in _GONE:
                    raise
        return view.nbytes


def quiet(stream: TextIO | None) -> TextIO:
    """`stream`, deaf to a closed pipe; a character that the encoding lacks is replaced. None (a closed descriptor, as
    after `>&-`) becomes a stream to nowhere."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    stream.flush()
    raw = io.BufferedWriter(_QuietRaw(stream.fileno()))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return io.TextIOWrapper(raw, encoding=encoding, errors="replace", line_buffering=True)


def install() -> None:
    """Makes standard output and standard error of this process quiet. They stay open until the process ends."""
    sys.stdout = quiet(sys.stdout)
    sys.stderr = quiet(sys.stderr)
