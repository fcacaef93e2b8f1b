"""What is measured: points (a config and a number of tokens) and candidates. Free of torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_fuzz.case import Case, Fault, Scalar, Step
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import UsageError
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.targets import registry

TOKENS = (1, 128, 4096)
#: The table that a padded batch of a data-parallel rank was measured on (vllm#39593): one row in ten is NaN.
NAN_ROWS = "nan-rows"
_NAN_TOKENS, _NAN_EVERY = 128, 10
_NAN_CONFIG: Mapping[str, Scalar] = {"experts": 128, "top_k": 8, "renormalize": True, "dtype": "bfloat16"}
_WITH_NAN_ROWS = ("topk_softmax", "topk_sigmoid")
_SEED = 1

#: Beside the known targets: what making a row safe costs, here by leaving it out, there by a pass in front.
EXTRA: Mapping[str, Mapping[str, str]] = {
    op: {
        "builtin, NaN-unsafe": f"{op}@moe_fuzz.bench.candidates:{op}_unsafe",
        "torch + nan_to_num": f"{op}@moe_fuzz.bench.candidates:{op}_nan_to_num",
    }
    for op in _WITH_NAN_ROWS
} | {"grouped_topk": {"builtin, NaN-unsafe": "grouped_topk@moe_fuzz.bench.candidates:grouped_topk_unsafe"}}


@dataclass(frozen=True)
class Point:
    """One line of the table: everything about the inputs but the tensors."""

    op: str
    name: str  # a preset, or nan-rows
    tokens: int
    config: Mapping[str, Scalar]  # the part of a config that is fixed
    nan_every: int = 0  # every so-manyth row is NaN; 0: none

    def case(self, info: TargetInfo, nan: bool) -> Case:
        """The case with these inputs, as the target's space completes it; `nan=False` leaves the NaN rows out."""
        space = get_space(self.op)
        simplest = {axis.name: axis.values[0] for axis in space.axes(info)}
        wanted = {name: value for name, value in self.config.items() if name in simplest}
        config = space.complete({**simplest, "magnitude": 2, "out": info.capabilities.out, **wanted}, info)
        rows = Labels.range(self.tokens)
        faults: tuple[Fault, ...] = ()
        if nan and self.nan_every:
            poisoned = Labels.of(range(0, self.tokens, self.nan_every))
            faults = (Fault("nan_rows", "logits", poisoned),)
        return Case(self.op, config, (Step(rows, faults=faults),), _SEED)

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, "name": self.name, "tokens": self.tokens, "config": dict(self.config),
                "nan_every": self.nan_every}  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Point:
        return cls(**data)


@dataclass(frozen=True)
class Candidate:
    """One column of the table: a short label, and the full name of a target."""

    label: str
    target: str
    upstream: bool = field(default=False)  # of another project: what ours is compared with


def points(op: str, presets: Sequence[str] = (), tokens: Sequence[int] = TOKENS) -> tuple[Point, ...]:
    """The NaN-row point, then every preset (or those named) at each number of tokens. UsageError for an unknown one."""
    known = get_space(op).presets
    for name in presets:
        if name not in known and name != NAN_ROWS:
            near = difflib.get_close_matches(name, [*known, NAN_ROWS], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the presets are {', '.join([NAN_ROWS, *known])}"
            raise UsageError(f"{op} has no preset {name!r}", hint)
    found = []
    if op in _WITH_NAN_ROWS and (not presets or NAN_ROWS in presets):
        found.append(Point(op, NAN_ROWS, _NAN_TOKENS, _NAN_CONFIG, _NAN_EVERY))
    chosen = [name for name in known if not presets or name in presets]
    # what a server quantizes is in bfloat16, whatever is the simplest to fuzz
    fixed: Mapping[str, Scalar] = {"dtype": "bfloat16"} if op == "nvfp4_quantize" else {}
    return (*found, *(Point(op, name, count, {**fixed, **known[name]}) for name in chosen for count in tokens))


def candidates(op: str, targets: Sequence[str] = ()) -> tuple[Candidate, ...]:
    """The targets named, or all known ones and ours and torch's variants. UsageError for an unknown one."""
    extra = EXTRA.get(op, {})
    if not targets:
        named = [name for name in registry.resolve(op) if name.startswith(f"{op}@")]
        return tuple(map(_candidate, named)) + tuple(Candidate(label, name) for label, name in extra.items())
    chosen: dict[str, Candidate] = {}
    for text in targets:
        if text in extra:
            chosen[extra[text]] = Candidate(text, extra[text])
            continue
        for name in registry.resolve(text, op):
            if not name.startswith(f"{op}@"):
                raise UsageError(f"{name} does not implement {op}", "name targets of the op that is measured")
            chosen[name] = _candidate(name)
    return tuple(chosen.values())


def _candidate(name: str) -> Candidate:
    source = name.partition("@")[2]
    return Candidate(source, name, upstream=source not in ("builtin", "torch") and ":" not in source)
