"""What the engine costs: cases per second in one process, through one worker, through several; the shares of drawing
and of fences; the cost of isolation, and of each kind of fence.

    python benchmarks/engine.py [--device cpu|cuda] [--target topk_softmax@builtin] [--cases N] [--repeats 5]
                                [--workers 1,2,4,8,12] [--json PATH]

All variants run the same cases, interleaved within each repeat, because machines drift; medians and ratios are printed.
On cuda all workers share the first GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
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
from moe_fuzz.verdict import Verdict
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


def fence_variants() -> dict[str, FenceOptions]:
    """The ordinary fences, and what is measured against them."""
    return {
        "ordinary fences": FenceOptions(),
        "own memory unfenced": FenceOptions(own="off"),
        "no hard fences": FenceOptions(hard=(), readonly=()),
        "no fences": FenceOptions(hard=(), readonly=(), own="off"),
        "fence all": FenceOptions(own="all"),
    }


def measure(target: str, device: str, count: int, repeats: int, workers: tuple[int, ...]) -> dict[str, float]:
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from moe_fuzz.execute.runner import Runner  # after the variable: Triton reads it when a kernel is defined

    runner = Runner(device)
    info = runner.describe(target)
    with contextlib.ExitStack() as stack:
        pools = {number: stack.enter_context(Pool(number, device)) for number in workers}
        cases, drawing = draw(info, device, count)
        verdicts = [runner.run(case, target, PATIENT) for case in cases]  # compiles
        bad = [verdict for verdict in verdicts if verdict.kind not in ("pass", "rejected")]
        if bad:
            raise SystemExit(f"{len(bad)} of {count} cases do not pass, so their times say nothing: {bad[0]}")
        for number, pool in pools.items():
            for _ in range(2):  # the first time round some workers may have had nothing to do
                through(pool, cases, target, number)
        verdicts = [runner.run(case, target, PATIENT) for case in cases]
        slow = [case for case, verdict in zip(cases, verdicts, strict=True) if verdict.seconds >= SLOW]

        calls: dict[str, Callable[[], object]] = {}
        for name, fence in fence_variants().items():
            options = RunOptions(fence=fence, deadline=60.0)
            calls[name] = lambda options=options: [runner.run(case, target, options) for case in cases]  # type: ignore[misc]
        for number, pool in pools.items():
            calls[f"{number} workers"] = lambda number=number, pool=pool: through(pool, cases, target, number)  # type: ignore[misc]
        if slow:
            calls["slow in process"] = lambda: [runner.run(case, target, PATIENT) for case in slow]
            calls["slow one worker"] = lambda: through(pools[workers[0]], slow, target, 1)
        found: dict[str, list[float]] = {}
        for _ in range(repeats):
            for name, call in calls.items():
                found.setdefault(name, []).append(timed(call))
                print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return figures(found, verdicts, count, len(slow), drawing, workers)


def figures(
    found: dict[str, list[float]],
    verdicts: list[Verdict],
    count: int,
    slow: int,
    drawing: float,
    workers: tuple[int, ...],
) -> dict[str, float]:
    """What is printed, from seconds by variant, one for each repeat."""
    median = {name: statistics.median(times) for name, times in found.items()}

    def ratio(name: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(found[name], found[to], strict=True))

    first, base = f"{workers[0]} workers", "ordinary fences"
    result: dict[str, float] = {"cases": count, "cases of 20 ms or more": slow}
    result["cases/s in one process"] = count / median[base]
    result |= {f"cases/s, workers: {number}": count / median[f"{number} workers"] for number in workers}
    result |= {f"workers: {number}, over {workers[0]}": ratio(first, f"{number} workers") for number in workers[1:]}
    result["isolation, all cases"] = ratio(first, base) - 1 if workers[0] == 1 else math.nan
    if slow and workers[0] == 1:
        result["isolation, cases of 20 ms or more"] = ratio("slow one worker", "slow in process") - 1
    result["share of drawing (Hypothesis)"] = drawing / (drawing + median[first])
    result["share of fences, own clock"] = sum(v.fence_seconds for v in verdicts) / sum(v.seconds for v in verdicts)
    result["cost of all ordinary fences, against none"] = ratio(base, "no fences") - 1
    result["cost of hard fences, against soft ones"] = ratio(base, "no hard fences") - 1
    result["cost of fencing the target's own tensors"] = ratio(base, "own memory unfenced") - 1
    if "fence all" in found:
        result["cost of --fence all, against ordinary"] = ratio("fence all", base) - 1
    return {name: value for name, value in result.items() if not math.isnan(value)}


def machine(device: str) -> str:
    cores = f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}"
    if device == "cpu":
        return f"{cores}, no GPU (Triton's interpreter)"
    import torch

    return f"1 of {torch.cuda.device_count()} {torch.cuda.get_device_name(0)}, {cores}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--target", default="topk_softmax@builtin")
    parser.add_argument("--cases", type=int, help="default: 96 on a CPU, 2000 on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", help="numbers of workers, default: 1,2 on a CPU, 1,2,4,8,12 on a GPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    workers = tuple(int(number) for number in (options.workers or ("1,2,4,8,12" if cuda else "1,2")).split(","))
    cases = options.cases or (2000 if cuda else 96)
    result = measure(options.target, options.device, cases, options.repeats, workers)
    for name, value in result.items():
        percent = name.startswith(("isolation", "share", "cost"))
        print(f"{name:42} {value:8.1%}" if percent else f"{name:42} {value:8.1f}")
    if options.json:
        record = {
            "command": " ".join(["python", "benchmarks/engine.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(options.device),
            "versions": {name: version(name) for name in ("moe-fuzz", "torch", "triton", "numpy", "hypothesis")},
            "result": result,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
