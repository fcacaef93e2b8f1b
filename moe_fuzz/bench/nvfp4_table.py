"""What the benchmark of `experts_nvfp4` says beyond its times: a line a candidate, and how ours stands to its bars.

Free of torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from rich.table import Table

from moe_fuzz.bench.drive import Result
from moe_fuzz.bench.layer_table import share_of_floor
from moe_fuzz.bench.points import Candidate
from moe_fuzz.bench.table import OURS

BACKENDS = ("builtin, small", "builtin, large")
MARLIN, BF16, THREE_FILLS = "vllm, Marlin", "builtin, bf16", "builtin, three fills"
#: Ours over Marlin at most; our bfloat16 over ours at least, where its floor is so long (µs); ours over our best
#: backend.
OVER_MARLIN, UNDER_BF16, LONG_US, OVER_BEST = 1.3, 1.8, 50.0, 1.03
#: The goal: this share of the floor, and no slower than Marlin.
GOAL_SHARE = 0.75


def facts(results: Sequence[Result], candidates: Sequence[Candidate]) -> Table:
    """A line for each candidate that was timed at a point."""
    made = Table(title="what a call takes", title_justify="left")
    made.add_column("point")
    made.add_column("candidate")
    for head in ("T", "us", "of floor", "launches", "weights MiB", "workspace MiB"):
        made.add_column(head, justify="right")
    for result in results:
        for label in (c.label for c in candidates if c.label in result.times):
            known, share = result.facts.get(label, {}), share_of_floor(result, label)
            made.add_row(
                result.point.name, label, str(result.point.tokens), f"{time(result, label):.1f}",
                "-" if share is None else f"{share:.0%}", str(known.get("launches", "-")),
                f"{known.get('weight_bytes', 0) / 2**20:.1f}", f"{known.get('workspace_bytes', 0) / 2**20:.1f}",
            )  # fmt: skip
    return made


def bars(results: Sequence[Result]) -> list[str]:
    """For each bar the points that it was held to, how many met it, and the worst of them."""
    return [
        _bar(f"ours over Marlin, at most {OVER_MARLIN}", results, _over_marlin, OVER_MARLIN),
        _bar(f"ours over our bf16, at most 1/{UNDER_BF16} where that has a floor of {LONG_US:.0f} us or more", results,
             _over_bf16, 1 / UNDER_BF16),
        _bar(f"the rule over our best backend, at most {OVER_BEST}", results, _over_best, OVER_BEST),
        _bar("ours over ours with three fills a product, below 1", results, _over_fills, 1.0),
        _bar(f"goal: floor over ours, at least {GOAL_SHARE:.0%}: ours over floor", results, _over_floor,
             1 / GOAL_SHARE),
        _bar("goal: ours over Marlin, at most 1", results, _over_marlin, 1.0),
    ]  # fmt: skip


def time(result: Result, label: str) -> float:
    return statistics.median(result.times[label])


def _bar(what: str, results: Sequence[Result], ratio: Callable[[Result], Iterator[float]], most: float) -> str:
    found = [(value, result.point) for result in results if OURS in result.times for value in ratio(result)]
    if not found:
        return f"{what}: nothing to hold to it"
    worst, point = max(found, key=lambda pair: pair[0])
    met = sum(value <= most for value, _ in found)
    return f"{what}: {met} of {len(found)} points; worst {worst:.2f} at {point.name} T {point.tokens}"


def _over(result: Result, label: str) -> Iterator[float]:
    if label in result.times:
        yield time(result, OURS) / time(result, label)


def _over_marlin(result: Result) -> Iterator[float]:
    return _over(result, MARLIN)


def _over_fills(result: Result) -> Iterator[float]:
    return _over(result, THREE_FILLS)


def _over_bf16(result: Result) -> Iterator[float]:
    if bf16_floor(result) >= LONG_US:
        yield from _over(result, BF16)


def _over_best(result: Result) -> Iterator[float]:
    times = [time(result, label) for label in BACKENDS if label in result.times]
    if times:
        yield time(result, OURS) / min(times)


def _over_floor(result: Result) -> Iterator[float]:
    share = share_of_floor(result, OURS)
    if share:
        yield 1 / share


def bf16_floor(result: Result) -> float:
    """µs that the same call takes at least with weights in bfloat16."""
    if not result.floor:
        return 0.0
    tokens = 2 * 2 * result.point.tokens * int(result.point.config["hidden"])  # x and y
    weights = (result.moved - tokens) / (0.5 + 1 / 16) * 2
    floor = result.floor
    return float(max((weights + tokens) / floor["bytes_per_us"], floor["flops"] / floor["flops_per_us"]))
