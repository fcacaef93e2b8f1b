"""The program from which workers are forked, with the arguments `FD [--drop-path DIR]`.

It imports what is slow to import and does nothing else with it: no tensor operation, no `cuda.is_available()`. One
parallel torch operation before a fork hangs the child (its thread pool is gone), and CUDA does not survive a fork at
all. It stays single-threaded; extension libraries of targets load after the fork.

It talks to the parent over the control socket FD (see protocol.py). When that closes, or the parent is gone, it kills
every worker's process group and exits; when it dies itself, the kernel kills the workers (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import os
import select
import signal
import socket
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import moe_fuzz
from moe_fuzz.worker import child, protocol
from moe_fuzz.worker.protocol import Channel, ChannelClosed

PRELOADED = ("numpy", "torch", "triton")
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_TICK = 0.5  # seconds between two looks at whether the parent still lives


class Control(Channel):
    """The zygote's end of the control socket: descriptors arrive along with the bytes."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.descriptors: list[int] = []  # in the order of the fork requests they belong to

    def _read(self) -> bytes:
        data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 16, 64)
        self.descriptors += descriptors
        return data


class Zygote:
    def __init__(self, control: Control) -> None:
        self._control = control
        self._parent = os.getppid()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._workers: dict[int, int] = {}  # pid -> id
        self._wakeup, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup_write = write_end
        # A grandchild whose worker died becomes ours, so that no process is left when we go.
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Returns when the parent is gone."""
        poll = select.poll()
        poll.register(self._control.socket, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        try:
            while os.getppid() == self._parent:
                for descriptor, _ in poll.poll(_TICK * 1000):
                    if descriptor == self._wakeup:
                        os.read(self._wakeup, 4096)
                    else:
                        self._requests()
                self._reap()
        except ChannelClosed:
            pass  # the parent closed the pool, or died: either way the end
        finally:
            self._kill_all()

    def _requests(self) -> None:
        while (request := self._control.receive(0)) is not None:
            if "fork" in request:
                self._fork(request, self._control.descriptors.pop(0))
            else:
                self._signal(request["signal"], request["number"])

    def _fork(self, request: dict[str, Any], descriptor: int) -> None:
        mine = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(descriptor)
            self._control.send({"forked": request["fork"], "error": str(error)})
            return
        if pid == 0:
            code = protocol.EXIT_INTERNAL
            try:
                self._become_child(mine)
                os.environ.update(request["environment"])
                code = child.main(descriptor, Path(request["log"]), request["memory"])
            finally:
                # Whatever happens, a child never comes back into the zygote's loop, nor runs its exit handlers.
                os._exit(code)
        os.close(descriptor)
        self._workers[pid] = request["fork"]
        self._control.send({"forked": request["fork"], "pid": pid})

    def _become_child(self, zygote: int) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        self._libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != zygote:  # it died before the line above
            os._exit(protocol.EXIT_PIPE)
        self._control.close()
        for descriptor in (self._wakeup, self._wakeup_write, *self._control.descriptors):
            os.close(descriptor)

    def _signal(self, worker: int, number: int) -> None:
        # Only a pid that was not reaped yet is signalled, so it cannot be somebody else's by now.
        for pid, known in self._workers.items():
            if known == worker:
                _kill_group(pid) if number == signal.SIGKILL else os.kill(pid, number)

    def _reap(self) -> None:
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if dead is None:
                return
            if dead.si_pid in self._workers:
                _kill_group(dead.si_pid)  # what it left behind, while its zombie still keeps the group's number taken
            _, status = os.waitpid(dead.si_pid, 0)
            worker = self._workers.pop(dead.si_pid, None)
            if worker is not None:
                self._control.send({"exited": worker, "status": status})

    def _kill_all(self) -> None:
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            for pid in self._workers:
                _kill_group(pid)
            for pid in _children():  # strangers: orphans of workers, in sessions of their own
                if pid not in self._workers:
                    _kill(pid)
            try:
                while (found := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                    self._workers.pop(found, None)
            except ChildProcessError:
                return
            time.sleep(0.005)


def _children() -> list[int]:
    """The pids of this process's children; empty where the kernel does not tell."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already, or no longer ours to kill
        os.kill(pid, signal.SIGKILL)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has not come to its setsid yet
        os.killpg(leader, signal.SIGKILL)
    _kill(leader)


def _preload() -> dict[str, str]:
    """Imports what every worker needs. Returns the versions."""
    versions = {name: str(getattr(importlib.import_module(name), "__version__", "?")) for name in PRELOADED}
    name = protocol.DEFAULT_RUNNER.partition(":")[0]
    if not os.environ.get(protocol.RUNNER_VARIABLE) and importlib.util.find_spec(name) is not None:
        importlib.import_module(name)
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(prog="moe_fuzz.worker.zygote")
    parser.add_argument("descriptor", type=int)
    parser.add_argument("--drop-path", default="", help="a directory that sys.path held only so that we were found")
    arguments = parser.parse_args()
    if arguments.drop_path:
        # A checkout has `kernels/` at its top level, which must not hide the package of that name from a target.
        sys.path[:] = [entry for entry in sys.path if entry != arguments.drop_path]
    started = time.perf_counter()
    versions = _preload()
    gc.collect()
    gc.freeze()  # no collection in a child touches, and so copies, the pages it shares with us
    control = Control(socket.socket(fileno=arguments.descriptor))
    control.socket.set_inheritable(False)
    zygote = Zygote(control)
    control.send({
        "ready": protocol.VERSION,
        "versions": {"python": ".".join(map(str, sys.version_info[:3]))} | versions,
        "seconds": time.perf_counter() - started,
        "threads": len(os.listdir("/proc/self/task")),
        "library": sorted({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}),
        "packages": [str(Path(str(sys.modules[name].__file__)).parent) for name in PRELOADED],
        "moe_fuzz": str(Path(str(moe_fuzz.__file__)).parent),
    })
    zygote.serve()
    os._exit(0)  # there is nothing to clean up, and torch takes long to unload

