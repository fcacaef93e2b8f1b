"""`moe-fuzz bench`: implementations of an op side by side, on a GPU."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from moe_fuzz.bench import allreduce, layer_table, layers, nvfp4_table, table
from moe_fuzz.bench.drive import Result, Timer, measure_all
from moe_fuzz.bench.points import TOKENS, Candidate, candidates, points
from moe_fuzz.cli import machine, params
from moe_fuzz.errors import EXIT_CLEAN, EXIT_ENVIRONMENT, EXIT_FINDING, EnvironmentProblem, UsageError
from moe_fuzz.ops import get_space

MAX_TOKENS = 1 << 17


def _counts(value: Any) -> tuple[int, ...]:
    items = [part.strip() for part in str(value).split(",") if part.strip()]
    if not items or not all(item.isdecimal() and 1 <= int(item) <= MAX_TOKENS for item in items):
        raise ValueError(f"write numbers from 1 to {MAX_TOKENS} with commas in between, not {value!r}")
    return tuple(dict.fromkeys(int(item) for item in items))


def _written(counts: Sequence[int]) -> str:
    return ",".join(map(str, counts))


COUNTS = params.Parsed("n,n…", _counts, tuple)


@click.command(short_help="Time implementations of an op side by side, on a GPU.")
@click.argument("op")
@click.argument("targets", nargs=-1, metavar="[TARGET]...")
@click.option("--preset", "presets", multiple=True, metavar="NAME", help="This model only. May be given several times.")
@click.option("--tokens", type=COUNTS, metavar="N,…", help="Numbers of tokens.  [default: "
              f"{_written(TOKENS)}; of experts: {_written(layers.TOKENS)}]")  # fmt: skip
@click.option("--ab", nargs=2, metavar="A B", help="Compare two of the candidates: A's time over B's, with interval.")
@click.option("--rounds", type=click.IntRange(6, 10_000), default=60, show_default=True, help="Samples a candidate.")
@click.option("--launches", type=click.IntRange(1, 1000), default=100, show_default=True, help="Launches a sample.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write a result file (JSON).")
@click.option("--ranks", type=click.IntRange(2, 8), help="Of allreduce_rmsnorm: GPUs.  [default: all, up to 8]")
@click.option("--calibrate", type=click.Path(dir_okay=False, path_type=Path), metavar="TABLE",
              help="Of allreduce_rmsnorm: write the dispatch table that was measured to this file.")
@click.pass_context
def command(
    ctx: click.Context,
    op: str,
    targets: tuple[str, ...],
    presets: tuple[str, ...],
    tokens: tuple[int, ...] | None,
    ab: tuple[str, str] | None,
    rounds: int,
    launches: int,
    out: Path | None,
    ranks: int | None,
    calibrate: Path | None,
) -> None:
    """Time implementations of OP side by side: in CUDA graphs, interleaved, each verified before it is timed.

    Without TARGET: all known ones, and beside the routers ours without NaN safety and torch with nan_to_num in front.
    A candidate that cannot be timed (not installed, wrong, crashed, hung) is a line that says so. The ops
    experts_bf16 and experts_nvfp4 are timed at the sizes of real models, several calls a graph in place of --launches.

    allreduce_rmsnorm is timed on --ranks GPUs, 4 KB to 8 MB at H 2048, 4096 and 7168, against each all-reduce followed
    by a norm. Exit code 1 where the dispatch table is more than 5 % slower than the best choice.

    Exit code 3 without a GPU, or where nothing could be timed.
    """
    if op == allreduce.OP:
        ctx.exit(_all_reduce(ranks, calibrate, out, targets or presets or tokens or ab))
    if ranks is not None or calibrate is not None:
        raise UsageError("--ranks and --calibrate are of allreduce_rmsnorm", f"leave them out with {op}")
    of_layers = op in layers.OPS
    if of_layers:
        chosen, wanted = layers.candidates(targets, op), layers.points(presets, tokens or layers.TOKENS, op)
    else:
        get_space(op)
        chosen, wanted = candidates(op, targets), points(op, presets, tokens or TOKENS)
    for label in ab or ():
        if label not in [candidate.label for candidate in chosen]:
            names = ", ".join(repr(candidate.label) for candidate in chosen)
            raise UsageError(f"--ab: there is no candidate {label!r}", f"the candidates are {names}")
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"--out: there is no directory {out.absolute().parent}")
    if not machine.gpus():
        raise EnvironmentProblem("there is no GPU here, so there is nothing to time",
                                 "run it on a machine with one; `moe-fuzz doctor` says what this one has")  # fmt: skip
    about: dict[str, Any] = {
        "command": shlex.join(["moe-fuzz", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": {"rounds": rounds, "unit": "us"} | ({} if of_layers else {"launches": launches, "l2": "warm"}),
    }
    results: list[Result] = []

    with Timer() as timer:

        def done(result: Result) -> None:
            results.append(result)
            times = " ".join(f"{c.label}={table.cell(result, c.label)}" for c in chosen)
            click.echo(f"{len(results)}/{len(wanted)} {result.point.name} T={result.point.tokens}: {times}", err=True)
            if out is not None:  # after each point: a run that is cut short keeps what it has
                _write(out, _record(of_layers, results, chosen, {**about, **timer.environment}, ab))

        timer.start()
        measure_all(timer, wanted, chosen, rounds, launches, done)
    console = Console(width=None if sys.stdout.isatty() else 240)
    console.print((layer_table if of_layers else table).table(results, chosen))
    for line in table.notes(results) + (layer_table.notes(results) if of_layers else []):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if op == layers.OP_NVFP4:
        console.print(nvfp4_table.facts(results, chosen))
        for line in nvfp4_table.bars(results):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    for result, ratio in table.compare(results, *ab) if ab else ():
        console.print(
            f"{result.point.name} T={result.point.tokens}: {ab[0]} / {ab[1]} = {ratio.median:.4f} "  # type: ignore[index]
            f"[{ratio.low:.4f}, {ratio.high:.4f}]", soft_wrap=True, highlight=False, markup=False
        )  # fmt: skip
    ctx.exit(EXIT_CLEAN if any(result.times for result in results) else EXIT_ENVIRONMENT)


def _all_reduce(ranks: int | None, calibrate: Path | None, out: Path | None, more: Any) -> int:
    if more:
        raise UsageError("allreduce_rmsnorm is timed at sizes and against all-reduces of its own",
                         "leave TARGET, --preset, --tokens and --ab out")  # fmt: skip
    for option, path in (("--out", out), ("--calibrate", calibrate)):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{option}: there is no directory {path.absolute().parent}")
    found = len(machine.gpus())
    ranks = ranks or min(8, found)
    if found < 2 or ranks > found:
        raise EnvironmentProblem(f"{max(2, ranks)} ranks need as many GPUs, and there are {found}",
                                 "run it on a machine with more, or with fewer --ranks")  # fmt: skip
    result = allreduce.measure(ranks, calibrate is not None)
    if out is not None:
        _write(out, result)
    if calibrate is not None:
        _write(calibrate, allreduce.table_of(result))
    console = Console(width=None if sys.stdout.isatty() else 240)
    console.print(allreduce.rendered(result))
    for line in allreduce.notes(result):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return EXIT_ENVIRONMENT if not result["points"] else EXIT_FINDING if result["misses"] else EXIT_CLEAN


def _record(
    of_layers: bool, results: Sequence[Result], chosen: Sequence[Candidate], about: dict[str, Any],
    ab: tuple[str, str] | None,
) -> dict[str, Any]:  # fmt: skip
    return layer_table.to_json(results, chosen, about) if of_layers else table.to_json(results, chosen, about, ab)


def _write(path: Path, record: dict[str, Any]) -> None:
    """Replaces the file whole: who reads it never sees half of one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
