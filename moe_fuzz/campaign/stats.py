"""stats.json: counters over all campaigns of a state directory, and the last flaky cases."""

from __future__ import annotations

import threading
from typing import Any

from moe_fuzz.campaign.badcase import BadCase
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.campaign.tally import Tally

FILE = "stats.json"
MAX_FLAKY = 100


class Stats:
    """What earlier campaigns counted, to which this run's tally is added whenever it is saved."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._before, self._flaky = state.read(FILE, _parse) or (Tally(), [])

    def flaky(self, bad: BadCase) -> None:
        """Remembers a case that was bad once; its inline form is enough to look again."""
        check, symptom = bad.key
        entry = {"target": bad.target, "check": check, "symptom": symptom, "case": bad.case.inline()}
        with self._lock:
            self._flaky = [*self._flaky, entry][-MAX_FLAKY:]

    def save(self, run: Tally) -> None:
        total = Tally()
        total.merge(self._before)
        total.merge(run)
        with self._lock:
            self._state.write_json(FILE, {"format": 1, "targets": total.to_json(), "flaky": self._flaky})


def _parse(data: Any) -> tuple[Tally, list[dict[str, str]]]:
    if data["format"] != 1:
        raise ValueError(f"format {data['format']!r} is not 1")
    return Tally.from_json(data["targets"]), [dict(entry) for entry in data["flaky"]]
