"""Mutation testing of our kernels: what the checks and the generator let through.

    python benchmarks/mutants.py [FILE ...] [--count 40] [--seed 0] [--cases 200] [--seconds 30] [--jobs N]
                                 [--json PATH] [--again PATH]

Each mutant is one small change to one kernel file: a comparison off by one, a mask left out, a constant one larger, two
values swapped, a store that is gone. It is found when any case of a small campaign on it, in Triton's interpreter, does
not pass. Of one that survives it is asked whether its line is run at all: much of a kernel is for a GPU alone. What is
run and survives is either no change (a bound that is never met, a size that only says how fast it goes), or a hole in
the fuzzer; each of these is to be read.

FILE: below kernels/; all of them by default, `--count` mutants each. --again PATH: those that survived in this file.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: The targets that run a file, by the beginning of its name; the first that finds a mutant is enough.
TARGETS = {
    "routing": ("topk_softmax@builtin", "topk_sigmoid@builtin", "grouped_topk@builtin"),
    "grouped": ("grouped_topk@builtin",),
    "align": ("align@builtin", "experts_bf16@builtin"),
    "experts_bf16": ("experts_bf16@builtin", "experts_nvfp4@builtin"),
    "moe_layer": ("moe_layer@builtin",),
    "nvfp4": ("nvfp4_quantize@builtin", "experts_nvfp4@builtin"),
    "experts_nvfp4": ("experts_nvfp4@builtin", "experts_nvfp4@builtin.small", "experts_nvfp4@builtin.large"),
    "allreduce_rmsnorm": ("allreduce_rmsnorm@builtin.one_shot", "allreduce_rmsnorm@builtin.split",
                          "allreduce_rmsnorm@builtin.two_shot"),
}
_COMPARED = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
             ast.Eq: ("==", "!="), ast.NotEq: ("!=", "==")}  # fmt: skip
_COMPUTED = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.FloorDiv: ("//", "%"),
             ast.Mod: ("%", "//"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.LShift: ("<<", ">>"),
             ast.RShift: (">>", "<<"), ast.BitXor: ("^", "|")}  # fmt: skip
_NAMES = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max"}
_TREE = ("moe_fuzz", "kernels", "reference")  # of which links of the package lead into each other


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: the text [begin, end) of a file becomes another."""

    file: str
    line: int
    begin: int
    end: int
    was: str
    becomes: str
    statement: int  # the line at which the statement begins

    def apply(self, source: str) -> str:
        return source[: self.begin] + self.becomes + source[self.end :]

    def trap(self, source: str) -> str:
        """The file with something in front of the statement that cannot pass."""
        lines = source.splitlines(keepends=True)
        line = lines[self.statement - 1]
        lines.insert(self.statement - 1, line[: len(line) - len(line.lstrip())] + "1 // 0\n")
        return "".join(lines)


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """Every change of a file that this script knows."""
    tree = ast.parse(source)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    raw = source.encode()

    def span(node: Any) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(begin: int, end: int) -> str:
        return raw[begin:end].decode()

    def changed(node: Any, begin: int, end: int, becomes: str) -> Mutant:
        first, last = len(text(0, begin)), len(text(0, end))
        return Mutant(file, node.lineno, first, last, text(begin, end), becomes, inside[node].lineno)

    def between(node: Any, left: Any, right: Any, swap: tuple[str, str]) -> Iterator[Mutant]:
        begin, end = span(left)[1], span(right)[0]
        at = text(begin, end).find(swap[0])
        if at >= 0:
            yield changed(node, begin + at, begin + at + len(swap[0]), swap[1])

    inside = dict(_of_code(tree, tree))
    for node in inside:
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARED:
            yield from between(node, node.left, node.comparators[0], _COMPARED[type(node.ops[0])])
        elif isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED:
            yield from between(node, node.left, node.right, _COMPUTED[type(node.op)])
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float) and type(node.value) is not bool:
            yield changed(node, *span(node), repr(node.value + 1))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert | ast.Not):
            yield changed(node, *span(node), f"({text(*span(node.operand))})")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield changed(node, *span(node), "pass")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            of_triton = isinstance(node.func.value, ast.Name) and node.func.value.id == "tl"
            if name == "where" and of_triton and len(node.args) == 3:
                condition, yes, no = (text(*span(arg)) for arg in node.args)
                yield changed(node, *span(node), f"tl.where({condition}, {no}, {yes})")
            if name in ("load", "store") and any(keyword.arg == "mask" for keyword in node.keywords):
                kept = [keyword for keyword in node.keywords if keyword.arg not in ("mask", "other")]
                bare = ast.Call(node.func, node.args, kept)
                yield changed(node, *span(node), ast.unparse(bare))
            if name in _NAMES and of_triton:
                begin, end = span(node.func)
                yield changed(node, begin, end, f"tl.{_NAMES[name]}")


def _of_code(node: ast.AST, statement: Any) -> Iterator[tuple[ast.AST, Any]]:
    """What is run on valid input, and the statement that it is in: no text, annotation, decorator or default, and no
    refusal of what is invalid."""
    for name, value in ast.iter_fields(node):
        if name in ("decorator_list", "annotation", "returns", "defaults", "kw_defaults"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr):
                continue
            if isinstance(child, ast.If) and all(isinstance(one, ast.Raise) for one in child.body):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            of_child = child if isinstance(child, ast.stmt) else statement
            yield child, of_child
            yield from _of_code(child, of_child)


def targets_of(file: str) -> tuple[str, ...]:
    name = Path(file).parts[0].removesuffix(".py")
    return TARGETS.get(name) or next(targets for start, targets in TARGETS.items() if name.startswith(start))


#: Run beside the changed tree: cases on one target, until one does not pass.
HUNT = """
import itertools, json, sys
from moe_fuzz.campaign.selftest import draw
from moe_fuzz.errors import MoeFuzzError
from moe_fuzz.options import RunOptions
from moe_fuzz.worker.pool import Pool
target, cases, seconds, seed = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
import time
start, ran, found = time.monotonic(), 0, ""
with Pool(workers=1, device="cpu") as pool:
    try:
        info = pool.describe(target)
        drawn = itertools.islice(draw(info.op, info, "cpu", seed), cases)
        with pool.lease() as worker:
            while not found and time.monotonic() - start < seconds and (batch := tuple(itertools.islice(drawn, 4))):
                for verdict in worker.run(batch, target, RunOptions(deadline=10.0)):
                    ran += 1
                    if verdict.kind not in ("pass", "rejected"):
                        found = "; ".join(f"{v.check}:{v.symptom}" for v in verdict.violations[:1]) or verdict.kind
                        break
    except MoeFuzzError as error:
        found = f"does not load: {error}"[:200]
print(json.dumps([found, ran, round(time.monotonic() - start, 1)]))
"""


def hunt(tree: Path, target: str, cases: int, seconds: float, seed: int) -> tuple[str, int, float]:
    """What found the change, or nothing; how many cases ran, and for how long."""
    command = [sys.executable, "-c", HUNT, target, str(cases), str(seconds), str(seed)]
    try:
        done = subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True,
                              text=True, timeout=seconds + 120, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return "hang: the campaign did not end", 0, seconds + 120
    if done.returncode:
        raise SystemExit(f"{target} could not be tried: {done.stderr[-2000:]}")
    found, ran, took = json.loads(done.stdout.splitlines()[-1])
    return found, ran, took


def try_source(file: str, source: str, cases: int, seconds: float, seed: int) -> tuple[str, int, float]:
    """What found a file of this text, or nothing; how many cases ran, and for how long."""
    found, ran, took = "", 0, 0.0
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        tree = Path(name)
        for part in _TREE:
            shutil.copytree(ROOT / part, tree / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        (tree / "kernels" / file).write_text(source)
        for target in targets_of(file):
            found, more, took_here = hunt(tree, target, cases, seconds, seed)
            ran, took = ran + more, took + took_here
            if found:
                break
    return found, ran, round(took, 1)


def try_one(mutant: Mutant, cases: int, seconds: float, seed: int) -> dict[str, Any]:
    """The mutant as a record, with what became of it. reached: whether its line is run; None: nobody asked, or it
    cannot be asked."""
    source = (ROOT / "kernels" / mutant.file).read_text()
    found, ran, took = try_source(mutant.file, mutant.apply(source), cases, seconds, seed)
    reached: bool | None = None
    if not found and _is_python(trapped := mutant.trap(source)):
        reached = bool(try_source(mutant.file, trapped, cases, seconds, seed)[0])
    return {"file": mutant.file, "line": mutant.line, "was": mutant.was, "becomes": mutant.becomes, "found_by": found,
            "reached": reached, "cases": ran, "seconds": took}  # fmt: skip


def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def chosen(file: str, count: int, seed: int) -> list[Mutant]:
    """Some of a file's mutants that are still Python, the same ones for the same seed."""
    source = (ROOT / "kernels" / file).read_text()
    every = [mutant for mutant in mutants(file, source) if _is_python(mutant.apply(source))]
    return sorted(random.Random(f"{file} {seed}").sample(every, min(count, len(every))), key=lambda one: one.begin)


def survivors_of(path: Path) -> list[Mutant]:
    """The mutants that survived in a file of --json, as far as the kernels still have them."""
    left = {(one["file"], one["line"], one["was"], one["becomes"])
            for one in json.loads(path.read_text())["mutants"] if not one["found_by"]}  # fmt: skip
    return [mutant for file in sorted({key[0] for key in left}) for mutant in chosen(file, sys.maxsize, 0)
            if (mutant.file, mutant.line, mutant.was, mutant.becomes) in left]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--again", type=Path)
    asked = parser.parse_args(argv)
    kernels = ROOT / "kernels"
    if missing := [file for file in asked.files if not (kernels / file).is_file()]:
        parser.error(f"below {kernels} there is no {', '.join(missing)}")
    files = asked.files or sorted(str(path.relative_to(kernels)) for path in kernels.rglob("*.py")
                                  if path.name != "__init__.py")  # fmt: skip
    if asked.again is not None:
        every = survivors_of(asked.again)
    else:
        every = [mutant for file in files for mutant in chosen(file, asked.count, asked.seed)]
    for target, file in {target: one.file for one in every for target in targets_of(one.file)}.items():
        found = try_source(file, (kernels / file).read_text(), 8, 60.0, asked.seed)[0]
        if found:
            raise SystemExit(f"{target} does not pass as it is, so its mutants would all be found: {found}")
    records: list[dict[str, Any]] = []
    writing = threading.Lock()
    started = time.monotonic()

    def work(mutant: Mutant) -> None:
        record = try_one(mutant, asked.cases, asked.seconds, asked.seed)
        with writing:
            tell(mutant, record)

    def tell(mutant: Mutant, record: dict[str, Any]) -> None:
        records.append(record)
        word = record["found_by"] or ("is never run" if record["reached"] is False else "SURVIVES")
        print(f"{len(records)} of {len(every)}, {time.monotonic() - started:.0f} s: {mutant.file}:{mutant.line} "
              f"{mutant.was!r} -> {mutant.becomes!r}: {word} ({record['cases']} cases)", flush=True)  # fmt: skip
        if asked.json is not None:
            _write(asked.json, records, argv)

    with ThreadPoolExecutor(asked.jobs) as threads:
        for _ in threads.map(work, every):
            pass
    left = [record for record in records if not record["found_by"]]
    unread = [record for record in left if record["reached"] is not False]
    broken = sum(record["found_by"].startswith("does not load") for record in records)
    print(f"{len(records) - len(left)} of {len(records)} found, {broken} of them as they do not load; "
          f"{len(left) - len(unread)} are never run; left:")  # fmt: skip
    for record in sorted(unread, key=lambda one: (one["file"], one["line"])):
        print(f"  {record['file']}:{record['line']}: {record['was']!r} -> {record['becomes']!r}")


def _write(path: Path, records: list[dict[str, Any]], argv: Sequence[str] | None) -> None:
    command = " ".join(["python benchmarks/mutants.py", *(argv if argv is not None else sys.argv[1:])])
    path.write_text(json.dumps({"command": command, "date": datetime.now(UTC).date().isoformat(),
                                "found": sum(bool(one["found_by"]) for one in records), "of": len(records),
                                "mutants": records}, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
