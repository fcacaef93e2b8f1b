"""SIGKILL to a campaign in the middle of its work, again and again: nothing that was told is lost, nothing is found
twice, no process stays behind, and the next run goes on where the last one was.

    python tests/endurance/kill_parent.py [--kills 20] [--cases 400] [--seed 11] [--targets A,B] [--keep DIR]

First a campaign runs undisturbed. Then the same campaign runs in a new state directory and is killed in moments of
every kind until it ends by itself; where kills are left, it begins anew. So it does where a kill came after the end,
which is none. In the end the findings must be the same: the same ids. A failure that needs other cases before it in its
process is compared by target, check and symptom, because a kill changes what ran before; another face of such a bug may
be met then, and is counted.
Exits with 1 if anything was lost, doubled, damaged or left running.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import Campaign, listed, problems_on_disk, table

PLANTED = ("renorm_zero_division", "reads_past_logits", "stale_row_max", "int64_ids", "null_workspace")
TARGETS = ",".join(["topk_softmax@torch", *(f"topk_softmax@planted.{name}" for name in PLANTED)])
MOMENTS = ("running", "confirming", "random", "writing", "minimizing", "told", "starting")
GONE = 2.0  # seconds after which no process may be left
PATIENCE = 120.0  # seconds to wait for a moment
TRIES = 5  # for each kill that was asked for: the machine may be so fast that some come after the end
HEAD = ("kill", "asked", "came in", "at s", "goes on", "cases", "told", "on disk", "lost", "doubled", "left", "gone s")


@dataclass
class Ledger:
    """What must hold over all runs on one state directory."""

    state: Path
    told: dict[str, None] = field(default_factory=dict)  # ids, in the order of the first announcement
    saved: bool = False  # a run has come so far that the next one must go on


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="endurance-") as temporary:
        return run(options, Path(options.keep or temporary))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--targets", default=TARGETS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", help="leave everything in this directory")
    return parser.parse_args()


def run(options: argparse.Namespace, root: Path) -> int:
    chosen = random.Random(options.seed)
    # The reducer's budget is not what is tested here; the machine may be busy, and half-reduced is another finding.
    fixed = [*options.targets.split(","), "--cases", options.cases, "--seed", options.seed, "--minimize-time", "10m"]
    fixed += ["--device", "cpu", "--workers", options.workers]

    started = time.monotonic()
    whole = Campaign(root, [*fixed, "--state-dir", root / "whole"])
    code = whole.wait(900)
    expected = {name_of(finding) for finding in whole.summary["new"]}
    length = time.monotonic() - started
    busy = whole.events[-1]["time"] - whole.events[0]["time"] if whole.events else 0.0
    print(f"undisturbed: exit {code}, {whole.cases} cases, {len(expected)} findings, {length:.0f} s")
    if code != 1 or not expected:
        print(whole.err or "the campaign must find something, or there is nothing to lose")
        return 1

    rows: list[list[object]] = []
    problems: list[str] = []
    moments = itertools.cycle(MOMENTS)
    kills = late = ends = faces = 0
    for number in itertools.count():
        ledger = Ledger(root / f"killed-{number}")
        while True:
            moment = next(moments) if kills < options.kills else "end"
            campaign = Campaign(root, [*fixed, "--state-dir", ledger.state])
            came = wait_for(campaign, moment, ledger.state, chosen, length, busy)
            campaign.kill() if came else campaign.wait(900)
            ended = finished(ledger.state)
            rows.append(check(campaign, moment, came, ledger, kills + 1, problems))
            print(table(HEAD, rows[-1:]).splitlines()[-1], flush=True)
            if came and not ended:
                kills += 1
                continue
            if not came and campaign.process.returncode != 1:
                problems.append(f"the end has exit code {campaign.process.returncode}: {campaign.err}")
            elif campaign.of("campaign-finished"):  # else killed between the last word on disk and the last one said
                problems += finish(campaign, ledger, expected, options.cases)
                faces += len(campaign.summary["new"]) - len(whole.summary["new"])
            elif not came:
                problems.append("the end: the report lacks it")
            late += came
            ends += not came
            break
        if kills >= options.kills or late > TRIES * options.kills:
            break
    if kills < options.kills:
        problems.append(f"{late} kills came after the end, and {kills} of {options.kills} before: take more --cases")
    print(f"\n{table(HEAD, rows)}\n\n{kills} kills, {late} too late; {ends} campaigns came to their end")
    print(sorted(expected))
    print(f"{faces} more faces of bugs that need other cases before them")
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems else 0


def finished(state: Path) -> bool:
    """Whether the campaign says on disk that it has come to its end: the next one has nothing to go on with."""
    file = state / "campaign.json"
    return file.exists() and bool(json.loads(file.read_text(encoding="utf-8"))["finished"])


def wait_for(
    campaign: Campaign, moment: str, state: Path, chosen: random.Random, length: float, busy: float
) -> bool:
    """Waits for a moment of this kind; False if the campaign ended first. Undisturbed it takes `length` seconds from
    its start and `busy` ones from its first word to its last: no machine is too fast to be in time."""

    def event(kind: str) -> Callable[[], bool]:
        return lambda: any(found["kind"] == kind for found in campaign.pump())

    def writing() -> bool:
        return any((state / "findings").glob(".tmp-*"))

    match moment:
        case "end":
            return False
        case "starting":
            return campaign.until(lambda: False, chosen.uniform(0, min(3.5, length))) or campaign.alive
        case "random":
            return campaign.until(lambda: False, chosen.uniform(min(1.0, 0.3 * length), 0.6 * length)) or campaign.alive
        case "writing":
            return campaign.until(writing, PATIENCE, every=0.0)
        case "told":
            before = set(entry.name for entry in (state / "findings").glob("*")) if state.exists() else set()
            return campaign.until(lambda: bool(set(campaign.announced()) - before), PATIENCE)
        case "running":
            came, pause = campaign.until(event("progress"), PATIENCE), chosen.uniform(0, min(2.0, 0.5 * busy))
        case _:
            came, pause = campaign.until(event(f"finding-{moment}"), PATIENCE), chosen.uniform(0, min(0.5, 0.1 * busy))
    return came and (campaign.until(lambda: False, pause) or campaign.alive)


def check(
    campaign: Campaign, moment: str, came: bool, ledger: Ledger, number: int, problems: list[str]
) -> list[object]:
    """One row of the table; what is wrong goes to `problems`."""
    left, seconds = campaign.leftovers(GONE)
    told = campaign.announced()
    ledger.told |= dict.fromkeys(told)
    found = problems_on_disk(ledger.state, list(ledger.told))
    ids, wrong = listed(ledger.state, campaign.folder)
    lost = [name for name in ledger.told if name not in ids]
    doubled = len(ids) - len(set(ids))
    found += wrong + [f"finding {name} is lost" for name in lost] + [f"process {pid} is left" for pid in left]
    started = campaign.of("campaign-started")
    goes_on = started[0]["resumed"] if started else None
    if ledger.saved and goes_on is False:
        found.append("it began anew instead of going on")
    ledger.saved |= (ledger.state / "campaign.json").exists() and not finished(ledger.state)
    if "Traceback" in campaign.err:
        found.append(campaign.err)
    problems += [f"kill {number}: {problem}" for problem in found]
    at = campaign.events[-1]["time"] - campaign.events[0]["time"] if campaign.events else 0.0
    word = {True: "yes", False: "no", None: "-"}[goes_on]
    place = phase(campaign, ledger.state) if came else "the end"
    return [number, moment, place, f"{at:.1f}", word, campaign.cases, len(told), len(ids), len(lost), doubled,
            len(left), f"{seconds:.2f}"]  # fmt: skip


def phase(campaign: Campaign, state: Path) -> str:
    """What the campaign was doing, by what it said last and what lies half-written."""
    half = [str(file.relative_to(state)) for file in state.rglob(".tmp-*")]
    if any(name.startswith("findings/") for name in half):
        return "writing a finding"
    if half:
        return "writing state"
    said = [event for event in campaign.events if event["kind"] not in ("progress", "note", "violation-seen")]
    match said[-1]["kind"] if said else "":
        case "":
            return "starting"
        case "phase-started":
            return f"phase {said[-1]['name']}"
        case "finding-reported" | "flaky-seen":
            return "between findings"
        case kind:
            return kind.removeprefix("finding-")


def name_of(finding: dict[str, Any]) -> str:
    """By what a finding is the same in another run."""
    return f"{finding['target']} {finding['check']} {finding['symptom']}" if finding["sequence"] else finding["id"]


def finish(campaign: Campaign, ledger: Ledger, expected: set[str], cases: int) -> list[str]:
    """What a campaign that came to its end owes."""
    summary = campaign.summary
    new, known = ({name_of(finding) for finding in summary[kind]} for kind in ("new", "known"))
    wrong = []
    if lost := sorted(expected - new):
        wrong.append(f"the end: {lost} were found undisturbed, and are not among {sorted(new)}")
    if more := sorted(new - expected):  # kills change what is examined first; a bug may have two faces
        print(f"the end: {more} besides what was found undisturbed")
    if known:
        wrong.append(f"the end: {sorted(known)} are old news, though this campaign found them")
    if summary["cases"] != cases:
        wrong.append(f"the end: {summary['cases']} cases, not {cases}")
    for folder in ("pending", "inflight"):
        files = [file.name for file in (ledger.state / folder).iterdir()]
        wrong += [f"the end: {folder}/ holds {files}"] if files and not summary["unexamined"] else []
    left = [str(file.relative_to(ledger.state)) for file in ledger.state.rglob(".tmp-*")]
    return wrong + ([f"the end: {left} are left over"] if left else [])


if __name__ == "__main__":
    sys.exit(main())
