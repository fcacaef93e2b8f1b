"""The space of `allreduce_rmsnorm`: configs, dictionary, faults, limits and the reducer's moves. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from moe_fuzz.case import ALL_MODES, MODES, RANKS, Case, Fault, Scalar
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops.allreduce import text
from moe_fuzz.ops.allreduce.presets import MODELS
from moe_fuzz.ops.space import Axis, FaultPlace

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
    "capacity": ("exact", "double", "half"),  # of the ranks' buffers: the largest message of the case, or other sizes
    "captured": (False, True),  # in the mode ranks: each rank replays graphs
    "edge": ("right", "left"),
    "out": (False, True),
}

#: On rows, the plainest first.
ROW_FAULTS = ("zero_rows", "nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "partial_inf", "negative_zeros",
              "negative_subnormals", "ladder", "overflowing_squares", "huge_rows", "stale_rows")  # fmt: skip
_ONE = ("nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "partial_inf", "negative_subnormals",
        "overflowing_squares", "huge_rows", "ladder")  # fmt: skip
#: x0, x1: of one rank, that of the first or the last. Static buffers know each fault in one place: the first here.
PLACES = (
    *(FaultPlace(name, "x0", on_rows=True) for name in _ONE),
    *(FaultPlace(name, "x", on_rows=True) for name in ("zero_rows", "negative_zeros", "stale_rows")),
    *(FaultPlace(name, "x1", on_rows=True) for name in _ONE),
    *(FaultPlace(name, "x", on_rows=True) for name in _ONE),
    *(FaultPlace(name, "residual", on_rows=True, needs="residual")
      for name in ROW_FAULTS if name not in ("stale_rows",)),
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
    sizes: ClassVar[tuple[str, ...]] = ("hidden",)
    presets: ClassVar[Mapping[str, Mapping[str, Scalar]]] = MODELS
    tensors: ClassVar[Mapping[str, str]] = {
        "x": "input", "residual": "input", "gamma": "input", "normed": "output", "residual_out": "output",
    }  # fmt: skip
    simplest: ClassVar[Mapping[str, Scalar]] = {name: values[0] for name, values in FIELDS.items()}

    # ---- what to draw -----------------------------------------------------------------------------------------------

    def axes(self, info: TargetInfo) -> tuple[Axis, ...]:
        return tuple(Axis(name, [v for v in values if not self._without(name, v, info)] or values[:1])
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
            "capacity": value == "half" and not can.cuts,
            "captured": bool(value) and not info.contract.graph,
            "out": bool(value) and not can.out,
        }.get(name, False)

    def modes(self, info: TargetInfo) -> tuple[str, ...]:
        found = (MODES if info.contract.graph else MODES[:1]) if info.capabilities.launches else ()
        return (*found, RANKS) if info.capabilities.max_processes > 1 else found

    def complete(self, config: Mapping[str, Scalar], info: TargetInfo) -> dict[str, Scalar]:
        whole = dict(config)
        if int(whole["burst"]) > 8 and int(whole["hidden"]) > 256:
            whole["burst"] = 8  # a thousand calls are for small messages
        return whole

    def tokens(self, config: Mapping[str, Scalar], device: str) -> tuple[int, ...]:
        if device == "cpu":
            return tuple(t for t in TOKENS if self.cpu_seconds(t, config) <= CPU_BUDGET) or TOKENS[:5]
        row = int(config["hidden"]) * (4 if config["dtype"] == "float32" else 2)
        near = {cap // row + more for cap in CAPS for more in (-1, 0, 1)}
        found = (*TOKENS, *sorted(t for t in near if 0 < t <= TOKENS[-1] and t not in TOKENS))
        return tuple(t for t in found if t * int(config["hidden"]) * int(config["ranks"]) <= CUDA_ELEMENTS)

    def affordable(self, case: Case, device: str) -> bool:
        return device != "cpu" or self.cost(case, device) <= CPU_BUDGET

    def places_for(self, config: Mapping[str, Scalar], info: TargetInfo) -> tuple[FaultPlace, ...]:
        return tuple(p for p in self.places if not self._refused(p.fault, p.tensor, info)
                     and (not p.needs or config[p.needs]))  # fmt: skip

    def _refused(self, fault: str, tensor: str, info: TargetInfo) -> str:
        """Why the target does not take the fault; empty if it does."""
        return f"misaligned {tensor}" if fault == "misaligned" and info.capabilities.alignment > 1 else ""

    # ---- what is valid ----------------------------------------------------------------------------------------------

    def validate(self, case: Case) -> None:
        config = case.config
        for key in sorted(set(config) ^ set(FIELDS)):
            raise CaseError(
                f"config.{key}",
                "is missing" if key in FIELDS else "unknown field",
                f"the fields of {self.op} are {', '.join(sorted(FIELDS))}",
            )
        for key, values in FIELDS.items():
            value = config[key]
            if not any(value == v and type(value) is type(v) for v in values):
                raise CaseError(f"config.{key}", f"must be one of {', '.join(map(repr, values))}, not {value!r}")
        if case.mode == RANKS and config["ranks"] == 1:
            raise CaseError("config.ranks", "must be more than 1 in mode ranks")
        for index, step in enumerate(case.steps):
            if step.tokens * int(config["hidden"]) * int(config["ranks"]) > MAX_ELEMENTS:
                raise CaseError(f"steps[{index}].rows", f"{step.tokens} rows of {config['hidden']} are too many")
            for number, fault in enumerate(step.faults):
                self._validate_fault(case, fault, f"steps[{index}].faults[{number}]")

    def _validate_fault(self, case: Case, fault: Fault, where: str) -> None:
        place = next((p for p in self.places if (p.fault, p.tensor) == (fault.name, fault.tensor)), None)
        if place is None:
            raise CaseError(
                where,
                f"{self.op} knows no fault {fault.name!r} on {fault.tensor!r}",
                f"`moe-fuzz list faults` shows them: {', '.join(self.faults)}",
            )
        if place.on_rows != bool(fault.rows):
            raise CaseError(f"{where}.rows", "must name rows" if place.on_rows else "must name no rows")
        if place.needs and not case.config[place.needs]:
            raise CaseError(where, f"{fault.name} on {fault.tensor} needs config.{place.needs}")
        if fault.stream is not None and fault.name != "stale_rows":
            raise CaseError(f"{where}.stream", "only stale_rows hold what another step had")

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
        return f"{info.name} does not take {', '.join(refused)}" if refused else ""

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
        found |= {"no residual"} if not config["residual"] else set()
        found |= {"burst"} if config["burst"] else set()
        found |= {"two groups"} if config["groups"] == 2 else set()
        found |= {"magnitude"} if config["magnitude"] else set()
        found |= {f"fault:{name}" for name in case.fault_names}
        found |= {"several steps"} if len(case.steps) > 1 else set()
        found |= {"several buckets"} if case.mode != "eager" and len(case.buckets) > 1 else set()
        return frozenset(found)

    def simplify(self, case: Case) -> Iterator[Case]:
        for mode in ALL_MODES[: ALL_MODES.index(case.mode)]:
            yield replace(case, mode=mode)
        if any(step.stream is not None for step in case.steps):  # numbered anew, where nothing hangs on old values
            yield replace(case, steps=tuple(replace(step, stream=None) for step in case.steps))
        for name, values in FIELDS.items():
            own = case.config[name]
            sizes = name in ("ranks", "hidden")
            for value in [v for v in values if int(v) < int(own)] if sizes else values[: values.index(own)]:
                changed = self._without_orphans(case.with_config(**{name: value}))
                if changed.mode != RANKS or changed.config["ranks"] != 1:
                    yield changed
        for index, step in enumerate(case.steps):
            for number, fault in enumerate(step.faults):
                for other in self._plainer(fault):
                    faults = (*step.faults[:number], other, *step.faults[number + 1 :])
                    yield case.with_step(index, replace(step, faults=faults))

    def _plainer(self, fault: Fault) -> list[Fault]:
        """A fault on rows replaced by those listed before it: one bug, seen through many faults, is one finding."""
        names = ROW_FAULTS[: ROW_FAULTS.index(fault.name)] if fault.name in ROW_FAULTS else ()
        known = {(place.fault, place.tensor) for place in self.places}
        found = [replace(fault, name=name, stream=None) for name in names if (name, fault.tensor) in known]
        return found + ([replace(fault, stream=None)] if fault.stream is not None else [])

    def sharpen(self, case: Case) -> Iterator[Case]:
        if case.config["edge"] == "right":  # an access before a tensor is seen at any size only if it lies flush left
            yield case.with_config(edge="left")

    def label_axes(self, case: Case) -> Mapping[str, Labels]:
        return {}

    def keep(self, case: Case, axis: str, labels: Labels) -> Case:
        raise CaseError(f"config.{axis}", "has no labels")

    def cost(self, case: Case, device: str) -> float:
        graph = case.mode != "eager"
        if device != "cpu":
            size = int(case.config["hidden"]) * int(case.config["ranks"])
            drawn = sum(0.003 + 2e-8 * step.tokens * size for step in case.steps)
            return drawn + (0.02 * len(case.buckets) if graph else 0.0)
        seconds = {t: self.cpu_seconds(t, case.config) for t in case.buckets}
        each = [seconds[step.tokens] for step in case.steps]
        if not graph:
            return sum(each)
        # A call is two fifths of an eager step. Here: one to warm up a bucket, two a step, and one more for the last.
        return (sum(seconds.values()) + 2 * sum(each) + 2 * each[-1]) * 0.4

    def cpu_seconds(self, tokens: int, config: Mapping[str, Scalar]) -> float:
        """An interpreted case, called twice or three times, fitted to measurements: programs, what each rank sends to
        each other, and elements."""
        ranks, elements = int(config["ranks"]), tokens * int(config["hidden"])
        programs = ranks * min(max(1, tokens), max(1, 8 // ranks))
        call = 0.003 * programs + 0.0015 * ranks * ranks + 6e-7 * ranks * elements
        return 0.01 + 2.3 * (1 + int(config["burst"])) * int(config["groups"]) * call + 1e-7 * elements

    def label(self, case: Case) -> str:
        return text.label(case)

    def _without_orphans(self, case: Case) -> Case:
        """Without the faults that the config no longer has room for."""
        if case.config["residual"]:
            return case
        for index, step in enumerate(case.steps):
            kept = tuple(fault for fault in step.faults if fault.tensor != "residual")
            if kept != step.faults:
                case = case.with_step(index, replace(step, faults=kept))
        return case


SPACES = (AllreduceSpace(),)
