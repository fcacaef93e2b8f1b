"""Kinds of damage to a case file: each a function of the file's JSON and of `random`, under its name in KINDS."""

from __future__ import annotations

import contextlib
import json
import random
import re
import sys
from collections.abc import Callable
from typing import Any

from moe_fuzz.case import Case

HUGE: tuple[Any, ...] = (2**31, 2**63, 2**64, 10**40, 10**5000, 1e308, -1, -(2**63), 0.5, 1e-320)
WRONG: tuple[Any, ...] = (None, True, False, 0, "", " ", "x" * 4000, "9-1", "0-99999999999", "\x00", "\ud800", "٣",
                          "0-6,", "1e3", [], [[]], {}, {"a": 1}, [None], ["0-6"], *HUGE)  # fmt: skip
Damage = Callable[[random.Random, Any], bytes]
KINDS: dict[str, Damage] = {}


def damage(name: str) -> Callable[[Damage], Damage]:
    def register(function: Damage) -> Damage:
        KINDS[name] = function
        return function

    return register


def text_of(data: Any) -> bytes:
    return json.dumps(data).encode()


def records(data: Any) -> list[dict[str, Any]]:
    """All objects of the JSON."""
    inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return ([data] if isinstance(data, dict) else []) + [found for item in inner for found in records(item)]


def pick(chosen: random.Random, data: Any) -> tuple[dict[str, Any], str]:
    """A key anywhere in the case, and its object. Half of the time by somebody who knows to drop the digest."""
    if chosen.random() < 0.5:
        for record in records(data):
            record.pop("digest", None)
    record = chosen.choice([found for found in records(data) if found])
    return record, chosen.choice(sorted(record))


@damage("cut off")
def _(chosen: random.Random, data: Any) -> bytes:
    text = text_of(data)
    return text[: chosen.randrange(len(text))]


@damage("bytes flipped")
def _(chosen: random.Random, data: Any) -> bytes:
    raw = bytearray(text_of(data))
    for _ in range(chosen.randint(1, 8)):
        raw[chosen.randrange(len(raw))] ^= 1 << chosen.randrange(8)
    return bytes(raw)


@damage("bytes replaced")
def _(chosen: random.Random, data: Any) -> bytes:
    raw = bytearray(text_of(data))
    at = chosen.randrange(len(raw))
    raw[at : at + chosen.randint(1, 40)] = chosen.randbytes(chosen.randint(0, 40))
    return bytes(raw)


@damage("digit changed")
def _(chosen: random.Random, data: Any) -> bytes:
    text = text_of(data).decode()
    at = chosen.choice([found.start() for found in re.finditer(r"[0-9]", text)])
    return (text[:at] + chosen.choice("0123456789-.e") + text[at + 1 :]).encode()


@damage("key removed")
def _(chosen: random.Random, data: Any) -> bytes:
    record, key = pick(chosen, data)
    del record[key]
    return text_of(data)


@damage("key renamed")
def _(chosen: random.Random, data: Any) -> bytes:
    record, key = pick(chosen, data)
    record[chosen.choice([key.upper(), key + " ", key[:-1], "", "x", "__class__"])] = record.pop(key)
    return text_of(data)


@damage("key added")
def _(chosen: random.Random, data: Any) -> bytes:
    record, _ = pick(chosen, data)
    record[chosen.choice(["surplus", "", "Seed", "ep_size", "\x00"])] = chosen.choice([1, "x", None, {}])
    return text_of(data)


@damage("type changed")
def _(chosen: random.Random, data: Any) -> bytes:
    record, key = pick(chosen, data)
    record[key] = chosen.choice([wrong for wrong in WRONG if type(wrong) is not type(record[key])])
    return dump(data)


@damage("out of range")
def _(chosen: random.Random, data: Any) -> bytes:
    record, key = pick(chosen, data)
    same = [wrong for wrong in WRONG if type(wrong) is type(record[key]) and wrong != record[key]]
    record[key] = chosen.choice(same or [None])
    return dump(data)


@damage("key twice")
def _(chosen: random.Random, data: Any) -> bytes:
    record, key = pick(chosen, data)
    marked = text_of(data | {"twin": 0} if isinstance(data, dict) else data).decode()
    at = marked.find(f'"{key}": ')
    return (marked[:at] + f'"{key}": {json.dumps(record[key])}, ' + marked[at:]).replace(', "twin": 0', "").encode()


@damage("nested deeply")
def _(chosen: random.Random, data: Any) -> bytes:
    depth = chosen.choice([50, 990, 5000, 100_000])
    opening, closing = chosen.choice([("[", "]"), ('{"a":', "}")])
    deep = opening * depth + "1" + closing * chosen.choice([0, depth])
    record, key = pick(chosen, data)
    record[key] = "DEEP"
    return chosen.choice([deep, json.dumps(data).replace('"DEEP"', deep, 1)]).encode()


@damage("huge number")
def _(chosen: random.Random, data: Any) -> bytes:
    record, key = pick(chosen, data)
    record[key] = "HUGE"
    large = ["9" * 20, "9" * 400, "9" * 5000, "1e309", "-1e999", "1" + "0" * 300 + ".5"]
    number = chosen.choice([*large, "NaN", "-Infinity"])
    return json.dumps(data).replace('"HUGE"', number, 1).encode()


@damage("labels")
def _(chosen: random.Random, data: Any) -> bytes:
    found = [(record, key) for record in records(data) for key in record if key in ("rows", "padding", "experts")]
    pick(chosen, data)
    record, key = chosen.choice(found)
    record[key] = chosen.choice(
        ["0-1000000000000", "5-3", "-1", "0,0", "1-", "--", "0-6,3", "0;1", "0 - 6", "a", ",", "1" * 5000, "0-9e9", "²"]
    )
    return text_of(data)


@damage("encoding")
def _(chosen: random.Random, data: Any) -> bytes:
    text = text_of(data).decode()
    match chosen.randrange(5):
        case 0:
            return text.encode("utf-16")
        case 1:
            return text.encode("utf-32-le")
        case 2:
            return text.encode("cp037")
        case 3:
            return b"\xff\xfe" + text.encode()
        case _:
            return text.replace("t", "t\xe9", 1).encode("latin-1")


@damage("garbage")
def _(chosen: random.Random, data: Any) -> bytes:
    return chosen.randbytes(chosen.randrange(1, 4000))


@damage("another JSON")
def _(chosen: random.Random, data: Any) -> bytes:
    return text_of(chosen.choice([[], {}, None, 0, "mfz1:", [data], {"moe_fuzz": 1}, {"case": data}, True, 1e9, "x"]))


@damage("empty")
def _(chosen: random.Random, data: Any) -> bytes:
    return chosen.choice([b"", b"\n", b" \t\r\n", b"\0" * 64])


@damage("inline damaged")
def _(chosen: random.Random, data: Any) -> bytes:
    word = one_case(data).inline()
    at = chosen.randrange(5, len(word))
    match chosen.randrange(6):
        case 0:
            word = word[:at]
        case 1:
            word = word[:at] + chosen.choice("ABCxyz019-_") + word[at + 1 :]
        case 2:
            word = word[:at] + word[at + chosen.randint(1, 9) :]
        case 3:
            word = word[:at] + chosen.choice([" ", "\n", "…", "=", "%2F", "é"]) + word[at:]
        case 4:
            word = "mfz1:" + word[: chosen.randrange(4, 30)]
        case _:
            word = chosen.choice(["mfz2:", "MFZ1:", "mfz1", "mfz1: ", "mfz:"]) + word[5:]
    return word.encode()


def dump(data: Any) -> bytes:
    with contextlib.suppress(ValueError):  # 10**5000: json refuses to write what it would refuse to read
        return text_of(data)
    sys.set_int_max_str_digits(0)
    try:
        return text_of(data)
    finally:
        sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)


def one_case(data: Any) -> Case:
    return Case.from_json(data["cases"][-1] if "cases" in data else data)
