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
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from damage import KINDS, text_of
from harness import moe_fuzz_command, table

from moe_fuzz import strategies
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case, dumps_sequence, loads_sequence
from moe_fuzz.cli import main as cli
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import MoeFuzzError
from moe_fuzz.ops import get_space

INFO = TargetInfo("topk_softmax@builtin", "topk_softmax", "builtin", origin="moe_fuzz.kernels")
FILE = "broken.json"


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
