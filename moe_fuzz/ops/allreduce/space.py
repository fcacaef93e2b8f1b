"""The space of `allreduce_rmsnorm`: configs, dictionary, faults, limits and the reducer's moves. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from moe_fuzz.case import MODES, RANKS, Case, Scalar
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops import moves
from moe_fuzz.ops.allreduce import text
from moe_fuzz.ops.allreduce.presets import MODELS
from moe_fuzz.ops.space import Axis, FaultPlace, Means
from moe_fuzz.ops.validity import (
    require_fields,
    require_integer,
    require_place,
    require_rows,
    require_stream,
    require_values,
)

WORLDS = (2, 1, 3, 4, 5, 6, 7, 8)
#: On both sides of vectors, warps and blocks; and the sizes that people serve.
HIDDEN = (16, 1, 2, 3, 7, 8, 15, 17, 24, 31, 32, 33, 63, 64, 65, 96, 100, 112, 127, 128, 129, 255, 256, 257, 448, 512,
          513, 896, 1023, 1024, 1025, 2047, 2048, 2049, 2688, 2880, 4096, 5120, 7168, 8192)  # fmt: skip
TOKENS = (1, 2, 3, 0, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513,
          1023, 1025, 2049, 4097)  # fmt: skip
#: Bytes of a message at which implementations change their ways: a token less, as many, a token more.
CAPS = tuple(1 << power for power in range(14, 24))

MAX_ELEMENTS = 1 << 26
CPU_BUDGET = 0.25  # seconds an interpreted case may take
HOST_BUDGET = 0.06  # and one whose target is no kernel of Triton's
CUDA_ELEMENTS = 1 << 23  # of all ranks

FIELDS: Mapping[str, tuple[Scalar, ...]] = {
    "ranks": WORLDS,
    "hidden": HIDDEN,
    "dtype": ("bfloat16", "float16", "float32"),
    "gamma_dtype": ("dtype", "float32", "bfloat16", "float16"),
    "residual": (True, False),
    "eps": (1e-6, 1e-5, 1e-12, 1.0),
    "recipe": ("dense", "integer", "wide"),  # of like size; whole numbers that can be summed exactly; of many sizes
    "magnitude": (0, 6, -6, 14, -14),  # values lie within ±2^magnitude
    # Of ranks in one process: barriers are the ends of launches, or real ones inside a single launch.
    "launches": ("phases", "single"),
    # Who is ahead of whom, where ranks are not in step: all alike, one late, one ahead, or at random.
    "pace": ("together", "late", "ahead", "random"),
    "burst": (0, 1, 3, 8, 1000),  # calls of other sizes around the one that is judged, without a wait in between
    "groups": (1, 2),  # groups of ranks that call at the same time, each with its own memory
    # Of the ranks' buffers: the largest message of the case, or other sizes; "short" by one row.
    "capacity": ("exact", "double", "half", "short"),
    "captured": (False, True),  # in the mode ranks: each rank replays graphs
    "edge": ("right", "left"),
    "out": (False, True, text.IN_PLACE),
}

#: On rows, the plainest first.
ROW_FAULTS = ("zero_rows", "nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "partial_inf", "negative_zeros",
              "negative_subnormals", "ladder", "overflowing_squares", "huge_rows", "stale_rows")  # fmt: skip
_ONE = ("nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "partial_inf", "negative_subnormals",
        "overflowing_squares", "huge_rows", "ladder")  # fmt: skip
_STRIDED = ("noncontiguous", "transposed")
#: x0, x1: of one rank, that of the first or the last. Static buffers know each fault in one place: the first here.
PLACES = (
    *(FaultPlace(name, "x0", on_rows=True) for name in _ONE),
    *(FaultPlace(name, "x", on_rows=True) for name in ("zero_rows", "negative_zeros", "stale_rows")),
    *(FaultPlace(name, "x1", on_rows=True) for name in _ONE),
    *(FaultPlace(name, "x", on_rows=True) for name in _ONE),
    *(FaultPlace(name, "residual", on_rows=True, needs="residual")
      for name in ROW_FAULTS if name not in ("stale_rows",)),
    FaultPlace("noncontiguous", "x", on_rows=False),
    FaultPlace("noncontiguous", "residual", on_rows=False, needs="residual"),
    FaultPlace("noncontiguous", "gamma", on_rows=False),
    FaultPlace("transposed", "x", on_rows=False),
    FaultPlace("transposed", "residual", on_rows=False, needs="residual"),
    FaultPlace("misaligned", "x", on_rows=False),
    FaultPlace("misaligned", "residual", on_rows=False, needs="residual"),
    FaultPlace("misaligned", "gamma", on_rows=False),
)  # fmt: skip


@dataclass(frozen=True)
class AllreduceSpace:
    """The sum over ranks, a residual, and RMSNorm of that. See ops/space.py for what each member is."""

    op: str = "allreduce_rmsnorm"
    description: str = "the sum over ranks, the residual added to it, and its RMSNorm: the same bits on every rank"

    family: ClassVar[str] = "allreduce"
    checks: ClassVar[Mapping[str, str]] = text.CHECKS
    faults: ClassVar[Mapping[str, str]] = text.FAULTS
    places: ClassVar[tuple[FaultPlace, ...]] = PLACES
    fields: ClassVar[Mapping[str, tuple[Scalar, ...]]] = FIELDS
    sizes: ClassVar[tuple[str, ...]] = ("hidden",)
    presets: ClassVar[Mapping[str, Mapping[str, Scalar]]] = MODELS
    tensors: ClassVar[Mapping[str, str]] = {
        "x": "input", "residual": "input", "gamma": "input", "normed": "output", "residual_out": "output",
    }  # fmt: skip
    simplest: ClassVar[Mapping[str, Scalar]] = {name: values[0] for name, values in FIELDS.items()}

    # ---- what to draw -----------------------------------------------------------------------------------------------

    def axes(self, info: TargetInfo) -> tuple[Axis, ...]:
        multiple = info.capabilities.min_multiple_h
        return tuple(Axis(name, [v for v in values if not self._without(name, v, info)] or values[:1],
                          between=(lambda size: size % multiple == 0) if name == "hidden" else None)
                     for name, values in FIELDS.items())  # fmt: skip

    def _without(self, name: str, value: Scalar, info: TargetInfo) -> bool:
        """Whether the target does not take this value of a field."""
        can = info.capabilities
        return {
            "ranks": not 1 <= int(value) <= can.max_world if name == "ranks" else False,
            "hidden": name == "hidden" and (int(value) > can.max_hidden or int(value) % can.min_multiple_h != 0),
            "dtype": value not in can.dtypes,
            "gamma_dtype": value not in can.gamma_dtypes,
            "residual": value not in can.residual,
            "launches": value not in can.launches,
            "burst": name == "burst" and int(value) > can.max_burst,
            "groups": name == "groups" and int(value) > can.max_groups,
            "capacity": value in ("half", "short") and not can.cuts,
            "captured": bool(value) and not info.contract.graph,
            "out": bool(value) and not (can.residual_in_place if value == text.IN_PLACE else can.out),
        }.get(name, False)

    def modes(self, info: TargetInfo) -> tuple[str, ...]:
        found = (MODES if info.contract.graph else MODES[:1]) if info.capabilities.launches else ()
        return (*found, RANKS) if info.capabilities.max_processes > 1 else found

    def complete(self, config: Mapping[str, Scalar], info: TargetInfo) -> dict[str, Scalar]:
        whole = dict(config)
        if int(whole["burst"]) > 8 and int(whole["hidden"]) > 256:
            whole["burst"] = 8  # a thousand calls are for small messages
        if whole["out"] == text.IN_PLACE and not whole["residual"]:
            whole["out"] = True
        return whole

    def tokens(self, config: Mapping[str, Scalar], means: Means) -> tuple[int, ...]:
        most = means.budget(CPU_BUDGET, HOST_BUDGET)
        if means.device == "cpu" and means.interpreted:
            return tuple(t for t in TOKENS if self.cpu_seconds(t, config, means) <= most) or TOKENS[:5]
        row = int(config["hidden"]) * (4 if config["dtype"] == "float32" else 2)
        near = {cap // row + more for cap in CAPS for more in (-1, 0, 1)}
        found = (*TOKENS, *sorted(t for t in near if 0 < t <= TOKENS[-1] and t not in TOKENS))
        if means.device == "cpu":
            return tuple(t for t in found if self.cpu_seconds(t, config, means) <= most) or TOKENS[:5]
        return tuple(t for t in found if t * int(config["hidden"]) * int(config["ranks"]) <= CUDA_ELEMENTS)

    @staticmethod
    def seams(config: Mapping[str, Scalar], tokens: Sequence[int]) -> list[int]:
        """Of more rows than its blocks have tiles, a block has several, one after another: in the interpreter of more
        than 8 for each of the 8 blocks that the ranks share. The last one is not whole."""
        return [count for count in tokens if count * int(config["ranks"]) > 64 and count % 8]

    def roomy(self, config: dict[str, Scalar], means: Means) -> dict[str, Scalar]:
        """With fewer calls, and of fewer ranks, where it has no room for one row."""
        less: dict[str, Scalar] = {}
        for least in ({}, {"burst": 0}, {"groups": 1}, {"ranks": min(int(config["ranks"]), 2)}):
            less |= least
            if any(self.tokens({**config, **less}, means)):
                return {**config, **less}
        return config

    def affordable(self, case: Case, means: Means) -> bool:
        return means.device != "cpu" or self.cost(case, means) <= means.budget(CPU_BUDGET, HOST_BUDGET)

    def places_for(self, config: Mapping[str, Scalar], info: TargetInfo) -> tuple[FaultPlace, ...]:
        return tuple(p for p in self.places if not self._refused(p.fault, p.tensor, info)
                     and (not p.needs or config[p.needs]) and not self._packed(p.fault, p.tensor, config))  # fmt: skip

    @staticmethod
    def _packed(fault: str, tensor: str, config: Mapping[str, Scalar]) -> bool:
        """Whether the tensor lies as results do, and the fault is another layout."""
        return config["out"] == text.IN_PLACE and tensor == "residual" and fault in (*_STRIDED, "misaligned")

    def _refused(self, fault: str, tensor: str, info: TargetInfo) -> str:
        """Why the target does not take the fault; empty if it does."""
        can = info.capabilities
        if fault in _STRIDED and not (can.any_strides if tensor == "gamma" else can.strided):
            return f"strided {tensor}"
        return f"misaligned {tensor}" if fault == "misaligned" and can.alignment > 1 else ""

    # ---- what is valid ----------------------------------------------------------------------------------------------

    def validate(self, case: Case) -> None:
        config = case.config
        require_fields(case, FIELDS)
        require_integer(case, "hidden", max(HIDDEN))
        require_values(case, {name: values for name, values in FIELDS.items() if name != "hidden"})
        if case.mode == RANKS and config["ranks"] == 1:
            raise CaseError("config.ranks", "must be more than 1 in mode ranks")
        if config["out"] == text.IN_PLACE and not config["residual"]:
            raise CaseError("config.out", "needs config.residual where it is in place")
        for index, step in enumerate(case.steps):
            if step.tokens * int(config["hidden"]) * int(config["ranks"]) > MAX_ELEMENTS:
                raise CaseError(f"steps[{index}].rows", f"{step.tokens} rows of {config['hidden']} are too many")
            for number, fault in enumerate(step.faults):
                where = f"steps[{index}].faults[{number}]"
                place = require_place(self, case, fault, where)
                if self._packed(fault.name, fault.tensor, config):
                    raise CaseError(where, "a residual in place lies as results do")
                require_rows(place, fault, where)
                if place.needs and not config[place.needs]:
                    raise CaseError(where, f"{fault.name} on {fault.tensor} needs config.{place.needs}")
                require_stream(fault, where)

    def refusal(self, case: Case, info: TargetInfo) -> str:
        can = info.capabilities
        named = [name for name in FIELDS if not (name == "launches" and case.mode == RANKS)]
        refused = [f"{name}={case.config[name]}" for name in named if self._without(name, case.config[name], info)]
        if case.mode == RANKS and int(case.config["ranks"]) > can.max_processes:
            refused.append(f"{case.config['ranks']} ranks with a process each")
        if not can.zero_tokens and not all(step.tokens for step in case.steps):
            refused.append("no rows")
        pairs = sorted({(fault.name, fault.tensor) for step in case.steps for fault in step.faults})
        refused += [why for name, tensor in pairs if (why := self._refused(name, tensor, info))]
        here = f"; here it is {info.narrowed}" if info.narrowed else ""
        return f"{info.name} does not take {', '.join(refused)}{here}" if refused else ""

    # ---- what it is like --------------------------------------------------------------------------------------------

    def features(self, case: Case) -> frozenset[str]:
        config, most = case.config, max(step.tokens for step in case.steps)
        hidden, ranks = int(config["hidden"]), int(config["ranks"])
        found = {f"H>{limit}" for limit in (1, 16, 128, 1024, 4096) if hidden > limit}
        found |= {f"T>{limit}" for limit in (1, 8, 32, 128, 512) if most > limit}
        found |= {f"R>{limit}" for limit in (1, 2, 4) if ranks > limit}
        found |= {"H odd"} if hidden % 2 else {"H % 16"} if hidden % 16 else set()
        found |= {"R not a power of two"} if ranks & (ranks - 1) else set()
        found |= {"T % R"} if any(step.tokens % ranks for step in case.steps) else set()
        found |= {"T=0"} if any(step.tokens == 0 for step in case.steps) else set()
        named = ("dtype", "gamma_dtype", "recipe", "launches", "pace", "capacity", "edge")
        found |= {f"{name}={config[name]}" for name in named if config[name] != FIELDS[name][0]}
        found |= {name for name in ("captured", "out") if config[name]}
        found |= {"residual in place"} if config["out"] == text.IN_PLACE else set()
        found |= {"no residual"} if not config["residual"] else set()
        found |= {"burst"} if config["burst"] else set()
        found |= {"two groups"} if config["groups"] == 2 else set()
        found |= {"magnitude"} if config["magnitude"] else set()
        found |= {f"fault:{name}" for name in case.fault_names}
        found |= {"several steps"} if len(case.steps) > 1 else set()
        found |= {"several buckets"} if case.mode != "eager" and len(case.buckets) > 1 else set()
        return frozenset(found)

    def simplify(self, case: Case) -> Iterator[Case]:
        yield from moves.simpler_runs(case)
        for name, values in FIELDS.items():
            own = case.config[name]
            sizes = name in ("ranks", "hidden")
            for value in [v for v in values if int(v) < int(own)] if sizes else values[: values.index(own)]:
                changed = case.with_config(**{name: value})
                if not changed.config["residual"]:
                    changed = changed.with_config(out=bool(changed.config["out"]))
                    changed = moves.with_fitting_faults(changed, lambda fault: fault.tensor != "residual")
                if changed.mode != RANKS or changed.config["ranks"] != 1:
                    yield changed
        known = {(place.fault, place.tensor) for place in self.places}
        yield from moves.plainer_faults(case, ROW_FAULTS, fits=lambda fault: (fault.name, fault.tensor) in known)

    def sharpen(self, case: Case) -> Iterator[Case]:
        yield from moves.flush_left(case)

    def label_axes(self, case: Case) -> Mapping[str, Labels]:
        return {}

    def keep(self, case: Case, axis: str, labels: Labels) -> Case:
        raise CaseError(f"config.{axis}", "has no labels")

    def launches(self, config: Mapping[str, Scalar]) -> int:
        return int(config["ranks"]) * (1 + int(config["burst"])) * int(config["groups"])

    def cost(self, case: Case, means: Means) -> float:
        graph = case.mode != "eager"
        if means.device != "cpu":
            size = int(case.config["hidden"]) * int(case.config["ranks"])
            drawn = sum(0.003 + 2e-8 * step.tokens * size for step in case.steps)
            return drawn + (0.02 * len(case.buckets) if graph else 0.0)
        seconds = {t: self.cpu_seconds(t, case.config, means) for t in case.buckets}
        each = [seconds[step.tokens] for step in case.steps]
        if not graph:
            return sum(each)
        # A call is two fifths of an eager step. Here: one to warm up a bucket, two a step, and one more for the last.
        return (sum(seconds.values()) + 2 * sum(each) + 2 * each[-1]) * 0.4

    def cpu_seconds(self, tokens: int, config: Mapping[str, Scalar], means: Means) -> float:
        """A case, called twice or three times, fitted to measurements. Interpreted: programs, what each rank sends to
        each other, and elements."""
        ranks, elements = int(config["ranks"]), tokens * int(config["hidden"])
        if not means.interpreted:
            calls = (1 + int(config["burst"])) * int(config["groups"]) * ranks
            return 0.015 + calls * (1.5e-3 + 8e-8 * elements)
        programs = ranks * min(max(1, tokens), max(1, 8 // ranks))
        call = 0.003 * programs + 0.0015 * ranks * ranks + 6e-7 * ranks * elements
        return 0.01 + 2.3 * (1 + int(config["burst"])) * int(config["groups"]) * call + 1e-7 * elements

    def label(self, case: Case) -> str:
        return text.label(case)


SPACES = (AllreduceSpace(),)
