"""Readers of the values of the configuration: each gives the value, or raises ValueError with what is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from moe_fuzz.written import parse_report


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def count(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"must be a whole number, not {value!r}")
        if not least <= value < 2**63:
            raise ValueError(f"must be at least {least} and less than 2^63, not {value}")
        return value

    return read


def choice(*choices: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, not {value!r}" + did_you_mean(str(value), choices))
        return str(value)

    return read


def texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"must be a list of strings, not {value!r}")
    return value


def reports(value: Any) -> list[str]:
    for item in texts(value):
        parse_report(item)
    return list(value)


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"must be a string, not {value!r}")
    return value


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {value!r}")
    return value


def strings(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError(f"must be a table of strings, not {value!r}")
    return value
