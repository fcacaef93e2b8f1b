"""What a pool counts. Free of torch."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields


@dataclass
class Stats:
    """Counters of a pool. Changed through `count` alone."""

    zygotes: int = 0  # started
    forks: int = 0
    fork_seconds: float = 0.0  # from the request until the worker was ready
    deaths: int = 0  # workers that died of a case: crashes, hangs, out of memory
    idle_deaths: int = 0  # workers that died between cases
    recycled: int = 0  # workers replaced because they had run long, or grown
    cases: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def count(self, name: str, amount: float = 1) -> None:
        with self._lock:
            setattr(self, name, getattr(self, name) + amount)

    def to_json(self) -> dict[str, float]:
        with self._lock:
            return {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}
