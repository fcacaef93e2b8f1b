"""Leases of GPUs: several campaigns and pytest processes on one machine share them without knowing of each other.

A slot is a file, and whoever holds its lock may run one worker there; the kernel drops the lock of a process that dies.
Slots are taken across the GPUs first: one on each, then a second on each. A pool that holds one slot never waits for
another: its further workers (the fresh ones that confirm a finding, or more than there are slots) share what it has.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.worker.gpus import Gpu
from moe_fuzz.worker.protocol import MEMORY_VARIABLE

PATIENCE = 600.0  # seconds to wait for the first slot
_LOOK = 0.25  # seconds between two looks


class Lease:
    """The right to run one worker on a GPU, until `release`."""

    def __init__(self, gpu: Gpu, release: Callable[[Lease], None], lock: FileLock | None) -> None:
        self.gpu = gpu
        self.lock = lock  # None: a share in a slot that the pool holds already
        self._release = release

    @property
    def environment(self) -> dict[str, str]:
        """What the worker needs in its environment before CUDA starts in it."""
        found = {"CUDA_VISIBLE_DEVICES": self.gpu.uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        return found | ({MEMORY_VARIABLE: str(self.gpu.budget)} if self.gpu.budget else {})

    def release(self) -> None:
        self._release(self)


class Leases:
    """What one pool has leased. Safe for use by several threads."""

    def __init__(self, gpus: Sequence[Gpu], directory: Path | None = None, patience: float = PATIENCE) -> None:
        """directory: where the locks lie; the same one for all who share the GPUs. By default the user's own.

        Raises EnvironmentProblem where there is no GPU, or the directory cannot be made.
        """
        if not gpus:
            raise EnvironmentProblem("there is no GPU that this process may use",
                                     "--device cpu runs the same kernels in Triton's interpreter")  # fmt: skip
        self._gpus = list(gpus)
        self._patience = patience
        self.directory = directory or default_directory()
        self._held: list[Lease] = []
        self._lock = threading.Lock()
        self._given_up = False
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise EnvironmentProblem(f"the directory of GPU leases cannot be made: {error}",
                                     "set XDG_RUNTIME_DIR or TMPDIR to one that can be written") from error  # fmt: skip

    def take(self) -> Lease:
        """A slot, or a share in one of ours. Waits where others have all of them; raises EnvironmentProblem after
        `patience` seconds."""
        until = time.monotonic() + self._patience
        while not self._given_up:
            with self._lock:
                lease = self._free_slot() or self._share()
                if lease is not None:
                    self._held.append(lease)
                    return lease
            if time.monotonic() >= until:
                slots = sum(gpu.slots for gpu in self._gpus)
                raise EnvironmentProblem(
                    f"other processes have held all {slots} GPU slots for {self._patience:g} s: {self.directory}",
                    "wait until they are done, or give the other campaign fewer --workers",
                )
            time.sleep(_LOOK)
        raise EnvironmentProblem("the pool was closed while it waited for a GPU")

    @property
    def closed(self) -> bool:
        return self._given_up

    @property
    def gpus(self) -> Sequence[Gpu]:
        return self._gpus

    def take_all(self, count: int) -> list[Lease]:
        """A slot, or a share in one of ours, on each of as many GPUs: all of them or none, so that two pools which both
        want several never wait for each other. Raises as `take`, and where there are not so many."""
        if count > len(self._gpus):
            raise EnvironmentProblem(f"{count} ranks need as many GPUs, and there are {len(self._gpus)}")
        until = time.monotonic() + self._patience
        while not self._given_up:
            with self._lock:
                found: list[Lease] = []
                for gpu in self._gpus:
                    lease = self._slot_on(gpu) or self._share_on(gpu)
                    if lease is not None:
                        found.append(lease)
                        self._held.append(lease)
                    if len(found) == count:
                        return found
            for lease in found:
                self._release(lease)
            if time.monotonic() >= until:
                raise EnvironmentProblem(
                    f"other processes have held too many GPU slots for {self._patience:g} s: {self.directory}",
                    f"{count} GPUs must have one free at the same time",
                )
            time.sleep(_LOOK)
        raise EnvironmentProblem("the pool was closed while it waited for GPUs")

    def _slot_on(self, gpu: Gpu) -> Lease | None:
        return next((lease for slot in range(gpu.slots) if (lease := self._slot(gpu, slot)) is not None), None)

    def _share_on(self, gpu: Gpu) -> Lease | None:
        held = any(lease.gpu == gpu for lease in self._held)
        return Lease(gpu, self._release, None) if held else None

    def close(self) -> None:
        """Gives everything back, and ends the waiting."""
        self._given_up = True
        for lease in list(self._held):
            self._release(lease)

    def _free_slot(self) -> Lease | None:
        for slot in range(max(gpu.slots for gpu in self._gpus)):
            for gpu in self._gpus:
                if slot < gpu.slots and (lease := self._slot(gpu, slot)) is not None:
                    return lease
        return None

    def _slot(self, gpu: Gpu, slot: int) -> Lease | None:
        lock = FileLock(self.directory / f"{gpu.uuid.replace('/', '_')}.{slot}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        except OSError as error:
            raise EnvironmentProblem(f"GPUs cannot be leased: {error}", "is the disk full?") from error
        return Lease(gpu, self._release, lock)

    def _share(self) -> Lease | None:
        """On the GPU of ours with the fewest workers a slot."""
        if not self._held:
            return None
        workers = Counter(lease.gpu for lease in self._held)
        slots = Counter(lease.gpu for lease in self._held if lease.lock is not None)
        return Lease(min(slots, key=lambda gpu: workers[gpu] / slots[gpu]), self._release, None)

    def _release(self, lease: Lease) -> None:
        with self._lock:
            if lease not in self._held:
                return
            self._held.remove(lease)
            if lease.lock is None:
                return
            heir = next((other for other in self._held if other.gpu == lease.gpu and other.lock is None), None)
            if heir is not None:  # a worker that shared the slot now has it
                heir.lock, lease.lock = lease.lock, None
            else:
                lease.lock.release()


def default_directory() -> Path:
    """The user's own: in XDG_RUNTIME_DIR where there is one, else in the directory of temporary files."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime) / "moe-fuzz" / "gpus"
    return Path(tempfile.gettempdir()) / f"moe-fuzz-{os.getuid()}" / "gpus"
