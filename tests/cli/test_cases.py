"""Naming, reading and showing cases; whatever is wrong with one is a usage error, and nothing is executed."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz.case import Case, dumps_sequence
from moe_fuzz.cli import source
from moe_fuzz.errors import UsageError
from moe_fuzz.ops import OPS, get_space

JUNK: tuple[Any, ...] = (None, True, -1, 2**80, 1.5, "", "x" * 300, "9-1", "\x00", [], [[]], {}, {"a": 1})


@pytest.mark.parametrize("seed", range(10))
def test_a_broken_file_is_a_usage_error(call: Callable, pool: Any, case: Case, tmp_path: Path, seed: int) -> None:
    """A thousand broken files in all: each ends in 2 and a sentence, and no worker is asked."""
    chosen = random.Random(seed)
    path = tmp_path / "case.json"
    broken = 0
    while broken < 100:
        data = damage(case, chosen)
        if still_fine(data, case):
            continue
        broken += 1
        path.write_bytes(data)
        ran = call("replay", path)
        assert ran.code == 2, (data, ran.err)
        assert ran.err.startswith("error: ")
        assert "Traceback" not in ran.err
    assert not pool.made


def damage(case: Case, chosen: random.Random) -> bytes:
    data = case.to_json()
    text = json.dumps(data)
    match chosen.randrange(5):
        case 0:
            return text[: chosen.randrange(len(text))].encode()
        case 1:
            raw = bytearray(text.encode())
            for _ in range(chosen.randint(1, 4)):
                raw[chosen.randrange(len(raw))] = chosen.randrange(256)
            return bytes(raw)
        case 2:  # a value of the wrong kind, by somebody who knows to drop the digest
            del data["digest"]
            record = chosen.choice([data, data["config"], data["steps"][0], *data["steps"][0].get("faults", [])])
            record[chosen.choice(sorted(record))] = chosen.choice(JUNK)
        case 3:  # a key too many, or too few
            del data["digest"]
            record = chosen.choice([data, data["config"], data["steps"][0]])
            if chosen.random() < 0.5:
                record["surplus"] = 1
            else:
                del record[chosen.choice(sorted(record))]
        case _:
            return chosen.randbytes(chosen.randrange(200))
    return json.dumps(data).encode()


def still_fine(data: bytes, case: Case) -> bool:
    """Some damage harms nobody: another blank, a seed that is as good, an optional key."""
    try:
        found = Case.loads(data.decode())
        get_space(found.op).validate(found)
    except (UsageError, ValueError):
        return False
    return True


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"moe_fuzz": NaN}', '{"a": 1, "a": 2}', "1" * 5000, '{"moe_fuzz_sequence": 1, "cases": []}'],
)
def test_hostile_texts(call: Callable, tmp_path: Path, text: str) -> None:
    (tmp_path / "case.json").write_text(text)
    assert call("show", "case.json").code == 2


@pytest.mark.parametrize("name", ["", "\x00", "x" * 5000, "no/such/file", "/proc/self/mem", "a\nb"])
def test_names_that_mean_nothing(call: Callable, name: str) -> None:
    ran = call("show", name)
    assert ran.code == 2, ran.err


def test_every_way_to_name_a_case(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / ".moe-fuzz"
    folder = tmp_path / "copied"
    folder.mkdir()
    (folder / "case.json").write_text(case.dumps(indent=1))
    assert source.load(case.inline(), state).case == case
    assert source.load(str(folder / "case.json"), state).case == case
    assert source.load(str(folder), state).case == case
    (folder / "sequence.json").write_text(dumps_sequence([case, case]))
    assert source.load(str(folder), state).cases == (case, case)
    monkeypatch.setattr("sys.stdin", io.StringIO(case.dumps()))
    assert source.load("-", state).case == case


def test_show_says_all_there_is(call: Callable, case: Case) -> None:
    ran = call("show", case.inline())
    assert ran.code == 0
    for word in (*case.config, *case.fault_names, case.digest, str(case.seed), case.target):
        assert word in ran.out
    assert f"\nmoe-fuzz replay {case.inline()}\n" in ran.out


def test_show_json_and_inline_are_read_again(call: Callable, case: Case) -> None:
    assert Case.loads(call("show", case.inline(), "--json").out) == case
    assert Case.loads(call("show", case.inline(), "--inline").out) == case


@pytest.mark.parametrize("kind", ["ops", "targets", "checks", "faults", "presets"])
def test_list(call: Callable, kind: str) -> None:
    text, data = call("list", kind), call("list", kind, "--json")
    assert text.code == data.code == 0
    rows = json.loads(data.out)
    assert rows
    assert len(text.out.splitlines()) == len(rows) + 1
    named = " ".join(str(row["op"]) for row in rows)
    assert all(op in named for op in OPS)
