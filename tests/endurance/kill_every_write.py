"""A kill before every single operation on the file system, and in the middle of every write: what `kill_parent.py` does
at random, done at all places there are.

    python tests/endurance/kill_every_write.py [--every 1] [--seed 7]

A small campaign runs on workers that are Python functions, so that a thousand of them take a minute. Each time it kills
itself with SIGKILL at the next operation inside its state directory. Then the directory must be whole, the next run
must go on, and end with the findings of a campaign that nobody killed. In the second round an earlier campaign's
findings look fixed and come back, so that their folders are replaced: there is no moment without one or the other.
Exits with 1 if any of this does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import ROOT, problems_on_disk

sys.path.append(str(ROOT / "tests" / "cpu"))

from campaign_fakes import GOOD, Judge, Listener, bad, campaign, crash  # found by the line above

from moe_fuzz.campaign import events
from moe_fuzz.campaign.findings import load_findings
from moe_fuzz.campaign.state import StateDir

CASES = 96
#: Audit events of what changes a file system, and the position of the path among their arguments.
CHANGES = {"open": 0, "os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.truncate": 0, "os.link": 1}
At = tuple[str, int]
_ANY = re.compile(r"\b(\d+|[0-9a-f]{10})\b")


def judge(healed: frozenset[str] = frozenset()) -> Judge:
    """Three bugs: a plain one, a crash, and one that needs another case before it. The cases `healed` pass."""

    def look(case, history, options):  # type: ignore[no-untyped-def]
        if case.digest in healed:
            return GOOD
        if "nan_rows" in case.fault_names and len(case.experts) % 2:
            return bad()
        if case.config["bias"] and "ties" in case.fault_names:
            return crash("SIGABRT")
        if case.config["dtype"] == "float16" and any("inf_rows" in earlier.fault_names for earlier in history):
            return bad("parity", "stale")
        return GOOD

    return look


class Killer:
    """Counts operations inside `folder`, and ends the process at the one `at`: (kind, which of the kind). By kind,
    because threads take turns in another way each time."""

    def __init__(self, folder: Path, at: At | None) -> None:
        self.operations: Counter[str] = Counter()
        self._folder = folder
        self._at = at
        self._write = os.write

    def install(self) -> None:
        sys.addaudithook(self._hear)
        os.write = self._tear  # which is not audited

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[CHANGES[event]]) if event in CHANGES else ""
        if not path.startswith(str(self._folder)):
            return
        if event != "open" or int(arguments[2]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._count(f"{event} {self._kind(path)}")

    def _tear(self, handle: int, data: Any) -> int:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if path.startswith(str(self._folder)):
            self._count(f"half a write {self._kind(path)}", handle, data)
        return self._write(handle, data)

    def _count(self, name: str, handle: int = -1, data: Any = b"") -> None:
        self.operations[name] += 1
        if (name, self.operations[name]) == self._at:
            if handle >= 0:
                self._write(handle, bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    def _kind(self, path: str) -> str:
        """The path without what is another name in every run."""
        parts = Path(path).relative_to(self._folder).parts
        last = [part.split("-", 2)[2] if part.startswith(".tmp-") else part for part in parts]
        hidden = [_ANY.sub("*", part) for part in last]
        temporary = " (beside its place)" if last != list(parts) else ""
        return ("/".join(hidden) or ".") + temporary


@dataclass
class Ran:
    status: int = 0  # what waitpid says
    told: list[str] = field(default_factory=list)  # ids of the findings, as they were reported
    new: set[str] = field(default_factory=set)  # those that the summary calls new
    operations: Counter[str] = field(default_factory=Counter)  # by kind; known if the process came to its end


def run(state: Path, seed: int, look: Judge, kill_at: At | None = None) -> Ran:
    """A campaign in a fork, killed at operation `kill_at`."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.close(out)
            _campaign(state, seed, look, kill_at, into)
            code = 0
        except BaseException:  # noqa: BLE001 - the last frame of the fork
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(into)
    with os.fdopen(out, "rb") as stream:
        lines = [line.decode().rstrip("\n").partition(" ") for line in stream]
    by = {word: [rest for found, _, rest in lines if found == word] for word in ("told", "new", "did")}
    return Ran(os.waitpid(pid, 0)[1], by["told"], set(by["new"]), Counter(by["did"]))


def _campaign(state: Path, seed: int, look: Judge, kill_at: At | None, pipe: int) -> None:
    killer, write = Killer(state, kill_at), os.write

    class Tell(Listener):
        def __call__(self, event: object) -> None:
            if isinstance(event, events.FindingReported):
                write(pipe, f"told {event.finding.id}\n".encode())

    killer.install()
    summary = campaign(state, look, Tell(), seed=seed, cases=CASES).run()
    write(pipe, "".join(f"new {finding.id}\n" for finding in summary.new).encode())
    write(pipe, "".join(f"did {name}\n" for name in killer.operations.elements()).encode())


def explore(name: str, root: Path, start: Path, seed: int, every: int, look: Judge) -> list[str]:
    """Kills a campaign that begins with the directory `start` at each of its operations; what is wrong."""
    whole = root / f"{name}-whole"
    shutil.copytree(start, whole)
    undisturbed = run(whole, seed, look)
    before = set(ids(start)[0])
    expected = before | set(undisturbed.told)
    if undisturbed.status or not undisturbed.told or not undisturbed.operations:
        return [f"{name}: the undisturbed campaign gives {undisturbed}"]
    problems: list[str] = []
    killed: Counter[str] = Counter()
    moments = [(name, at) for name, times in undisturbed.operations.items() for at in range(1, times + 1)]
    for operation, at in moments[::every]:
        state = root / f"{name}-killed"
        shutil.copytree(start, state)
        first = run(state, seed, look, (operation, at))
        where = f"{name}, {operation} {at}"
        if os.WIFSIGNALED(first.status):
            killed[operation] += 1
        elif first.status:
            problems.append(f"{where}: it was not killed, but ended with status {first.status}")
        problems += [f"{where}: {problem}" for problem in problems_on_disk(state, first.told)]
        over = finished(state)
        with StateDir(state):  # what the next run sees
            lost = before.union(first.told).difference(ids(state)[0])
            problems += [f"{where}: {id_} is lost at once" for id_ in lost]
        again = run(state, seed, look)
        problems += [f"{where}: {problem}" for problem in after(state, expected, again)]
        if again.new != undisturbed.new and not over:
            problems.append(f"{where}: {sorted(again.new)} are new in the end, not {sorted(undisturbed.new)}")
        shutil.rmtree(state)
    print(f"{name}: {len(expected)} findings, {sum(killed.values())} kills at {len(killed)} kinds of operations")
    for operation, times in killed.most_common():
        print(f"  {times:5d}  {operation}")
    return problems


def finished(state: Path) -> bool:
    """Whether the campaign was killed when it had saved its end: then the next run is another one."""
    file = state / "campaign.json"
    return file.exists() and bool(json.loads(file.read_text())["finished"])


def after(state: Path, expected: set[str], ran: Ran) -> list[str]:
    """What is wrong when the run after the kill has come to its end."""
    found, problems = ids(state)
    if ran.status:
        problems.append(f"the next run ends with status {ran.status}")
    if lost := expected - set(found):
        problems.append(f"{sorted(lost)} are lost")
    if more := set(found) - expected:
        problems.append(f"{sorted(more)} were found besides")
    if len(ran.told) != len(set(ran.told)):
        problems.append(f"told twice: {ran.told}")
    return problems + [f"{file.relative_to(state)} is left over" for file in state.rglob(".tmp-*")]


def ids(state: Path) -> tuple[list[str], list[str]]:
    """The findings on disk, and what is damaged."""
    notes: list[str] = []
    return [finding.id for finding in load_findings(StateDir(state, notes.append))], notes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="kill at every N-th operation only")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="endurance-") as temporary:
        root = Path(temporary)
        empty, old = root / "empty", root / "old"
        empty.mkdir()
        problems = explore("in an empty directory", root, empty, options.seed, options.every, judge())
        campaign(old, judge(), seed=options.seed + 1, cases=CASES).run()
        healed = frozenset(finding.case.digest for finding in load_findings(StateDir(old)))
        problems += explore("with findings that come back", root, old, options.seed, options.every, judge(healed))
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
