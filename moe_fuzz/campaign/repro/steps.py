"""The steps of an exhibit (execute/exhibit.py) as the templates take them: named, and sorted into buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_fuzz.case import Case

Step = dict[str, Any]


@dataclass(frozen=True)
class Calls:
    """The calls of one case. `buckets`: name -> suffix of the step that makes it, in the order of their capture."""

    steps: tuple[tuple[str, Step], ...]  # suffix of all names of a step, and the step
    buckets: tuple[tuple[int | str, str], ...]
    peers: Mapping[str, Any] | None = None  # of an all-reduce: who its ranks are

    @property
    def graph(self) -> bool:
        return bool(self.buckets)

    def who(self) -> str:
        """The ranks, as arguments in Python."""
        return ", ".join(f"{name}={value!r}".replace("'", '"') for name, value in (self.peers or {}).items()
                         if name != "group")


def calls_of(case: Case, exhibit: Mapping[str, Any], suffixes: Sequence[str]) -> Calls:
    """A step gains `inputs`: the names of the tensors that the target is given; `last`: whether it is the case's last
    one; `holds`: the suffix of the first step in its buffers, if another is in them, too; and `graph`, `pieces`,
    `bucket`: its name, `makes`: whether this is the first step of its bucket."""
    steps = [_with_inputs(step) for step in exhibit["steps"]]
    graph = case.mode not in ("eager", "ranks")
    keys = [_key(step) for step in steps]
    names: dict[Any, int | str] = {}
    for index, (tokens, layout) in enumerate(keys):
        alone = {key for key in keys if key[0] == tokens} == {(tokens, layout)}
        names.setdefault((tokens, layout), tokens if alone else f"{tokens}, laid as in step {index + 1}")
    first: list[int] = []  # of each step, the first in its buffers
    for index, step in enumerate(steps):
        first.append(index if step["refills"] is None else first[step["refills"]])
    for index, step in enumerate(steps):
        step |= {
            "holds": suffixes[first[index]] if first.count(first[index]) > 1 else "",
            "graph": graph,
            "pieces": case.mode == "piecewise",
            "last": index == len(steps) - 1,
            "bucket": names[keys[index]],
            "makes": keys.index(keys[index]) == index,
        }
    order = sorted(set(keys), key=lambda key: (-key[0], keys.index(key))) if graph else []
    buckets = tuple((names[key], suffixes[keys.index(key)]) for key in order)
    return Calls(tuple(zip(suffixes, steps, strict=True)), buckets, exhibit["peers"])


def all_tensors(step: Step) -> list[Mapping[str, Any]]:
    """Those whose bits the script holds."""
    blank = step.get("blank", {}).values() if step["makes"] else ()
    healed = [step["healed"]] if step["healed"] else step["others"]["healed"].values() if "others" in step else []
    return [*step["tensors"].values(), *blank, *(one["values"] for one in healed)]


def _with_inputs(step: Mapping[str, Any]) -> Step:
    given = {keyword.get("tensor") for keyword in step["keywords"].values()}
    if "positional" in step:
        given |= {argument.get("tensor") for argument in step["positional"]} - {None}
        return {**step, "inputs": [name for name in step["tensors"] if name in given]}
    return {**step, "inputs": [name for name in step["tensors"] if name == "logits" or name in given]}


def _key(step: Step) -> tuple[int, tuple[tuple[Any, ...], ...]]:
    """What cannot change inside a graph: the token count and the layout, as in execute/graph.py."""
    tensors = sorted(step["tensors"].items())
    return step["tokens"], tuple((name, t["gap"], t["column_stride"], t["offset"]) for name, t in tensors)
