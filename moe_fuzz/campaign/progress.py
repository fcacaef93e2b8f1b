"""campaign.json: how far the plan has come, so that an interrupted campaign goes on where it stopped."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_fuzz.campaign.code import edited_since
from moe_fuzz.campaign.plan import Settings, Unit
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.campaign.tally import Tally
from moe_fuzz.case import Case
from moe_fuzz.labels import Labels

FILE = "campaign.json"


@dataclass
class _Saved:
    key: dict[str, Any]
    seed: int
    finished: bool
    done: dict[str, Labels]
    tally: Tally
    elapsed: float
    new: frozenset[str]
    aside: tuple[tuple[str, Case], ...]
    began: float
    releases: dict[str, str]


@dataclass
class Plan:
    """Which units are done. `before` counts what they gave in earlier runs of this campaign, `elapsed` their time.
    `began`: when the first of them loaded its targets, in seconds since the epoch; `releases`: of each, what they were.
    """

    seed: int
    resumed: bool = False
    before: Tally = field(default_factory=Tally)
    elapsed: float = 0.0
    new: frozenset[str] = frozenset()  # ids of the findings of earlier runs of this campaign
    aside: tuple[tuple[str, Case], ...] = ()  # (target, case) that this campaign does not run any more
    began: float = 0.0
    releases: Mapping[str, str] = field(default_factory=dict)
    superseded: str = ""  # why the campaign of these settings that was cut is not gone on with

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._done: dict[str, Labels] = {}
        self._tally = Tally()  # of done units only: the others run again
        self._tally.merge(self.before)
        self._start = time.monotonic()

    @classmethod
    def open(
        cls, settings: Settings, state: StateDir, began: float = 0.0, releases: Mapping[str, str] | None = None
    ) -> Plan:
        """Goes on with the campaign of the same settings (and seed, if one is given) that was cut; else a new one, as
        where a target is not what it was when that campaign began: what it passed says nothing of another.

        began: when this run began to load its targets; releases: what each is, as far as a version tells."""
        releases, superseded = releases or {}, ""
        saved = state.read(FILE, _parse)
        same = saved is not None and not saved.finished and saved.key == settings.key()
        if saved is not None and same and settings.seed in (None, saved.seed):
            superseded = _changed(saved, releases)
            if not superseded:
                both = {**saved.releases, **releases}
                plan = cls(saved.seed, True, saved.tally, saved.elapsed, saved.new, saved.aside, saved.began, both)
                plan._done = saved.done
                return plan
        seed = secrets.randbits(32) if settings.seed is None else settings.seed
        return cls(seed, began=began, releases=releases, superseded=superseded)

    def is_done(self, unit: Unit) -> bool:
        return unit.index in self._done.get(unit.line, Labels())

    def set_aside(self, target: str, case: Case) -> None:
        if not self.is_aside(target, case):
            self.aside = (*self.aside, (target, case))

    def is_aside(self, target: str, case: Case) -> bool:
        return any((target, case) == one for one in self.aside)

    def done(self, unit: Unit, tally: Tally) -> None:
        with self._lock:
            self._done[unit.line] = self._done.get(unit.line, Labels()) | Labels.of([unit.index])
            self._tally.merge(tally)

    @property
    def seconds(self) -> float:
        """Time spent on this campaign, earlier runs included."""
        return self.elapsed + time.monotonic() - self._start

    def save(self, settings: Settings, state: StateDir, new: list[str], finished: bool) -> None:
        with self._lock:
            done = {line: str(indices) for line, indices in self._done.items()}
            data = {"format": 1, "key": settings.key(), "seed": self.seed, "finished": finished, "done": done}
            data |= {"tally": self._tally.to_json(), "elapsed": self.seconds, "new": sorted({*new, *self.new})}
            data |= {"began": self.began, "releases": dict(self.releases)}
            data["aside"] = [{"target": target, "case": case.to_json()} for target, case in self.aside]
            state.write_json(FILE, data)


def _parse(data: Any) -> _Saved:
    if data["format"] != 1:
        raise ValueError(f"format {data['format']!r} is not 1")
    done = {str(line): Labels.parse(indices) for line, indices in data["done"].items()}
    tally = Tally.from_json(data["tally"])
    new = frozenset(map(str, data["new"]))
    aside = tuple((str(one["target"]), Case.from_json(one["case"])) for one in data.get("aside", ()))
    releases = {str(target): str(what) for target, what in data.get("releases", {}).items()}
    return _Saved(
        dict(data["key"]), int(data["seed"]), bool(data["finished"]), done, tally, float(data["elapsed"]), new, aside,
        float(data.get("began", 0.0)), releases,
    )  # fmt: skip


def _changed(saved: _Saved, releases: Mapping[str, str]) -> str:
    """Which target is not what it was; empty where none is known to have changed."""
    for target, what in releases.items():
        if saved.releases.get(target, what) != what:
            return f"{target} runs with other releases"
        if (file := edited_since(target, saved.began)) is not None:
            return f"{target} is made of {file}, which was written"
    return ""
