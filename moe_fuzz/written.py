"""Durations, sizes and reports as a person writes them, in the configuration and on the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+|\d+(?:\.\d+)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)


def parse_duration(value: Any) -> float:
    """Seconds: `90`, `1.5`, `"90s"`, `"2m"`, `"1h30m"`. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f'{value!r} is not a duration: write seconds, or a text like "90s", "2m", "1h30m"')
    if isinstance(value, str):
        text = value.strip().lower()
        if not _DURATION.fullmatch(text):
            raise ValueError(f'{value!r} is not a duration: write seconds, or a text like "90s", "2m", "1h30m"')
        parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text)
        value = sum(float(number) * _UNITS[unit] for number, unit in parts)
    seconds = float(value)
    if not 0 < seconds < 1e9:  # also refuses NaN
        raise ValueError(f"a duration must be positive, and less than thirty years, not {value!r}")
    return seconds


def parse_size(value: Any) -> int:
    """Bytes: `1073741824`, `"512MB"`, `"4GiB"`. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None:
            raise ValueError(f'{value!r} is not a size: write bytes, or a text like "512MB" or "4GiB"')
        power = "kmgt".index(match[2].lower()) + 1 if match[2] else 0
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size < 64 << 20:
        raise ValueError(f"{value!r} is too small: a worker needs at least 64MiB")
    return size


def parse_report(value: Any) -> tuple[str, Path | None]:
    """`KIND=PATH` as a pair, or `KIND` alone. Raises ValueError. Which kinds there are, and which of them need a path,
    the reports know."""
    kind, equals, path = value.partition("=") if isinstance(value, str) else ("", "", "")
    if not kind or bool(equals) != bool(path):
        raise ValueError(f"{value!r} is not KIND=PATH, e.g. ndjson=events.ndjson")
    return kind, Path(path) if path else None
