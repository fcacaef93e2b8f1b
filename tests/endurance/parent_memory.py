"""Whether the memory of a campaign's parent stays flat: the rule, and a campaign without workers to try it on.

    python tests/endurance/parent_memory.py [--cases 12000] [--targets NAME,…] [--leak] [--json FILE]

The parent is all there: spaces, strategies, corpus, coverage, every kind of report. Only the workers are not, whose
answers are made up, so that thousands of cases take seconds. With --leak it keeps the event of each case, for the rule
to see. Exits with 1 if memory grew, 2 if too few cases ran to say so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_fuzz import report
from moe_fuzz.campaign import events
from moe_fuzz.campaign.engine import Campaign
from moe_fuzz.campaign.interfaces import Cases, OnVerdict
from moe_fuzz.campaign.plan import Settings
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.options import RunOptions
from moe_fuzz.report.plain import Plain
from moe_fuzz.verdict import PASS, VIOLATION, Verdict, Violation

WARM_UP = 2000  # cases of each target: by then all is imported, and most classes of its configs have been covered
SPAN = 2000  # cases after those that a judgement takes, at least
MOST = 0.25  # MiB that 1,000 cases may add after the warm-up. Their events take 3.
SLACK = 1.0  # MiB more, whatever the number of cases: a round being drawn, a finding made smaller
CEILING = 32.0  # MiB that a campaign may add to what it began with, ever
MIB = 1 << 20


@dataclass(frozen=True)
class Sample:
    seconds: float
    cases: int
    size: int  # bytes, resident


def resident(pid: int) -> int:
    """Bytes; 0 if the process has ended."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def needed(targets: int) -> int:
    """Cases of a campaign before its memory can be judged by the case."""
    return WARM_UP * targets + SPAN


def growth(samples: Sequence[Sample], targets: int) -> tuple[float, float] | None:
    """(MiB, cases): what was added by how many cases after the warm-up, between the medians of the first and of the
    last quarter of those cases; None where too few ran."""
    settled = [sample for sample in samples if sample.cases >= WARM_UP * targets]
    if not settled or settled[-1].cases - settled[0].cases < 0.9 * SPAN:  # they are looked at now and then
        return None
    first, last = settled[0].cases, settled[-1].cases
    quarter = (last - first) / 4
    early = [sample for sample in settled if sample.cases <= first + quarter]
    late = [sample for sample in settled if sample.cases >= last - quarter]
    grown = statistics.median(s.size for s in late) - statistics.median(s.size for s in early)
    return grown / MIB, statistics.median(s.cases for s in late) - statistics.median(s.cases for s in early)


def problems(samples: Sequence[Sample], targets: int) -> list[str]:
    """What is wrong with the memory of a parent that was looked at again and again."""
    found = []
    highest = (max(sample.size for sample in samples) - samples[0].size) / MIB
    if highest > CEILING:
        found.append(f"the parent's memory grew by {highest:.1f} MiB, and {CEILING:g} is the most")
    grown, cases = growth(samples, targets) or (0.0, 0.0)
    most = SLACK + MOST * cases / 1000
    if grown > most:
        found.append(f"the parent's memory grew by {grown:.1f} MiB in {cases:g} cases, and {most:.1f} is the most")
    return found


def figures(samples: Sequence[Sample], targets: int) -> dict[str, object]:
    """For a person: sizes in MiB at the start, at each minute and at the end."""
    minutes: dict[int, Sample] = {}
    for sample in samples:
        minutes.setdefault(int((sample.seconds - samples[0].seconds) // 60), sample)
    shown = [*minutes.values(), samples[-1]]
    grown = growth(samples, targets)
    return {
        "seconds": round(samples[-1].seconds - samples[0].seconds, 1), "cases": samples[-1].cases,
        "MiB at each minute": " → ".join(f"{sample.size / MIB:.1f} ({sample.cases} cases)" for sample in shown),
        "highest MiB": round(max(sample.size for sample in samples) / MIB, 1),
        "MiB each 1,000 cases": "too few cases to tell" if grown is None else round(1000 * grown[0] / grown[1], 3),
    }  # fmt: skip


# ---- a campaign without workers -------------------------------------------------------------------------------------


class Made:
    """A worker whose answers are made up: one case in 64 is bad, a twin of the same bug, and the others use some of
    their budget."""

    def __init__(self) -> None:
        self._history: deque[Case] = deque(maxlen=32)

    def run(
        self, cases: Sequence[Case], target: str, options: RunOptions, on_verdict: OnVerdict | None = None
    ) -> list[Verdict]:
        verdicts = []
        for at, case in enumerate(cases):
            verdicts.append(_verdict(case))
            if on_verdict is not None:
                on_verdict(at, verdicts[-1], tuple(self._history))
            self._history.append(case)
        return verdicts


def _verdict(case: Case) -> Verdict:
    number = int(case.digest[:8], 16)
    if number % 64 == 0:
        return Verdict(VIOLATION, (Violation("structural", "wrong dtype", "ids are int64", tensor="ids"),))
    return Verdict(PASS, seconds=0.001, parity=True, budget=number % 8 / 8)


class MadePool:
    environment = {"torch": "0.0"}  # noqa: RUF012

    def __init__(self) -> None:
        self._worker, self._free = Made(), threading.Lock()

    def describe(self, target: str) -> TargetInfo:
        op, _, provider = target.partition("@")
        return TargetInfo(target, op, provider, "made up", clauses={"structural": "ids are int32"})

    def versions(self, target: str) -> dict[str, str]:
        return dict(self.environment)

    @contextlib.contextmanager
    def lease(self, target: str = "") -> Iterator[Made]:
        with self._free:
            yield self._worker

    @contextlib.contextmanager
    def fresh(self, environment: object = None) -> Iterator[Made]:
        yield Made()


class Leaky(Campaign):
    """A parent that keeps what it was told of each case."""

    def verdict(self, unit: object, at: int, cases: Cases, verdict: Verdict, history: Cases) -> None:
        kept: list[events.Event] = self.__dict__.setdefault("kept", [])
        kept.append(events.ViolationSeen(unit.target, Case.from_json(cases[-1].to_json()), verdict))  # type: ignore[attr-defined]
        super().verdict(unit, at, cases, verdict, history)  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=12000)
    parser.add_argument("--targets", default="topk_softmax@torch")
    parser.add_argument("--leak", action="store_true", help="keep the event of each case")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    targets = tuple(options.targets.split(","))
    samples: list[Sample] = []

    def look(event: events.Event) -> None:
        if isinstance(event, events.Progress):
            samples.append(Sample(event.seconds, event.cases, resident(os.getpid())))

    with tempfile.TemporaryDirectory(prefix="endurance-") as folder:
        root = Path(folder)
        opened = report.open_reports([(kind, root / kind) for kind in ("html", "junit", "ndjson", "sarif")], {})
        broadcast = report.Broadcast({**opened, "on the screen": Plain(lambda text: None)}, print)

        def emit(event: events.Event) -> None:
            broadcast(event)
            look(event)

        settings = Settings(targets, options.cases, None, 1, None, "cpu", 1, minimize_seconds=2.0)
        kind = Leaky if options.leak else Campaign
        with StateDir(root / "state") as state:
            summary = kind(settings, MadePool(), state, emit).run()
        broadcast.close()
    wrong = problems(samples, len(targets))
    told = figures(samples, len(targets)) | {"findings": len(summary.new), "problems": wrong}
    print(json.dumps(told, indent=1))
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 2 if growth(samples, len(targets)) is None else 0


if __name__ == "__main__":
    sys.exit(main())
