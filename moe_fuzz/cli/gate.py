"""`moe-fuzz gate`: a fixed plan, red only on a new confirmed finding or a ledger that is out of date."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from moe_fuzz import config, report
from moe_fuzz._version import __version__
from moe_fuzz.campaign.events import CampaignFinished, CampaignStarted, Summary
from moe_fuzz.campaign.gate import changed, ledger_file
from moe_fuzz.campaign.gate.corpus import read as read_corpus
from moe_fuzz.campaign.gate.engine import Gate
from moe_fuzz.campaign.gate.entries import no_target
from moe_fuzz.campaign.gate.ledger import FILE, Entry, strays
from moe_fuzz.campaign.gate.plan import PROFILES, read_quota
from moe_fuzz.campaign.gate.settings import GateSettings
from moe_fuzz.campaign.repro import renderer
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.cli import params
from moe_fuzz.cli.machine import architecture, gpus, human
from moe_fuzz.cli.run import expand, pick_sanitizer, runnable, screen
from moe_fuzz.config_tables import TABLE
from moe_fuzz.errors import EXIT_CLEAN, EnvironmentProblem, UsageError
from moe_fuzz.ops import OPS
from moe_fuzz.options import ProviderOptions
from moe_fuzz.restriction import Restriction
from moe_fuzz.sanitize.automatic import automatic
from moe_fuzz.targets import registry
from moe_fuzz.worker.gpus import SLOT_BYTES, Gpu, default_workers
from moe_fuzz.worker.pool import Pool

F = TypeVar("F", bound=Callable[..., Any])


def _option(key: str, flag: str, **settings: Any) -> Callable[[F], F]:
    return click.option(flag, envvar=config.env_name(f"gate-{key}"), show_envvar=True, **settings)


_PROFILES = ", ".join(f"{profile.name} ({profile.help})" for profile in PROFILES.values())


@click.command(short_help="A fixed plan of cases for CI: red on a new confirmed finding.")
@click.argument("targets", nargs=-1, metavar="[TARGET]...", envvar="MOE_FUZZ_TARGETS")
@click.option("--changed-from", metavar="REV", help="Only targets that the changes since REV touch; none: green.")
@_option(
    "profile", "--profile", type=click.Choice(tuple(PROFILES)), default="default", show_default=True,
    help=f"How much: {_PROFILES}.",
)
@_option("cases", "--cases", type=click.IntRange(1), metavar="N",
         help="Exactly so many, among all targets, however long they take.")
@_option("time", "--time", type=params.DURATION, metavar="SECONDS", help="Cuts the plan. [default: the profile's]")
@_option("seed", "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, metavar="N",
         help="Same version, seed, profile and targets: same plan.")
@_option("ledger", "--ledger", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
         help=f"The findings already known. [default: {FILE} beside pyproject.toml, if it is there]")
@_option("corpus", "--corpus", type=click.Path(file_okay=False, path_type=Path), multiple=True, metavar="DIR",
         help="Cases to replay first. May be given several times.")
@_option("strict", "--strict", is_flag=True, help="Red on findings of class robustness too.")
@_option("base-python", "--base-python", metavar="PYTHON",
         help="The interpreter of the build that the change is made to; what fails there too is not new.")
@_option("base-path", "--base-path", metavar="DIR:…",
         help="PYTHONPATH of the base build. The change's own is not handed on to it.")
@click.option("--sanitize/--no-sanitize", "sanitizing", default=True, show_default=True,
              help="On a GPU: have compute-sanitizer name the line of the kernel, for findings about memory.")
@_option("gpu-memory", "--gpu-memory", type=params.SIZE, metavar="SIZE",
         help="Of each GPU at most so much, e.g. 24GiB: fewer workers. [default: all that is free]")
@params.target_op
@params.option(
    "report", "--report", "reports", type=params.REPORT, multiple=True, metavar="KIND=PATH",
    help="Also write a report: html, junit, sarif or ndjson; github needs no PATH. May be given several times.",
)
@params.workers
@params.device
@params.deadline
@params.memory
@params.state_dir
@click.pass_context
def command(
    ctx: click.Context, targets: tuple[str, ...], changed_from: str | None, profile: str, cases: int | None,
    time: float | None, seed: int, ledger: Path | None, corpus: tuple[Path, ...], strict: bool,
    base_python: str | None, base_path: str | None, sanitizing: bool, gpu_memory: int | None, op: str | None,
    reports: tuple[tuple[str, Path | None], ...],
    workers: int | None, device: str, deadline: float, memory: int | None, state_dir: Path,
) -> None:  # fmt: skip
    """Run a fixed plan on each TARGET; without one, on every target that this machine can run.

    The whole list of cases is known before the first runs: the corpus and the ledger, a grid, then generated ones. It
    depends on the version, the seed, the profile and the targets. What fails is confirmed in three fresh processes,
    reduced, and compared with the ledger.

    Green (0): nothing new. Red (1): a new finding, or an entry of the ledger that expired or passes now. Exit code 3:
    too little ran to say anything.
    """
    names = expand(targets, op)
    entries = read_ledger(ledger)  # one that cannot be read is told by the change that broke it
    everywhere = (*names, *configured(ctx), *(target.name for target in registry.known(planted=True)))
    stray = strays(entries, everywhere)
    names, notes = touched(names, changed_from, ledger or ledger_path()) if changed_from is not None else (names, ())
    if not names:
        notes = (*notes, *(f"ledger: {entry.name}: {no_target(entry)}" for entry in stray))
        click.echo("\n".join(notes))
        write_nothing(reports, notes, seed, params.pick_device(device), state_dir)
        ctx.exit(EXIT_CLEAN)
    chosen = PROFILES[profile]
    replayed, left_out = read_corpus(corpus)
    device = params.pick_device(device)
    sanitizing, without = pick_sanitizer(sanitizing, device)
    cards = limited(gpus(), gpu_memory) if device == "cuda" else ()
    count = workers or (default_workers(cards) if cards else params.pick_workers(None, device))
    opened = report.open_reports(reports, os.environ)
    broadcast = report.Broadcast({**opened, "on the screen": screen()}, lambda text: click.echo(text, err=True))
    state = StateDir(state_dir)
    providers = params.pick_providers()
    limit = params.pick_memory(memory, device, count)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(state)
            pool = stack.enter_context(
                Pool(workers=count, device=device, memory_limit=limit, log_dir=state_dir / "logs",
                     providers=providers, gpus=cards or None)
            )  # fmt: skip
            base = None
            if base_python is not None or base_path is not None:
                python = base_python or sys.executable
                base = stack.enter_context(base_pool(python, base_path, providers, device, limit, state_dir, pool))
                check_base(base, python)
            able = runnable(names, targets, op, pool, broadcast, Restriction(), device)
            read_quota(cases, able)
            settings = GateSettings(
                targets=able, profile=chosen, cases=cases,
                seconds=time if time is not None or cases is not None else chosen.seconds,
                seed=seed, device=device, workers=count, deadline=deadline, strict=strict, corpus=replayed,
                entries=entries, arch=architecture(device) if any(entry.arch for entry in entries) else "",
                notes=(*notes, *left_out, *without), strays=stray,
            )  # fmt: skip
            summary = Gate(
                settings, pool, state, broadcast, base=base, render_repro=renderer(pool),
                sanitize=automatic(pool, device) if sanitizing else None, health=pool.stats.to_json,
            ).run()  # fmt: skip
    finally:
        broadcast.close()
    lost = [name for name in broadcast.failed if name in opened]
    if lost and summary.exit_code == EXIT_CLEAN:
        raise EnvironmentProblem(f"nothing was found, but the report {lost[0]} could not be written to its end")
    ctx.exit(summary.exit_code)


def configured(ctx: click.Context) -> Iterator[str]:
    """The project's own functions that the configuration names: known, also where others are gated by name."""
    for text in (ctx.default_map or {}).get("targets", ()):
        if ":" in text:
            yield from (text,) if "@" in text else (f"{op}@{text}" for op in OPS)


def touched(names: Sequence[str], revision: str, ledger: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The targets that the changes since a revision touch, and lines that say why these. A changed ledger touches all:
    what an entry that went told of is new again. So does the file of the configuration, and one that may have been it.
    """
    found = _configuration()
    root, files = changed.changed_files(revision, Path.cwd())
    change = changed.affected(
        names, root, files, found.paths, found.path.parent if found.path else None,
        for_all=(ledger, *configuring(found.path)),
    )
    lines = [f"changed since {revision}: {len(files)} files, {len(change.unmapped)} of them touch no target"]
    lines += [f"{name}: {reason} changed" for name, reason in change.reasons.items()]
    if not change.targets:
        some = ", ".join(change.unmapped[:5]) + (", …" if len(change.unmapped) > 5 else "")
        lines.append("nothing to gate" + (f": {some}" if some else ""))
        lines.append(f"what a path touches beside what is imported stands in [{TABLE}.paths]")
    return change.targets, tuple(lines)


def configuring(path: Path | None) -> Iterator[Path]:
    """The files that the configuration is read from, or was before it came to be read from `path`."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        yield folder / "pyproject.toml"
        if folder / "pyproject.toml" == path:
            return


def write_nothing(
    reports: Sequence[tuple[str, Path | None]], notes: tuple[str, ...], seed: int, device: str, state_dir: Path
) -> None:
    """The reports of a gate with nothing to gate: the next step of a workflow uploads them, and fails where there are
    none."""
    broadcast = report.Broadcast(report.open_reports(reports, os.environ), lambda text: click.echo(text, err=True))
    try:
        broadcast(CampaignStarted(__version__, (), device, 0, seed, 0, None, str(state_dir), False, notes))
        broadcast(CampaignFinished(Summary(
            seed=seed, cases=0, planned=0, seconds=0.0, verdicts={}, new=(), known=(), fixed=(), flaky=0, unexamined=0,
            rows=(), interrupted=False, exit_code=EXIT_CLEAN,
        )))  # fmt: skip
    finally:
        broadcast.close()
    if broadcast.failed:
        raise EnvironmentProblem(f"the report {broadcast.failed[0]} could not be written to its end")


def read_ledger(path: Path | None) -> tuple[Entry, ...]:
    if path is not None:
        return ledger_file.load(path)
    return ledger_file.load(ledger_path(), missing_ok=True)


def ledger_path() -> Path:
    """Where the ledger is if nobody says: beside pyproject.toml, or in the current directory."""
    found = _configuration()
    return (found.path.parent if found.path else Path.cwd()) / FILE


def limited(cards: Sequence[Gpu], limit: int | None) -> tuple[Gpu, ...]:
    """The GPUs as if they had no more memory than the limit: fewer slots, of each worker its share."""
    if limit is None:
        return tuple(cards)
    if limit < SLOT_BYTES:
        raise UsageError(f"--gpu-memory {human(limit)} is too little: a worker needs {human(SLOT_BYTES)}")
    return tuple(
        replace(card, memory=min(limit, card.memory or limit), free=min(limit, card.free) if card.free else card.free)
        for card in cards
    )


def base_pool(
    python: str, path: str | None, providers: Mapping[str, ProviderOptions], device: str, memory: int | None,
    state_dir: Path, pool: Pool,
) -> Pool:  # fmt: skip
    """A worker of the base build: another interpreter, its own PYTHONPATH or none, and otherwise the same variables."""
    others = {name: replace(options, python=None) for name, options in providers.items()}
    return Pool(workers=1, device=device, python=python, memory_limit=memory, log_dir=state_dir / "logs" / "base",
                providers=others, beside=pool, variables={"PYTHONPATH": path or ""})  # fmt: skip


def check_base(base: Pool, python: str) -> None:
    """Raises EnvironmentProblem where nothing at all runs on the base build: everything would look new there, and be
    laid at this change's door."""
    try:
        base.describe("topk_softmax@torch")
    except EnvironmentProblem as problem:
        hint = "it needs torch, Triton and numpy, as the base build has them"
        said = f"--base-python {python} cannot be compared with: {problem.message}"
        raise EnvironmentProblem(said, hint) from problem


def _configuration() -> config.Config:
    context = click.get_current_context(silent=True)
    found = (context.obj or {}).get("config") if context else None
    return found if isinstance(found, config.Config) else config.Config()
