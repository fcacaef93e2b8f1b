"""What is said of a planted bug. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Planted:
    """One planted bug. Its docstring tells the same story, for whoever reads the code."""

    name: str  # also the name of the function
    op: str
    module: str  # beside this file
    check: str  # the check that must find it; "crash", "hang" and "oom" for those that take their process
    upstream: str  # the issue it stands for, as OWNER#NUMBER
    story: str  # the flaw, and the input that shows it
    symptom: str = ""  # the symptom of the finding, where it is one only
    only: bool = False  # no other check can find it
    fence: str = "torch"  # FenceOptions.own that it takes to see it
    contract: Mapping[str, Any] = field(default_factory=lambda: {"deterministic": True})
    capabilities: Mapping[str, Any] = field(default_factory=dict)  # beyond what the signature tells

    @property
    def function(self) -> str:
        return self.name

    @property
    def devices(self) -> tuple[str, ...]:
        """Where it is a bug: memory of the host is eaten on the host."""
        return tuple(self.capabilities.get("devices", ("cpu", "cuda")))

    @property
    def processes(self) -> int:
        """How many it takes at least to see it, each on a GPU of its own where it runs on GPUs."""
        return 2 if self.capabilities.get("processes") else 1

    @property
    def target(self) -> str:
        return f"{self.op}@planted.{self.name}"
