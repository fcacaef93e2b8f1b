"""Times block shapes of `experts_bf16` on a GPU, each checked before it is timed; `--write` rewrites their table.

    python benchmarks/tune_experts.py [--models NAME,...] [--tokens 1,8,...] [--json FILE] [--write]

Everything is compiled first, in a process for each core. For each number of slots to a block, each shape of the first
product is timed beside one shape of the second, and the other way round: their times add up. The points that a plan of
the table serves choose its shapes together; then the chosen plans are timed, with launches one after another and with
launches that overlap, and with fewer slots that the programs group themselves.

Points, inputs and floors are those of `moe-fuzz bench experts_bf16`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch

from moe_fuzz.bench import timing
from moe_fuzz.bench.layer_child import cost, make_sets, verify
from moe_fuzz.bench.layer_weights import make_weights
from moe_fuzz.bench.layers import MODELS, OP, points
from moe_fuzz.bench.points import Point
from moe_fuzz.kernels.experts_bf16 import blocks as table
from moe_fuzz.kernels.experts_bf16 import experts_bf16
from moe_fuzz.kernels.experts_bf16.blocks import Blocks, Plan
from moe_fuzz.targets.bind import Target, bind_at

#: What is tried for each plan of the table, by its place: (m, n, d, group, warps, stages) of either product. Of each m
#: the first is what the others are timed beside. Bytes on their way to a multiprocessor, n * d * 2 * (stages - 1) times
#: the programs that fit it, must be 40 KB or more where memory bounds.
CANDIDATES = (
    [(16, 64, 128, 1, 4, 4), (16, 32, 128, 1, 4, 4), (16, 32, 256, 1, 4, 3), (16, 64, 64, 1, 4, 5),
     (16, 64, 256, 1, 4, 3), (16, 128, 64, 1, 4, 4), (16, 128, 128, 1, 4, 3)],
    [(16, 128, 128, 1, 4, 3), (16, 64, 128, 1, 4, 4), (16, 64, 128, 1, 4, 3), (16, 128, 64, 1, 4, 4),
     (16, 128, 64, 1, 4, 6), (16, 64, 256, 1, 4, 3), (16, 256, 64, 1, 4, 4)],
    [(16, 128, 128, 4, 4, 3), (16, 64, 128, 4, 4, 3), (16, 128, 64, 4, 4, 4), (32, 128, 128, 4, 4, 3),
     (32, 128, 64, 4, 4, 4), (32, 64, 128, 4, 4, 4), (32, 128, 128, 1, 8, 3), (64, 128, 64, 4, 4, 4)],
    [(32, 128, 128, 4, 4, 3), (32, 128, 64, 4, 4, 4), (64, 128, 64, 4, 4, 4), (64, 128, 128, 4, 4, 3),
     (64, 128, 64, 4, 4, 3), (64, 128, 128, 4, 8, 3), (64, 256, 64, 4, 8, 4), (64, 64, 128, 4, 4, 4)],
    [(64, 128, 64, 8, 4, 4), (64, 256, 64, 8, 4, 4), (64, 256, 64, 8, 8, 4), (64, 128, 128, 8, 4, 3),
     (128, 128, 64, 8, 8, 4), (128, 128, 64, 8, 4, 4), (128, 256, 64, 8, 8, 4), (128, 256, 64, 8, 8, 3)],
    [(128, 256, 64, 8, 8, 4), (128, 256, 64, 8, 8, 3), (128, 256, 64, 16, 8, 4), (128, 128, 64, 8, 8, 4),
     (128, 128, 64, 16, 4, 4)],
)  # fmt: skip
_BUDGET = 20_000.0  # µs of replays for each time
_INFINITE = 1e9  # µs: of a shape that does not work


@dataclass
class Work:
    """One point, ready to be called."""

    point: Point
    nth: int  # of the plan that serves it
    sets: list[dict[str, Any]]
    floor: float  # µs

    def time(self, plan: Plan) -> float:
        """µs of a call; `_INFINITE` where the answer is wrong or the plan does not fit the machine."""
        target = bind_at(OP, "builtin", "moe_fuzz.targets.builtin:experts_bf16")
        target = Target(target.info, partial(experts_bf16, plan=plan), target.keywords, target.positional)
        try:
            error = verify(target, self.sets[0])
            if not error <= 2.0**-7:
                print(f"WRONG: {_name(self.point)}: relative error {error:.2e} with {_text(plan)}", flush=True)
                return _INFINITE
            calls = [partial(target, arguments) for arguments in self.sets]
            for call in calls:
                call()
            graph = timing.capture(calls, len(calls))
        except Exception as problem:  # noqa: BLE001 -- a shape too large for the machine, told and passed over
            print(f"{_name(self.point)}: {_text(plan)}: {type(problem).__name__}: {problem}"[:300], flush=True)
            return _INFINITE
        return replayed(graph) / len(calls)


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """µs of a graph: the median of as many replays as the budget allows, from 4 to 12."""

    def once() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        return start, end

    graph.replay()
    first = once()
    torch.cuda.synchronize()
    marks = [once() for _ in range(max(4, min(12, int(_BUDGET / (1e3 * first[0].elapsed_time(first[1]))))))]
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1e3 for start, end in marks)


# ---- compiling ------------------------------------------------------------------------------------------------------


def compile_all(pool: Pool, wanted: list[tuple[Point, Plan]]) -> None:
    """Every kernel into Triton's cache, by calls of layers so small that they take no time of their own."""
    jobs: dict[tuple[Any, ...], tuple[Point, Plan]] = {}
    for point, plan in wanted:
        c = point.config
        slots = _slots(point)
        even = [int(c[name]) % b.d == 0 for name, b in (("hidden", plan.gate_up), ("inter", plan.down))]
        flavour = (c["activation"], c["gate_layout"], c["bias"], int(c["local"]) < int(c["experts"]), *even,
                   slots > 16)  # fmt: skip
        jobs.setdefault((flavour, replace(plan, up_to=0)), (point, plan))
    problems = [said for said in pool.imap_unordered(_compile, jobs.values()) if said]
    print(f"compiled {len(jobs)} plans after {time.monotonic() - STARTED:.0f} s", *problems, sep="\n", flush=True)


def _compile(job: tuple[Point, Plan]) -> str:
    """What went wrong."""
    point, plan = job
    c = point.config
    # as divisible by the blocks and by 16 as the model's own sizes
    sizes = {name: b.d if int(c[name]) % b.d == 0 else b.d + 64
             for name, b in (("hidden", plan.gate_up), ("inter", plan.down))}  # fmt: skip
    small = replace(point, tokens=min(point.tokens, 160), config={
        **c, **sizes, "experts": 16, "local": 16 if c["local"] == c["experts"] else 8,
    })  # fmt: skip
    arguments = make_sets(small, make_weights(small))[0]
    try:
        experts_bf16(*(arguments.pop(name) for name in ("x", "w13", "w2", "weights", "ids")), **arguments, plan=plan)
        torch.cuda.synchronize()
    except Exception as problem:  # noqa: BLE001 -- told; the plan is told again when it is to be timed
        return f"{_text(plan)}: {type(problem).__name__}: {problem}"[:300]
    return ""


# ---- choosing -------------------------------------------------------------------------------------------------------


def measure(work: Work) -> dict[str, Any]:
    """The times of each candidate for either product, by m: {"64": {"gate_up": {shape: µs}, "down": {shape: µs}}}."""
    times: dict[str, Any] = {}
    for m, group in itertools.groupby((Blocks(*c) for c in CANDIDATES[work.nth]), key=lambda blocks: blocks.m):
        tried = list(group)
        base = Plan(0, tried[0], tried[0])
        first = work.time(base)
        of_m = {part: {_short(tried[0]): first} for part in ("gate_up", "down")}
        for part, blocks in itertools.product(of_m, tried[1:]):
            plan = replace(base, gate_up=blocks) if part == "gate_up" else replace(base, down=blocks)
            of_m[part][_short(blocks)] = work.time(plan)
        times[str(m)] = of_m
    return times


def choose(rows: list[dict[str, Any]]) -> tuple[str, str] | None:
    """The two shapes with the least mean of the logarithm of time over these points."""
    best: tuple[float, tuple[str, str]] | None = None
    for m in rows[0]["times"] if rows else ():
        of_m = [row["times"][m] for row in rows]
        gate_up, down = (
            min(of_m[0][part], key=lambda shape, part=part: sum(math.log(one[part][shape]) for one in of_m))  # type: ignore[misc]
            for part in ("gate_up", "down")
        )
        score = sum(math.log(max(_together(one, gate_up, down), 1e-3)) for one in of_m)
        if best is None or score < best[0]:
            best = score, (gate_up, down)
    return best[1] if best else None


def _together(of_m: dict[str, dict[str, float]], gate_up: str, down: str) -> float:
    base = next(iter(of_m["gate_up"].values()))
    return of_m["gate_up"][gate_up] + of_m["down"][down] - base


def best_alone(row: dict[str, Any]) -> float:
    """What this point would take with shapes of its own, by the sum of its parts."""
    return min(
        _together(of_m, gate_up, down)
        for of_m in row["times"].values() for gate_up in of_m["gate_up"] for down in of_m["down"]
    )  # fmt: skip


def works(wanted: Iterable[Point], bandwidth: float, rate: float) -> Iterator[Work]:
    """The points, ready; the weights of a model are made once."""
    for _, of_model in itertools.groupby(wanted, key=lambda point: point.name):
        weights: dict[str, Any] = {}
        for point in of_model:
            weights = weights or make_weights(point)
            sets = make_sets(point, weights)
            moved, worked = cost(point, sets)
            yield Work(point, _served_by(point), sets, max(moved / bandwidth, worked / rate))


def _served_by(point: Point) -> int:
    return table.PLANS.index(table.choose(_slots(point), int(point.config["experts"])))


def _slots(point: Point) -> int:
    return point.tokens * int(point.config["top_k"])


def _name(point: Point) -> str:
    return f"{point.name} T {point.tokens}"


def _text(plan: Plan) -> str:
    return f"{_short(plan.gate_up)} {_short(plan.down)}{' overlapping' if plan.overlaps else ''}"


def _short(b: Blocks) -> str:
    return f"{b.m}x{b.n}x{b.d}g{b.group}w{b.warps}s{b.stages}"


def _blocks(short: str) -> Blocks:
    return Blocks(*map(int, re.findall(r"\d+", short)))


def _line(plan: Plan) -> str:
    def shape(b: Blocks) -> str:
        return f"Blocks({b.m}, {b.n}, {b.d}, {b.group}, {b.warps}, {b.stages})"

    up_to = 'float("inf")' if math.isinf(plan.up_to) else str(plan.up_to)
    more = ", overlaps=True" if plan.overlaps else ""
    return f"Plan({up_to}, {shape(plan.gate_up)}, {shape(plan.down)}{more})"


def write(plans: list[Plan]) -> None:
    """Puts the plans into the table's file, each in the place of the one with the same limit."""
    file = Path(table.__file__)
    source = file.read_text(encoding="utf-8")
    for plan in plans:
        line = _line(plan)
        limit = re.escape(line.partition(",")[0])
        entry = re.compile(rf"(?m)^    {limit}, Blocks\([^)]*\), Blocks\([^)]*\)(, \w+=\w+)*\)")
        source, count = entry.subn(f"    {line}", source)
        assert count == 1, f"{count} lines of {file} begin with {limit}"
    file.write_text(source, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS[OP]))
    parser.add_argument("--tokens", default="1,8,64,512,4096")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="rewrite the table with what was found")
    options = parser.parse_args()
    wanted = points(options.models.split(","), [int(count) for count in options.tokens.split(",")])
    # The processes are forked before this one touches the GPU: later they could not use it.
    with multiprocessing.get_context("fork").Pool(min(len(os.sched_getaffinity(0)), 16)) as pool:
        tune(pool, wanted, options.json, options.write)
    print(f"{time.monotonic() - STARTED:.0f} s in all")
    return 0


def tune(pool: Pool, wanted: Sequence[Point], result: Path | None, rewrite: bool) -> None:
    """Compiles, measures, chooses, measures what was chosen, and writes it down."""
    tried = {nth: [Plan(0, Blocks(*c), Blocks(*c)) for c in of_plan] for nth, of_plan in enumerate(CANDIDATES)}
    compile_all(pool, [(point, plan) for point in wanted for plan in tried[_served_by(point)]])
    bandwidth, rate = timing.copy_bandwidth("cuda"), timing.product_rate("cuda")
    record: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "copy": bandwidth, "product": rate, "points": []}
    print(f"{record['gpu']}: copy {bandwidth / 1e6:.2f} TB/s, product {rate / 1e6:.0f} TFLOP/s")
    rows: list[dict[str, Any]] = record["points"]
    for work in works(wanted, bandwidth, rate):
        rows.append({"model": work.point.name, "tokens": work.point.tokens, "plan": work.nth, "floor": work.floor,
                     "times": measure(work)})  # fmt: skip
        _save(result, record)
    print(f"measured all shapes after {time.monotonic() - STARTED:.0f} s", flush=True)

    plans: dict[int, Plan] = {}
    for nth, old in enumerate(table.PLANS):
        shapes = choose([row for row in rows if row["plan"] == nth])
        if shapes:
            plans[nth] = replace(old, gate_up=_blocks(shapes[0]), down=_blocks(shapes[1]), overlaps=False)
    variants = {
        nth: {_text(v): v for v in (replace(plan, overlaps=overlaps) for overlaps in (False, True))}
        for nth, plan in plans.items()
    }
    compile_all(pool, [(point, v) for point in wanted for v in variants[_served_by(point)].values()])
    for work, row in zip(works(wanted, bandwidth, rate), rows, strict=True):
        row["alone"] = best_alone(row)
        row["variants"] = {text: work.time(v) for text, v in variants[work.nth].items()}
        best = min(row["variants"].values())
        share, each = work.floor / best, [round(t, 1) for t in row["variants"].values()]
        print(f"{_name(work.point):28} plan {work.nth} floor {work.floor:7.1f} best {best:7.1f} ({share:4.0%}) "
              f"alone {row['alone']:7.1f}; {each}", flush=True)  # fmt: skip
    final = [
        of_plan[min(of_plan, key=lambda text, nth=nth: sum(  # type: ignore[misc]
            math.log(row["variants"][text]) for row in rows if row["plan"] == nth))]
        for nth, of_plan in variants.items()
    ]  # fmt: skip
    record["table"] = [_line(plan) for plan in final]
    print(*record["table"], sep=",\n")
    _save(result, record)
    if rewrite:
        write(final)


def _save(file: Path | None, record: dict[str, Any]) -> None:
    if file:
        file.write_text(json.dumps(record), encoding="utf-8")


STARTED = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
