"""`moe-fuzz run`: a campaign."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from moe_fuzz import config, report
from moe_fuzz.campaign.engine import Campaign
from moe_fuzz.campaign.events import Summary, TargetUnavailable
from moe_fuzz.campaign.plan import Settings, not_here, nothing_left
from moe_fuzz.campaign.repro import renderer
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.cli import params
from moe_fuzz.cli import restriction as narrow
from moe_fuzz.errors import EXIT_CLEAN, EnvironmentProblem, UsageError
from moe_fuzz.ops import get_space
from moe_fuzz.report.plain import Plain
from moe_fuzz.report.terminal import Terminal
from moe_fuzz.restriction import Restriction
from moe_fuzz.sanitize import lane
from moe_fuzz.sanitize.automatic import automatic
from moe_fuzz.targets import registry
from moe_fuzz.worker.pool import Pool

_PROFILES = ", ".join(f"{profile.name} ({profile.help})" for profile in config.PROFILES.values())


@click.command(short_help="Run a campaign: generate cases, confirm and minimize what fails.")
@click.argument("targets", nargs=-1, metavar="[TARGET]...", envvar="MOE_FUZZ_TARGETS")
@params.option(
    "time", "--time", type=params.DURATION, metavar="SECONDS",
    help="How long, e.g. 90, 2m, 1h30m. What runs then is given up after 2 s; the last finding may be confirmed, and "
    "made smaller for --minimize-time longer.",
)  # fmt: skip
@params.option("cases", "--cases", type=click.IntRange(1), metavar="N", help="How many cases; with --time, at most.")
@params.option(
    "seed", "--seed", type=click.IntRange(0, 2**63 - 1), metavar="N",
    help="Same seed, same plan; but with --time, on a CPU, what would take seconds is left out of it.",
)  # fmt: skip
@params.option(
    "profile",
    "--profile",
    type=click.Choice(tuple(config.PROFILES)),
    default="default",
    show_default=True,
    help=f"A budget by name: {_PROFILES}.",
)
@params.target_op
@narrow.options
@params.fence
@params.option("checks", "--checks", type=params.NAMES, metavar="NAME,…", help="These checks only. [default: all]")
@params.option(
    "minimize-time",
    "--minimize-time",
    type=params.DURATION,
    metavar="SECONDS",
    help="For making one finding smaller. [default: the profile's]",
)
@params.option(
    "report",
    "--report",
    "reports",
    type=params.REPORT,
    multiple=True,
    metavar="KIND=PATH",
    help="Also write a report: html, junit, sarif or ndjson; github needs no PATH. May be given several times.",
)
@click.option("--sanitize/--no-sanitize", "sanitizing", default=True, show_default=True,
              help="On a GPU: have compute-sanitizer name the line of the kernel, for findings about memory.")
@params.workers
@params.device
@params.deadline
@params.memory
@params.state_dir
@click.pass_context
def command(
    ctx: click.Context,
    targets: tuple[str, ...],
    time: float | None,
    cases: int | None,
    seed: int | None,
    profile: str,
    op: str | None,
    ops: tuple[str, ...] | None,
    mode: tuple[str, ...] | None,
    preset: tuple[str, ...] | None,
    faults: tuple[str, ...] | None,
    only: tuple[tuple[str, tuple[str, ...]], ...] | None,
    fence: str | None,
    checks: tuple[str, ...] | None,
    minimize_time: float | None,
    reports: tuple[tuple[str, Path | None], ...],
    sanitizing: bool,
    workers: int | None,
    device: str,
    deadline: float,
    memory: int | None,
    state_dir: Path,
) -> None:
    """Run a campaign on each TARGET; without one, on every target that this machine can run.

    TARGET is op@provider (topk_softmax@torch), an op (every provider of it), a provider (every op of it),
    package.module:function, or file.py:function with --op.

    Each finding is confirmed in a fresh process, made small, and kept in the state directory with a line that
    replays it anywhere.
    """
    chosen = config.PROFILES[profile]
    names = narrow.only_ops(expand(targets, op), ops)
    restriction = narrow.restriction(mode, preset, faults, only, names)
    validate_checks(checks, names)
    device = params.pick_device(device)
    own, notes = params.pick_fence(fence, device)
    sanitizing, without = pick_sanitizer(sanitizing, device)
    count = params.pick_workers(workers, device)
    opened = report.open_reports(reports, os.environ)
    broadcast = report.Broadcast({**opened, "on the screen": screen()}, lambda text: click.echo(text, err=True))
    state = StateDir(state_dir)
    try:
        limit = params.pick_memory(memory, device, count)
        providers, logs = params.pick_providers(), state_dir / "logs"
        with state, Pool(
            workers=count, device=device, memory_limit=limit, log_dir=logs, providers=providers
        ) as pool:  # fmt: skip
            settings = Settings(
                targets=runnable(names, targets, op, pool, broadcast, restriction, device),
                cases=cases,
                seconds=time if time is not None or cases is not None else chosen.seconds,
                seed=seed,
                checks=checks,
                device=device,
                workers=count,
                deadline=deadline,
                restriction=restriction,
                own=own,
                notes=(*notes, *without, *restriction.lines()),
                minimize_seconds=chosen.minimize_seconds if minimize_time is None else minimize_time,
            )
            sanitize = automatic(pool, device) if sanitizing else None
            campaign = Campaign(
                settings, pool, state, broadcast, render_repro=renderer(pool), sanitize=sanitize,
                health=pool.stats.to_json,
            )  # fmt: skip
            summary = campaign.run()
    finally:
        broadcast.close()
    if summary.exit_code == EXIT_CLEAN:
        lost = [name for name in broadcast.failed if name in opened]
        if lost:
            raise EnvironmentProblem(f"nothing was found, but the report {lost[0]} could not be written to its end")
        if time is None and cases is None:
            check_floor(summary, chosen)
    ctx.exit(summary.exit_code)


def expand(targets: Sequence[str], op: str | None) -> tuple[str, ...]:
    """Full names, each once, in the order asked for; all that are known where none is asked for."""
    if not targets:
        return tuple(target.name for target in registry.known() if op in (None, target.op))
    return tuple(dict.fromkeys(name for text in targets for name in registry.resolve(text, op)))


def pick_sanitizer(wanted: bool, device: str) -> tuple[bool, tuple[str, ...]]:
    """Whether findings about memory are shown to a sanitizer, and a note where one is missed."""
    if not wanted or device != "cuda":
        return False, ()
    if lane.find() is None:
        return False, (f"{lane.NAME} is not here: findings about memory name no line of a kernel",)
    return True, ()


def validate_checks(checks: tuple[str, ...] | None, targets: Sequence[str]) -> None:
    """Raises UsageError for a check that none of the targets' ops has."""
    known = {check for name in targets for check in get_space(name.partition("@")[0]).checks}
    for check in checks or ():
        if check not in known:
            meant = config.did_you_mean(check, known)
            raise UsageError(f"there is no check {check!r}{meant}", f"the checks are {', '.join(sorted(known))}")


def check_floor(summary: Summary, profile: config.Profile) -> None:
    """Raises EnvironmentProblem if so little ran in the profile's time that its silence means nothing."""
    if not summary.interrupted and summary.cases < profile.floor:
        raise EnvironmentProblem(
            f"only {summary.cases} cases ran, and the profile {profile.name} asks for {profile.floor}",
            "a busy or slow machine? give more --time, or say with --cases how many are enough",
        )


def runnable(
    names: Sequence[str], targets: Sequence[str], op: str | None, pool: Pool, emit: report.Broadcast,
    restriction: Restriction, device: str,
) -> tuple[str, ...]:  # fmt: skip
    """Those that can run here, and those asked for by name, which must. That the others cannot is told and no error:
    an op or a provider stands for whatever there is of it."""
    asked = {name for text in targets if "@" in text or ":" in text for name in registry.resolve(text, op)}

    def able() -> Iterator[str]:
        for name in names:
            try:
                if name not in asked:
                    info = pool.describe(name)
                    elsewhere = not_here(get_space(info.op), info, device)
                    if elsewhere is not None:
                        raise elsewhere
                    refusal = restriction.refusal(get_space(info.op), info)
                    if refusal:
                        raise nothing_left(refusal)
            except EnvironmentProblem as error:
                emit(TargetUnavailable(name, error.message, error.hint))
            else:
                yield name

    found = tuple(able())
    if not found and restriction:
        raise EnvironmentProblem("there is nothing to run: --mode, --preset and --faults leave no case for any target",
                                 "widen them; the lines above say what each target does not take")  # fmt: skip
    if not found:
        raise EnvironmentProblem("no target can run on this machine", "`moe-fuzz doctor` says why not")
    return found


def screen() -> report.Report:
    """The live screen on a terminal, plain lines elsewhere."""
    from rich.console import Console

    console = Console()
    if sys.stdout.isatty() and not console.is_dumb_terminal:
        return Terminal(console)
    return Plain(_line)


def _line(text: str) -> None:
    print(text, flush=True)
