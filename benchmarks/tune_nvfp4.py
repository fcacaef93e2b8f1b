"""Finds block shapes for `kernels/experts_nvfp4/blocks.py` on this GPU, and prints what it measured.

    PYTHONPATH=. python benchmarks/tune_nvfp4.py [--models a,b] [--tokens 1,8,64,512,4096] [--json FILE] [--write]

Everything that is to be timed is compiled first, in a process for each core. For each number of slots to a block, each
shape of the first product is timed beside one shape of the second, and the other way round: their times add up. Beside
them stand the backend `large` and what the table takes now. `--write` puts the best plans for more than FEW slots an
expert into the table, with the number of slots from which `large` is chosen; the tiles for few, and the rule by which
`tile_of` takes them, are a person's to read off. Points, inputs and floors are those of `moe-fuzz bench experts_nvfp4`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tune_experts import replayed

from moe_fuzz.bench import timing
from moe_fuzz.bench.layer_child import cost, make_sets
from moe_fuzz.bench.layer_weights import make_weights
from moe_fuzz.bench.layers import MODELS, OP_NVFP4, points
from moe_fuzz.bench.points import Point
from moe_fuzz.kernels.experts_nvfp4 import blocks as table
from moe_fuzz.kernels.experts_nvfp4 import experts_nvfp4
from moe_fuzz.kernels.experts_nvfp4.blocks import DEEP, FEW, NARROW, PLANS, WIDE, Plan, Tile

#: What is tried of few slots an expert, then for each plan of the table. The first of each m is what the others are
#: timed beside.
CANDIDATES = (
    [NARROW, DEEP, WIDE, *(Tile(*numbers) for numbers in (
        (16, 64, 128, 1, 4, 5, 104), (16, 64, 128, 1, 4, 6, 128), (16, 128, 128, 1, 4, 4), (16, 128, 128, 1, 8, 3, 128),
        (16, 128, 256, 1, 4, 2)))],
    [Tile(32, 128, 128, 1, 4, 3, registers) for registers in (168, 152, 160, 0)]
    + [Tile(*numbers) for numbers in (
        (32, 64, 128, 4, 4, 4, 128), (32, 128, 128, 4, 4, 3, 168), (32, 128, 128, 4, 4, 3, 152),
        (32, 128, 128, 4, 4, 2, 168), (64, 128, 128, 4, 4, 3), (64, 128, 128, 4, 4, 3, 168))],
    [Tile(64, 128, 128, 8, 4, 3, registers) for registers in (0, 168, 200)]
    + [Tile(*numbers) for numbers in (
        (64, 64, 128, 8, 4, 3, 168), (64, 64, 128, 8, 4, 3, 128), (64, 128, 128, 8, 4, 4), (64, 128, 128, 8, 4, 2, 168),
        (32, 128, 128, 4, 4, 3, 168), (128, 128, 128, 8, 8, 3), (128, 64, 128, 8, 4, 3))],
)  # fmt: skip
_INFINITE = 1e9  # µs: of a shape that does not work
STARTED = time.monotonic()


def call(arguments: dict[str, Any], **more: Any) -> torch.Tensor:
    return experts_nvfp4(**{name: value for name, value in arguments.items() if name != "decoded"}, **more)


def compile_one(job: tuple[Point, Plan | None]) -> str:
    """Every kernel of a point and a plan into Triton's cache, by a layer so small that it takes no time of its own."""
    point, plan = job
    c = point.config
    sizes = {name: 512 if int(c[name]) % 256 == 0 else 384 for name in ("hidden", "inter")}
    experts = {"experts": 16, "local": 16 if c["local"] == c["experts"] else 8, "top_k": min(int(c["top_k"]), 8)}
    small = replace(point, tokens=min(point.tokens, 160), config={**c, **sizes, **experts})
    try:
        call(make_sets(small, make_weights(small))[0], **_forced(plan))
        torch.cuda.synchronize()
    except Exception as problem:  # noqa: BLE001 -- told; the plan is told again when it is to be timed
        return f"{plan}: {type(problem).__name__}: {problem}"[:300]
    return ""


def timed(sets: list[dict[str, Any]], expected: torch.Tensor, options: dict[str, Any]) -> float:
    """µs of a call; `_INFINITE` where the answer is wrong or its plan does not fit the machine."""
    try:
        calls: list[Callable[[], torch.Tensor]] = [partial(call, arguments, **options) for arguments in sets]
        for one in calls:
            one()
        error = float((calls[0]().double() - expected).norm() / expected.norm())
        if not error <= 2.0**-7:
            print(f"WRONG: relative error {error:.2e} with {options}", flush=True)
            return _INFINITE
        return replayed(timing.capture(calls, len(calls))) / len(calls)
    except Exception as problem:  # noqa: BLE001 -- a shape too large for the machine, told and passed over
        print(f"{options}: {type(problem).__name__}: {problem}"[:300], flush=True)
        return _INFINITE


def _forced(plan: Plan | None) -> dict[str, Any]:
    return {"backend": "small", "plan": plan} if plan else {"backend": "large"}


def band(slots: float) -> int:
    """What is tried of so many slots an expert, by its place."""
    return 0 if slots <= FEW else 1 + next(nth for nth, plan in enumerate(PLANS) if slots <= plan.up_to)


def plans_of(point: Point) -> dict[str, Plan]:
    """What is timed: each candidate as either product, beside the first of its m."""
    slots = point.tokens * int(point.config["top_k"]) / int(point.config["experts"])
    nth = band(slots)
    found: dict[str, Plan] = {}
    for _, of_m in itertools.groupby(CANDIDATES[nth], key=lambda tile: tile.m):
        first, *others = of_m
        base = Plan(0, first, first)
        pairs = [(first, first), *((tile, first) for tile in others), *((first, tile) for tile in others)]
        found |= {f"{_short(up)} {_short(down)}": replace(base, gate_up=up, down=down) for up, down in pairs}
    return found


def sums(times: dict[str, float]) -> dict[str, float]:
    """µs of every pair of one m, by its parts' gains over the pair that they were timed in."""
    found = {}
    parts = [(key.split()[0], key.split()[1], us) for key, us in times.items() if key != "large"]
    for base in {up for up, down, _ in parts if up == down}:
        ups = {up: us for up, down, us in parts if down == base}
        downs = {down: us for up, down, us in parts if up == base}
        for up, down in itertools.product(ups, downs):
            found[f"{up} {down}"] = max(ups[up] + downs[down] - ups[base], 1e-3)
    return found


def best_plan(old: Plan, rows: list[dict[str, Any]]) -> Plan:
    """The shapes of the least mean logarithm of time over the points that the plan serves; the old ones where there is
    no such point."""
    if not rows:
        return old
    tables = [sums(row["times"]) for row in rows]
    scores = {pair: sum(math.log(of_row[pair]) for of_row in tables) for pair in tables[0]}
    up, down = (_tile(text) for text in min(scores, key=lambda pair: scores[pair]).split())
    return replace(old, gate_up=up, down=down)


def best_limit(rows: list[dict[str, Any]]) -> int:
    """Slots an expert from which `large` is chosen, with the least mean logarithm of time: between two that were timed,
    or the last of them doubled, where it never pays."""
    known = sorted({row["slots"] for row in rows})
    between = [math.sqrt(one * other) for one, other in itertools.pairwise(known)]
    limits = [float(known[0]), *between, 2.0 * known[-1]]

    def score(limit: float) -> float:
        return math.fsum(math.log(row["times"]["large"] if row["slots"] >= limit else row["best"][0]) for row in rows)

    chosen: float = min(limits, key=score)
    return max(1, round(chosen))


def line(plan: Plan) -> str:
    """As it stands in the table."""

    def shape(t: Tile) -> str:
        numbers = [t.m, t.n, t.d, t.group, t.warps, t.stages] + [t.registers] * bool(t.registers)
        return f"Tile({', '.join(map(str, numbers))})"

    up_to = 'float("inf")' if math.isinf(plan.up_to) else str(plan.up_to)
    return f"Plan({up_to}, {shape(plan.gate_up)}, {shape(plan.down)})"


def write(plans: list[Plan], limit: int, file: Path | None = None) -> None:
    """Puts the plans into the table's file, each in the place of the one with the same limit, and LARGE_FROM."""
    file = file or Path(table.__file__)
    source = file.read_text(encoding="utf-8")
    entries = [(rf"^    {re.escape(line(plan).partition(',')[0])}, Tile\([^)]*\), Tile\([^)]*\)(, \w+=\w+)*\)",
                f"    {line(plan)}") for plan in plans]  # fmt: skip
    for pattern, text in [*entries, (r"^LARGE_FROM = \d+", f"LARGE_FROM = {limit}")]:
        source, count = re.subn(pattern, text, source, flags=re.MULTILINE)
        assert count == 1, f"{count} lines of {file} are {pattern}"
    file.write_text(source, encoding="utf-8")


def _tile(short: str) -> Tile:
    return Tile(*map(int, re.findall(r"\d+", short)))


def _short(t: Tile) -> str:
    return f"{t.m}x{t.n}x{t.d}g{t.group}w{t.warps}s{t.stages}r{t.registers}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS[OP_NVFP4]))
    parser.add_argument("--tokens", default="1,8,64,512,4096")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="rewrite the table with what was found")
    options = parser.parse_args()
    wanted = points(options.models.split(","), [int(count) for count in options.tokens.split(",")], OP_NVFP4)
    jobs: dict[str, tuple[Point, Plan | None]] = {}
    for point in wanted:
        for plan in (*plans_of(point).values(), None):
            flavour = [int(point.config[name]) % 256 == 0 for name in ("hidden", "inter")]
            slots = point.tokens * int(point.config["top_k"])
            jobs.setdefault(str((point.config["activation"], point.config["local"] == point.config["experts"], flavour,
                                 (slots > 16) + (slots > 128), plan)), (point, plan))  # fmt: skip
    # The processes are forked before this one touches the GPU: later they could not use it.
    with multiprocessing.get_context("fork").Pool(min(len(os.sched_getaffinity(0)), 16)) as pool:
        problems = [said for said in pool.imap_unordered(compile_one, jobs.values()) if said]
    print(f"compiled {len(jobs)} plans after {time.monotonic() - STARTED:.0f} s", *problems, sep="\n", flush=True)
    bandwidth, rate = timing.copy_bandwidth("cuda"), timing.product_rate("cuda")
    rows = []
    for name, of_model in itertools.groupby(wanted, key=lambda point: point.name):
        weights: dict[str, Any] = {}
        for point in of_model:
            weights = weights or make_weights(point)
            sets = make_sets(point, weights)
            moved, worked = cost(point, sets)
            floor = max(moved / bandwidth, worked / rate)
            expected = call(sets[0], backend="large").double()
            times = {text: timed(sets, expected, _forced(plan)) for text, plan in plans_of(point).items()}
            times["large"] = timed(sets, expected, {"backend": "large"})
            now = timed(sets, expected, {"backend": "small"})
            pair, us = min(sums(times).items(), key=lambda item: item[1])
            each = point.tokens * int(point.config["top_k"]) / int(point.config["experts"])
            rows.append({"model": name, "tokens": point.tokens, "floor": floor, "times": times, "best": [us, pair],
                         "now": now, "band": band(each), "slots": each})  # fmt: skip
            ordered = sorted((us, text) for text, us in times.items())[:4]
            shown = "  ".join(f"{text} {us:.1f}" for us, text in ordered)
            print(f"{name} T {point.tokens} floor {floor:.1f} now {now:.1f} best {us:.1f} ({floor / us:.0%}) {pair} "
                  f"large {times['large']:.1f} | {shown}", flush=True)  # fmt: skip
            if options.json:
                options.json.write_text(json.dumps({"copy": bandwidth, "product": rate, "points": rows}))
    final = [best_plan(old, [row for row in rows if row["band"] == nth]) for nth, old in enumerate(PLANS, 1)]
    limit = best_limit(rows)
    print(*map(line, final), f"LARGE_FROM = {limit}", sep="\n")
    if options.write:
        write(final, limit)
    print(f"{time.monotonic() - STARTED:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
