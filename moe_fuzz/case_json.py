"""The JSON that cases are written in: strict, bounded, compressed in its inline form; and its fields, one by one."""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels

INLINE_PREFIX = "mfz1:"
MAX_BYTES = 1 << 20  # of a case's JSON, so that a hostile file cannot fill the memory
MAX_FILE = MAX_BYTES * 64


def read_text(path: Path) -> str:
    """A file's text, or CaseError with the reason it cannot be read."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise CaseError("", f"{path} is too large to be a case ({path.stat().st_size} bytes)")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CaseError("", f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CaseError("", f"{path} is not text: {error.reason} at byte {error.start}") from error


def read_member(path: Path) -> str:
    """`read_text`, of a file that was met in a folder and that nobody named: a pipe there would be waited for for ever.
    """
    if path.exists() and not path.is_file():
        raise CaseError("", f"{path} is no regular file")
    return read_text(path)


def parse_json(text: str) -> Any:
    """Strict JSON: no NaN, no Infinity, no key twice."""

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) != len(pairs):
            raise CaseError("", "a key stands twice in one object of the JSON")
        return data

    def no_constant(name: str) -> Any:
        raise CaseError("", f"{name} is not a JSON number")

    try:
        return json.loads(text, object_pairs_hook=no_twins, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise CaseError("", f"not JSON: {error}") from error


def packed(text: str) -> str:
    """The inline form of a JSON text."""
    return INLINE_PREFIX + base64.urlsafe_b64encode(zlib.compress(text.encode(), level=9)).rstrip(b"=").decode()


def unpacked(text: str) -> str:
    """The JSON behind an inline form; any other text as it is. Raises CaseError where the inline form is damaged."""
    if not text.startswith(INLINE_PREFIX):
        return text
    body = text[len(INLINE_PREFIX) :]
    try:
        packed = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(packed, MAX_BYTES)
        if not unpacker.eof:
            raise CaseError("", "the inline case is cut short, or too large")
        return raw.decode()
    except (binascii.Error, zlib.error, UnicodeDecodeError, ValueError) as error:
        raise CaseError(
            "", f"the inline case is damaged: {error}", "copy the whole word, from mfz1: to its end"
        ) from error


# ---- fields ----------------------------------------------------------------------------------------------------------


def record_of(data: Any, where: str, keys: set[str]) -> dict[str, Any]:
    """The object at `where`, which has no other keys. Raises CaseError, as all of these do."""
    if not isinstance(data, dict):
        raise CaseError(where, f"must be an object, not {type(data).__name__}")
    unknown = sorted(set(data) - keys)
    if unknown:
        raise CaseError(f"{where}.{unknown[0]}".lstrip("."), "unknown key", f"the keys are {', '.join(sorted(keys))}")
    return data


def text_of(record: Mapping[str, Any], key: str, pattern: re.Pattern[str], where: str = "") -> str:
    value = record.get(key)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise CaseError(f"{where}.{key}".lstrip("."), f"must be a name, not {value!r}")
    return value


def labels_of(record: Mapping[str, Any], key: str, where: str) -> Labels:
    value = record.get(key, "")
    if not isinstance(value, str):
        raise CaseError(f"{where}.{key}", f'must be a string like "0-6,9", not {value!r}')
    try:
        return Labels.parse(value)
    except ValueError as error:
        raise CaseError(f"{where}.{key}", str(error)) from error
