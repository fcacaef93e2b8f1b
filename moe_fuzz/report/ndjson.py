"""NDJSON: one JSON object a line for each event, flushed as it happens."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TextIO

from moe_fuzz.campaign.events import Event
from moe_fuzz.report import Report, file_report


class Ndjson:
    """`time` is UTC in seconds; the other fields are the event's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def handle(self, event: Event) -> None:
        data = event.to_json()
        line = {"kind": data.pop("kind"), "time": round(time.time(), 3), **data}
        self._stream.write(json.dumps(line, allow_nan=False, default=str) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


@file_report("ndjson", "one JSON object a line for each event")
def open_report(path: Path) -> Report:
    return Ndjson(path.open("w", encoding="utf-8"))
