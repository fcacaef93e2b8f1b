"""Half an hour of everything at once: workers, their zygote and the parent are killed, the disk fills up and files of
the corpus are damaged, at random, while campaigns run.

    python tests/endurance/chaos.py [--minutes 30] [--workers 2] [--cases 300] [--seed 1] [--json FILE] [--keep DIR]

A third of the time one campaign lives on: its workers are killed and its corpus is damaged, and the memory of the
parent must stay flat, by the rule of parent_memory.py. Then campaigns of one seed run on, each in a directory of its
own, through blows of every kind.
After each blow the state must be valid: every file parses, each finding that anybody was told of is there and whole,
none twice. No blow makes a target unavailable, and only a full disk keeps a campaign from going on. A campaign that
comes to its end must have found what an undisturbed one finds: nothing lost, nothing besides.
Filling a disk takes a mount of our own (namespaces); where that cannot be, it is told and left out.
Exits with 1 if anything does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from full_disk import INSIDE, enter_namespaces, fill, mount
from harness import Campaign, listed, problems_on_disk, workers
from kill_parent import name_of
from kill_workers import kill
from parent_memory import Sample, figures, growth, needed, problems, resident

#: Bugs that need nothing but their case, so that what a campaign finds does not hang on what was killed before.
PLANTED = ("renorm_zero_division", "reads_past_logits", "int64_ids", "null_workspace", "nan_argmax")
TARGETS = ("topk_softmax@torch", *(f"topk_softmax@planted.{name}" for name in PLANTED))
DISK = 96 << 20  # bytes
GONE = 10.0  # seconds after which no process of a killed campaign may be left


@dataclass
class Book:
    blows: Counter[str] = field(default_factory=Counter)
    checks: int = 0
    told: int = 0  # findings, over all directories
    ends: int = 0  # campaigns that came to their end
    problems: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


@dataclass
class Place:
    """A state directory and what was told there."""

    state: Path
    told: dict[str, None] = field(default_factory=dict)

    def check(self, campaign: Campaign, book: Book, after: str) -> None:
        self.told |= dict.fromkeys(campaign.announced())
        problems: list[str] = []
        for _ in range(5):  # a folder that is being replaced is away for a moment
            problems = [p for p in problems_on_disk(self.state, list(self.told)) if not p.startswith("corpus/")]
            if not problems or not campaign.alive:
                break
            time.sleep(0.1)
        book.checks += 1
        book.problems += [f"after {after}: {problem}" for problem in problems]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cases", type=int, default=300, help="of a campaign")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--keep", help="leave everything in this directory")
    options = parser.parse_args()
    enter_namespaces()
    with tempfile.TemporaryDirectory(prefix="endurance-") as temporary:
        return run(options, Path(options.keep or temporary))


def run(options: argparse.Namespace, root: Path) -> int:
    chosen, book = random.Random(options.seed), Book()
    targets = options.targets.split(",")
    fixed = [*targets, "--cases", options.cases, "--seed", options.seed, "--minimize-time", "10m"]
    fixed += ["--device", "cpu", "--workers", options.workers]
    if os.environ[INSIDE] != "1":
        book.skipped.append(f"full disks: {os.environ[INSIDE]}")

    whole = Campaign(root, [*fixed, "--state-dir", root / "whole"])
    whole.wait(900)
    expected = sorted(name_of(finding) for finding in whole.summary["new"])
    print(f"undisturbed: {len(expected)} findings", flush=True)
    start = time.monotonic()  # what comes now is what was asked for
    end = start + 60 * options.minutes
    memory = soak(root, options, targets, start + (end - start) / 3, chosen, book)
    blows(root, fixed, expected, end, chosen, book)

    figures = {
        "minutes": round((time.monotonic() - start) / 60, 1), "workers": options.workers, "blows": dict(book.blows),
        "checks": book.checks, "findings told": book.told, "campaigns ended": book.ends, "expected": len(expected),
        "parent": memory, "problems": book.problems, "skipped": book.skipped,
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if book.problems or not expected or not book.blows else 0


# ---- a long life ----------------------------------------------------------------------------------------------------


def soak(
    root: Path, options: argparse.Namespace, targets: list[str], end: float, chosen: random.Random, book: Book
) -> dict[str, Any]:
    """One campaign until `end`, its workers killed and its corpus damaged; what its parent's memory did."""
    place = Place(root / "soak")
    seconds = max(5, int(end - time.monotonic()))
    fixed = [*targets, "--time", seconds, "--seed", options.seed, "--minimize-time", "20"]
    fixed += ["--device", "cpu", "--workers", options.workers]
    campaign = Campaign(root / "soak-out", [*fixed, "--state-dir", place.state])
    campaign.until(lambda: bool(campaign.of("progress")), 60)
    samples: list[Sample] = []
    due = time.monotonic() + 2.0
    while campaign.alive and time.monotonic() < end + 60:
        time.sleep(0.25)
        campaign.pump()
        with suppress(OSError):
            if now := resident(campaign.process.pid):  # 0: it has ended
                samples.append(Sample(time.monotonic(), campaign.cases, now))
        if time.monotonic() < due:
            continue
        due = time.monotonic() + chosen.uniform(1.0, 4.0)
        blow = chosen.choice([worker, worker, corpus])
        if blow(campaign, place, chosen):
            book.blows[f"{blow.__name__}, while one campaign lives"] += 1
            place.check(campaign, book, blow.__name__)
    code = campaign.wait(120)
    if code not in (0, 1) or "Traceback" in campaign.err:
        book.problems.append(f"the long campaign ends in {code}: {campaign.err}")
    book.problems += unavailable(campaign)
    finish(campaign, place, book, None)
    book.problems += problems(samples, len(targets))
    if growth(samples, len(targets)) is None:
        said = f"{needed(len(targets))} cases tell, and {campaign.cases} ran"
        book.skipped.append(f"whether the parent's memory grows by the case: {said}")
    return figures(samples, len(targets))


# ---- blows ----------------------------------------------------------------------------------------------------------


def worker(campaign: Campaign, place: Place, chosen: random.Random) -> bool:
    _, forked = workers(campaign)
    return bool(forked) and kill(chosen.choice(forked))


def zygote(campaign: Campaign, place: Place, chosen: random.Random) -> bool:
    found, _ = workers(campaign)
    return any(map(kill, found))


def corpus(campaign: Campaign, place: Place, chosen: random.Random) -> bool:
    """Damages some files of the corpus, each in another way."""
    files = sorted((place.state / "corpus").glob("*.json"))
    for file in chosen.sample(files, min(len(files), chosen.randint(1, 5))):
        with suppress(FileNotFoundError, IsADirectoryError):
            damage(file, chosen)
    return bool(files)


def damage(file: Path, chosen: random.Random) -> None:
    raw = bytearray(file.read_bytes())
    match chosen.randrange(6):
        case 0:
            raw = raw[: chosen.randrange(len(raw) or 1)]
        case 1:
            raw[chosen.randrange(len(raw) or 1)] ^= 1 << chosen.randrange(8)
        case 2:
            raw = bytearray(chosen.randbytes(200))
        case 3:
            raw = bytearray(raw.replace(b'"moe_fuzz_corpus": 1', b'"moe_fuzz_corpus": 2'))
        case 4:
            file.unlink()
            return
        case _:
            file.unlink()
            file.mkdir()
            return
    file.write_bytes(bytes(raw))


ACTS: dict[str, Callable[[Campaign, Place, random.Random], bool]] = {
    "worker": worker, "corpus": corpus, "zygote": zygote,
}  # fmt: skip


def blows(
    root: Path, fixed: list[object], expected: list[str], end: float, chosen: random.Random, book: Book
) -> None:  # fmt: skip
    kinds = ["parent", "worker", "corpus", "zygote", *(["disk"] if os.environ[INSIDE] == "1" else [])]
    number = 0
    while time.monotonic() < end:
        number += 1
        disk = root / f"disk-{number}"
        disk.mkdir()
        if "disk" in kinds:
            mount("-t", "tmpfs", "-o", f"size={DISK}", "none", disk)
        try:
            one_directory(Place(disk / "state"), root / f"out-{number}", fixed, expected, end, kinds, chosen, book)
        finally:
            if "disk" in kinds:
                subprocess.run(["umount", "-l", str(disk)], check=True)


def one_directory(
    place: Place, out: Path, fixed: list[object], expected: list[str], end: float, kinds: list[str],
    chosen: random.Random, book: Book,
) -> None:  # fmt: skip
    """Runs of one campaign on one directory, until it ends by itself. When the time is up, no more blows fall."""
    while True:
        campaign = Campaign(out, [*fixed, "--state-dir", place.state])
        left = set(kinds)
        while campaign.alive:
            if time.monotonic() >= end:
                campaign.wait(900)
                break
            campaign.until(lambda: False, chosen.uniform(0.3, 5.0), every=0.05)
            kind = chosen.choice([name for name in kinds if name in left])
            if not campaign.alive:
                break
            if not strike(kind, campaign, place, chosen, book):
                continue
            if kind in ("zygote", "disk"):
                left.discard(kind)  # a zygote may die once
        place.check(campaign, book, "the end of a run")
        book.problems += unavailable(campaign)
        pids, _ = campaign.leftovers(GONE)
        book.problems += [f"process {pid} is left" for pid in pids]
        if "Traceback" in campaign.err:
            book.problems.append(campaign.err)
        if campaign.process.returncode in (-9, 1) and campaign.of("campaign-finished"):
            # killed after its last word or not: the next run may be a new campaign, to which all of this is known
            finish(campaign, place, book, expected)
            return
        if campaign.process.returncode not in (-9, 1, 3):
            said = f"{campaign.err}, after {campaign.out[-2000:]}"
            book.problems.append(f"a run ends in {campaign.process.returncode}: {said}")
            return
        filled = "disk" in kinds and "disk" not in left
        if campaign.process.returncode == 3 and not filled:  # the next one would, too, and all that come after it
            book.problems.append(f"a run ends in 3, though the disk was not full: {campaign.err}")
            return


def unavailable(campaign: Campaign) -> list[str]:
    """The targets that a run went on without: what it would have found there is missing in the end."""
    return [f"{event['target']} was unavailable: {event['reason']}" for event in campaign.of("target-unavailable")]


def strike(kind: str, campaign: Campaign, place: Place, chosen: random.Random, book: Book) -> bool:
    """One blow, and whether the state is valid after it. False if there was nothing to strike."""
    if kind == "parent":
        campaign.kill()
    elif kind == "disk":
        full(campaign, place, book)
    else:
        if not ACTS[kind](campaign, place, chosen):
            return False
    book.blows[kind] += 1
    place.check(campaign, book, kind)
    ids, wrong = listed(place.state, campaign.folder) if kind in ("parent", "disk") else (list(place.told), [])
    book.problems += [f"after {kind}: {problem}" for problem in wrong]
    book.problems += [f"after {kind}: finding {name} is lost" for name in place.told if name not in ids]
    if len(ids) != len(set(ids)):
        book.problems.append(f"after {kind}: findings are doubled: {ids}")
    return True


def full(campaign: Campaign, place: Place, book: Book) -> None:
    """Fills the disk until the campaign has given up, and makes room again."""
    ballast = place.state.parent / "ballast"
    until = time.monotonic() + 30
    while campaign.alive and time.monotonic() < until:
        fill(ballast, 0)
        time.sleep(0.02)
    ballast.unlink()
    if campaign.alive:
        return  # it had nothing more to write
    code, err = campaign.process.returncode, campaign.err
    if code == 3 and ("error: " not in err or "hint: " not in err):
        book.problems.append(f"a full disk: no error with a hint: {err!r}")
    if code not in (1, 3):
        book.problems.append(f"a full disk: exit code {code}: {err}")


def finish(campaign: Campaign, place: Place, book: Book, expected: list[str] | None) -> None:
    """What a campaign that came to its end owes."""
    place.told |= dict.fromkeys(campaign.announced())
    book.ends += 1
    book.told += len(place.told)
    ids, wrong = listed(place.state, campaign.folder)
    book.problems += wrong
    book.problems += [f"the end: finding {name} is lost" for name in place.told if name not in ids]
    if len(ids) != len(set(ids)):
        book.problems.append(f"the end: findings are doubled: {ids}")
    if expected is None:
        return
    # A run that was stopped when all was done but its last word begins anew: it replays the corpus, and may not come by
    # a finding again that stands on disk since.
    last = {name_of(finding) for kind in ("new", "known") for finding in campaign.summary[kind]}
    # A case that was running alone at two deaths is not run a third time: a campaign must say so.
    left_out = [event["message"] for event in campaign.of("note") if "not run any more" in event["message"]]
    if left_out:
        book.skipped.append(f"what left out cases show: {left_out}")
    elif lost := sorted(set(expected) - last - set(ids)):
        book.problems.append(f"the end: {lost} were found undisturbed, and are not among {sorted(last | set(ids))}")
    if more := sorted(last - set(expected)):
        book.problems.append(f"the end: {more} were found, and not undisturbed: {expected}")


if __name__ == "__main__":
    sys.exit(main())
