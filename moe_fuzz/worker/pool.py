"""The pool of workers: leases them, keeps their zygote alive, leaves nothing behind. Free of torch.

    with Pool(workers=2, device="cpu") as pool:
        info = pool.describe("topk_softmax@torch")
        with pool.lease() as worker:
            verdicts = worker.run(cases, info.name, RunOptions())
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import EnvironmentProblem, MoeFuzzError, UsageError
from moe_fuzz.options import ProviderOptions
from moe_fuzz.worker import turns
from moe_fuzz.worker.gpus import Gpu
from moe_fuzz.worker.gpus import gpus as gpus_here
from moe_fuzz.worker.launch import Demand, Process, Zygote, ZygoteGone, environment_of
from moe_fuzz.worker.leases import Lease, Leases
from moe_fuzz.worker.protocol import provider_of
from moe_fuzz.worker.ranks import Groups
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
        providers: Mapping[str, ProviderOptions] | None = None,
        gpus: Sequence[Gpu] | None = None,
        recycle_after: int = Limits.cases,
        recycle_growth: int = Limits.growth,
        runner: str | None = None,
        beside: Pool | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Starts the zygote and does not wait for it: the first use does.

        python: the interpreter of the workers, which needs torch, triton, numpy and moe-fuzz.
        memory_limit: bytes of writable private memory a worker may have, interpreter and libraries (0.3 GB) included.
        log_dir: where targets' output goes, a file a worker; a temporary directory by default.
        recycle_after, recycle_growth: cases a process runs, and bytes it grows, before a new one takes its place.
        providers: by name, those whose targets run in an interpreter of their own, or with variables of their own. Each
            gets a zygote, started when it is first needed; it needs no package but torch, triton and numpy.
        gpus: those to lease on cuda; by default all that this process may use (gpus.py).
        beside: a pool on the same GPUs, whose leases this one shares: it never waits for a slot that the other holds.
        variables: of workers, in place of what this process and their provider have.
        runner: "module:Class" or "file.py:Class" in place of moe_fuzz.execute.runner:Runner; for tests.

        Raises UsageError, EnvironmentProblem.
        """
        if workers < 1:
            raise UsageError(f"a pool needs at least one worker, not {workers}")
        if device not in ("cpu", "cuda"):
            raise UsageError(f"{device!r} is no device", "the devices are cpu and cuda")
        self._python, self._device, self._runner = python, device, runner
        self._providers = dict(providers or {})
        self._variables = dict(variables or {})
        self._shares = beside is not None
        self._leases: Leases | None
        if beside is not None:
            self._leases = beside._leases
        else:
            self._leases = Leases(gpus_here() if gpus is None else gpus) if device == "cuda" else None
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
        self._turn = threading.Lock()
        self._idle = [self._new_worker(f"worker-{number}.log") for number in range(workers)]
        self._zygotes: dict[ProviderOptions, Zygote] = {}
        self._started: Counter[ProviderOptions] = Counter()
        try:
            self._zygotes[self._home("")] = self._start(self._home(""))
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, Any]:
        """Versions of python, torch, triton and numpy on the workers' side. Waits for the zygote."""
        return self.versions("")

    def versions(self, target: str) -> dict[str, Any]:
        """The same where this target runs, which may be another interpreter."""
        while True:
            zygote = self._living(provider_of(target))
            with contextlib.suppress(ZygoteGone):
                return dict(zygote.info()["versions"])

    def describe(self, target: str, timeout: float = DESCRIBE_SECONDS) -> TargetInfo:
        """What the target says of itself. Blocks until a worker is free.

        Raises UsageError for a target that makes no sense, EnvironmentProblem for one that cannot be loaded, or whose
        loading ends the worker or takes longer than `timeout` seconds.
        """
        with self.lease(target) as worker:
            found = worker.describe(target, timeout)
        room = len(self._leases.gpus) if self._leases is not None else found.capabilities.max_processes
        limited = replace(found.capabilities, max_processes=min(room, found.capabilities.max_processes))
        return replace(found, capabilities=limited)

    @contextlib.contextmanager
    def lease(self, target: str = "") -> Iterator[Worker]:
        """A worker for the duration of the block; blocks until one is free. Its process goes on where it was. Where
        several are free it is one whose process stands ready for `target`: in another interpreter it starts anew."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._closed)
            if self._closed:
                raise _closed()
            worker = next((w for w in reversed(self._idle) if target and w.provider == provider_of(target)),
                          self._idle[-1])  # of several the one used last: its kernels are compiled
            self._idle.remove(worker)
        try:
            yield worker
        finally:
            with self._changed:
                self._idle.append(worker)
                self._changed.notify()

    @contextlib.contextmanager
    def fresh(self, environment: Mapping[str, str] | None = None) -> Iterator[Worker]:
        """A worker whose process nobody used before, thrown away after the block. It does not count as leased.

        environment: variables that its process has before it touches a device, such as CUDA_LAUNCH_BLOCKING.
        """
        worker = self._new_worker(f"fresh-{next(self._numbers)}.log", environment)
        try:
            yield worker
        finally:
            worker.discard()

    @contextlib.contextmanager
    def place(self, target: str) -> Iterator[tuple[str, dict[str, str]]]:
        """For a process that is no worker of ours: the interpreter of this target's provider and the whole environment
        it needs to import this moe-fuzz, with a place on a GPU for the duration of the block."""
        seat, home = Seat(self._leases), self._home(provider_of(target))
        python = str(home.python)
        lent = None if python == sys.executable else self._logs / "lent"
        try:
            yield python, environment_of(self._device, None, home.env, lent)[1] | seat.take()
        finally:
            seat.leave()

    def rest(self) -> None:
        """Ends the workers that nobody has leased: their places on GPUs are free for other programs. What was imported
        stays, so that the next use forks another worker soon."""
        with self._changed:
            for worker in self._idle:
                worker.rest()

    def close(self) -> None:
        """Ends all processes and waits for them. Idempotent. Threads that wait for a worker get an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._leases is not None and not self._shares:
            self._leases.close()
        with self._starting:
            zygotes, self._zygotes = self._zygotes, {}
        for zygote in zygotes.values():
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

    # ---- the zygotes ------------------------------------------------------------------------------------------------

    def _new_worker(self, log: str, environment: Mapping[str, str] | None = None) -> Worker:
        seat = Seat(self._leases)
        spawn = functools.partial(self._spawn, seat)
        groups = Groups(self._leases, functools.partial(self._spawn_rank, dict(environment or {})), self._turn)
        return Worker(spawn, self._logs / log, self.stats, self._limits, environment, seat.leave, groups,
                      seat.turn)

    def _spawn_rank(
        self, given: Mapping[str, str], provider: str, log: Path, environment: Mapping[str, str]
    ) -> Process:
        while True:
            zygote = self._living(provider)
            with contextlib.suppress(ZygoteGone):
                return zygote.spawn(log, self._limits.memory, {**given, **environment})

    def _spawn(self, seat: Seat, log: Path, demand: Demand) -> Process:
        environment = {**seat.take(), **dict(demand.environment)}
        while True:
            zygote = self._living(demand.provider)
            with contextlib.suppress(ZygoteGone):
                return zygote.spawn(log, self._limits.memory, environment)

    def _home(self, provider: str) -> ProviderOptions:
        """The interpreter and environment in which a provider's targets run. Several may have the same."""
        given = self._providers.get(provider, ProviderOptions())
        return ProviderOptions(given.python or self._python, _Variables({**given.env, **self._variables}))

    def _living(self, provider: str = "") -> Zygote:
        """The provider's zygote; another one where it died, if it did for the first time."""
        home = self._home(provider)
        with self._starting:
            if self._closed:
                raise _closed()
            zygote = self._zygotes.get(home)
            if zygote is not None and zygote.gone:
                if self._started[home] > _RESTARTS:
                    raise EnvironmentProblem("the process that workers are forked from died again",
                                             "does a target kill its parent process, or is the machine out of memory?")
                zygote.close()
                zygote = None
            if zygote is None:
                zygote = self._zygotes[home] = self._start(home)
            return zygote

    def _start(self, home: ProviderOptions) -> Zygote:
        self.stats.count("zygotes")
        self._started[home] += 1
        number = len(self._zygotes)
        log = self._logs / (f"zygote-{number}.log" if number else "zygote.log")
        return Zygote(str(home.python), self._device, log, self._runner, home.env)


class Seat:
    """Where a worker's processes run, one after the other: on a CPU anywhere, else on the GPU that was leased first."""

    def __init__(self, leases: Leases | None) -> None:
        self._leases = leases
        self._lease: Lease | None = None

    def take(self) -> dict[str, str]:
        """What the place adds to a process's environment. Blocks while other programs have every GPU."""
        if self._leases is None:
            return {}
        if self._lease is None:
            self._lease = self._leases.take()
        return self._lease.environment

    def turn(self) -> contextlib.AbstractContextManager[object]:
        """A block in which no group of ranks has the GPU for itself."""
        leases, lease = self._leases, self._lease
        if leases is None or lease is None:
            return contextlib.nullcontext()
        return turns.beside(leases.directory, lease.gpu.uuid, given_up=lambda: leases.closed)

    def leave(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None


class _Variables(dict[str, str]):
    """An environment that can be a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def _closed() -> MoeFuzzError:
    return MoeFuzzError("the pool of workers is closed")
