"""What a gate is asked for."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from moe_fuzz.campaign.gate.ledger import Entry
from moe_fuzz.campaign.gate.plan import Profile
from moe_fuzz.campaign.interfaces import Cases
from moe_fuzz.options import FenceOptions, RunOptions


@dataclass(frozen=True)
class GateSettings:
    """What the user asked for. `seconds` None: the whole plan, however long it takes."""

    targets: tuple[str, ...]
    profile: Profile
    cases: int | None  # among all targets; None: the profile's, for each of them
    seconds: float | None
    seed: int
    device: str
    workers: int
    deadline: float = 10.0
    first_deadline: float = 60.0
    strict: bool = False  # red on findings of class robustness too
    corpus: Cases = ()
    entries: tuple[Entry, ...] = ()
    strays: tuple[Entry, ...] = ()  # those of no target that is known or asked for
    arch: str = ""  # of the GPU, as "sm90"; "cpu"; empty where it is not known
    today: datetime.date | None = None
    notes: tuple[str, ...] = ()  # for the header

    def options(self) -> RunOptions:
        return RunOptions(None, FenceOptions(), self.deadline, self.first_deadline)
