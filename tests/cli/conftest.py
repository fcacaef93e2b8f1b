"""The command line runs in an empty directory with no variables of its own; workers are stood in for by fakes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import moe_fuzz
from moe_fuzz import strategies
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.case import Case
from moe_fuzz.cli.main import main
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.ops import get_space
from moe_fuzz.verdict import PASS, VIOLATION, Verdict, Violation
from moe_fuzz.worker.stats import Stats

TARGET = "topk_softmax@builtin"
INFO = TargetInfo(TARGET, "topk_softmax", "builtin", origin="moe_fuzz.kernels")
Judge = Callable[[tuple[Case, ...], object], Verdict]


@pytest.fixture(autouse=True)
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MOE_FUZZ_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@dataclass
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs the command line in this process."""

    def run(*arguments: str) -> Ran:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def spawn(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command line in a process of its own, through a shell."""
    root = str(Path(moe_fuzz.__file__).parents[1])

    def run(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
        line = line.replace("moe-fuzz", f"{sys.executable} -m moe_fuzz.cli.main")
        path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        env = {**os.environ, "PYTHONPATH": path, **environment}
        return subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
        )

    return run


@pytest.fixture
def case() -> Case:
    """A case with a fault on rows, so that there is something to damage everywhere."""
    cases = strategies.grid(get_space("topk_softmax"), INFO, "cpu", 0)
    return next(case for case in cases if case.steps[0].tokens > 2 and any(f.rows for f in case.steps[0].faults))


@dataclass
class FakeWorker:
    pool: FakePool

    def run(self, cases: Sequence[Case], target: str, options: object, on_verdict: object = None) -> list[Verdict]:
        self.pool.ran.append(tuple(cases))
        self.pool.options.append(options)
        return [self.pool.judge(tuple(cases[: at + 1]), options) for at in range(len(cases))]


@dataclass
class FakePool:
    """Judges cases without running them."""

    judge: Judge = lambda cases, options: Verdict(PASS)
    unavailable: Sequence[str] = ()
    ran: list[tuple[Case, ...]] = field(default_factory=list)
    options: list[object] = field(default_factory=list)
    made: dict[str, object] = field(default_factory=dict)
    stats: Stats = field(default_factory=Stats)

    def __call__(self, **settings: object) -> FakePool:
        self.made = settings
        return self

    def __enter__(self) -> FakePool:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def environment(self) -> dict[str, str]:
        return {}

    def describe(self, target: str) -> TargetInfo:
        if target in self.unavailable:
            raise EnvironmentProblem(f"{target} is not installed", "install it")
        op, _, provider = target.partition("@")
        return TargetInfo(target, op, provider)

    def versions(self, target: str) -> dict[str, str]:
        return dict(self.environment)

    @contextmanager
    def lease(self, *_: object) -> Iterator[FakeWorker]:
        yield FakeWorker(self)

    fresh = lease


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> FakePool:
    """Stands in for the workers of every command."""
    fake = FakePool()
    for command in ("run", "replay", "minimize", "selftest"):
        monkeypatch.setattr(f"moe_fuzz.cli.{command}.Pool", fake)
    return fake


@pytest.fixture
def finding(case: Case) -> Finding:
    """A finding on nobody's disk yet."""
    violation = Violation("ids", "duplicate-id", "row 5 names expert 0 twice", "ids", (5, 1), "distinct ids", "0")
    return Finding(
        id="3fa9c1d2e0",
        target=TARGET,
        check="ids",
        symptom="duplicate-id",
        message=violation.message,
        finding_class="contract",
        clause="its docstring",
        case=case,
        verdict=Verdict(VIOLATION, (violation,)),
        raw=("ids", "duplicate-id"),
        features=("fault:nan_rows",),
        scope=("fault:nan_rows",),
        label=get_space(case.op).label(case),
        first_seen="2026-11-21T03:26:00Z",
    )
