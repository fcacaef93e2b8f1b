"""What the endurance scripts share: a campaign in a process of its own, what it said, what it left running, and what
lies on disk.

The scripts run the real command, as a user does. They find the processes that belong to a campaign by a variable that
all of them inherit, so that what other programs do on the machine does not matter.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import moe_fuzz
from moe_fuzz.campaign.findings import load_findings
from moe_fuzz.campaign.state import StateDir

MARK = "ENDURANCE_MARK"
ROOT = Path(str(moe_fuzz.__file__)).parents[1]
COMMAND = (sys.executable, "-m", "moe_fuzz.cli.main")
FILES = ("case.json", "finding.json", "report.md", "env.json")  # of every finding


def memory() -> str | None:
    """A folder in memory where there is one: who is killed leaves the same there, and syncing costs nothing."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def environment(mark: str = "") -> dict[str, str]:
    """Of a process that runs this moe_fuzz and no other, without the caller's options."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MOE_FUZZ_")}
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return inherited | {"PYTHONPATH": os.pathsep.join(paths), MARK: mark}


def moe_fuzz_command(*arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command, run to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600,
        check=False, **options,
    )  # fmt: skip


@dataclass
class Campaign:
    """`moe-fuzz run` in a process of its own. `arguments` come after `run`."""

    folder: Path  # for its output and its report; a campaign started there later begins new ones
    arguments: Sequence[object]
    prefix: Sequence[str] = ()  # what starts the command: `unshare`, `prlimit`
    report: bool = True  # False: nothing but what is on the screen
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._report, self._out, self._err = (self.folder / f"{self.mark}.{end}" for end in ("ndjson", "out", "err"))
        command = [*self.prefix, *COMMAND, "run", *map(str, self.arguments)]
        command += ["--report", f"ndjson={self._report}"] if self.report else []
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=self.folder, env=environment(self.mark)
            )
        self._read = 0
        self.events: list[dict[str, Any]] = []

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def pump(self) -> list[dict[str, Any]]:
        """Takes in the events that were reported since the last call; half a line is left for the next one."""
        if not self._report.exists():
            return []
        with self._report.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        new = [json.loads(line) for line in whole.splitlines()]
        self.events += new
        return new

    def of(self, kind: str) -> list[dict[str, Any]]:
        self.pump()
        return [event for event in self.events if event["kind"] == kind]

    def announced(self) -> list[str]:
        """The ids of new findings that anybody was told of, on the screen or in the report."""
        told = [event["finding"]["id"] for event in self.of("finding-reported") if event["status"] == "new"]
        lines = self.out.split("\n")[:-1]  # a last line without its end was not told yet
        return list(dict.fromkeys([*told, *(line.split()[1] for line in lines if line.startswith("FOUND "))]))

    @property
    def cases(self) -> int:
        """How many cases it said were done, those of the interrupted runs that it goes on with included."""
        return max((event["cases"] for event in self.of("progress")), default=0)

    @property
    def summary(self) -> dict[str, Any]:
        [finished] = self.of("campaign-finished")
        return dict(finished["summary"])

    def until(self, condition: Callable[[], bool], seconds: float, every: float = 0.002) -> bool:
        """Waits for the condition or the campaign's end; whether the condition came, while the campaign was alive."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.alive:
            if condition():
                return True
            time.sleep(every)
        return False

    def wait(self, seconds: float) -> int:
        """Its exit code. One that does not end is killed, and TimeoutExpired raised."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def processes(self) -> list[int]:
        """The campaign's processes that still run: the parent, the zygote, the workers, and whatever they started."""
        return list(_marked(self.mark))

    def leftovers(self, seconds: float) -> tuple[list[int], float]:
        """Which of its processes are left, and after how many seconds none was; waits `seconds` at most."""
        start = time.monotonic()
        while (left := self.processes()) and time.monotonic() - start < seconds:
            time.sleep(0.01)
        return left, time.monotonic() - start


def _marked(mark: str) -> Iterator[int]:
    needle = f"{MARK}={mark}".encode()
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                if needle in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    yield int(entry)
            except OSError:  # it ended meanwhile, is a zombie, or is somebody else's
                continue


def workers(campaign: Campaign) -> tuple[list[int], list[int]]:
    """(zygotes, workers) of a campaign that runs: the children of its parent, and theirs."""
    parents = {pid: _parent(pid) for pid in campaign.processes()}
    zygotes = [pid for pid, parent in parents.items() if parent == campaign.process.pid]
    return zygotes, [pid for pid, parent in parents.items() if parent in zygotes]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def problems_on_disk(state: Path, announced: Sequence[str]) -> list[str]:
    """What is wrong with a state directory as it lies there: findings that were told and are not intact, and files
    that do not parse. Nothing is repaired or moved."""
    problems: list[str] = []
    for name in announced:
        folder = state / "findings" / name
        problems += [f"finding {name}: no {file}" for file in FILES if not _filled(folder / file)]
    found = load_findings(StateDir(state, problems.append))  # verifies digests and ids, and tells what is damaged
    there = {finding.id for finding in found}
    problems += [f"finding {name} does not load" for name in announced if name not in there]
    for file in (*state.glob("*.json"), *state.glob("pending/*.json"), *state.glob("inflight/*.json")):
        if file.name.startswith("."):
            continue  # half-written beside its place, and not in it
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue  # a campaign that lives is done with it
        except ValueError as error:
            problems.append(f"{file.relative_to(state)}: {error}")
    problems += [f"{file.relative_to(state)} was set aside" for file in state.rglob("*.damaged")]
    return problems


def _filled(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def listed(state: Path, cwd: Path) -> tuple[list[str], list[str]]:
    """The ids that `moe-fuzz findings` lists, and what is wrong with its answer."""
    done = moe_fuzz_command("findings", "--json", "--state-dir", state, cwd=cwd)
    if done.returncode or done.stderr:
        return [], [f"`moe-fuzz findings` ends in {done.returncode}: {done.stderr.strip()}"]
    return [finding["id"] for finding in json.loads(done.stdout)], []


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as text, columns aligned."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
