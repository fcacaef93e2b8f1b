"""What the engine costs: cases per second in one process, through one worker, through several; the share of drawing;
the cost of isolation, and of each kind of fence.

    python benchmarks/engine.py [--device cpu|cuda] [--target topk_softmax@builtin] [--cases N] [--graph 0.2]
                                [--repeats 5] [--seconds S] [--workers 1,2,4,6,8] [--fences] [--json PATH]

All variants run the same cases, interleaved within each repeat, because machines drift; medians and ratios are printed.
A share of the cases (--graph) replays CUDA graphs, or what stands for them on a CPU; the rest is eager. On cuda all
workers share the first GPU. All of them compile, each config in one of them; then each loads what it will run. Cases
that are not compiled after half of --seconds are left out, and no repeat but the first begins that would end after
--seconds. The figures so far are written after every repeat.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from moe_fuzz import strategies
from moe_fuzz.case import Case, Step
from moe_fuzz.contract import TargetInfo
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.verdict import CRASH, Verdict
from moe_fuzz.worker.pool import Pool

ROUND = 8
SLOW = 0.020  # seconds from which on isolation must cost at most a tenth
ENOUGH_SLOW = 8  # of fewer such cases nothing is said
DEATHS = 3
PARTS = 4  # rounds that each of several workers runs at least: with one or two, most would wait for the last
PATIENT = RunOptions(deadline=60.0)
FEWEST = {True: 2, False: 4}  # cases of a config, with replays and without
COMPILED, LOADED = 0.5, 0.7  # of --seconds: until then
_STARTED = time.perf_counter()


def draw(info: TargetInfo, device: str, count: int, graph: float = 0.0) -> tuple[list[Case], float]:
    """`count` cases as a campaign draws them, and the seconds that drawing as many takes. Those of a config follow one
    another, and there are several, as a campaign's rounds have them. graph: the share of cases with replays; 0: as they
    come."""
    cases: list[Case] = []
    seen: set[str] = set()
    drawn = 0
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
        nonlocal drawn
        drawn += len(round_)
        round_ = tuple(case for case in round_ if case.digest not in seen)  # as a campaign does
        seen.update(case.digest for case in round_)
        for replays in (False, True):
            alike = [case for case in round_ if (case.mode != "eager") == replays]
            left = wanted[replays] if graph else count - len(cases)
            if alike and len(alike) >= min(FEWEST[replays], left):
                cases.extend(alike[: min(ROUND, left)])
                wanted[replays] -= min(ROUND, left, len(alike))
        if len(cases) >= count:
            raise Enough

    started = time.perf_counter()
    with contextlib.suppress(Enough):
        body()
    return cases, (time.perf_counter() - started) * len(cases) / max(1, drawn)


class Enough(BaseException):
    """Leaves Hypothesis from inside; not an Exception, which it would take for a failure."""


def rounds_of(cases: list[Case]) -> list[list[Case]]:
    return [cases[at : at + ROUND] for at in range(0, len(cases), ROUND)]


def passes_of(workers: int, cases: list[Case]) -> int:
    """How often several workers run all cases to have enough to do."""
    return -(-PARTS * workers // max(1, len(rounds_of(cases)))) if workers > 1 else 1


def through(pool: Pool, cases: list[Case], target: str, workers: int, options: RunOptions = PATIENT) -> None:
    """Runs the cases in so many workers at once, and sees to it that they pass."""
    todo, verdicts = rounds_of(cases), list[Verdict]()

    def work() -> None:
        while True:
            try:
                part = todo.pop()
            except IndexError:
                return
            with pool.lease() as worker:
                verdicts.extend(worker.run(part, target, options))

    together([work] * workers)
    judged(verdicts)
    if len(verdicts) < len(cases):
        raise SystemExit(f"{len(cases) - len(verdicts)} of {len(cases)} cases did not run")


def say(what: str) -> None:
    print(f"{time.perf_counter() - _STARTED:6.1f} s: {what}", file=sys.stderr, flush=True)


def passed() -> float:
    return time.perf_counter() - _STARTED


def compiled(pool: Pool, cases: list[Case], target: str, workers: int, until: float) -> list[Case]:
    """The cases that have run once before `until`, in their order: what they need is in the caches on disk."""
    groups: dict[str, list[int]] = {}
    for at, case in enumerate(cases):
        groups.setdefault(repr((case.mode, sorted(case.config.items()))), []).append(at)
    todo, done, failed = list(groups.values()), set[int](), list[BaseException]()

    def work() -> None:
        try:
            with pool.lease() as worker:
                while todo and passed() < until:
                    for at in todo.pop():
                        if passed() >= until:
                            break
                        judged(worker.run([cases[at]], target, PATIENT))
                        done.add(at)
                    say(f"{len(done)} of {len(cases)} cases compiled, {len(todo)} of {len(groups)} configs to begin")
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            failed.append(error)

    together([work] * workers)
    if failed:
        raise failed[0]
    return [case for at, case in enumerate(cases) if at in done]


def loaded(
    pool: Pool, cases: list[Case], target: str, workers: int, until: float, here: Callable[[Case], object]
) -> None:
    """Every worker, and this process, runs every case once, as far as `until` allows."""
    ready = threading.Barrier(workers)  # nobody gives a worker back before everybody has one of his own
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with pool.lease() as worker:
                ready.wait()
                for part in rounds_of(cases):
                    if passed() < until:
                        judged(worker.run(part, target, PATIENT))
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            ready.abort()
            failed.append(error)

    def this() -> None:
        for case in cases:
            if passed() < until:
                here(case)

    together([work] * workers, this)
    if failed:
        raise failed[0]


def judged(verdicts: Iterable[Verdict]) -> None:
    bad = [verdict for verdict in verdicts if verdict.kind not in ("pass", "rejected")]
    if bad:
        raise SystemExit(f"{len(bad)} cases do not pass, so their times say nothing: {bad[0]}")


def together(jobs: Sequence[Callable[[], None]], here: Callable[[], None] = lambda: None) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    here()
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
    }


def measure(
    target: str, device: str, count: int, repeats: int, workers: tuple[int, ...], graph: float, seconds: float,
    fences: bool, keep: Callable[[dict[str, float]], None],
) -> dict[str, float]:  # fmt: skip
    """keep: told the figures after every repeat."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from moe_fuzz.execute.runner import Runner  # after the variable: Triton reads it when a kernel is defined

    with Pool(1, device) as lonely:
        after_death = {"of one worker": replacement(lonely)}
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(Pool(max(workers), device))
        runner = Runner(device)
        info = runner.describe(target)
        cases, drawing = draw(info, device, count, graph)
        say(f"{len(cases)} cases drawn, of {len({repr(sorted(case.config.items())) for case in cases})} configs")
        drawn = len(cases)
        own, everything = None, RunOptions(fence=FenceOptions(own="all"), deadline=60.0)
        if device == "cuda" and fences:  # a worker with an allocator of its own; first, as the others take every slot
            own = stack.enter_context(Pool(1, device))
            through(own, [case for case in cases if case.mode == "eager"][:1], target, 1, everything)
        cases = compiled(pool, cases, target, max(workers), COMPILED * seconds)
        say(f"{len(cases)} of {drawn} cases compiled")
        after_death[f"of {max(workers)} workers"] = replacement(pool)
        say("workers died and were replaced")
        loaded(pool, cases, target, max(workers), LOADED * seconds, lambda case: runner.run(case, target, PATIENT))
        say("loaded in every worker")
        began = passed()
        verdicts, used = list[Verdict](), list[Case]()
        # A repeat takes no longer than each of its variants in one process would, where workers are at least half as
        # many times as fast as they are many. The last tenth is for ending it all.
        several = sum(max(1.0, 2 * passes_of(number, cases) / number) for number in workers)
        variants = 3 + several + 4 * fences + (3 * fences if device == "cuda" else 0)
        for case in cases:
            if used and (passed() - began) * variants > 0.9 * seconds - passed():
                break
            verdicts.append(runner.run(case, target, PATIENT))
            used.append(case)
        if len(used) < len(cases):
            say(f"{len(used)} of {len(cases)} cases are what the time is enough for")
        drawing *= len(used) / max(1, drawn)
        cases = used
        eager = [case for case in cases if case.mode == "eager"]
        slow = [case for case, verdict in zip(cases, verdicts, strict=True) if verdict.seconds >= SLOW]

        calls: dict[str, Callable[[], object]] = {}
        passes: dict[str, int] = {}  # over all cases, in one call
        for number in workers:
            often = passes[f"{number} workers"] = passes_of(number, cases)
            many = cases * often
            calls[f"{number} workers"] = lambda number=number, many=many: through(pool, many, target, number)  # type: ignore[misc]
        for name, fence in list(fence_variants().items())[: None if fences else 1]:
            options = RunOptions(fence=fence, deadline=60.0)
            calls[name] = lambda options=options: [runner.run(case, target, options) for case in cases]  # type: ignore[misc]
        if graph and eager:
            calls["eager"] = lambda: [runner.run(case, target, PATIENT) for case in eager]
        if ENOUGH_SLOW <= len(slow) < len(cases):  # else they are all cases
            calls["slow in process"] = lambda: [runner.run(case, target, PATIENT) for case in slow]
            calls["slow one worker"] = lambda: through(pool, slow, target, 1)
        if own is not None and eager:
            through(own, eager, target, 1, everything)
            say("loaded where all is fenced")
            calls["fence all"] = lambda: through(own, eager, target, 1, everything)
            calls["eager one worker"] = lambda: through(pool, eager, target, 1)
        found: dict[str, list[float]] = {}
        result: dict[str, float] = {}
        for repeat in range(repeats):
            started = passed()
            for name, call in calls.items():
                found.setdefault(name, []).append(timed(call) / passes.get(name, 1))
            result = figures(found, verdicts, cases, len(slow), drawing, workers)
            result |= {f"seconds from a death, {one}, to the next verdict": s for one, s in after_death.items()}
            keep(result)
            say(f"repeat {repeat + 1} took {passed() - started:.1f} s")
            if passed() + (passed() - started) > 0.95 * seconds:
                break
    say("done")
    return result


def replacement(pool: Pool) -> float:
    """Seconds from the verdict on a case that kills its worker to that on the next one, which a fresh worker runs."""
    ordinary, deadly = (
        Case("topk_softmax", {**SIMPLEST, "experts": experts, "top_k": 2}, (Step(Labels.range(4)),), 1)
        for experts in ("0-11", "0-12")  # of 13 this bug reads 16
    )
    target, ends = "topk_softmax@planted.reads_past_logits", list[float]()
    with pool.lease() as worker:
        judged(worker.run([ordinary], target, PATIENT))  # compiled
    for _ in range(DEATHS):
        with pool.lease() as worker:
            died, lived = worker.run([deadly, ordinary], target, PATIENT, lambda *_: ends.append(time.monotonic()))
        judged([lived])
        if died.kind != CRASH:
            raise SystemExit(f"nothing died: {died}")
    return statistics.median(alive - dead for dead, alive in zip(ends[::2], ends[1::2], strict=True))


def figures(
    found: dict[str, list[float]],
    verdicts: list[Verdict],
    cases: list[Case],
    slow: int,
    drawing: float,
    workers: tuple[int, ...],
) -> dict[str, float]:
    """What is printed, from the seconds of a pass by variant, one for each repeat."""
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
    if "slow in process" in found:
        result["isolation, cases of 20 ms or more"] = ratio("slow one worker", "slow in process") - 1
    result["share of drawing (Hypothesis)"] = drawing / (drawing + median[first])
    result["share of fences, own clock"] = sum(v.fence_seconds for v in verdicts) / sum(v.seconds for v in verdicts)
    if "no fences" in found:
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
    parser.add_argument("--cases", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", help="numbers of workers, default: 1,2 on a CPU, 1,2,4,6,8 on a GPU")
    parser.add_argument("--graph", type=float, default=0.2, help="share of cases that replay (0.2)")
    parser.add_argument("--seconds", type=float, default=75.0, help="for all of it, compiling included")
    parser.add_argument("--fences", action="store_true", help="also run with other fences, and with --fence all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    workers = tuple(int(number) for number in (options.workers or ("1,2,4,6,8" if cuda else "1,2")).split(","))
    told = {"machine": machine(options.device)} if options.json else {}

    def keep(result: dict[str, float]) -> None:
        if options.json is None:
            return
        record = {
            "command": shlex.join(["python", "benchmarks/engine.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **told,
            "versions": {name: version(name) for name in ("moe-fuzz", "torch", "triton", "numpy", "hypothesis")},
            "result": result,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    result = measure(options.target, options.device, options.cases, options.repeats, workers, options.graph,
                     options.seconds, options.fences, keep)  # fmt: skip
    for name, value in result.items():
        percent = name.startswith(("isolation", "share", "cost"))
        print(f"{name:42} {value:8.1%}" if percent else f"{name:42} {value:8.1f}")


if __name__ == "__main__":
    main()
