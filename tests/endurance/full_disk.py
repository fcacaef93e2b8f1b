"""State directories that cannot be written, and disks that fill up in the middle of a campaign.

    python tests/endurance/full_disk.py [--rounds 6] [--limits 3] [--cases 200] [--seed 11]

A campaign that cannot keep its findings must end in exit code 3 and a sentence that names the way out; what lay on disk
before must be as it was; and when there is room again, the next run goes on and finds what it would have found.

Disks are small tmpfs, and read-only directories are bind mounts, in mount and user namespaces of our own: so neither
needs root where the kernel lets users have namespaces. Permission bits bind ordinary users only, and are tried where we
are one. What cannot be tried is skipped with a reason. A limit on the size of files (RLIMIT_FSIZE) works everywhere.
Exits with 1 if anything does not hold.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from harness import Campaign, moe_fuzz_command, problems_on_disk, table

INSIDE = "ENDURANCE_INSIDE"
DISK = 64 << 20  # bytes
TARGET = "topk_softmax@torch"
HEAD = ("trouble", "came at", "exit", "told", "what it says")


@dataclass
class Book:
    rows: list[list[object]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def row(self, *cells: object) -> None:
        self.rows.append(list(cells))
        print(table(HEAD, [cells]).splitlines()[-1], flush=True)

    def refused(self, trouble: str, done: subprocess.CompletedProcess[str], came: str = "start", told: int = 0) -> None:
        """A command that could not work must say so, and how to go on."""
        lines = done.stderr.strip().splitlines()
        error = next((line for line in lines if line.startswith("error: ")), "")
        hint = next((line for line in lines if line.startswith("hint: ")), "")
        self.row(trouble, came, done.returncode, told, f"{error} | {hint}")
        if done.returncode != 3:
            self.problems.append(f"{trouble}: exit code {done.returncode}, not 3: {done.stderr or done.stdout[-300:]}")
        if not error or not hint:
            self.problems.append(f"{trouble}: no error with a hint: {done.stderr!r}")
        if "Traceback" in done.stderr:
            self.problems.append(f"{trouble}: a traceback: {done.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6, help="disks that fill up")
    parser.add_argument("--limits", type=int, default=3, help="limits on the size of files")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--targets", default=f"{TARGET},topk_softmax@planted.int64_ids")
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args()
    enter_namespaces()
    book = Book()
    with tempfile.TemporaryDirectory(prefix="endurance-") as temporary:
        root = Path(temporary)
        fixed = [*options.targets.split(","), "--cases", options.cases, "--seed", options.seed, "--minimize-time", "10m"]  # noqa: E501
        fixed += ["--device", "cpu", "--workers", 2]
        whole = Campaign(root, [*fixed, "--state-dir", root / "whole"])
        whole.wait(600)
        expected = {finding["id"] for finding in whole.summary["new"]}
        print(f"undisturbed: exit {whole.process.returncode}, {len(expected)} findings {sorted(expected)}")
        nowhere(book, root)
        limited(book, root, fixed, expected, options.limits)
        if os.environ[INSIDE] == "1":
            readonly(book, root, fixed, root / "whole")
            for number in range(options.rounds):
                fills_up(book, root, fixed, expected, number, random.Random(options.seed + number))
        else:
            book.skipped.append(f"full and read-only disks: {os.environ[INSIDE]}")
    print(f"\n{table(HEAD, book.rows)}\n")
    for line in book.skipped:
        print(f"SKIPPED {line}")
    for line in book.problems:
        print(f"PROBLEM {line}")
    return 1 if book.problems or not expected else 0


def enter_namespaces() -> None:
    """Begins the program again where mounts are ours. Where that cannot be, INSIDE says why."""
    if INSIDE not in os.environ:
        reason = namespaces()
        if not reason:
            os.environ[INSIDE] = "1"
            os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv])
        os.environ[INSIDE] = reason


def namespaces() -> str:
    """Why we cannot have mounts of our own; empty if we can."""
    probe = "mount -t tmpfs none /mnt && mount --bind /mnt /mnt"
    try:
        done = subprocess.run(["unshare", "-rm", "sh", "-c", probe], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "there is no `unshare`"
    return "" if done.returncode == 0 else f"no mount namespace: {done.stderr.strip()}"


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and its contents."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def nowhere(book: Book, root: Path) -> None:
    """Places where no directory can be, for anybody."""
    (root / "file").write_text("mine")
    for place in ("/dev/null/x", "/proc/moe-fuzz", root / "file", root / "file" / "below"):
        done = moe_fuzz_command("run", TARGET, "--cases", 4, "--state-dir", place, cwd=root)
        if place == root / "file" and done.returncode == 2:  # click sees it first; as good
            book.row(f"--state-dir {place}", "start", 2, 0, done.stderr.strip().splitlines()[0])
        else:
            book.refused(f"--state-dir {place}", done)
    if os.geteuid() == 0:
        book.skipped.append("permission bits: they do not bind root; the read-only mount stands for them")
        return
    (root / "bits").mkdir(mode=0o500)
    done = moe_fuzz_command("run", TARGET, "--cases", 4, "--state-dir", root / "bits" / "state", cwd=root)
    book.refused("a directory without the permission to write", done)


def readonly(book: Book, root: Path, fixed: list[object], state: Path) -> None:
    """A state directory with findings, on a file system that is read-only."""
    before = snapshot(state)
    mount("--bind", state, state)
    mount("-o", "remount,ro,bind", state)
    try:
        done = moe_fuzz_command("run", *fixed, "--state-dir", state, cwd=root)
        book.refused("a read-only mount", done)
        name = next(iter((state / "findings").iterdir())).name
        for words in (["findings"], ["show", name]):  # who only reads is not disturbed
            done = moe_fuzz_command(*words, "--state-dir", state, cwd=root)
            if done.returncode or done.stderr:
                book.problems.append(f"a read-only mount: `{words[0]}` ends in {done.returncode}: {done.stderr}")
    finally:
        subprocess.run(["umount", str(state)], check=True)
    if snapshot(state) != before:
        book.problems.append("a read-only mount: something changed")


def limited(book: Book, root: Path, fixed: list[object], expected: set[str], count: int) -> None:
    """Files of at most so many bytes, which works for everybody: the larger files of a campaign cannot be written."""
    for size in (700, 2500, 5000)[:count]:  # less than that, and what it says on the screen is cut as well
        state = root / f"limited-{size}"
        campaign = Campaign(root, [*fixed, "--state-dir", state], ("prlimit", f"--fsize={size}"), report=False)
        campaign.wait(600)
        after_trouble(book, campaign, f"files of {size} bytes at most", "start", state, fixed, expected)


def fills_up(
    book: Book, root: Path, fixed: list[object], expected: set[str], number: int, chosen: random.Random
) -> None:
    """A disk that has room at first; then somebody else fills it, to the last byte or nearly so."""
    disk = root / f"disk-{number}"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", f"size={DISK}", "none", disk)
    try:
        state, out = disk / "state", root / f"out-{number}"  # the report is written elsewhere
        campaign = Campaign(out, [*fixed, "--state-dir", state])
        moments: dict[str, Callable[[], bool]] = {
            "the start": lambda: True,
            "the first case": lambda: bool(campaign.of("progress")),
            "confirming": lambda: bool(campaign.of("finding-confirming")),
            "minimizing": lambda: bool(campaign.of("finding-minimizing")),
            "the first finding": lambda: bool(campaign.of("finding-reported")),
        }
        moment = list(moments)[number % len(moments)]
        campaign.until(moments[moment], 60)
        time.sleep(chosen.uniform(0, 0.2))
        spare = chosen.choice([0, 0, 4096, 16384])
        ballast = disk / "ballast"
        fill(ballast, spare)
        while campaign.alive:  # it takes up what the campaign gives back
            with suppress(subprocess.TimeoutExpired):
                campaign.process.wait(0.02)
            fill(ballast, 0)
        trouble = f"a disk with {spare} bytes left"
        after_trouble(book, campaign, trouble, moment, state, fixed, expected, ballast.unlink)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(ballast: Path, spare: int) -> None:
    with ballast.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 65536)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        with suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        if spare:
            file.truncate(max(0, file.tell() - spare))


def after_trouble(
    book: Book, campaign: Campaign, trouble: str, moment: str, state: Path, fixed: list[object], expected: set[str],
    make_room: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    told = campaign.announced()
    code = campaign.process.returncode
    done = subprocess.CompletedProcess([], code, campaign.out, campaign.err)
    book.refused(trouble, done, moment, len(told))
    where = f"{trouble} at {moment}"
    left, _ = campaign.leftovers(2.0)
    book.problems += [f"{where}: process {pid} is left" for pid in left]
    if state.exists():
        book.problems += [f"{where}: {problem}" for problem in problems_on_disk(state, told)]
    make_room()
    again = Campaign(campaign.folder, [*fixed, "--state-dir", state])
    code = again.wait(600)
    if code != 1:
        book.problems.append(f"{where}: with room again, it ends in {code}: {again.err}")
        return
    found = {finding["id"] for finding in again.summary["new"]}
    if found != expected:
        book.problems.append(f"{where}: with room again, {sorted(found)} are new, not {sorted(expected)}")
    notes = [event["message"] for event in again.of("note") if "damaged" in event["message"]]
    book.problems += [f"{where}: {note}" for note in notes]


if __name__ == "__main__":
    sys.exit(main())
