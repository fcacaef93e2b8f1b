"""What goes over the pipe between parent and worker: JSON, one message a line. Free of torch; both sides import it.

    parent → worker   {"round": [case, …], "target": "topk_softmax@torch", "options": {…}}   {"describe": "…"}
                      {"exhibit": case, "target": "…"}
    worker → parent   {"ready": 1}   {"start": i, "log": offset}   {"verdict": i, "is": {…}}   {"done": n, "rss": bytes}
                      {"still": "compile"}   {"goes": "compile"}: from here, to here the case's clock stands still;
                      for "compile", "load" or "judge"; another "still" changes the reason
                      {"on": 1}: another program of an interpreted kernel begins
                      {"info": {…}}   {"exhibit": {…}}   {"error": {"class": "UsageError", "message": "…", "hint": "…"}}
    parent → zygote   {"fork": id, "log": path, "memory": bytes, "environment": {…}} and one descriptor
                      {"signal": id, "number": 10}
    zygote → parent   {"ready": 1, …}   {"forked": id, "pid": 7}   {"exited": id, "status": raw wait status}
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

from moe_fuzz.errors import CaseError, EnvironmentProblem, MoeFuzzError, UsageError

VERSION = 1  # of the messages; a worker of another version is refused
MAX_LINE = 64 << 20  # bytes; a longer one is not ours
EXIT_INTERNAL = 70  # of a worker: it failed outside any case
EXIT_PIPE = 71  # of a worker: the parent is gone, or the target closed the worker's socket
RUNNER_VARIABLE = "MOE_FUZZ_RUNNER"  # "module:Class" or "file.py:Class", in place of the default; for tests
DEFAULT_RUNNER = "moe_fuzz.execute.runner:Runner"
ALLOCATOR_VARIABLE = "MOE_FUZZ_ALLOCATOR"  # "all": of a worker that fences whatever torch allocates on its GPU
MEMORY_VARIABLE = "MOE_FUZZ_GPU_MEMORY"  # bytes of device memory for a worker

_CHUNK = 1 << 16
_SEND_SECONDS = 30.0


def provider_of(target: str) -> str:
    """The provider in a target's full name; `user` for a function in a file or module."""
    source = target.partition("@")[2]
    return source.partition(".")[0] if ":" not in source else "user"


# ---- framing --------------------------------------------------------------------------------------------------------


class ChannelClosed(Exception):
    """The other side is gone."""


class Garbled(Exception):
    """What came over the channel is not a message of ours: somebody else wrote to the descriptor."""


def encode(message: Mapping[str, Any]) -> bytes:
    """One line. Raises TypeError or ValueError for what JSON cannot carry."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Channel:
    """Messages over a stream socket. Not locked: one thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer known to hold no newline

    def send(self, message: Mapping[str, Any], descriptors: Iterable[int] = ()) -> None:
        """Raises ChannelClosed when the other side is gone, or reads nothing for half a minute."""
        self.send_lines(encode(message), descriptors)

    def send_lines(self, data: bytes, descriptors: Iterable[int] = ()) -> None:
        passed = list(descriptors)
        try:
            self.socket.settimeout(_SEND_SECONDS)
            if passed:
                data = data[socket.send_fds(self.socket, [data], passed) :]
            if data:
                self.socket.sendall(data)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message, or None after `timeout` seconds (None: wait for ever). Raises ChannelClosed, Garbled."""
        until = None if timeout is None else time.monotonic() + timeout
        while (line := self._line()) is None:
            try:
                self.socket.settimeout(None if until is None else max(0.0, until - time.monotonic()))
                data = self._read()
            except (TimeoutError, BlockingIOError):
                return None
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not data:
                raise ChannelClosed("end of stream")
            self._buffer += data
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Garbled(repr(line[:80])) from error
        if not isinstance(message, dict):
            raise Garbled(repr(line[:80]))
        return message

    def _read(self) -> bytes:
        return self.socket.recv(_CHUNK)

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._buffer)
            if self._searched > MAX_LINE:
                raise Garbled("a line without an end")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    def close(self) -> None:
        self.socket.close()


# ---- errors that travel ---------------------------------------------------------------------------------------------

_ERRORS = {kind.__name__: kind for kind in (EnvironmentProblem, UsageError, MoeFuzzError)}


def error_to_json(error: MoeFuzzError) -> dict[str, Any]:
    where = error.where if isinstance(error, CaseError) else None
    name = next((n for n, kind in _ERRORS.items() if type(error) is kind), MoeFuzzError.__name__)
    return {"class": "CaseError" if where is not None else name, "message": error.message, "hint": error.hint,
            "where": where or ""}


def error_from_json(data: Mapping[str, Any]) -> MoeFuzzError:
    if data["class"] == "CaseError":
        error = CaseError("", data["message"], data["hint"])  # the message begins with the place already
        error.where = data["where"]
        return error
    return _ERRORS.get(data["class"], MoeFuzzError)(data["message"], data["hint"])
