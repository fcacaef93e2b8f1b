"""The space of `align`: configs, dictionary, faults, limits and the reducer's moves. Free of torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from moe_fuzz.case import MODES, Case, Fault, Scalar
from moe_fuzz.contract import Capabilities, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops import moves
from moe_fuzz.ops.align import text
from moe_fuzz.ops.align.presets import MODELS
from moe_fuzz.ops.space import Axis, FaultPlace, Means
from moe_fuzz.ops.validity import (
    require_experts,
    require_few_rows,
    require_fields,
    require_integer,
    require_place,
    require_rows,
    require_stream,
    require_values,
)
from moe_fuzz.sizes import any_number

#: Never uniform random sizes: a warp, a block of threads and a scan end at each of these, or right before or after.
EXPERTS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 60, 63, 64, 65, 67, 96, 127, 128, 129, 160, 192, 255, 256, 257,
           288, 384, 512, 575, 576, 992, 1023, 1024, 1025, 1100, 2048, 2049, 4095, 4096, 4097, 8191, 8192)  # fmt: skip
TOP_K = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 17, 22, 31, 32, 33, 48, 63, 64)
BLOCK_SIZES = (16, 8, 4, 2, 1, 32, 64, 128, 256, 3, 7, 12, 48, 100)
#: With the dictionary of top_k, tokens times top_k stands on both sides of 64, 256, 1024 and 65536 slots.
TOKENS = (1, 2, 3, 0, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513,
          1023, 1024, 1025, 2048, 4095, 4096, 4097, 8191, 16385, 65537)  # fmt: skip
MAPS = ("none", "shard", "permuted", "local", "replicas", "spares")

MAX_EXPERTS = 8192
MAX_TOP_K = 64
MAX_BLOCK = 1024
MAX_ELEMENTS = 1 << 27
CPU_BUDGET = 0.2  # seconds an interpreted case may take
HOST_BUDGET = 0.03  # and one whose target is no kernel of Triton's
#: T x E on a device: the ids of a row are drawn among all experts.
CUDA_ELEMENTS = 1 << 23

#: What each field of a config may be; `experts` is a labels string, top_k and block_size are numbers, and stand apart.
FIELDS: Mapping[str, tuple[Scalar, ...]] = {
    "expert_map": MAPS,
    "ids_dtype": ("int32", "int64"),
    "edge": ("right", "left"),
    "out": (False, True),
}

#: On rows of ids, the plainest first.
ROW_FAULTS = ("zero_rows", "all_to_one", "hot_expert", "duplicate_experts", "empty_experts", "minus_one_ids",
              "num_experts_ids", "sentinel_ids", "wide_ids", "stale_rows")  # fmt: skip
#: Fault -> the dialect that a target must take, see Contract.accepts.
_DIALECTS = {"minus_one_ids": "minus_one", "num_experts_ids": "num_experts", "sentinel_ids": "garbage",
             "wide_ids": "garbage"}  # fmt: skip
_DUPLICATES = ("zero_rows", "all_to_one", "hot_expert", "duplicate_experts")  # a row may name an expert twice
#: What stands in the rows of a static buffer past the tokens, where it is not what was there: see moe_fuzz.sequences.
TAILS = ("", "", "", "minus_one_ids", "minus_one_ids", "num_experts_ids", "sentinel_ids", "zero_rows")
_STRIDED = ("noncontiguous", "transposed", "int32_boundary")
_MAP = "expert_map"
_OTHER = ("local", "replicas", "spares")  # maps that make num_experts another number than that of the ids
PLACES = (
    *(FaultPlace(name, "ids", on_rows=True) for name in ROW_FAULTS),
    FaultPlace("noncontiguous", "ids", on_rows=False),
    FaultPlace("transposed", "ids", on_rows=False),
    # Not piecewise: the producer's graph would need real memory for all that lies between the rows.
    FaultPlace("int32_boundary", "ids", on_rows=False, max_rows=64, modes=("eager", "graph")),
    FaultPlace("far_columns", "ids", on_rows=False, modes=("eager", "graph")),
    FaultPlace("misaligned", "ids", on_rows=False),
    FaultPlace("exact_count", "ids", on_rows=False),
    FaultPlace("noncontiguous", _MAP, on_rows=False, needs=_MAP),
)


@dataclass(frozen=True)
class AlignSpace:
    """The slots of a routing decision sorted by expert into whole blocks. See ops/space.py for what each member is."""

    op: str = "align"
    description: str = "the slots of a routing decision sorted by expert, each padded to whole blocks"

    family: ClassVar[str] = "align"
    checks: ClassVar[Mapping[str, str]] = text.CHECKS
    faults: ClassVar[Mapping[str, str]] = text.FAULTS
    places: ClassVar[tuple[FaultPlace, ...]] = PLACES
    fields: ClassVar[Mapping[str, tuple[Scalar, ...]]] = FIELDS
    sizes: ClassVar[tuple[str, ...]] = ("experts", "top_k", "block_size")
    presets: ClassVar[Mapping[str, Mapping[str, Scalar]]] = MODELS
    tails: ClassVar[tuple[str, ...]] = TAILS
    tensors: ClassVar[Mapping[str, str]] = {
        "ids": "input", "expert_map": "input", "sorted_token_ids": "output", "expert_ids": "output",
        "num_tokens_post_padded": "output", "inverse": "output",
    }  # fmt: skip
    simplest: ClassVar[Mapping[str, Scalar]] = {
        "block_size": BLOCK_SIZES[0], **{name: values[0] for name, values in FIELDS.items()}
    }  # fmt: skip

    # ---- what to draw -----------------------------------------------------------------------------------------------

    def axes(self, info: TargetInfo) -> tuple[Axis, ...]:
        can = info.capabilities
        return (
            Axis("experts", can.numbers_of_experts(EXPERTS), between=can.takes_experts),
            Axis("top_k", [k for k in TOP_K if k <= can.max_top_k], between=any_number),
            Axis("block_size", [b for b in BLOCK_SIZES if _takes_block(can, b)] or can.block_sizes),
            Axis("expert_map", _maps(can)),
            Axis("ids_dtype", ("int32", "int64") if can.int64_ids else ("int32",)),
            Axis("edge", FIELDS["edge"]),
            Axis("out", (False, True) if can.out else (False,)),
        )

    def modes(self, info: TargetInfo) -> tuple[str, ...]:
        return MODES if info.contract.graph else MODES[:1]

    def complete(self, config: Mapping[str, Scalar], info: TargetInfo) -> dict[str, Scalar]:
        whole = self.mended({**config, "experts": str(Labels.range(int(config["experts"])))})
        return {**whole, _MAP: "permuted"} if _most_experts(whole) > _limit(info) else whole

    def tokens(self, config: Mapping[str, Scalar], means: Means) -> tuple[int, ...]:
        if means.device == "cpu":
            most = means.budget(CPU_BUDGET, HOST_BUDGET)
            return tuple(t for t in TOKENS if self.cpu_seconds(t, config, means) <= most)
        count = len(Labels.parse(str(config["experts"])))
        return tuple(t for t in TOKENS if t * count <= CUDA_ELEMENTS)

    @staticmethod
    def seams(config: Mapping[str, Scalar], tokens: Sequence[int]) -> list[int]:
        """A block of threads has 1024 slots. Of more, one begins to rank where others have counted."""
        return [count for count in tokens if count * int(config["top_k"]) > 1024]

    @staticmethod
    def crowded(
        config: dict[str, Scalar], allowed: Mapping[str, Sequence[Scalar]], info: TargetInfo, means: Means,
        chosen: random.Random,
    ) -> dict[str, Scalar]:  # fmt: skip
        """With thousands of experts, and so many slots a token that a CPU affords several blocks of threads: of so many
        experts one adds up the counts of each other in a turn of its own."""
        many = [int(count) for count in allowed["experts"] if int(count) > 2048]
        slots = [int(count) for count in allowed["top_k"] if int(count) >= 16]
        if not many or not slots:
            return config
        return {**config, "experts": str(Labels.range(chosen.choice(many))), "top_k": chosen.choice(slots)}

    def affordable(self, case: Case, means: Means) -> bool:
        return means.device != "cpu" or self.cost(case, means) <= means.budget(CPU_BUDGET, HOST_BUDGET)

    def places_for(self, config: Mapping[str, Scalar], info: TargetInfo) -> tuple[FaultPlace, ...]:
        return tuple(p for p in self.places if not self._refused(p.fault, p.tensor, info)
                     and _has_room(config, p.fault, p.tensor))  # fmt: skip

    def _refused(self, fault: str, tensor: str, info: TargetInfo) -> str:
        """Why the target does not take the fault; empty if it does."""
        can, contract = info.capabilities, info.contract
        if fault in _DIALECTS and _DIALECTS[fault] not in contract.accepts:
            return f"ids of no expert ({fault})"
        if fault in _DUPLICATES and not can.duplicate_ids:
            return "an expert twice in a row"
        any_strides = fault == "far_columns" or tensor == _MAP
        if (fault in _STRIDED and not can.strided) or (any_strides and not can.any_strides):
            return f"strided {tensor}"
        return "misaligned ids" if fault == "misaligned" and can.alignment > 1 else ""

    # ---- what is valid ----------------------------------------------------------------------------------------------

    def validate(self, case: Case) -> None:
        require_fields(case, {"experts", "top_k", "block_size", *FIELDS})
        labels = require_experts(case, MAX_EXPERTS)
        require_integer(case, "top_k", min(MAX_TOP_K, len(labels)))
        require_integer(case, "block_size", MAX_BLOCK)
        require_values(case, FIELDS)
        if _most_experts(case.config) > MAX_EXPERTS:
            raise CaseError(f"config.{_MAP}", f"leaves no room for spares beside {len(labels)} experts")
        for index, step in enumerate(case.steps):
            if step.tokens * len(labels) > MAX_ELEMENTS:
                raise CaseError(f"steps[{index}].rows", f"{step.tokens} rows x {len(labels)} experts are too many")
            for number, fault in enumerate(step.faults):
                where = f"steps[{index}].faults[{number}]"
                place = require_place(self, case, fault, where)
                require_few_rows(place, step.tokens, where)
                require_rows(place, fault, where)
                if not _has_room(case.config, fault.name, fault.tensor):
                    needed = f"config.{_MAP}" if fault.tensor == _MAP else "config.ids_dtype int64"
                    raise CaseError(where, f"{fault.name} on {fault.tensor} needs {needed}")
                require_stream(fault, where)

    def refusal(self, case: Case, info: TargetInfo) -> str:
        refused = [what for hit, what in self._refusals(case, info) if hit]
        for tensor, name in sorted({(fault.tensor, fault.name) for step in case.steps for fault in step.faults}):
            refused += [why] if (why := self._refused(name, tensor, info)) else []
        return f"{info.name} does not take {', '.join(refused)}" if refused else ""

    def _refusals(self, case: Case, info: TargetInfo) -> Iterator[tuple[object, str]]:
        can, config = info.capabilities, case.config
        count = len(case.experts)
        yield not can.takes_experts(count), f"{count} experts"
        yield can.takes_experts(count) and _most_experts(config) > _limit(info), f"twice {count} experts"
        yield int(config["top_k"]) > can.max_top_k, f"top_k {config['top_k']}"
        yield not _takes_block(can, int(config["block_size"])), f"block_size {config['block_size']}"
        yield config["expert_map"] not in _maps(can), f"expert_map={config['expert_map']}"
        yield config["ids_dtype"] == "int64" and not can.int64_ids, "int64 ids"
        yield config["out"] and not can.out, "out"
        yield not can.zero_tokens and not all(step.tokens for step in case.steps), "no tokens"

    # ---- what it is like --------------------------------------------------------------------------------------------

    def features(self, case: Case) -> frozenset[str]:
        config, count, top_k, block = case.config, len(case.experts), int(case.config["top_k"]), self._block(case)
        most = max(step.tokens for step in case.steps)
        found = {f"E>{limit}" for limit in (1, 8, 32, 64, 128, 512, 1023, 2048) if count > limit}
        found |= {f"k>{limit}" for limit in (1, 4, 8, 16, 32) if top_k > limit}
        found |= {f"T>{limit}" for limit in (1, 8, 32, 128, 512) if most > limit}
        found |= {f"slots>{limit}" for limit in (256, 1023, 32767, 65535) if most * top_k > limit}
        found |= {"slots<E"} if most * top_k < count else set()
        found |= {"T=0"} if any(step.tokens == 0 for step in case.steps) else set()
        found |= {"E not a power of two"} if count & (count - 1) else set()
        found |= {"block=1"} if block == 1 else {"block not a power of two"} if block & (block - 1) else set()
        found |= {f"{name}={config[name]}" for name in ("expert_map", "ids_dtype", "edge")
                  if config[name] != FIELDS[name][0]}  # fmt: skip
        found |= {"out"} if config["out"] else set()
        found |= {f"fault:{name}" for name in case.fault_names}
        found |= {"several steps"} if len(case.steps) > 1 else set()
        found |= {"several buckets"} if case.mode != "eager" and len(case.buckets) > 1 else set()
        return frozenset(found)

    def simplify(self, case: Case) -> Iterator[Case]:
        yield from moves.simpler_runs(case, MODES)
        top_k, block = int(case.config["top_k"]), self._block(case)
        for smaller in (k for k in TOP_K if k < top_k):
            yield case.with_config(top_k=smaller)
        for fewer in (e for e in EXPERTS if e < len(case.experts)):
            yield self.keep(case, "experts", case.experts.first(fewer))
        for plainer in BLOCK_SIZES[: BLOCK_SIZES.index(block) if block in BLOCK_SIZES else None]:
            yield case.with_config(block_size=plainer)
        for name, values in FIELDS.items():
            for value in values[: values.index(case.config[name])]:
                changed = case.with_config(**{name: value})
                room = partial(_has_room_for, changed.config)
                yield moves.with_fitting_faults(changed, room)
        yield from moves.plainer_faults(case, ROW_FAULTS, fits=partial(_has_room_for, case.config))

    def sharpen(self, case: Case) -> Iterator[Case]:
        yield from moves.flush_left(case)

    def label_axes(self, case: Case) -> Mapping[str, Labels]:
        return {"experts": case.experts}

    def keep(self, case: Case, axis: str, labels: Labels) -> Case:
        return replace(case, config=self.mended({**case.config, axis: str(labels)}))

    def mended(self, config: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """The config with what depends on the number of experts cut down to it."""
        count = len(Labels.parse(str(config["experts"])))
        return {**config, "top_k": min(int(config["top_k"]), count)}

    def cost(self, case: Case, means: Means) -> float:
        graph = case.mode != "eager"
        if means.device != "cpu":
            drawn = sum(0.002 + 1e-7 * step.tokens * len(case.experts) for step in case.steps)
            return drawn + (0.02 * len(case.buckets) if graph else 0.0)
        seconds = {t: self.cpu_seconds(t, case.config, means) for t in case.buckets}
        each = [seconds[step.tokens] for step in case.steps]
        if not graph:
            return sum(each)
        # A call is half of an eager step. Here: one to warm up a bucket, two a step, and one more for the last.
        return (sum(seconds.values()) + 2 * sum(each) + each[-1]) / 2

    def cpu_seconds(self, tokens: int, config: Mapping[str, Scalar], means: Means) -> float:
        """A case, called twice, fitted to measurements. Interpreted: programs of 1024 slots, then what each program's
        loops go over: the room for sorted ids, and the blocks of the fullest expert, which may have all slots. Else it
        is the judgement of each slot."""
        count, block = len(Labels.parse(str(config["experts"]))), int(config["block_size"])
        slots = tokens * int(config["top_k"])
        if not means.interpreted:
            return 0.012 + 8e-7 * slots + 2e-8 * tokens * count
        room = min(slots, _most_experts(config)) * block + max(0, slots - _most_experts(config))
        programs = -(-slots // 1024)
        call = 0.018 + 0.025 * (programs if programs > 1 else 0) + 8e-7 * room + 2.5e-4 * slots / block
        return 2 * call + 2e-7 * tokens * count

    def label(self, case: Case) -> str:
        return text.label(case)

    def _block(self, case: Case) -> int:
        return int(case.config["block_size"])


def _has_room(config: Mapping[str, Scalar], fault: str, tensor: str) -> bool:
    """Whether the config has what the fault is laid on: ids beyond 32 bits need more of them."""
    if tensor == _MAP:
        return config[_MAP] != MAPS[0]
    return fault != "wide_ids" or config["ids_dtype"] == "int64"


def _has_room_for(config: Mapping[str, Scalar], fault: Fault) -> bool:
    return _has_room(config, fault.name, fault.tensor)


def _most_experts(config: Mapping[str, Scalar]) -> int:
    """At most so many experts have blocks made for them."""
    return len(Labels.parse(str(config["experts"]))) * (2 if config[_MAP] == "spares" else 1)


def _limit(info: TargetInfo) -> int:
    return min(MAX_EXPERTS, info.capabilities.max_experts)


def _takes_block(can: Capabilities, size: int) -> bool:
    return not can.block_sizes or size in can.block_sizes


def _maps(can: Capabilities) -> tuple[str, ...]:
    if not can.expert_map:
        return MAPS[:1]
    return MAPS if can.fewer_than_map else tuple(name for name in MAPS if name not in _OTHER)


SPACES = (AlignSpace(),)
