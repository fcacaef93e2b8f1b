"""How the fences of one run stand. Free of torch: the parent sends it to the worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from moe_fuzz.errors import UsageError

SIDES = ("both", "left", "right")
ACCESS = ("any", "write")


@dataclass(frozen=True)
class FenceOptions:
    """By default everything faults. After a crash the same case runs again with other options, which name the culprit:
    one tensor hard at a time gives the tensor, `sides` the side, `access` the kind of access."""

    hard: tuple[str, ...] | None = None  # tensors with real guards; None: all. The others get soft ones: only checked
    sides: str = "both"  # "both" | "left" | "right": the side on which a hard tensor's guard is real
    access: str = "any"  # "any": a real guard faults on reads and writes; "write": it can be read
    readonly: bool = True  # inputs are read-only during the call, those with soft guards too
    own: bool = True  # memory that the target allocates itself is fenced too

    def __post_init__(self) -> None:
        if self.sides not in SIDES:
            raise UsageError(f"fence sides: {self.sides!r} is not one of {', '.join(SIDES)}")
        if self.access not in ACCESS:
            raise UsageError(f"fence access: {self.access!r} is not one of {', '.join(ACCESS)}")

    def is_hard(self, name: str, side: str) -> bool:
        """Whether the guard of tensor `name` on `side` ("left" | "right") is real."""
        return (self.hard is None or name in self.hard) and self.sides in ("both", side)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["hard"] = None if self.hard is None else list(self.hard)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FenceOptions:
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise UsageError(f"fence options: unknown key {unknown[0]!r}",
                             f"the keys are {', '.join(f.name for f in fields(cls))}")
        hard = data.get("hard")
        return cls(**{**data, "hard": None if hard is None else tuple(hard)})
