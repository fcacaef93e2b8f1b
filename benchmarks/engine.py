"""What the engine costs: cases per second in one process, through one worker, through several; the shares of drawing
and of fences; the cost of isolation, and of each kind of fence.

    python benchmarks/engine.py [--device cpu|cuda] [--target topk_softmax@builtin] [--cases N] [--graph 0.2]
                                [--repeats 5] [--seconds S] [--workers 1,2,4,6,8] [--json PATH]

All variants run the same cases, interleaved within each repeat, because machines drift; medians and ratios are printed.
A share of the cases (--graph) replays CUDA graphs, or what stands for them on a CPU; the rest is eager. No repeat
begins that would end after --seconds. On cuda all workers share the first GPU; they compile first, all together.
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


def draw(info: TargetInfo, device: str, count: int, graph: float = 0.0) -> tuple[list[Case], float]:
    """`count` cases as a campaign draws them, and the seconds it took. graph: the share of cases with replays; 0: as
    they come."""
    cases: list[Case] = []
    wanted = {True: round(graph * count), False: count - round(graph * count)}

    @seed(1)
    @settings(
        phases=[Phase.generate],
        max_examples=50 * count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategies.rounds(get_space(info.op), info, device))
    def body(round_: tuple[Case, ...]) -> None:
        for case in round_:
            replays = case.mode != "eager"
            if len(cases) < count and (not graph or wanted[replays]):
                cases.append(case)
                wanted[replays] -= 1
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


def through(pool: Pool, cases: list[Case], target: str, workers: int, options: RunOptions = PATIENT) -> None:
    """Runs the cases in so many workers at once, and sees to it that they pass."""
    todo, bad = rounds_of(cases), list[Verdict]()

    def work() -> None:
        while True:
            try:
                part = todo.pop()
            except IndexError:
                return
            with pool.lease() as worker:
                bad.extend(v for v in worker.run(part, target, options) if v.kind not in ("pass", "rejected"))

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if bad:
        raise SystemExit(f"{len(bad)} of {len(cases)} cases do not pass, so their times say nothing: {bad[0]}")


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
    }


def measure(
    target: str, device: str, count: int, repeats: int, workers: tuple[int, ...], graph: float, seconds: float
) -> dict[str, float]:
    began = time.perf_counter()
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from moe_fuzz.execute.runner import Runner  # after the variable: Triton reads it when a kernel is defined

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(Pool(max(workers), device))
        runner = Runner(device)
        info = runner.describe(target)
        cases, drawing = draw(info, device, count, graph)
        eager = [case for case in cases if case.mode == "eager"]
        for _ in range(3):  # compiles; later times round, some workers may have had nothing to do
            through(pool, cases, target, max(workers))
        for case in cases:
            runner.run(case, target, PATIENT)
        verdicts = [runner.run(case, target, PATIENT) for case in cases]
        slow = [case for case, verdict in zip(cases, verdicts, strict=True) if verdict.seconds >= SLOW]

        calls: dict[str, Callable[[], object]] = {}
        for name, fence in fence_variants().items():
            options = RunOptions(fence=fence, deadline=60.0)
            calls[name] = lambda options=options: [runner.run(case, target, options) for case in cases]  # type: ignore[misc]
        for number in workers:
            calls[f"{number} workers"] = lambda number=number: through(pool, cases, target, number)  # type: ignore[misc]
        if graph:
            calls["eager"] = lambda: [runner.run(case, target, PATIENT) for case in eager]
        if slow:
            calls["slow in process"] = lambda: [runner.run(case, target, PATIENT) for case in slow]
            calls["slow one worker"] = lambda: through(pool, slow, target, 1)
        if device == "cuda":
            own = stack.enter_context(Pool(1, device))  # of a process with an allocator of its own
            everything = RunOptions(fence=FenceOptions(own="all"), deadline=60.0)
            through(own, eager, target, 1, everything)
            calls["fence all"] = lambda: through(own, eager, target, 1, everything)
            calls["eager one worker"] = lambda: through(pool, eager, target, 1)
        print(f"drawn, compiled and warm after {time.perf_counter() - began:.0f} s", file=sys.stderr)
        found: dict[str, list[float]] = {}
        for _ in range(repeats):
            started = time.perf_counter()
            for name, call in calls.items():
                found.setdefault(name, []).append(timed(call))
                print(".", end="", flush=True, file=sys.stderr)
            if time.perf_counter() - began + (time.perf_counter() - started) > seconds:
                break
    print(file=sys.stderr)
    return figures(found, verdicts, cases, len(slow), drawing, workers)


def figures(
    found: dict[str, list[float]],
    verdicts: list[Verdict],
    cases: list[Case],
    slow: int,
    drawing: float,
    workers: tuple[int, ...],
) -> dict[str, float]:
    """What is printed, from seconds by variant, one for each repeat."""
    median = {name: statistics.median(times) for name, times in found.items()}

    def ratio(name: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(found[name], found[to], strict=True))

    first, base, count = f"{workers[0]} workers", "ordinary fences", len(cases)
    eager = sum(case.mode == "eager" for case in cases)
    result: dict[str, float] = {"cases": count, "cases that replay": count - eager, "cases of 20 ms or more": slow}
    result["repeats"] = len(found[base])
    result["cases/s in one process"] = count / median[base]
    if "eager" in found:
        result["ms a case in one process, eager"] = 1e3 * median["eager"] / eager
        result["ms a case in one process, replays"] = 1e3 * (median[base] - median["eager"]) / max(1, count - eager)
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
        result["cost of --fence all, against ordinary"] = ratio("fence all", "eager one worker") - 1
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
    parser.add_argument("--cases", type=int, help="default: 96 on a CPU, 320 on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", help="numbers of workers, default: 1,2 on a CPU, 1,2,4,8,12 on a GPU")
    parser.add_argument("--graph", type=float, default=0.2, help="share of cases that replay (0.2)")
    parser.add_argument("--seconds", type=float, default=75.0, help="no further repeat begins that would end later")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    workers = tuple(int(number) for number in (options.workers or ("1,2,4,6,8" if cuda else "1,2")).split(","))
    cases = options.cases or (320 if cuda else 96)
    result = measure(options.target, options.device, cases, options.repeats, workers, options.graph, options.seconds)
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
