"""`moe-fuzz corpus`: cases worth running again. Add, merge, prune."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click

from moe_fuzz.campaign import corpus
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.cli import params, source
from moe_fuzz.cli.output import table
from moe_fuzz.errors import UsageError
from moe_fuzz.ops import get_space

_FOLDER = click.Path(file_okay=False, path_type=Path)
_where = click.option("--corpus", "folder", type=_FOLDER, metavar="DIR", help="[default: that of the state directory]")


@click.group(short_help="Add, merge and prune cases worth running again.")
@click.pass_context
def command(ctx: click.Context) -> None:
    """The corpus holds passing cases that a campaign replays before it generates others: those that were near to a
    bound, or of a kind that nothing else in it is. A file is one case, named by its contents."""
    ctx.default_map = dict.fromkeys(("add", "merge", "prune"), ctx.default_map)  # click hands it on to one level only


@command.command(short_help="Put cases into the corpus.", epilog=source.CASE_HELP)
@click.argument("cases", metavar="CASE...", nargs=-1, required=True)
@click.option("--reason", required=True, metavar="TEXT", help="Why it must stay. Pruning never takes it away.")
@click.option("--any-target", is_flag=True, help="For every target of the op, not only for the one that it names.")
@_where
@params.state_dir
def add(cases: tuple[str, ...], reason: str, any_target: bool, folder: Path | None, state_dir: Path) -> None:
    """Put each CASE into the corpus. It is read and validated, and not run."""
    if not reason.strip():
        raise UsageError("--reason is empty", "say in a few words why the case must stay")
    found = [source.load(text, state_dir) for text in cases]
    for one in found:
        if len(one.cases) > 1:
            raise UsageError(f"{one.origin} needs {len(one.cases) - 1} cases before it in one process",
                             "a corpus holds cases that stand alone")  # fmt: skip
    with _open(folder, state_dir) as into:
        for one in found:
            case = replace(one.case, target="") if any_target else one.case
            new = into.put(corpus.Entry(case, reason=reason.strip()))
            click.echo(f"{case.digest}  {'added' if new else 'was there'}  {get_space(case.op).label(case)}")
        _tell(into)


@command.command(short_help="Take over the cases of other corpora.")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=click.Path(file_okay=False, path_type=Path))
@_where
@params.state_dir
def merge(folders: tuple[Path, ...], folder: Path | None, state_dir: Path) -> None:
    """Take over the cases of each DIR, whose files stay. Cases that are there already are not doubled."""
    for one in folders:
        _must_be_there(one)
    with _open(folder, state_dir) as into:
        sources = [corpus.load(one, get_space) for one in folders]
        new = corpus.merge(into, sources)
        read = sum(len(one.entries) for one in sources)
        click.echo(f"{read} cases read, {new} new; {into.folder} holds {len(into.entries)}")
        _tell(into, *sources)


@command.command(short_help="Keep the fewest cases that cover as much.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@_where
@params.state_dir
def prune(dry_run: bool, folder: Path | None, state_dir: Path) -> None:
    """Keep the fewest cases that cover every point of the feature lattice (target, class of configs, fault, mode,
    nearness to the bound) that the corpus covers. Cases with a reason stay; so do files of another version."""
    if folder is not None:
        _must_be_there(folder)
    with _open(folder, state_dir) as into:
        stays, goes = corpus.prune(into, get_space)
        table(
            [(name, str(count), str(points)) for name, (count, points) in corpus.summary(stays, get_space).items()],
            ("target", "cases", "points covered"),
        )
        for entry in goes:
            if not dry_run:
                into.remove(entry)
        pinned = sum(entry.pinned for entry in stays)
        verb = "would go" if dry_run else "went"
        click.echo(f"\n{len(stays)} cases stay, {pinned} of them for a reason; {len(goes)} {verb}")
        _tell(into)


def _must_be_there(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", "name the folder of a corpus, e.g. .moe-fuzz/corpus")


@contextlib.contextmanager
def _open(folder: Path | None, state_dir: Path) -> Iterator[corpus.Corpus]:
    """The corpus of that name; that of the state directory under its lock, since a campaign may add to it."""
    if folder is not None:
        yield corpus.load(folder, get_space)
        return
    with StateDir(state_dir) as state:
        yield corpus.load(state.path / "corpus", get_space)


def _tell(*some: corpus.Corpus) -> None:
    lines: Sequence[str] = [line for one in some for line in one.lines()]
    for line in lines:
        click.echo(f"warning: {line}", err=True)
