"""A toy op and a pool whose workers judge cases with Python functions: a campaign without processes."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from hypothesis import strategies as st

from moe_fuzz.campaign.engine import Campaign
from moe_fuzz.campaign.interfaces import Cases, OnVerdict, Sources
from moe_fuzz.campaign.plan import Settings
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case, Fault, Scalar, Step
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import CaseError, EnvironmentProblem
from moe_fuzz.labels import Labels
from moe_fuzz.ops.space import Axis, FaultPlace, Means
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.verdict import CRASH, PASS, VIOLATION, Verdict, Violation

Judge = Callable[[Case, Cases, RunOptions], Verdict]  # (case, what this process ran before, options)
TARGET = "toy@fake"
OPTIONS = RunOptions(fence=FenceOptions())
DTYPES = ("float32", "bfloat16", "float16")
GOOD = Verdict(PASS, seconds=0.001, parity=True, budget=0.25)


class ToySpace:
    op = "toy"
    sizes = ("experts", "top_k")
    tensors = {"logits": "input", "bias": "input", "ids": "output"}  # noqa: RUF012

    places = (
        *(FaultPlace(name, "logits", on_rows=True) for name in ("nan_rows", "ties", "inf_rows")),
        FaultPlace("extreme_bias", "bias", on_rows=False, needs="bias"),
    )

    def cost(self, case: Case, means: Means) -> float:
        return 0.01 * len(case.steps)

    def axes(self, info: TargetInfo) -> tuple[Axis, ...]:
        return ()

    def complete(self, config: Mapping[str, Scalar], info: TargetInfo) -> dict[str, Scalar]:
        return dict(config)

    def places_for(self, config: Mapping[str, Scalar], info: TargetInfo) -> tuple[FaultPlace, ...]:
        return self.places

    def modes(self, info: TargetInfo) -> tuple[str, ...]:
        return ("eager",)

    def validate(self, case: Case) -> None:
        if case.op != "toy" or not 1 <= int(case.config["top_k"]) <= len(case.experts):
            raise CaseError("config.top_k", "must be from 1 to the number of experts")

    def features(self, case: Case) -> frozenset[str]:
        found = {f"dtype={case.config['dtype']}", "E odd" if len(case.experts) % 2 else "E even"}
        found |= {"bias"} if case.config["bias"] else set()
        found |= {"T=0"} if not any(step.tokens for step in case.steps) else set()
        return frozenset(found | {f"fault:{name}" for name in case.fault_names})

    def simplify(self, case: Case) -> Iterator[Case]:
        experts, k = case.experts, int(case.config["top_k"])
        if k > 1:
            yield case.with_config(top_k=1)
            yield case.with_config(top_k=k - 1)
        for count in sorted({k, len(experts) // 2, len(experts) - 1}):
            if k <= count < len(experts):
                yield case.with_config(experts=str(experts.first(count)))
        for dtype in DTYPES[: DTYPES.index(str(case.config["dtype"]))]:
            yield case.with_config(dtype=dtype)
        if case.config["bias"]:
            yield case.with_config(bias=False)

    def sharpen(self, case: Case) -> Iterator[Case]:
        return iter(())

    def label_axes(self, case: Case) -> dict[str, Labels]:
        return {"experts": case.experts}

    def keep(self, case: Case, axis: str, labels: Labels) -> Case:
        return case.with_config(experts=str(labels), top_k=min(int(case.config["top_k"]), len(labels)))

    def label(self, case: Case) -> str:
        rows = "+".join(str(step.tokens) for step in case.steps)
        return f"T={rows} E={len(case.experts)} k={case.config['top_k']} {case.config['dtype']}"


SPACE = ToySpace()


def toy(
    experts: int = 8, top_k: int = 2, rows: int = 4, faults: Sequence[str] = (), seed: int = 1, **config: object
) -> Case:
    """A case of the toy op with one step; each fault lies on its last row."""
    last = Labels.range(rows).last(1)
    values = {"experts": str(Labels.range(experts)), "top_k": top_k, "dtype": "float32", "bias": False} | config
    step = Step(Labels.range(rows), faults=tuple(Fault(name, "logits", last) for name in faults))
    return Case("toy", values, (step,), seed, target=TARGET)  # type: ignore[arg-type]


def bad(check: str = "routing", symptom: str = "wrong", kind: str = VIOLATION, site: str = "") -> Verdict:
    return Verdict(kind, (Violation(check, symptom, f"{check} says {symptom}", tensor="ids", site=site),))


def crash(symptom: str = "SIGSEGV", site: str = "") -> Verdict:
    return bad("crash", symptom, CRASH, site)


@st.composite
def toy_rounds(draw: st.DrawFn) -> Cases:
    experts = draw(st.sampled_from([1, 2, 3, 8, 61, 64]))
    top_k = draw(st.integers(1, min(experts, 8)))
    dtype, bias = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    cases = []
    for _ in range(draw(st.integers(1, 6))):
        rows = draw(st.sampled_from([0, 1, 2, 7, 16, 33]))
        names = st.lists(st.sampled_from(["nan_rows", "ties", "inf_rows"]), unique=True, max_size=3)
        faults = draw(names) if rows else []
        cases.append(toy(experts, top_k, rows, faults, draw(st.integers(0, 2**63 - 1)), dtype=dtype, bias=bias))
    return tuple(cases)


def toy_grid(_space: object, _info: TargetInfo, _device: str, seed: int) -> Iterator[Case]:
    for experts, rows, dtype in itertools.product((1, 8, 61), (0, 1, 16), DTYPES):
        yield toy(experts, 1, rows, seed=seed, dtype=dtype)


SOURCES = Sources(lambda op: SPACE, lambda space, info, device: toy_rounds(), toy_grid)


class FakeWorker:
    """A process: it remembers what it ran, until a crash takes it."""

    def __init__(self, pool: FakePool) -> None:
        self._pool = pool
        self._history: Cases = ()

    def run(
        self, cases: Sequence[Case], target: str, options: RunOptions, on_verdict: OnVerdict | None = None
    ) -> list[Verdict]:
        verdicts = []
        for at, case in enumerate(cases):
            verdict = self._pool.judge(case, self._history, options)
            verdicts.append(verdict)
            if on_verdict is not None:
                on_verdict(at, verdict, self._history[-32:])
            self._history = () if verdict.kind == CRASH else (*self._history, case)
        return verdicts


class FakePool:
    """`leased` is what campaigns ran in shared workers, `fresh_runs` what was run again in fresh ones."""

    def __init__(self, judge: Judge, workers: int = 1, unavailable: Sequence[str] = ()) -> None:
        self._judge = judge
        self._unavailable = unavailable
        self._free = [FakeWorker(self) for _ in range(workers)]
        self._available = threading.Semaphore(workers)
        self.lock = threading.Lock()
        self.leased: list[Case] = []
        self.fresh_runs = 0
        self._local = threading.local()

    def judge(self, case: Case, history: Cases, options: RunOptions) -> Verdict:
        with self.lock:
            if not getattr(self._local, "fresh", False):
                self.leased.append(case)
        return self._judge(case, history, options)

    @property
    def environment(self) -> dict[str, str]:
        return {"torch": "0.0"}

    def describe(self, target: str) -> TargetInfo:
        if target in self._unavailable:
            raise EnvironmentProblem(f"{target} is not installed", "pip install it")
        op, _, provider = target.partition("@")
        return TargetInfo(target, op, provider, "a fake", clauses={"routing": "README: top k is top k"})

    def versions(self, target: str) -> dict[str, str]:
        return dict(self.environment)

    @contextlib.contextmanager
    def lease(self, target: str = "") -> Iterator[FakeWorker]:
        with self._available:
            with self.lock:
                worker = self._free.pop()
            try:
                yield worker
            finally:
                with self.lock:
                    self._free.append(worker)

    @contextlib.contextmanager
    def fresh(self, environment: Mapping[str, str] | None = None) -> Iterator[FakeWorker]:
        self._local.fresh = True
        self.fresh_runs += 1
        try:
            yield FakeWorker(self)
        finally:
            self._local.fresh = False


class Listener:
    """Collects events."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def __call__(self, event: object) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]


def settings(**changes: object) -> Settings:
    given: dict = {"targets": (TARGET,), "cases": 200, "seconds": None, "seed": 7, "checks": None, "device": "cuda"}
    return Settings(**(given | {"workers": 1, "shard_cases": 64} | changes))


def campaign(tmp_path: object, judge: Judge, listener: Callable | None = None, **changes: object) -> Campaign:
    """A campaign on fakes; `pool` and `state` can be given among the settings."""
    pool = changes.pop("pool", None) or FakePool(judge, int(changes.get("workers", 1)))  # type: ignore[call-overload]
    state = changes.pop("state", None) or StateDir(tmp_path)  # type: ignore[arg-type]
    made = Campaign(settings(**changes), pool, state, listener or Listener(), sources=SOURCES)  # type: ignore[arg-type]
    made.pool = pool  # type: ignore[attr-defined]
    return made


def always_good(_case: Case, _history: Cases, _options: RunOptions) -> Verdict:
    return GOOD


def when(predicate: Callable[[Case], bool], verdict: Verdict | None = None) -> Judge:
    """Bad whenever the predicate holds, in any process."""
    return lambda case, history, options: (verdict or bad()) if predicate(case) else replace(GOOD, budget=0.5)


def nan_on_odd(case: Case) -> bool:
    """A bug: NaN rows, where the number of experts is odd."""
    return "nan_rows" in case.fault_names and len(case.experts) % 2 == 1


def ran(made: Campaign) -> Counter[str]:
    """What the campaign ran in shared workers, by digest."""
    return Counter(case.digest for case in made.pool.leased)  # type: ignore[attr-defined]
