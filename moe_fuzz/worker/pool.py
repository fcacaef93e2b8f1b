"""The pool of workers: leases them, keeps their zygote alive, leaves nothing behind. Free of torch.

    with Pool(workers=2, device="cpu") as pool:
        info = pool.describe("topk_softmax@torch")
        with pool.lease() as worker:
            verdicts = worker.run(cases, info.name, RunOptions())
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import EnvironmentProblem, MoeFuzzError, UsageError
from moe_fuzz.worker.launch import Process, Zygote, ZygoteGone
from moe_fuzz.worker.stats import Stats
from moe_fuzz.worker.watch import Limits, Worker

__all__ = ["Pool", "Stats", "Worker"]

DESCRIBE_SECONDS = 120.0  # importing a serving library is slow
_RESTARTS = 1  # of the zygote: who kills it twice does not do so by chance


class Pool:
    """Workers on one device. Its methods may be called from several threads; a Worker is for one at a time."""

    def __init__(
        self,
        workers: int,
        device: str,
        python: str = sys.executable,
        memory_limit: int | None = None,
        log_dir: Path | None = None,
        *,
        recycle_after: int = Limits.cases,
        recycle_growth: int = Limits.growth,
        runner: str | None = None,
    ) -> None:
        """Starts the zygote and does not wait for it: the first use does.

        python: the interpreter of the workers, which needs torch, triton, numpy and moe-fuzz.
        memory_limit: bytes of writable private memory a worker may have, interpreter and libraries (0.3 GB) included.
        log_dir: where targets' output goes, a file a worker; a temporary directory by default.
        recycle_after, recycle_growth: cases a process runs, and bytes it grows, before a new one takes its place.
        runner: "module:Class" or "file.py:Class" in place of moe_fuzz.execute.runner:Runner; for tests.

        Raises UsageError, EnvironmentProblem.
        """
        if workers < 1:
            raise UsageError(f"a pool needs at least one worker, not {workers}")
        if device not in ("cpu", "cuda"):
            raise UsageError(f"{device!r} is no device", "the devices are cpu and cuda")
        self._python, self._device, self._runner = python, device, runner
        self._limits = Limits(memory_limit, recycle_after, recycle_growth)
        self._temporary = log_dir is None
        try:
            self._logs = Path(tempfile.mkdtemp(prefix="moe-fuzz-")) if log_dir is None else log_dir.resolve()
            self._logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(f"the directory of logs cannot be made: {error}") from error
        self.stats = Stats()
        self._changed = threading.Condition()
        self._starting = threading.Lock()
        self._closed = False
        self._numbers = itertools.count()
        self._idle = [self._new_worker(f"worker-{number}.log") for number in range(workers)]
        self._zygote: Zygote | None = None
        try:
            self._zygote = self._start()
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, Any]:
        """Versions of python, torch, triton and numpy on the workers' side. Waits for the zygote."""
        return dict(self._living().info()["versions"])

    def describe(self, target: str, timeout: float = DESCRIBE_SECONDS) -> TargetInfo:
        """What the target says of itself. Blocks until a worker is free.

        Raises UsageError for a target that makes no sense, EnvironmentProblem for one that cannot be loaded, or whose
        loading ends the worker or takes longer than `timeout` seconds.
        """
        with self.lease() as worker:
            return worker.describe(target, timeout)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Worker]:
        """A worker for the duration of the block; blocks until one is free. Its process goes on where it was."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._closed)
            if self._closed:
                raise _closed()
            worker = self._idle.pop()  # the one used last: its kernels are compiled
        try:
            yield worker
        finally:
            with self._changed:
                self._idle.append(worker)
                self._changed.notify()

    @contextlib.contextmanager
    def fresh(self) -> Iterator[Worker]:
        """A worker whose process nobody used before, thrown away after the block. It does not count as leased."""
        worker = self._new_worker(f"fresh-{next(self._numbers)}.log")
        try:
            yield worker
        finally:
            worker.discard()

    def close(self) -> None:
        """Ends all processes and waits for them. Idempotent. Threads that wait for a worker get an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with self._starting:
            zygote, self._zygote = self._zygote, None
        if zygote is not None:
            zygote.close()
        for worker in self._idle:
            worker.close()
        if self._temporary:
            shutil.rmtree(self._logs, ignore_errors=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- the zygote -------------------------------------------------------------------------------------------------

    def _new_worker(self, log: str) -> Worker:
        return Worker(self._spawn, self._logs / log, self.stats, self._limits)

    def _spawn(self, log: Path) -> Process:
        while True:
            zygote = self._living()
            with contextlib.suppress(ZygoteGone):
                return zygote.spawn(log, self._limits.memory)

    def _living(self) -> Zygote:
        """The zygote; another one where it died, if it did for the first time."""
        with self._starting:
            if self._closed or self._zygote is None:
                raise _closed()
            if self._zygote.gone:
                if self.stats.zygotes > _RESTARTS:
                    raise EnvironmentProblem("the process that workers are forked from died again",
                                             "does a target kill its parent process, or is the machine out of memory?")
                self._zygote.close()
                self._zygote = self._start()
            return self._zygote

    def _start(self) -> Zygote:
        self.stats.count("zygotes")
        return Zygote(self._python, self._device, self._logs / "zygote.log", self._runner)


def _closed() -> MoeFuzzError:
    return MoeFuzzError("the pool of workers is closed")
