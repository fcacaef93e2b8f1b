"""NDJSON: one JSON object a line for each event, flushed as it happens."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from moe_fuzz.campaign.events import Event
from moe_fuzz.report import Report, file_report


class Ndjson:
    """`time` is UTC in seconds; the other fields are the event's own. A number that JSON has no word for is null."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def handle(self, event: Event) -> None:
        data = event.to_json()
        line = _finite({"kind": data.pop("kind"), "time": round(time.time(), 3), **data})
        self._stream.write(json.dumps(line, allow_nan=False, default=str) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@file_report("ndjson", "one JSON object a line for each event")
def open_report(path: Path) -> Report:
    return Ndjson(path.open("w", encoding="utf-8"))
