"""One self-contained page: findings, targets, coverage, error budgets, time line, workers. It loads nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe_fuzz.campaign.issue import bisect
from moe_fuzz.errors import EXIT_CLEAN
from moe_fuzz.report import Report, file_report, heat, svg, text
from moe_fuzz.report.story import Story, Told
from moe_fuzz.report.whole import Whole

if TYPE_CHECKING:
    from jinja2 import Template

#: What a pool counts (worker/stats.py), for a person.
WORKERS = {
    "cases": "cases run, those of examinations too",
    "forks": "processes started",
    "deaths": "processes that died of a case: crashes, hangs, out of memory",
    "idle_deaths": "processes that died between cases",
    "recycled": "processes replaced because they had run long, or grown",
    "zygotes": "zygotes started",
}


def render(story: Story) -> str:
    summary = story.summary
    rows = list(summary.rows) if summary else []
    return _template().render(
        story=story,
        text=text,
        title=f"moe-fuzz: {_outcome(story)}",
        outcome=_outcome(story),
        red=any(told.failed for told in story.findings) or summary is None or summary.exit_code != EXIT_CLEAN,
        rows=rows,
        maps=list(heat.maps(story.cells)),
        levels=range(heat.LEVELS + 1),
        histograms=[(row, svg.budgets(row.budgets, f"error budgets of {row.target}")) for row in rows if row.budgets],
        timeline=_timeline(story),
        workers=list(_workers(story)),
        replay=_replay,
        first_violation=_violation,
        bisect=bisect,
        environment=_versions(story),
    )


@file_report("html", "one page to look at: findings, coverage, error budgets, time line; needs no network")
def open_report(path: Path) -> Report:
    return Whole(path, render)


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2")


def _outcome(story: Story) -> str:
    failed = sum(told.failed for told in story.findings)
    found = text.count(failed, "new finding") if failed else "no new finding"
    if story.summary is None:
        return f"not finished, {found} so far"
    return f"{'interrupted, ' if story.summary.interrupted else ''}{found}"


def _timeline(story: Story) -> str:
    found = [(told.seconds, f"{told.finding.id} {told.finding.title}") for told in story.findings if told.failed]
    lost = [seconds for seconds, _ in story.lost]
    first = story.samples[0][0] if story.samples else 0.0
    # A campaign that went on where another stopped begins late; the page tells of its own part.
    first = first if story.started and story.started.resumed else 0.0
    samples = story.samples if first else [(0.0, 0), *story.samples]
    return svg.timeline(samples, found, lost, "cases a second over time, and findings", first)


def _workers(story: Story) -> Iterator[tuple[str, str]]:
    counts = story.workers
    yield from ((said, f"{counts[name]:,.0f}") for name, said in WORKERS.items() if name in counts)
    if counts.get("forks"):
        yield "mean time to start one", f"{1000 * counts.get('fork_seconds', 0.0) / counts['forks']:.0f} ms"
    yield "killed from outside", f"{len(story.lost):,}"
    if story.summary is not None and story.started is not None and story.summary.seconds:
        spent = sum(row.seconds for row in story.summary.rows)
        fences = sum(row.fence_seconds for row in story.summary.rows)
        room = story.summary.seconds * story.started.workers
        yield "of the workers' time spent inside cases", f"{min(1.0, spent / room):.0%}"
        if spent:
            yield "of that on making, filling and checking fences", f"{fences / spent:.0%}"


def _versions(story: Story) -> dict[str, str]:
    """Of what the workers had, as findings tell it. Providers may differ in theirs; what differs is left out."""
    shown = [told.finding.env for told in story.findings if told.failed and told.finding.env]
    names = dict.fromkeys(name for env in shown for name in env if name not in ("target", "origin"))
    return {name: shown[0][name] for name in names if len({env.get(name) for env in shown}) == 1}


def _replay(told: Told) -> str:
    return told.finding.replay


def _violation(told: Told) -> object:
    return next(iter(told.finding.verdict.violations), None)
