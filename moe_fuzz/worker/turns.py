"""Whose turn it is on a GPU: one group of ranks has it to itself, or workers that are no group's share it. No torch.

Ranks wait for each other inside kernels. On a GPU that is shared a rank's peers wait for its time slice, and its own
slices go into waiting for theirs: a group and its neighbours hold each other up. And captured calls of ranks among a
dozen other processes have ended in illegal accesses that nothing in them explains, never on GPUs of their own. Others
report the same of graphs that run while a second process uses the GPU (NVIDIA/TensorRT#3633, #4061), and a kernel that
waits for a peer is one that is interrupted. So while a group runs a round it has its GPUs for itself; other workers'
rounds are over before, or begin afterwards. Processes that only stand by cost nothing.

A turn is a lock on a file beside the slots (leases.py), and the kernel drops the lock of a process that dies. Whoever
wants one stands in line first, in another file: a group that waits there is not overtaken by workers, nor by the group
that had its turn just now. GPUs are taken in one order by everybody, so nobody waits in a circle.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from moe_fuzz.errors import EnvironmentProblem

PATIENCE = 1800.0  # seconds to wait for a GPU: a round may be many cases, and there may be others in the line
_LOOK = 0.01  # seconds between two looks

GivenUp = Callable[[], bool]


def _never() -> bool:
    return False


@contextlib.contextmanager
def turn(
    directory: Path, uuids: Iterable[str], patience: float = PATIENCE, given_up: GivenUp = _never
) -> Iterator[None]:
    """The block runs while nobody else does on these GPUs, of whatever program.

    No slot may be waited for inside: take them before. given_up: asked while it waits. Raises EnvironmentProblem where
    it says yes, after `patience` seconds for one GPU, and where the files cannot be made.
    """
    with contextlib.ExitStack() as held:
        for uuid in sorted(set(uuids)):
            held.enter_context(_held(directory, uuid, fcntl.LOCK_EX, patience, given_up))
        yield


@contextlib.contextmanager
def beside(directory: Path, uuid: str, patience: float = PATIENCE, given_up: GivenUp = _never) -> Iterator[None]:
    """The block runs while no group does on this GPU, and others may run beside it. Raises as `turn`.

    It must not wait for anybody who waits for a turn there: a group that came between stands before them in the line,
    and behind this block.
    """
    with _held(directory, uuid, fcntl.LOCK_SH, patience, given_up):
        yield


@contextlib.contextmanager
def _held(directory: Path, uuid: str, how: int, patience: float, given_up: GivenUp) -> Iterator[None]:
    name, until = uuid.replace("/", "_"), time.monotonic() + patience

    def wait() -> None:
        if given_up():
            raise EnvironmentProblem("the pool was closed while it waited for its turn on a GPU")
        if time.monotonic() >= until:
            raise EnvironmentProblem(
                f"other programs have had {uuid} for {patience:g} s: {directory}",
                "wait until they are done, or let this one run on other GPUs (CUDA_VISIBLE_DEVICES)",
            )
        time.sleep(_LOOK)

    with contextlib.ExitStack() as held:
        with contextlib.ExitStack() as standing:
            _lock(standing.enter_context(_opened(directory / f"{name}.line.lock")), how, wait)
            _lock(held.enter_context(_opened(directory / f"{name}.turn.lock")), how, wait)
        yield


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file to lock, which is unlocked when it is closed. Processes that are started meanwhile do not have it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EnvironmentProblem(f"GPUs cannot be taken in turn: {error}", "is the disk full?") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, how: int, wait: Callable[[], None]) -> None:
    while True:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
        else:
            return
