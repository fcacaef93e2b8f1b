"""Results for a person, as a table, and for a file, as JSON. Free of torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from moe_fuzz.bench.drive import Result
from moe_fuzz.bench.points import Candidate
from moe_fuzz.bench.stats import Estimate, estimate, paired

FORMAT = 1
OURS = "builtin"
#: The sizes of a config, and how their columns are headed; an op has some of them.
_SIZES = {"experts": "E", "top_k": "k", "blocks": "blocks of 16"}
#: What ours has to be at every point: this share of the fastest upstream's time, or this share of copy bandwidth.
UPSTREAM_SHARE, COPY_SHARE = 0.8, 0.85
SAFETY_SHARE = 1.02  # and the whole interval of safe over unsafe lies below


def fastest_upstream(result: Result, candidates: Sequence[Candidate]) -> str:
    """The label of the fastest candidate of another project; empty where none was timed."""
    timed = [c.label for c in candidates if c.upstream and c.label in result.times]
    return min(timed, key=lambda label: statistics.median(result.times[label]), default="")


def of_copy(result: Result, label: str) -> Estimate | None:
    """The share of copy bandwidth that a candidate reaches: the time of a copy of as many bytes, over its own."""
    if label not in result.times or not result.floor:
        return None
    return paired(result.floor["copy"], result.times[label])


def versus_upstream(result: Result, candidates: Sequence[Candidate]) -> Estimate | None:
    """Our time over that of the fastest upstream, paired."""
    rival = fastest_upstream(result, candidates)
    return paired(result.times[OURS], result.times[rival]) if rival and OURS in result.times else None


def meets_goal(result: Result, candidates: Sequence[Candidate]) -> bool | None:
    """Whether ours is fast enough here; None where there is nothing to judge by."""
    ratio, share = versus_upstream(result, candidates), of_copy(result, OURS)
    if share is None:
        return None
    if share.median >= COPY_SHARE:
        return True
    return None if ratio is None else ratio.median <= UPSTREAM_SHARE


def table(results: Sequence[Result], candidates: Sequence[Candidate]) -> Table:
    """A line a point, a column a candidate: microseconds a launch. In front, what no kernel can be faster than."""
    made = Table(title="microseconds a launch, in CUDA graphs, data in L2", title_justify="left")
    made.add_column("point")
    sizes = [name for name in _SIZES if any(name in result.point.config for result in results)]
    for head in ("T", *(_SIZES[name] for name in sizes), "empty", "copy"):
        made.add_column(head, justify="right")
    for candidate in candidates:
        made.add_column(candidate.label, justify="right")
    made.add_column("ours / fastest upstream", justify="right")
    made.add_column("of copy", justify="right")
    for result in results:
        config = result.point.config
        floor = [f"{statistics.median(result.floor[name]):.2f}" if result.floor else "" for name in ("empty", "copy")]
        ratio, share = versus_upstream(result, candidates), of_copy(result, OURS)
        made.add_row(
            result.point.name, str(result.point.tokens), *(str(config.get(name, "")) for name in sizes), *floor,
            *(cell(result, candidate.label) for candidate in candidates),
            f"{ratio.median:.2f}" if ratio else "-", f"{share.median:.0%}" if share else "-",
        )  # fmt: skip
    return made


def cell(result: Result, label: str) -> str:
    """`2.21`, with what it did on NaN rows where they were part of it, or why there is no time."""
    if label not in result.times:
        return result.left_out.get(label, ("-", ""))[0]
    unsafe = result.facts.get(label, {}).get("nan_safe", "")
    mark = "" if unsafe in ("", "safe") else " *"
    return f"{statistics.median(result.times[label]):.2f}{mark}"


def notes(results: Sequence[Result]) -> list[str]:
    """Why a candidate has no time, each reason once; and what the star means."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        for label, (status, reason) in result.left_out.items():
            said.setdefault((label, status, reason), []).append(f"{result.point.name} T={result.point.tokens}")
    lines = [
        f"{label}: {status} at {where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''}: {reason}"
        for (label, status, reason), where in said.items()
    ]
    told = {label: facts.get("nan_safe", "") for result in results for label, facts in result.facts.items()
            if facts.get("nan_safe")}  # fmt: skip
    broken = {label: checks for label, checks in told.items() if checks != "safe"}
    return lines + [f"* {label}: on NaN rows it fails the check {checks}" for label, checks in broken.items()]


def compare(results: Sequence[Result], one: str, other: str) -> list[tuple[Result, Estimate]]:
    """`one` over `other` at every point where both were timed."""
    return [(r, paired(r.times[one], r.times[other])) for r in results if one in r.times and other in r.times]


def to_json(
    results: Sequence[Result],
    candidates: Sequence[Candidate],
    about: dict[str, Any],
    compared: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """The result file. Every estimate is [median, low, high], the interval one of 95 %."""
    record = {"format": FORMAT, **about, "points": [_point(result, candidates) for result in results]}
    if compared:
        record["ab"] = {
            "a": compared[0],
            "b": compared[1],
            "a_over_b": [
                {"point": r.point.name, "tokens": r.point.tokens, "ratio": ratio.to_json()}
                for r, ratio in compare(results, *compared)
            ],
        }
    return record


def _point(result: Result, candidates: Sequence[Candidate]) -> dict[str, Any]:
    rival = fastest_upstream(result, candidates)
    ratio = versus_upstream(result, candidates)
    shown: dict[str, Any] = {**result.point.to_json(), "bytes": result.moved}
    if result.floor:
        empty = statistics.median(result.floor["empty"])
        shown["floor"] = {
            "empty_us": estimate(result.floor["empty"]).to_json(),
            "copy_us": estimate(result.floor["copy"]).to_json(),
            "empty_and_bytes_us": round(empty + result.moved / result.floor["bytes_per_us"], 4),
        }
    shown["candidates"] = [_candidate(result, candidate) for candidate in candidates]
    shown["fastest_upstream"] = rival or None
    shown["ours_over_fastest_upstream"] = ratio.to_json() if ratio else None
    shown["meets_goal"] = meets_goal(result, candidates)
    return shown


def _candidate(result: Result, candidate: Candidate) -> dict[str, Any]:
    label = candidate.label
    if label not in result.times:
        status, reason = result.left_out.get(label, ("not measured", ""))
        return {"label": label, "target": candidate.target, "status": status, "reason": reason}
    shown: dict[str, Any] = {"label": label, "target": candidate.target, "status": "ok"}
    shown |= {"us": estimate(result.times[label]).to_json(), **result.facts.get(label, {})}
    if label in result.cold:
        shown["cold_us"] = estimate(result.cold[label]).to_json()
    share = of_copy(result, label)
    shown["of_copy"] = share.to_json() if share else None
    return shown
