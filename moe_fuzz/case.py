"""A case: one test as a small JSON value. It holds no tensors; every tensor is a function of it (see generator.py).

    {"moe_fuzz": 1, "op": "topk_softmax", "target": "topk_softmax@torch", "mode": "eager", "seed": 7,
     "config": {"experts": "0-59", "top_k": 4, "dtype": "bfloat16", …},
     "steps": [{"rows": "0-6", "padding": "5-6", "faults": [{"name": "nan_rows", "tensor": "logits", "rows": "5-6"}]}],
     "digest": "…"}

`digest` guards against a damaged file. It may be left out, and is when a case is written by hand.
The inline form is `mfz1:` followed by the same JSON, compressed, in URL-safe base64.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_fuzz.case_json import labels_of, packed, parse_json, read_text, record_of, text_of, unpacked
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.lazy import cached

FORMAT = 1
#: How the steps run. eager: one call each, in one process. graph: over static buffers, one bucket a token count, all
#: captured in one pool, the largest first, then replayed in order. piecewise: the same, with what produces the logits
#: and what consumes the result in graphs of their own, and eager work between them.
MODES = ("eager", "graph", "piecewise")
#: Of layers: as graph, over a batch that several data-parallel ranks (`dp` of the config) have padded to the largest of
#: them and gathered. Of an all-reduce: each of its ranks (`ranks` of the config) in a process of its own.
RANKS = "ranks"
ALL_MODES = (*MODES, RANKS)
MAX_STEPS = 64
MAX_ROWS = 1 << 20
MAX_SEED = 2**63 - 1

Scalar = bool | int | float | str
_WORD = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TARGET = re.compile(r"[a-z][a-z0-9_]{0,63}@\S.{0,1000}")


def in_mode(config: Mapping[str, Scalar], mode: str, most: int = 8) -> dict[str, Scalar]:
    """The config of a case in this mode: there are several data-parallel ranks in `ranks`, and nowhere else; and of an
    all-reduce two or more, but no more than `most`, with a process each."""
    ranks: dict[str, Scalar] = {}
    if "dp" in config:
        ranks = {"dp": max(2, int(config["dp"])) if mode == RANKS else 1}
    elif "captured" in config:
        ranks = {"ranks": max(2, min(most, int(config["ranks"]))), "launches": "phases"} if mode == RANKS else {
            "captured": False}
    return {**config, **ranks}


@dataclass(frozen=True)
class Fault:
    """An adversity laid into one tensor. `rows` names row labels; empty for faults that concern the whole tensor.

    `stream` names the step whose values the rows hold (see Step.stream), for a fault that brings back old ones.
    """

    name: str
    tensor: str = ""
    rows: Labels = field(default_factory=Labels)
    stream: int | None = None

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"name": self.name}
        if self.tensor:
            data["tensor"] = self.tensor
        if self.rows:
            data["rows"] = str(self.rows)
        if self.stream is not None:
            data["stream"] = self.stream
        return data


@dataclass(frozen=True)
class Step:
    """One call of the target: its token rows, those of them that are padding, and its faults.

    Its values are drawn from the generator's stream of that number; None stands for its place in the case. A step keeps
    its stream when those before it are taken away, so its values, and those that others took from it, stay the same.

    refilled: of the mode eager. Its tensors are those of the last step before it with the same shapes, layout and
    weights, filled anew, as a server has one set of buffers for each batch size. Where there is none they are new ones.
    """

    rows: Labels
    padding: Labels = field(default_factory=Labels)
    faults: tuple[Fault, ...] = ()
    stream: int | None = None
    refilled: bool = False

    @property
    def tokens(self) -> int:
        return len(self.rows)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"rows": str(self.rows)}
        if self.padding:
            data["padding"] = str(self.padding)
        if self.faults:
            data["faults"] = [fault.to_json() for fault in self.faults]
        if self.stream is not None:
            data["stream"] = self.stream
        if self.refilled:
            data["refilled"] = True
        return data

    def keep_rows(self, rows: Labels) -> Step:
        """The step with these rows only; a fault that named rows and has none left goes too."""
        faults = (replace(f, rows=f.rows & rows) if f.rows else f for f in self.faults)
        kept = tuple(new for new, old in zip(faults, self.faults, strict=True) if new.rows or not old.rows)
        return replace(self, rows=rows, padding=self.padding & rows, faults=kept)


@dataclass(frozen=True)
class Case:
    """One test. `config` is validated by the op's space; `target` is who was under test when the case was made."""

    op: str
    config: Mapping[str, Scalar]
    steps: tuple[Step, ...]
    seed: int
    mode: str = "eager"
    target: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", dict(sorted(self.config.items())))
        steps = [replace(step, stream=None) if step.stream == at else step for at, step in enumerate(self.steps)]
        if steps and steps[0].refilled:  # there is none before it
            steps[0] = replace(steps[0], refilled=False)
        object.__setattr__(self, "steps", tuple(steps))

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def experts(self) -> Labels:
        return Labels.parse(str(self.config["experts"]))

    @property
    def fault_names(self) -> tuple[str, ...]:
        return tuple(sorted({fault.name for step in self.steps for fault in step.faults}))

    @property
    def refilled(self) -> bool:
        """Whether a step is in the buffers of one before it, in the mode eager; in the others all are."""
        return any(step.refilled for step in self.steps)

    @property
    def way(self) -> str:
        """How the steps run, in a word; empty for calls each of which has memory of its own."""
        return self.mode if self.mode != MODES[0] else "refilled" if self.refilled else ""

    @property
    def buckets(self) -> tuple[int, ...]:
        """The token counts of the steps, the largest first: the sizes in which a graph mode captures."""
        return tuple(sorted({step.tokens for step in self.steps}, reverse=True))

    @property
    def processes(self) -> int:
        """How many processes run it: more than one where each rank has its own."""
        return int(self.config["ranks"]) if self.mode == RANKS and "dp" not in self.config else 1

    def stream(self, index: int) -> int:
        """The number of the generator's stream from which a step's values come."""
        own = self.steps[index].stream
        return index if own is None else own

    def keep_steps(self, kept: Iterable[int]) -> Case:
        """The case with the steps at these places only, their values unchanged."""
        return replace(self, steps=tuple(replace(self.steps[at], stream=self.stream(at)) for at in kept))

    def over_buffers(self, refilled: bool) -> Case:
        """The case with all of its steps in the same buffers as far as they fit, or each in new ones."""
        return replace(self, steps=tuple(replace(step, refilled=refilled) for step in self.steps))

    def with_config(self, **changes: Scalar) -> Case:
        return replace(self, config={**self.config, **changes})

    def with_step(self, index: int, step: Step) -> Case:
        return replace(self, steps=(*self.steps[:index], step, *self.steps[index + 1 :]))

    # ---- JSON -------------------------------------------------------------------------------------------------------

    def to_json(self, digest: bool = True) -> dict[str, Any]:
        """digest: by which whoever reads it sees that nothing was lost on the way."""
        return {**self._body(), "digest": self.digest} if digest else self._body()

    def _body(self) -> dict[str, Any]:
        data: dict[str, Any] = {"moe_fuzz": FORMAT, "op": self.op}
        if self.target:
            data["target"] = self.target
        data |= {"mode": self.mode, "seed": self.seed, "config": dict(self.config)}
        data["steps"] = [step.to_json() for step in self.steps]
        return data

    @cached
    def digest(self) -> str:
        """12 hexadecimal digits that stand for everything in the case."""
        body = json.dumps(self._body(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(body.encode()).hexdigest()[:12]

    def dumps(self, indent: int | None = None) -> str:
        separators = (",", ":") if indent is None else None
        return json.dumps(self.to_json(), indent=indent, separators=separators)

    def inline(self) -> str:
        """The case as one word, `mfz1:…`, that outlives the machine it was found on."""
        return packed(self.dumps())

    @classmethod
    def from_json(cls, data: Any) -> Case:
        """The case in `data`, or CaseError naming the field. What only the op knows, its space validates (ops)."""
        record = record_of(data, "", {"moe_fuzz", "op", "target", "mode", "seed", "config", "steps", "digest"})
        version = record.get("moe_fuzz")
        if version != FORMAT or isinstance(version, bool):
            raise CaseError(
                "moe_fuzz",
                f"this is not a case of format {FORMAT} (found {version!r})",
                'a case file begins with {"moe_fuzz": 1, "op": …}; write one with `moe-fuzz show`',
            )
        op = text_of(record, "op", _WORD)
        target = text_of(record, "target", _TARGET) if "target" in record else ""
        mode = text_of({"mode": "eager"} | record, "mode", _WORD)
        if mode not in ALL_MODES:
            raise CaseError("mode", f"{mode!r} is not one of {', '.join(ALL_MODES)}")
        seed = record.get("seed")
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
            raise CaseError("seed", f"must be an integer from 0 to 2^63-1, not {seed!r}")
        config = record.get("config")
        if not isinstance(config, dict):
            raise CaseError("config", "must be an object")
        for key, value in config.items():
            if not isinstance(value, bool | int | float | str):
                raise CaseError(f"config.{key}", f"must be a number, a string or a boolean, not {value!r}")
        if mode == RANKS and not {"dp", "ranks"} & set(config):
            raise CaseError("mode", f"{op} has no data-parallel ranks", f"use one of {', '.join(MODES)}")
        steps = record.get("steps")
        if not isinstance(steps, list) or not 1 <= len(steps) <= MAX_STEPS:
            raise CaseError("steps", f"must be a list of 1 to {MAX_STEPS} steps")
        case = cls(op, config, tuple(_step(s, f"steps[{i}]") for i, s in enumerate(steps)), seed, mode, target)
        if mode != MODES[0] and case.refilled:
            raise CaseError("steps", f"in mode {mode} every step has the buffers of its bucket", "leave out `refilled`")
        if "digest" in record and record["digest"] != case.digest:
            raise CaseError(
                "digest",
                f"says {record['digest']!r}, but the contents give {case.digest!r}: the file is damaged, or was edited",
                "to accept an edit, delete the digest line",
            )
        return case

    @classmethod
    def loads(cls, text: str) -> Case:
        """Reads the JSON of a case, or its inline form."""
        return cls.from_json(parse_json(unpacked(text.strip())))

    @classmethod
    def load(cls, path: Path) -> Case:
        return cls.loads(read_text(path))


def loads_sequence(text: str) -> tuple[Case, ...]:
    """Reads a list of cases that ran in one process, `{"moe_fuzz_sequence": 1, "cases": [...]}`, or its inline form."""
    text = text.strip()
    record = record_of(parse_json(unpacked(text)), "", {"moe_fuzz_sequence", "cases"})
    cases = record.get("cases")
    if record.get("moe_fuzz_sequence") != FORMAT or not isinstance(cases, list):
        raise CaseError("moe_fuzz_sequence", f"this is not a sequence of format {FORMAT}")
    return tuple(Case.from_json(case) for case in cases)


def targets_of(cases: Sequence[Case], target: str) -> tuple[str, ...]:
    """On what each of some cases runs that share a process: the last on `target`, and so do those that name the same
    one as it, or none. What ran before it on another target, perhaps of another op, does so again."""
    own = {"", *(case.target for case in cases[-1:])}
    return tuple(target if case.target in own else case.target for case in cases)


def inline_sequence(cases: Iterable[Case]) -> str:
    """Cases that ran in one process as one word, `mfz1:…`."""
    return packed(json.dumps(json.loads(dumps_sequence(cases)), separators=(",", ":")))


def dumps_sequence(cases: Iterable[Case]) -> str:
    return json.dumps({"moe_fuzz_sequence": FORMAT, "cases": [case.to_json() for case in cases]}, indent=1)


def _step(data: Any, where: str) -> Step:
    record = record_of(data, where, {"rows", "padding", "faults", "stream", "refilled"})
    if "rows" not in record:
        raise CaseError(f"{where}.rows", "is missing")
    rows, padding = labels_of(record, "rows", where), labels_of(record, "padding", where)
    if len(rows) > MAX_ROWS:
        raise CaseError(f"{where}.rows", f"{len(rows)} rows are more than {MAX_ROWS}")
    if not padding.issubset(rows):
        raise CaseError(f"{where}.padding", "names a row that the step does not have")
    faults = record.get("faults", [])
    if not isinstance(faults, list) or len(faults) > 64:
        raise CaseError(f"{where}.faults", "must be a list of at most 64 faults")
    laid = tuple(_fault(f, f"{where}.faults[{i}]", rows) for i, f in enumerate(faults))
    refilled = record.get("refilled", False)
    if not isinstance(refilled, bool):
        raise CaseError(f"{where}.refilled", f"must be true or false, not {refilled!r}")
    return Step(rows, padding, laid, _stream(record, where), refilled)


def _fault(data: Any, where: str, rows: Labels) -> Fault:
    record = record_of(data, where, {"name", "tensor", "rows", "stream"})
    name = text_of(record, "name", _WORD, where)
    tensor = text_of(record, "tensor", _WORD, where) if "tensor" in record else ""
    named = labels_of(record, "rows", where)
    if not named.issubset(rows):
        raise CaseError(f"{where}.rows", "names a row that the step does not have")
    return Fault(name, tensor, named, _stream(record, where))


def _stream(record: Mapping[str, Any], where: str) -> int | None:
    value = record.get("stream")
    if "stream" in record and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_STEPS):
        raise CaseError(f"{where}.stream", f"must be an integer from 0 to {MAX_STEPS - 1}, not {value!r}")
    return value
