"""SIGKILL to the workers of a campaign, at random and from outside, and to the zygote they are forked from.

    python tests/endurance/kill_workers.py [--seconds 30] [--every 0.4] [--cases 400] [--seed 3]

On a correct target the campaign must come to its end by itself, with every case counted once, and must report nothing:
a case is not to blame for what happened to its worker. On a broken one it must find what it finds undisturbed. The
zygote may die once; dying again and again is no accident, and must end in exit code 3 and a sentence.
Exits with 1 if anything of this does not hold.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness import Campaign, problems_on_disk, table, workers

GOOD, BROKEN = "topk_softmax@builtin", "topk_softmax@planted.int64_ids"
HEAD = ("campaign", "killed", "zygotes", "exit", "cases", "pass", "crash", "flaky", "not examined", "findings", "s")


@dataclass
class Toll:
    workers: int = 0
    zygotes: int = 0


def harass(campaign: Campaign, seconds: float, every: float, zygotes: int, chosen: random.Random) -> Toll:
    """Kills a random worker about every `every` seconds, for `seconds` from the first case on, and this many zygotes;
    gives up when the campaign has ended."""
    toll = Toll()
    campaign.until(lambda: bool(campaign.of("progress")), 120)
    start = time.monotonic()
    at = [start + min(3.0, seconds / 4) * (number + 1) for number in range(zygotes)]
    while campaign.alive and time.monotonic() - start < seconds:
        time.sleep(chosen.uniform(0, 2 * every))
        found, forked = workers(campaign)
        if at and time.monotonic() >= at[0]:
            at.pop(0)
            toll.zygotes += sum(map(kill, found))
        elif forked:
            toll.workers += kill(chosen.choice(forked))
    return toll


def kill(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def one(
    root: Path, name: str, target: str, options: argparse.Namespace, zygotes: int, rows: list[list[object]]
) -> tuple[Campaign, list[str]]:
    """A harassed campaign, and what is wrong with it whatever the target."""
    fixed = [target, "--cases", options.cases, "--seed", options.seed, "--device", "cpu", "--workers", 2]
    campaign = Campaign(root / name, [*fixed, "--state-dir", root / name / "state"])
    start = time.monotonic()
    toll = harass(campaign, options.seconds, options.every, zygotes, random.Random(options.seed))
    code = campaign.wait(600)
    wrong = [f"process {pid} is left" for pid in campaign.leftovers(2.0)[0]]
    wrong += problems_on_disk(root / name / "state", campaign.announced())
    if "Traceback" in campaign.err:
        wrong.append(campaign.err)
    done = campaign.of("campaign-finished")
    summary = done[0]["summary"] if done else {}
    verdicts = summary.get("verdicts", {})
    findings = [finding["id"] for finding in summary.get("new", [])]
    rows.append([name, toll.workers, toll.zygotes, code, summary.get("cases", "-"), verdicts.get("pass", 0),
                 verdicts.get("crash", 0), summary.get("flaky", "-"), summary.get("unexamined", "-"),
                 ",".join(findings) or "-", f"{time.monotonic() - start:.0f}"])  # fmt: skip
    if done and toll.workers == 0:
        wrong.append("no worker was killed: nothing was tested")
    return campaign, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=0.4, help="seconds between two kills, on average")
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    rows: list[list[object]] = []
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="endurance-") as temporary:
        root = Path(temporary)
        campaign, wrong = one(root, "correct", GOOD, options, 1, rows)
        problems += [f"correct: {line}" for line in wrong + ended(campaign, options.cases, 0, [])]
        quiet = Campaign(root, [BROKEN, "--cases", options.cases, "--seed", options.seed, "--device", "cpu"])
        quiet.wait(600)
        expected = [finding["id"] for finding in quiet.summary["new"]]
        campaign, wrong = one(root, "broken", BROKEN, options, 1, rows)
        problems += [f"broken: {line}" for line in wrong + ended(campaign, options.cases, 1, expected)]
        campaign, wrong = one(root, "zygotes", GOOD, options, 3, rows)
        if campaign.process.returncode != 3 or "error: " not in campaign.err or "hint: " not in campaign.err:
            wrong.append(f"exit code {campaign.process.returncode}, not 3 and a sentence: {campaign.err}")
        problems += [f"zygotes: {line}" for line in wrong]
    print(f"\n{table(HEAD, rows)}\n")
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems else 0


def ended(campaign: Campaign, cases: int, code: int, expected: Sequence[str]) -> list[str]:
    """What is wrong with a campaign that must have come to its end."""
    if campaign.process.returncode != code:
        return [f"exit code {campaign.process.returncode}, not {code}: {campaign.err or campaign.out[-1500:]}"]
    summary = campaign.summary
    wrong = []
    if summary["cases"] != cases:
        wrong.append(f"{summary['cases']} cases, not {cases}")
    if found := {finding["id"] for finding in summary["new"]} ^ set(expected):
        wrong.append(f"{sorted(found)} are too many or missing: {[f['label'] for f in summary['new']]}")
    if not expected and summary["verdicts"].get("crash", 0) > summary["flaky"] + summary["unexamined"]:
        wrong.append(f"killed cases are unaccounted for: {summary['verdicts']}, {summary['flaky']} flaky")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
