"""Draws what a campaign measured: error budgets of its targets, or cases a second.

    moe-fuzz run experts_bf16@builtin --time 60 --report ndjson=events.ndjson
    python benchmarks/picture.py events.ndjson --out docs/img/budgets.svg
    python benchmarks/picture.py benchmarks/results/engine-cpu.json --rates --out docs/img/engine.svg

FILE is NDJSON of `--report ndjson=FILE`, a state directory's `stats.json`, or any JSON that holds objects with `target`
and `budgets`, as the results of campaigns in `benchmarks/results/` do. A target that occurs more than once is added up.
The picture is an SVG for light and dark, with every count in it as text (`<title>`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_fuzz.campaign.events import BUDGET_BINS
from moe_fuzz.report import svg


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="SVG")
    parser.add_argument("--target", action="append", default=[], help="only this one; may be given several times")
    parser.add_argument("--rates", action="store_true", help="bars of what is called `cases/s …`, not error budgets")
    given = parser.parse_args(arguments)
    try:
        documents = [document for file in given.files for document in read(file)]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    drawn = rates(documents) if given.rates else budgets(documents, given.target)
    if not drawn:
        print("error: there is nothing to draw in " + ", ".join(map(str, given.files)), file=sys.stderr)
        return 3
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(svg.alone(drawn), encoding="utf-8")
    print(f"{given.out}: {', '.join(drawn)}")
    return 0


def read(file: Path) -> Iterator[Any]:
    """The JSON documents of a file. Of NDJSON the last line matters and is enough; broken lines raise ValueError."""
    text = file.read_text(encoding="utf-8")
    try:
        yield json.loads(text)
    except json.JSONDecodeError:
        lines = [line for line in text.splitlines() if line.strip()]
        documents = [_line(file, at, line) for at, line in enumerate(lines, 1)]
        ends = [one for one in documents if isinstance(one, dict) and one.get("kind") == "campaign-finished"]
        if not ends:
            raise ValueError(f"{file}: no campaign came to its end in it") from None
        yield from ends


def budgets(documents: Sequence[Any], targets: Sequence[str] = ()) -> dict[str, str]:
    """Target and how many cases -> its histogram."""
    counted: dict[str, Counter[int]] = {}
    for document in documents:
        for target, bins in found(document):
            if not targets or target in targets:
                counted.setdefault(target, Counter()).update(bins)
    drawn = {}
    for target, bins in counted.items():
        if bins.total():
            counts = [bins[at] for at in range(BUDGET_BINS)]
            drawn[f"{target}, {bins.total():,} cases"] = svg.budgets(counts, described(target, counts))
    return drawn


def described(target: str, counts: Sequence[int]) -> str:
    parts = (f"{5 * at} to {5 * at + 5} %: {count:,}" for at, count in enumerate(counts) if count)
    return f"passed cases of {target} by the share of the error bound they used: {', '.join(parts)}"


def found(value: Any, name: str = "") -> Iterator[tuple[str, Counter[int]]]:
    """(target, bin -> cases), wherever it stands in a document."""
    if isinstance(value, dict):
        target = str(value.get("target", name))
        bins = value.get("budgets")
        if isinstance(bins, list) and len(bins) == BUDGET_BINS:
            yield target, Counter({at: int(count) for at, count in enumerate(bins)})
        elif isinstance(bins, dict) and all(str(at).isdigit() and int(at) < BUDGET_BINS for at in bins):
            yield target, Counter({int(at): int(count) for at, count in bins.items()})
        for key, item in value.items():
            if key != "budgets":
                yield from found(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from found(item, name)


def rates(documents: Sequence[Any]) -> dict[str, str]:
    """One picture of all `cases/s …` in a result of benchmarks/engine.py."""
    values: dict[str, float] = {}
    for document in documents:
        result = document.get("result", {}) if isinstance(document, dict) else {}
        values |= {key.removeprefix("cases/s ").strip(): float(value)
                   for key, value in result.items() if key.startswith("cases/s")}  # fmt: skip
    said = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    return {"cases a second": svg.bars(values, "cases/s", f"cases a second: {said}")} if values else {}


def _line(file: Path, at: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{at}: no JSON: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
