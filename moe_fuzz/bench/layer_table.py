"""Results on the experts of a layer, as a table and as JSON. Free of torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from moe_fuzz.bench.drive import Result
from moe_fuzz.bench.points import Candidate
from moe_fuzz.bench.stats import estimate, paired
from moe_fuzz.bench.table import FORMAT, OURS, cell

#: No point may be slower than this many times the fastest other.
RATIO = 1.2
#: The goal: this share of the floor where it is this long (µs); below, so many µs a launch beyond it; and of the
#: measured rate where tokens are many.
FLOOR_SHARE, LONG_US, LAUNCH_US, RATE_SHARE, MANY = 0.8, 50.0, 2.5, 0.65, 4096


def fastest_other(result: Result, candidates: Sequence[Candidate]) -> str:
    """The label of the fastest candidate but ours; empty where none was timed."""
    timed = [c.label for c in candidates if c.upstream and c.label in result.times]
    return min(timed, key=lambda label: statistics.median(result.times[label]), default="")


def share_of_floor(result: Result, label: str) -> float | None:
    """The time that bytes or operations take at the measured rates, whichever is longer, over the candidate's."""
    times = result.times.get(label)
    return result.floor["us"] / statistics.median(times) if times and result.floor else None


def share_of_rate(result: Result, label: str) -> float | None:
    """Operations a second over those of a large product."""
    times = result.times.get(label)
    if not times or not result.floor:
        return None
    return float(result.floor["flops"] / result.floor["flops_per_us"] / statistics.median(times))


def ratio(result: Result, candidates: Sequence[Candidate]) -> float | None:
    """Our time over that of the fastest other."""
    rival = fastest_other(result, candidates)
    return paired(result.times[OURS], result.times[rival]).median if rival and OURS in result.times else None


def meets_goal(result: Result) -> bool | None:
    """Whether ours is as near to the floor as it should become; None where it was not timed."""
    share, rate = share_of_floor(result, OURS), share_of_rate(result, OURS)
    if share is None or rate is None:
        return None
    floor, launches = float(result.floor["us"]), int(result.facts.get(OURS, {}).get("launches", 0))
    if result.point.tokens >= MANY and rate >= RATE_SHARE:
        return True
    return share >= FLOOR_SHARE if floor >= LONG_US else floor / share <= floor + LAUNCH_US * launches


def table(results: Sequence[Result], candidates: Sequence[Candidate]) -> Table:
    """A line a point, a column a candidate. In front, what no implementation can be faster than."""
    made = Table(title="microseconds a call, in CUDA graphs of several calls", title_justify="left")
    made.add_column("point")
    made.add_column("T", justify="right")
    made.add_column("floor", justify="right")
    for candidate in candidates:
        made.add_column(candidate.label, justify="right")
    for head in ("launches", "of floor", "of rate", "ours / best other", "goal"):
        made.add_column(head, justify="right")
    for result in results:
        ours = ratio(result, candidates)
        goal = {None: "-", True: "met", False: "missed"}[meets_goal(result)]
        made.add_row(
            result.point.name, str(result.point.tokens), f"{result.floor['us']:.1f}" if result.floor else "",
            *(cell(result, candidate.label) for candidate in candidates),
            str(result.facts.get(OURS, {}).get("launches", "-")), _percent(share_of_floor(result, OURS)),
            _percent(share_of_rate(result, OURS)), f"{ours:.2f}{' !' if ours > RATIO else ''}" if ours else "-", goal,
        )  # fmt: skip
    return made


def notes(results: Sequence[Result]) -> list[str]:
    """The machine's two rates, and who was timed outside of a graph."""
    lines = []
    for result in results:
        if result.floor:
            lines.append(f"floor: bytes at {result.floor['bytes_per_us'] / 1e6:.2f} TB/s, operations at "
                         f"{result.floor['flops_per_us'] / 1e6:.0f} TFLOP/s, both measured")  # fmt: skip
            break
    eager = sorted({label for r in results for label, facts in r.facts.items() if facts.get("eager")})
    return lines + [f"{label}: cannot be captured, so timed call by call" for label in eager]


def to_json(results: Sequence[Result], candidates: Sequence[Candidate], about: dict[str, Any]) -> dict[str, Any]:
    """The result file. Every estimate is [median, low, high], the interval one of 95 %."""
    return {"format": FORMAT, **about, "points": [_point(result, candidates) for result in results]}


def _point(result: Result, candidates: Sequence[Candidate]) -> dict[str, Any]:
    shown: dict[str, Any] = {**result.point.to_json(), "bytes": result.moved, "floor": result.floor}
    shown["candidates"] = [_candidate(result, candidate) for candidate in candidates]
    shown["fastest_other"] = fastest_other(result, candidates) or None
    shown["ours_over_fastest_other"] = ratio(result, candidates)
    shown["meets_goal"] = meets_goal(result)
    return shown


def _candidate(result: Result, candidate: Candidate) -> dict[str, Any]:
    label = candidate.label
    if label not in result.times:
        status, reason = result.left_out.get(label, ("not measured", ""))
        return {"label": label, "status": status, "reason": reason}
    return {
        "label": label, "status": "ok", "us": estimate(result.times[label]).to_json(), **result.facts.get(label, {}),
        "of_floor": share_of_floor(result, label), "of_rate": share_of_rate(result, label),
    }  # fmt: skip


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
