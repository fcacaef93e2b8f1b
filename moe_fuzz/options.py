"""How a case is to be run. Free of torch: the parent sends it to the worker with each round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from moe_fuzz.errors import UsageError

#: Devices that have memory fences, without which nothing is run.
FENCED_DEVICES = ("cpu", "cuda")
SIDES = ("both", "left", "right")
ACCESS = ("any", "write")
OWN = ("torch", "all", "off")


#: The variables that name a provider's extension libraries, joined with os.pathsep, where its package is not installed.
LIB_VARIABLES: Mapping[str, str] = {"vllm": "MOE_FUZZ_VLLM_LIB", "sglang": "MOE_FUZZ_SGLANG_LIB"}
#: Forces one of the backends of our `experts_nvfp4`, by name.
EXPERTS_NVFP4_BACKEND = "MOE_FUZZ_EXPERTS_NVFP4_BACKEND"
EXPERTS_NVFP4_BACKENDS = ("small", "large", "scaled")


@dataclass(frozen=True)
class ProviderOptions:
    """How the workers of one provider are started: releases pin different versions of torch."""

    python: str | None = None  # the interpreter, which needs torch, triton, numpy; None: ours
    env: Mapping[str, str] = field(default_factory=dict)  # variables set for it, over those of this process


@dataclass(frozen=True)
class FenceOptions:
    """By default everything faults. After a crash the same case runs again with other options, which name the culprit:
    one tensor hard at a time gives the tensor, `sides` the side, `access` the kind of access."""

    hard: tuple[str, ...] | None = None  # tensors with real guards; None: all. The others get soft ones: only checked
    sides: str = "both"  # "both" | "left" | "right": the side on which a hard tensor's guard is real
    access: str = "any"  # "any": a real guard faults on reads and writes; "write": it can be read
    readonly: tuple[str, ...] | None = None  # inputs that are read-only during the call, soft guards or not; None: all
    own: str = "torch"  # memory the target allocates itself. "torch": what it asks torch for in Python; "all": on CUDA
    #                     whatever torch allocates for it, in C++ too, by an allocator of ours; "off": none of it

    def __post_init__(self) -> None:
        if self.sides not in SIDES:
            raise UsageError(f"fence sides: {self.sides!r} is not one of {', '.join(SIDES)}")
        if self.access not in ACCESS:
            raise UsageError(f"fence access: {self.access!r} is not one of {', '.join(ACCESS)}")

        if isinstance(self.own, bool):  # as it was written before there was a third choice
            object.__setattr__(self, "own", "torch" if self.own else "off")
        if self.own not in OWN:
            raise UsageError(f"fence own: {self.own!r} is not one of {', '.join(OWN)}")

    def is_hard(self, name: str, side: str) -> bool:
        """Whether the guard of tensor `name` on `side` ("left" | "right") is real."""
        return (self.hard is None or name in self.hard) and self.sides in ("both", side)

    def is_readonly(self, name: str) -> bool:
        """Whether the input tensor `name` is read-only during the call."""
        return self.readonly is None or name in self.readonly

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FenceOptions:
        names = {key: None if data.get(key) is None else tuple(data[key]) for key in ("hard", "readonly")}
        return cls(**{**_known(cls, data), **names})


@dataclass(frozen=True)
class RunOptions:
    """What the worker is to do with a round, and how long the parent waits for a case of it."""

    checks: tuple[str, ...] | None = None  # None: all of the op's
    fence: FenceOptions = field(default_factory=FenceOptions)
    deadline: float = 10.0  # seconds a case may take, those not counted in which it compiles or loads code
    first_deadline: float = 60.0  # seconds that these may take: what comes first in a process
    until: float = math.inf  # of time.monotonic() here: what runs then is given up, without a verdict

    def __post_init__(self) -> None:
        for name in ("deadline", "first_deadline"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name} must be a number of seconds above 0, not {getattr(self, name)!r}")

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "until"}  # the worker has no part in it

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunOptions:
        checks = data.get("checks")
        fence = FenceOptions.from_json(data.get("fence", {}))
        return cls(**{**_known(cls, data), "checks": None if checks is None else tuple(checks), "fence": fence})


def _known(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(data) - {f.name for f in fields(cls)})
    if unknown:
        raise UsageError(f"{cls.__name__}: unknown key {unknown[0]!r}")
    return dict(data)
