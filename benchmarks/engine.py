"""What the engine costs: cases per second in one process, through one worker, through two; the shares of drawing and of
fences; and the cost of isolation on cases of 20 ms or more.

    python benchmarks/engine.py [--target topk_softmax@builtin] [--cases 96] [--repeats 5] [--json PATH]

All variants run the same cases, interleaved within each repeat, because machines drift; medians and ratios are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from moe_fuzz import strategies
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.ops import get_space
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.worker.pool import Pool

ROUND = 8
SLOW = 0.020  # seconds from which on isolation must cost at most a tenth
PATIENT = RunOptions(deadline=60.0)


def draw(info: TargetInfo, device: str, count: int) -> tuple[list[Case], float]:
    """`count` cases as a campaign draws them, and the seconds it took."""
    cases: list[Case] = []

    @seed(1)
    @settings(
        phases=[Phase.generate],
        max_examples=10 * count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategies.rounds(get_space(info.op), info, device))
    def body(round_: tuple[Case, ...]) -> None:
        cases.extend(round_[: count - len(cases)])
        if len(cases) >= count:
            raise Enough

    started = time.perf_counter()
    with contextlib.suppress(Enough):
        body()
    return cases, time.perf_counter() - started


class Enough(BaseException):
    """Leaves Hypothesis from inside; not an Exception, which it would take for a failure."""


def rounds_of(cases: list[Case]) -> list[list[Case]]:
    return [cases[at : at + ROUND] for at in range(0, len(cases), ROUND)]


def through(pool: Pool, cases: list[Case], target: str, workers: int) -> None:
    todo = rounds_of(cases)

    def work() -> None:
        while True:
            try:
                part = todo.pop()
            except IndexError:
                return
            with pool.lease() as worker:
                worker.run(part, target, PATIENT)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(target: str, count: int, repeats: int) -> dict[str, float]:
    os.environ["TRITON_INTERPRET"] = "1"
    from moe_fuzz.execute.runner import Runner  # after the variable: Triton reads it when a kernel is defined

    runner = Runner("cpu")
    info = runner.describe(target)
    with Pool(1, "cpu") as one, Pool(2, "cpu") as two:
        cases, drawing = draw(info, "cpu", count)
        verdicts = [runner.run(case, target, PATIENT) for case in cases]  # also warms up
        through(one, cases, target, 1)
        through(two, cases, target, 2)
        slow = [case for case, verdict in zip(cases, verdicts, strict=True) if verdict.seconds >= SLOW]
        bare = RunOptions(fence=FenceOptions(hard=(), readonly=(), own="off"), deadline=60.0)
        found: dict[str, list[float]] = {}
        for _ in range(repeats):
            for name, call in {
                "in process": lambda: [runner.run(case, target, PATIENT) for case in cases],
                "one worker": lambda: through(one, cases, target, 1),
                "two workers": lambda: through(two, cases, target, 2),
                "no fences": lambda: [runner.run(case, target, bare) for case in cases],
                "slow in process": lambda: [runner.run(case, target, PATIENT) for case in slow],
                "slow one worker": lambda: through(one, slow, target, 1),
            }.items():
                found.setdefault(name, []).append(timed(call))
                print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    median = {name: statistics.median(times) for name, times in found.items()}

    def ratio(name: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(found[name], found[to], strict=True))

    return {
        "cases": len(cases),
        "cases of 20 ms or more": len(slow),
        "cases/s in one process": count / median["in process"],
        "cases/s through one worker": count / median["one worker"],
        "cases/s through two workers": count / median["two workers"],
        "two workers over one": ratio("one worker", "two workers"),
        "isolation, all cases": ratio("one worker", "in process") - 1,
        "isolation, cases of 20 ms or more": ratio("slow one worker", "slow in process") - 1,
        "share of drawing (Hypothesis)": drawing / (drawing + median["one worker"]),
        "share of fences, own clock": sum(v.fence_seconds for v in verdicts) / sum(v.seconds for v in verdicts),
        "cost of fences, against none": ratio("in process", "no fences") - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="topk_softmax@builtin")
    parser.add_argument("--cases", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options.target, options.cases, options.repeats)
    for name, value in result.items():
        percent = name.startswith(("isolation", "share", "cost"))
        print(f"{name:38} {value:8.1%}" if percent else f"{name:38} {value:8.1f}")
    if options.json:
        record = {
            "command": " ".join(["python", "benchmarks/engine.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU (Triton's interpreter)",
            "versions": {name: version(name) for name in ("moe-fuzz", "torch", "triton", "numpy", "hypothesis")},
            "result": result,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
