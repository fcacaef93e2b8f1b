"""`moe-fuzz selftest`: the checks are only worth what they have been seen to catch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_fuzz.campaign.selftest import Outcome, run_alone, run_planted
from moe_fuzz.cli import params
from moe_fuzz.cli.output import table
from moe_fuzz.config import did_you_mean
from moe_fuzz.errors import EXIT_CLEAN, EXIT_FINDING, EnvironmentProblem, UsageError
from moe_fuzz.planted.catalog import PLANTED
from moe_fuzz.report.whole import replace_file
from moe_fuzz.worker.gpus import gpus
from moe_fuzz.worker.pool import Pool

if TYPE_CHECKING:
    from moe_fuzz.campaign.selftest import Planted

LINE = 20  # planted bugs a line of progress, where it is no terminal that reads them
MEMORY = 2 << 30  # bytes a worker may have: enough for every planted bug but the one that eats memory


@click.command(short_help="Prove that the checks can fire: find every planted bug.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--only", is_flag=True, help="Prove that a check is needed: it alone finds its bug.")
@click.option("--cases", type=click.IntRange(1), default=2000, show_default=True, metavar="N", help="For each bug.")
@click.option("--time", type=params.DURATION, default=120.0, show_default=True, metavar="SECONDS", help="For each bug.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Same seed, same plan.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Also write a JSON file.")
@params.workers
@params.device
@params.memory
@click.pass_context
def command(
    ctx: click.Context,
    names: tuple[str, ...],
    only: bool,
    cases: int,
    time: float,
    seed: int,
    path: Path | None,
    workers: int | None,
    device: str,
    memory: int | None,
) -> None:
    """Run a small campaign on each planted bug, a kernel broken the way a real one was, until the check that must
    catch it does. Exit code 1 if any is missed.
    """
    device = params.pick_device(device)
    asked = [bug for bug in choose(names) if bug.only or not only]
    unseen = {bug.name: reason for bug in asked if (reason := why_not(bug, device))}
    chosen = [bug for bug in asked if bug.name not in unseen]
    if not asked:
        raise UsageError("none of these bugs is planted for one check alone", "leave out --only")
    if not chosen:
        reasons = "; ".join(sorted({*unseen.values()}))
        other = "cpu" if device == "cuda" else "cuda"
        there = any(other in bug.devices for bug in asked)
        hint = f"--device {other}, where there is one" if there else "use a machine with more GPUs"
        raise UsageError(f"none of these bugs can be seen here: each {reasons}", hint)
    count = min(params.pick_workers(workers, device), len(chosen))
    engine = run_alone if only else run_planted
    limit = memory or (MEMORY if device == "cpu" else None)
    with Pool(workers=count, device=device, memory_limit=limit) as pool:

        def one(bug: Planted) -> Outcome:
            return engine(bug, pool, seed, cases, time, device=device)

        keep = None
        if path is not None and (path.is_file() or not path.exists()):  # a pipe gets the last word alone
            keep = partial(_write, path)
        outcomes = run_all(chosen, one, count, keep)
    table([_row(outcome) for outcome in outcomes], ("bug", "", "check", "cases", "seconds", "also fired", "upstream"))
    missed = [outcome for outcome in outcomes if not outcome.passed]
    click.echo(f"\n{len(outcomes) - len(missed)} of {len(outcomes)} planted bugs found")
    for outcome in missed:
        click.echo(f"{outcome.name}: {why(outcome)}")
    for reason in dict.fromkeys(unseen.values()):
        click.echo(f"not run, as each {reason}: {', '.join(name for name in unseen if unseen[name] == reason)}")
    if path is not None:
        _write(path, outcomes)
    ctx.exit(EXIT_FINDING if missed else EXIT_CLEAN)


def choose(names: Iterable[str]) -> Sequence[Planted]:
    """The planted bugs of these names, all without any. Raises UsageError for an unknown one."""
    by_name: dict[str, Planted] = {bug.name: bug for bug in PLANTED}
    for name in names:
        if name not in by_name:
            meant = did_you_mean(name, by_name)
            raise UsageError(f"there is no planted bug {name!r}{meant}", f"there are {', '.join(by_name)}")
    return [by_name[name] for name in dict.fromkeys(names)] or list(PLANTED)


def why_not(bug: Planted, device: str) -> str:
    """Why a bug cannot be seen on this device of this machine; empty where it can."""
    if device not in bug.devices:
        return f"shows on {' or '.join(bug.devices)} alone"
    if device == "cuda" and bug.processes > len(gpus()):
        return f"needs {bug.processes} GPUs"
    return ""


def run_all(
    chosen: Sequence[Planted],
    one: Callable[[Planted], Outcome],
    workers: int,
    keep: Callable[[Sequence[Outcome]], None] | None = None,
) -> list[Outcome]:
    """All outcomes in the order of the catalog, `workers` at a time.

    keep: gets those there are, after each: what was found stays, should the rest be interrupted.
    """
    done: dict[str, Outcome] = {}

    def so_far() -> list[Outcome]:
        return [done[bug.name] for bug in chosen if bug.name in done]

    with ThreadPoolExecutor(workers) as threads:
        futures = [threads.submit(one, bug) for bug in chosen]
        try:
            for future in as_completed(futures):
                outcome = future.result()
                done[outcome.name] = outcome
                if keep is not None:
                    keep(so_far())
                if sys.stderr.isatty():
                    click.echo(f"\r{len(done)} of {len(chosen)} ", nl=False, err=True)
                elif len(done) % LINE == 0:
                    click.echo(f"{len(done)} of {len(chosen)}", err=True)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    if sys.stderr.isatty():
        click.echo("\r\x1b[2K", nl=False, err=True)
    return so_far()


def _row(outcome: Outcome) -> tuple[str, ...]:
    word = "found" if outcome.passed else "MISSED" if not outcome.found else "NOT ALONE"
    others = " ".join(outcome.others) or "-"
    cost = (str(outcome.cases), f"{outcome.seconds:.1f}")
    return (outcome.name, word, outcome.check, *cost, others, outcome.upstream)


def why(outcome: Outcome) -> str:
    """What a missed bug means, and the way on."""
    if outcome.found and outcome.others:
        return f"found by {outcome.check}, but {', '.join(outcome.others)} found it as well"
    if outcome.found:
        return f"the time was up before the other checks had run all {outcome.cases} cases: raise --time"
    if not outcome.seen:
        return f"the target refused all {outcome.cases} cases, so nothing was tested"
    fired = f"; {', '.join(outcome.others)} fired, which is not the check that must" if outcome.others else ""
    return f"{outcome.check} did not fire on {outcome.cases} cases{fired}"


def _write(path: Path, outcomes: Sequence[Outcome]) -> None:
    text = json.dumps([outcome.to_json() for outcome in outcomes], indent=1) + "\n"
    try:
        replace_file(path, text)
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written: {error.strerror}", "choose another --json path") from error
