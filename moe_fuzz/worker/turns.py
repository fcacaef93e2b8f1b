"""Whose turn it is on a GPU, among groups of ranks. Free of torch.

Ranks wait for each other inside kernels. Two groups on the same GPUs would each wait for ranks that the GPU runs only
when it has let the other group's go: every call of either costs time slices of both. So while a group runs a round it
has the turn of each of its GPUs; groups on other GPUs run beside it, and so do workers that are no group's.

A turn is a file beside the slots (leases.py), and the kernel drops the lock of a process that dies. GPUs are taken in
one order by everybody, so nobody waits in a circle. Whoever asks stands in line first: who just had the turn and wants
it again stands behind those that wait.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from moe_fuzz.errors import EnvironmentProblem

PATIENCE = 1800.0  # seconds to wait for a GPU: a round may be many cases, and there may be others in the line
_LOOK = 0.02  # seconds between two looks


@contextlib.contextmanager
def turn(
    directory: Path, uuids: Iterable[str], patience: float = PATIENCE, given_up: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """The block runs while no other group does on these GPUs, of whatever program.

    No slot may be waited for inside: take them before. given_up: asked while it waits. Raises EnvironmentProblem where
    it says yes, after `patience` seconds for one GPU, and where the files cannot be made.
    """
    with contextlib.ExitStack() as held:
        for uuid in sorted(set(uuids)):
            place = directory / uuid.replace("/", "_")
            with _locked(place.with_name(f"{place.name}.line.lock"), uuid, patience, given_up):
                held.enter_context(_locked(place.with_name(f"{place.name}.turn.lock"), uuid, patience, given_up))
        yield


@contextlib.contextmanager
def _locked(path: Path, uuid: str, patience: float, given_up: Callable[[], bool]) -> Iterator[None]:
    lock, until = FileLock(path, thread_local=False), time.monotonic() + patience
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        while not _got(lock):
            if given_up():
                raise EnvironmentProblem("the pool was closed while its ranks waited for their turn on a GPU")
            if time.monotonic() >= until:
                raise EnvironmentProblem(
                    f"other groups of ranks have had {uuid} for {patience:g} s: {path}",
                    "wait until they are done, or let the other campaign run on other GPUs (CUDA_VISIBLE_DEVICES)",
                )
            time.sleep(_LOOK)
    except OSError as error:
        raise EnvironmentProblem(f"GPUs cannot be taken in turn: {error}", "is the disk full?") from error
    try:
        yield
    finally:
        lock.release()


def _got(lock: FileLock) -> bool:
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=0)
        return True
    return False
