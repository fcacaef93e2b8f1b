"""The live screen of a campaign on a terminal: what happens scrolls by above, where it stands is shown below."""

from __future__ import annotations

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_fuzz.campaign import events
from moe_fuzz.report import plain, text
from moe_fuzz.verdict import BAD

_WARN = ("not available", "worker lost")
_STYLES = {"FOUND": "bold red", "gone": "green"} | dict.fromkeys(_WARN, "yellow")


class Terminal:
    """Every line that may be copied is printed unwrapped; only the status below is cut to the window."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True, redirect_stdout=False)
        self._started: events.CampaignStarted | None = None
        self._progress: events.Progress | None = None
        self._moments = plain.Moments()
        self._phase = ""
        self._doing = ""

    def handle(self, event: events.Event) -> None:
        match event:
            case events.CampaignStarted():
                self._started = event
                self._print(text.header(event))
                self._live.start()
            case events.PhaseStarted():
                self._phase = event.name
            case events.Progress():
                self._progress = event
            case events.FindingConfirming():
                self._doing = f"confirming {event.check} {event.symptom}: {event.label}"
            case events.FindingMinimizing():
                self._doing = f"minimizing {event.check} {event.symptom}, try {event.tries}: {event.label}"
            case events.CampaignFinished():
                self.close()
                self._print(["", *text.summary(event.summary, self._started.state_dir if self._started else "")])
                return
            case _:
                self._print(self._moments.lines(event))
        if isinstance(event, events.FindingReported | events.FlakySeen):
            self._doing = ""
        self._live.update(self._status())

    def close(self) -> None:
        """Gives the terminal back as it was."""
        self._live.stop()

    def _print(self, lines: list[str]) -> None:
        for line in lines:
            style = next((style for start, style in _STYLES.items() if line.startswith(start)), "")
            self._console.print(Text(line, style=style), soft_wrap=True, highlight=False)

    def _status(self) -> Group:
        grid = Table.grid(padding=(0, 2))
        now = self._progress
        if now is not None:
            grid.add_row("phase", Text(self._phase, no_wrap=True))
            grid.add_row("cases", _bar(now), f"{now.cases:,}  {now.rate:.1f}/s")
            bad = any(now.verdicts.get(kind) for kind in BAD)
            grid.add_row("verdicts", Text(text.verdicts(now.verdicts), style="yellow" if bad else "green"))
            waiting = f", {now.waiting} waiting to be examined" if now.waiting else ""
            grid.add_row("findings", Text(f"{now.findings} new{waiting}", style="bold red" if now.findings else ""))
            left = f", {text.duration(now.eta)} left" if now.eta is not None else ""
            grid.add_row("time", text.duration(now.seconds) + left)
        if self._started is not None:
            grid.add_row("workers", str(self._started.workers))
        return Group(grid, Text(self._doing, style="dim", no_wrap=True, overflow="ellipsis"))


def _bar(now: events.Progress) -> ProgressBar:
    """How far the campaign is: by cases where they are planned, else by time; a pulse where neither is known."""
    if now.planned:
        return ProgressBar(total=now.planned, completed=now.cases, width=30)
    if now.eta is not None:
        return ProgressBar(total=max(now.seconds + now.eta, 0.001), completed=now.seconds, width=30)
    return ProgressBar(total=None, pulse=True, width=30)
