"""A thousand broken case files through the real command: each must end in exit code 2 and a sentence that a person can
act on, and nothing may be executed.

    python tests/endurance/broken_cases.py [--files 1000] [--processes 20] [--seed 5]

Every kind of damage is done to cases and sequences as a campaign writes them, with their digests and without: without,
the digest cannot help, and every field must be validated for itself. Damage that leaves the very same case, or makes
another case that is just as valid, is counted apart. The commands run in this process, through `main` itself, with
a pool that fails if anybody asks for it; some run in processes of their own, where a traceback could not hide.
Exits with 1 if a file is accepted that should not be, or refused in another way than this.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from harness import moe_fuzz_command, table

from moe_fuzz import strategies
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case, dumps_sequence, loads_sequence
from moe_fuzz.cli import main as cli
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import MoeFuzzError
from moe_fuzz.ops import get_space

INFO = TargetInfo("topk_softmax@builtin", "topk_softmax", "builtin", origin="moe_fuzz.kernels")
HUGE: tuple[Any, ...] = (2**31, 2**63, 2**64, 10**40, 10**5000, 1e308, -1, -(2**63), 0.5, 1e-320)
WRONG: tuple[Any, ...] = (None, True, False, 0, "", " ", "x" * 4000, "9-1", "0-99999999999", "\x00", "\ud800", "٣",
                          "0-6,", "1e3", [], [[]], {}, {"a": 1}, [None], ["0-6"], *HUGE)  # fmt: skip
Damage = Callable[[random.Random, Any], bytes]
KINDS: dict[str, Damage] = {}
FILE = "broken.json"


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


def originals(chosen: random.Random) -> list[Any]:
    """Cases as a campaign writes them, and a sequence."""
    grid = strategies.grid(get_space(INFO.op), INFO, "cpu", 0)
    cases = [case for case, _ in zip(grid, range(60), strict=False)]
    faulty = [case for case in cases if case.steps[0].faults]
    some = [*chosen.sample(cases, 10), *chosen.sample(faulty, 10)]
    return [case.to_json() for case in some] + [json.loads(dumps_sequence(chosen.sample(cases, 3))) for _ in range(4)]


def accepted(raw: bytes) -> tuple[Case, ...] | None:
    """The cases that the bytes hold, if they do and are valid: judged by the parser and the space alone."""
    try:
        text = raw.decode()
        data = None if text.startswith("mfz") else json.loads(text)
        is_sequence = isinstance(data, dict) and "moe_fuzz_sequence" in data
        cases = loads_sequence(text) if is_sequence else (Case.loads(text),)
        for case in cases:
            get_space(case.op).validate(case)
    except (MoeFuzzError, ValueError, RecursionError):
        return None
    return cases or None


class Asked(BaseException):
    """Somebody asked for workers. Not an Exception: nobody may take it for an error of the file."""


def no_pool(*arguments: object, **options: object) -> NoReturn:
    raise Asked


@contextlib.contextmanager
def no_workers() -> Iterator[None]:
    """Whoever starts workers in this process fails."""
    with (
        mock.patch("moe_fuzz.cli.replay.Pool", no_pool),
        mock.patch("moe_fuzz.worker.pool.Pool", no_pool),
        mock.patch("subprocess.Popen", no_pool),
    ):
        yield


def in_process(*arguments: str) -> tuple[int, str, bool]:
    """(exit code, standard error, whether workers were asked for), as `moe-fuzz` would end."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return cli.main(arguments), err.getvalue(), "Asked" in err.getvalue()
        except Asked:
            return -1, err.getvalue(), True


def wrong_with(code: int, err: str) -> str:
    """What is wrong with an answer; empty if it is as it should be."""
    lines = err.strip().splitlines()
    if code != 2:
        return f"exit code {code}"
    if "Traceback" in err or "internal error" in err:
        return "a traceback"
    if not lines or not lines[0].startswith("error: ") or len(lines[0]) < len("error: ") + 8:
        return "no sentence that says what is wrong"
    if len(err) > 2000:
        return f"{len(err)} characters, which nobody reads"
    if any(not (char.isprintable() or char == "\n") for char in err):
        return "it writes control characters to the terminal"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="endurance-") as folder, contextlib.chdir(folder):
        return run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> int:
    chosen = random.Random(options.seed)
    bases = originals(chosen)
    problems: list[str] = []
    counts: dict[str, Counter[str]] = {name: Counter() for name in [*KINDS, "a directory"]}
    kept: list[bytes] = []
    names = list(KINDS)
    broken = 0
    while broken < options.files:
        name = names[broken % len(names)]
        base = json.loads(json.dumps(chosen.choice(bases)))
        before = accepted(text_of(base))
        raw = KINDS[name](chosen, base)
        after = accepted(raw)
        if after is not None:
            same = after == before
            counts[name]["the same case" if same else "another valid case"] += 1
            if not same and raw.count(b'"digest"') >= len(after):
                problems.append(f"{name}: the digests let another case pass: {raw!r}")
            if counts[name].total() > 50 * options.files:
                problems.append(f"{name}: breaks nothing")
                break
            continue
        broken += 1
        kept.append(raw)
        Path(FILE).write_bytes(raw)
        with no_workers():
            ask(raw, chosen, name, counts[name], problems)
    with no_workers():
        directories(folder, problems, counts["a directory"])
    for raw in chosen.sample(kept, min(options.processes, len(kept))):
        Path(FILE).write_bytes(raw)
        done = moe_fuzz_command(chosen.choice(["replay", "show"]), FILE, cwd=folder)
        wrong = wrong_with(done.returncode, done.stderr) or ("it wrote to stdout" if done.stdout else "")
        if wrong:
            problems.append(f"in a process: {wrong}: {raw[:300]!r}: {done.stderr[:600]}")
    report(counts, broken, options, problems)
    return 1 if problems else 0


def ask(raw: bytes, chosen: random.Random, name: str, counts: Counter[str], problems: list[str]) -> None:
    """Both commands, on a file of these bytes; an inline case as a word too."""
    for command in ("replay", "show"):
        as_word = raw.startswith(b"mfz1:") and chosen.random() < 0.5
        code, err, asked = in_process(command, raw.decode() if as_word else FILE)
        wrong = "workers were asked for" if asked else wrong_with(code, err)
        counts["WRONG" if wrong else "refused"] += 1
        counts["with a hint"] += "\nhint: " in err
        if wrong:
            problems.append(f"{command}, {name}: {wrong}: {raw[:300]!r}: {err.strip()[:600]}")


def directories(folder: Path, problems: list[str], counts: Counter[str]) -> None:
    """Folders that hold no case, or a broken one, and names that are no files."""
    (folder / "empty").mkdir()
    (folder / "nested" / "case.json").mkdir(parents=True)
    (folder / "half").mkdir()
    (folder / "half" / "case.json").write_text("{")
    (folder / "loop").symlink_to(folder / "loop")
    with StateDir(folder / "state") as state:
        state.write_folder("findings/abcdefabcd", {"case.json": "{", "finding.json": "{"})
    names = ["empty", "nested", "half", "half/case.json", "nested/case.json", "loop", "gone.json", "", ".", "/", "-x"]
    for name in (*names, "/dev/null", "/dev/full", "abcdefabcd", "x" * 5000, "\udcff", "a\nb"):
        for command in ("replay", "show"):
            code, err, asked = in_process(command, "--state-dir", "state", "--", name)
            wrong = "workers were asked for" if asked else wrong_with(code, err)
            counts["refused" if not wrong else "WRONG"] += 1
            counts["with a hint"] += "\nhint: " in err
            if wrong:
                problems.append(f"{command}, named {name[:40]!r}: {wrong}: {err.strip()[:600]}")


def report(counts: dict[str, Counter[str]], broken: int, options: argparse.Namespace, problems: list[str]) -> None:
    columns = ("refused", "with a hint", "WRONG", "the same case", "another valid case")
    rows: list[list[object]] = [[name, *(counted[column] for column in columns)] for name, counted in counts.items()]
    rows.append(["all", *(sum(counted[column] for counted in counts.values()) for column in columns)])
    print(table(("damage", *columns), rows))
    print(f"{broken} broken files, replayed and shown in this process; {options.processes} in processes of their own")
    for problem in problems:
        print(f"PROBLEM {problem}")


if __name__ == "__main__":
    sys.exit(main())
