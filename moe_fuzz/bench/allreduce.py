"""The benchmark of allreduce_rmsnorm across ranks: starts them, shows what they measured. Free of torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from moe_fuzz.bench.ranks import run_ranks

OP = "allreduce_rmsnorm"
_KIB = 1 << 10
#: Powers of two from 4 KB to 8 MB, and around the crossovers known so far what lies between them.
BYTES = tuple(sorted([4 * _KIB << n for n in range(12)] + [96 * _KIB, 192 * _KIB, 384 * _KIB, 768 * _KIB]))
HIDDEN = (2048, 4096, 7168)
_SECONDS = 80.0  # of measuring, behind which no further size is begun
_DEADLINE = 118.0


def measure(ranks: int, calibrate: bool, launches: int = 20, rounds: int = 15) -> dict[str, Any]:
    """What bench/allreduce_child.py reports. Raises EnvironmentProblem where a rank fails or hangs."""
    asked = {"bytes": BYTES, "hidden": HIDDEN, "launches": launches, "rounds": rounds, "seconds": _SECONDS,
             "calibrate": calibrate}  # fmt: skip
    said = run_ranks("moe_fuzz.bench.allreduce_child", ranks, [json.dumps(asked)], _DEADLINE)
    result: dict[str, Any] = json.loads(said.splitlines()[-1])
    return result


def table_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The dispatch table, as MOE_FUZZ_ALLREDUCE_TABLE takes it."""
    key = {name: result[name] for name in ("world", "arch", "links")}
    return {"entries": [{**key, **result["caps"]}]}


def rendered(result: Mapping[str, Any]) -> Table:
    """A row a size: each way of ours, the best unfused one, and what fusing gains."""
    table = Table(title=f"{OP}, {result['world']} x {result['device']}, bfloat16, microseconds, in CUDA graphs")
    others = sorted({name for point in result["points"] for ways in point["unfused"].values() for name in ways})
    backends = list(dict.fromkeys(name for point in result["points"] for name in point["fused"]))
    for column in ("H", "tokens", "bytes", *backends, "taken", *others, "delta"):
        table.add_column(column, justify="right")
    for point in result["points"]:
        fused = point["fused"]
        ways = {name: time for family in point["unfused"].values() for name, time in family.items()}
        best = min(ways, key=lambda name: ways[name]) if ways else ""
        taken = fused[point["choice"]]
        delta = f"{ways[best] - taken:+.2f} ({ways[best] / taken:.2f}x)" if best else ""
        table.add_row(
            str(point["hidden"]), str(point["tokens"]), written(point["bytes"]),
            *(f"{fused[name]:.2f}" for name in backends), point["choice"],
            *(f"{ways[name]:.2f}{'*' if name == best else ''}" if name in ways else "-" for name in others), delta,
        )  # fmt: skip
    return table


def notes(result: Mapping[str, Any]) -> list[str]:
    """Crossovers, caps, what was left out, and where the table is too slow."""
    lines = ["delta = best unfused (*) - taken: above 0 where fusing wins"]
    for hidden, families in result["crossover"].items():
        for family, size in families.items():
            said = "at every size" if size is None else f"up to {written(size)}" if size else "at no size"
            lines.append(f"H {hidden}: fusing wins over {family} {said}")
    lines.append(f"table {'as measured' if result['calibrated'] else 'in use'} ({result['source']}): "
                 f"{_told(result['caps'])}")  # fmt: skip
    lines += [f"{name}: {why}" for name, why in result["left_out"].items()]
    lines += [
        f"SLOW: H {m['hidden']} T {m['tokens']} ({written(m['bytes'])}), active {m['active']}: {m['chosen']} "
        f"{m['us']:.2f} us, {m['best']} {m['best_us']:.2f} us" for m in result["misses"]
    ]  # fmt: skip
    if not result["misses"]:
        lines.append("the table is within 5 % of the best choice everywhere")
    return lines


def _told(caps: Mapping[str, Any]) -> str:
    """The caps of an entry in words: those for narrow rows first."""
    fused = ", ".join(f"{name} {_bounds(bounds)}" for name, bounds in sorted(caps["fused"].items()))
    widths = [f"rows of up to {one['row']} bytes: {_told(one)}" for one in caps.get("narrower", [])]
    split = f", split up to {written(caps['split'])}" if caps.get("split") else ""
    here = f"one_shot up to {written(caps['one_shot'])}{split}; fused against {fused or 'nothing'}"
    return " · ".join([*widths, f"wider ones: {here}" if widths else here])


def _bounds(bounds: int | Sequence[int]) -> str:
    if isinstance(bounds, int):
        return written(bounds)
    ways = itertools.cycle(("fused", "not fused"))
    parts = [f"{way} up to {written(size)}" for size, way in zip(bounds, ways, strict=False)]
    return ", ".join([*parts, f"{next(ways)} above"])


def written(size: int) -> str:
    """Bytes for a person: 384 KB, 2 MB, "any size" of a cap that is none."""
    if size >= 1 << 40:
        return "any size"
    if size >= 1 << 20 and size % (1 << 18) == 0:
        return f"{size / (1 << 20):g} MB"
    return f"{size / (1 << 10):g} KB"
