"""The space of `nvfp4_quantize`: configs, dictionary, faults, limits and the reducer's moves. Free of torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from moe_fuzz.case import MODES, Case, Fault, Scalar
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops import moves
from moe_fuzz.ops.nvfp4 import text
from moe_fuzz.ops.nvfp4.presets import MODELS
from moe_fuzz.ops.space import Axis, FaultPlace, Means
from moe_fuzz.ops.validity import (
    require_few_rows,
    require_fields,
    require_labels,
    require_place,
    require_rows,
    require_stream,
    require_values,
)
from moe_fuzz.sizes import any_number

#: Of 16 columns: on both sides of whole tiles of 4 scales, of a warp's and a block's loads.
BLOCKS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 29, 31, 32, 33, 63, 64, 65, 96, 128, 168, 180, 256, 320, 448, 1025)
#: Tiles of swizzled scales are of 128 rows.
ROWS = (1, 2, 3, 0, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 384, 511, 513, 1024,
        4095, 4096, 4097)  # fmt: skip
#: Blocks of rows so narrow that many are cheap: in one tile of 4 scales, and one in the next.
NARROW = (1, 5)

MAX_BLOCKS = 1 << 12
MAX_ELEMENTS = 1 << 26
CPU_BUDGET = 0.2  # seconds an interpreted case may take
HOST_BUDGET = 0.15  # and one whose target is no kernel of Triton's: its judgement takes most of either
CUDA_ELEMENTS = 1 << 22

#: How the global scale is chosen for the data, simplest first: what makes steps exact, what calibration gives, a
#: calibration on data 2^8 times larger or smaller, the least and greatest normal float32, and what has no sense.
GLOBAL_SCALES = ("power", "six", "fitted", "small", "large", "least", "greatest", "zero", "infinite", "nan",
                 "subnormal", "negative")  # fmt: skip

#: What each field of a config may be; `blocks` is a labels string, and stands apart.
FIELDS: Mapping[str, tuple[Scalar, ...]] = {
    "layout": ("linear", "swizzled"),
    "activation": ("none", "silu"),  # fused before the quantizing: x has gate and up-projection
    "dtype": ("float32", "bfloat16", "float16"),
    "global_scale": GLOBAL_SCALES,
    "scale_dtype": ("float32", "bfloat16"),
    "expert_ids": ("none", "int32", "int64"),
    "magnitude": (0, -6, 6, -12, 12),
    "edge": ("right", "left"),
    "out": (False, True),
}

#: On rows of x, the plainest first.
ROW_FAULTS = ("zero_rows", "code_grid", "zero_block", "lone_number", "scale_saturation", "tiny_block", "code_ties",
              "scale_ties", "nonfinite_block", "nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "partial_inf",
              "huge_rows", "ladder", "stale_rows")  # fmt: skip
ID_FAULTS = ("all_to_one", "minus_one_ids", "num_experts_ids", "sentinel_ids", "wide_ids")
_STRIDED = ("noncontiguous", "transposed", "int32_boundary")
_VECTORS = ("expert_ids", "global_scale")  # of more than one number
PLACES = (
    *(FaultPlace(name, "x", on_rows=True) for name in ROW_FAULTS),
    FaultPlace("noncontiguous", "x", on_rows=False),
    FaultPlace("transposed", "x", on_rows=False),
    # Not piecewise: the producer's graph would need real memory for all that lies between the rows.
    FaultPlace("int32_boundary", "x", on_rows=False, max_rows=64, modes=("eager", "graph")),
    FaultPlace("far_columns", "x", on_rows=False, modes=("eager", "graph")),
    FaultPlace("misaligned", "x", on_rows=False),
    *(FaultPlace(name, "expert_ids", on_rows=True, needs="expert_ids") for name in ID_FAULTS),
    *(FaultPlace("noncontiguous", name, on_rows=False, needs="expert_ids") for name in _VECTORS),
)


@dataclass(frozen=True)
class QuantizeSpace:
    """Rows quantized to NVFP4. See ops/space.py for what each member is."""

    op: str = "nvfp4_quantize"
    description: str = "rows as 4-bit codes in blocks of 16 under an 8-bit scale each, and a global scale"

    family: ClassVar[str] = "nvfp4"
    checks: ClassVar[Mapping[str, str]] = text.CHECKS
    faults: ClassVar[Mapping[str, str]] = text.FAULTS
    places: ClassVar[tuple[FaultPlace, ...]] = PLACES
    fields: ClassVar[Mapping[str, tuple[Scalar, ...]]] = FIELDS
    sizes: ClassVar[tuple[str, ...]] = ("blocks",)
    presets: ClassVar[Mapping[str, Mapping[str, Scalar]]] = MODELS
    tensors: ClassVar[Mapping[str, str]] = {
        "x": "input", "global_scale": "input", "expert_ids": "input", "codes": "output", "scales": "output",
    }  # fmt: skip
    simplest: ClassVar[Mapping[str, Scalar]] = {name: values[0] for name, values in FIELDS.items()}

    # ---- what to draw -----------------------------------------------------------------------------------------------

    def axes(self, info: TargetInfo) -> tuple[Axis, ...]:
        return (
            Axis("blocks", [b for b in BLOCKS if b <= info.capabilities.max_blocks], between=any_number),
            *(Axis(name, [v for v in values if not self._without(name, v, info)]) for name, values in FIELDS.items()),
        )

    def _without(self, name: str, value: Scalar, info: TargetInfo) -> bool:
        """Whether the target does not take this value of a field."""
        can = info.capabilities
        return {
            "layout": value not in can.layouts,
            "activation": value != "none" and value not in can.activations,
            "dtype": value not in can.dtypes,
            "global_scale": value not in can.global_scales,
            "scale_dtype": value not in can.scale_dtypes,
            "expert_ids": value != "none" and (not can.expert_scales or (value == "int64" and not can.int64_ids)),
            "out": bool(value) and not can.out,
        }.get(name, False)

    def modes(self, info: TargetInfo) -> tuple[str, ...]:
        return MODES if info.contract.graph else MODES[:1]

    def complete(self, config: Mapping[str, Scalar], info: TargetInfo) -> dict[str, Scalar]:
        return {**config, "blocks": str(Labels.range(int(config["blocks"])))}

    def tokens(self, config: Mapping[str, Scalar], means: Means) -> tuple[int, ...]:
        if means.device == "cpu":
            most = means.budget(CPU_BUDGET, HOST_BUDGET)
            return tuple(t for t in ROWS if self.cpu_seconds(t, config, means) <= most) or ROWS[:1]
        return tuple(t for t in ROWS if t * 16 * self._count(config) <= CUDA_ELEMENTS)

    def roomy(self, config: dict[str, Scalar], means: Means) -> dict[str, Scalar]:
        """With fewer blocks where it has no room for one row: a row of swizzled scales costs what 128 do."""
        if any(self.tokens(config, means)):
            return config
        fewer = ({**config, "blocks": str(Labels.range(count))} for count in reversed(BLOCKS)
                 if count < self._count(config))  # fmt: skip
        return next((one for one in fewer if any(self.tokens(one, means))), config)

    def seams(self, config: Mapping[str, Scalar], tokens: Sequence[int]) -> list[int]:
        """Swizzled scales lie in tiles of 128 rows. Of the first ones nothing shows how far it is to the next. Wide
        rows show no more of that, and of so many, a kernel with a program for each block takes seconds."""
        if config["layout"] != "swizzled" or self._count(config) > max(NARROW):
            return []
        return [count for count in tokens if count > 128]

    def seamed(
        self, config: dict[str, Scalar], allowed: Mapping[str, Sequence[Scalar]], chosen: random.Random
    ) -> dict[str, Scalar]:  # fmt: skip
        """The config with rows so narrow that many are cheap, if scales are swizzled. allowed: of each axis, the values
        that may be drawn."""
        narrow = [count for count in NARROW if count in allowed["blocks"]]
        if config["layout"] != "swizzled" or not narrow:
            return config
        return {**config, "blocks": str(Labels.range(chosen.choice(narrow)))}

    def affordable(self, case: Case, means: Means) -> bool:
        return means.device != "cpu" or self.cost(case, means) <= means.budget(CPU_BUDGET, HOST_BUDGET)

    def places_for(self, config: Mapping[str, Scalar], info: TargetInfo) -> tuple[FaultPlace, ...]:
        return tuple(p for p in self.places if not self._refused(p.fault, p.tensor, info)
                     and self._has_room(p.fault, p.needs, config))  # fmt: skip

    def _has_room_for(self, config: Mapping[str, Scalar], fault: Fault) -> bool:
        return fault.tensor not in _VECTORS or self._has_room(fault.name, "expert_ids", config)

    def _has_room(self, fault: str, needs: str | None, config: Mapping[str, Scalar]) -> bool:
        """Whether the config has what the fault is laid on: ids beyond 32 bits need more of them."""
        return (not needs or config[needs] != "none") and (fault != "wide_ids" or config["expert_ids"] == "int64")

    def _refused(self, fault: str, tensor: str, info: TargetInfo) -> str:
        """Why the target does not take the fault; empty if it does."""
        can, contract = info.capabilities, info.contract
        if fault in ID_FAULTS[1:] and {"minus_one_ids": "minus_one", "num_experts_ids": "num_experts"}.get(
            fault, "garbage") not in contract.accepts:  # fmt: skip
            return f"rows of no expert ({fault})"
        any_strides = fault == "far_columns" or (fault in _STRIDED and tensor in _VECTORS)
        if (fault in _STRIDED and not can.strided) or (any_strides and not can.any_strides):
            return f"strided {tensor}"
        return "misaligned x" if fault == "misaligned" and can.alignment > 1 else ""

    # ---- what is valid ----------------------------------------------------------------------------------------------

    def validate(self, case: Case) -> None:
        require_fields(case, {"blocks", *FIELDS})
        blocks = require_labels(case, "blocks")
        if not 1 <= len(blocks) <= MAX_BLOCKS:
            raise CaseError("config.blocks", f'must name 1 to {MAX_BLOCKS} blocks of 16 columns as a string like "0-5"')
        require_values(case, FIELDS)
        for index, step in enumerate(case.steps):
            if step.tokens * 16 * len(blocks) > MAX_ELEMENTS:
                raise CaseError(f"steps[{index}].rows", f"{step.tokens} rows of {len(blocks)} blocks are too many")
            for number, fault in enumerate(step.faults):
                where = f"steps[{index}].faults[{number}]"
                place = require_place(self, case, fault, where)
                require_few_rows(place, step.tokens, where)
                require_rows(place, fault, where)
                if not self._has_room(fault.name, place.needs, case.config):
                    wide = " int64" if fault.name == "wide_ids" else ""
                    raise CaseError(where, f"{fault.name} needs config.{place.needs}{wide}")
                require_stream(fault, where)

    def refusal(self, case: Case, info: TargetInfo) -> str:
        refused = [f"{name}={case.config[name]}" for name in FIELDS if self._without(name, case.config[name], info)]
        if self._count(case.config) > info.capabilities.max_blocks:
            refused.append(f"{self._count(case.config)} blocks")
        if not info.capabilities.zero_tokens and not all(step.tokens for step in case.steps):
            refused.append("no rows")
        laid = sorted({(fault.tensor, fault.name) for step in case.steps for fault in step.faults})
        refused += [why for tensor, name in laid if (why := self._refused(name, tensor, info))]
        return f"{info.name} does not take {', '.join(refused)}" if refused else ""

    # ---- what it is like --------------------------------------------------------------------------------------------

    def features(self, case: Case) -> frozenset[str]:
        config, count, most = case.config, self._count(case.config), max(step.tokens for step in case.steps)
        found = {f"K>{16 * limit}" for limit in (1, 4, 32, 128) if count > limit}
        found |= {f"T>{limit}" for limit in (1, 16, 32, 128, 512) if most > limit}
        found |= {"K % 64"} if count % 4 else set()
        found |= {"T % 128"} if any(step.tokens % 128 for step in case.steps) else set()
        found |= {"T=0"} if any(step.tokens == 0 for step in case.steps) else set()
        found |= {f"{name}={config[name]}" for name in FIELDS if name != "out" and config[name] != FIELDS[name][0]}
        found |= {"out"} if config["out"] else set()
        found |= {f"fault:{name}" for name in case.fault_names}
        found |= {"several steps"} if len(case.steps) > 1 else set()
        found |= {"several buckets"} if case.mode != "eager" and len(case.buckets) > 1 else set()
        return frozenset(found)

    def simplify(self, case: Case) -> Iterator[Case]:
        yield from moves.simpler_runs(case, MODES)
        labels = self.label_axes(case)["blocks"]
        for fewer in (count for count in BLOCKS if count < len(labels)):
            yield self.keep(case, "blocks", labels.first(fewer))
        for name, values in FIELDS.items():
            for value in values[: values.index(case.config[name])]:
                changed = case.with_config(**{name: value})
                room = partial(self._has_room_for, changed.config)
                yield moves.with_fitting_faults(changed, room)
        yield from moves.plainer_faults(
            case, ROW_FAULTS, ID_FAULTS, fits=partial(self._has_room_for, case.config)
        )

    def sharpen(self, case: Case) -> Iterator[Case]:
        yield from moves.flush_left(case)

    def label_axes(self, case: Case) -> Mapping[str, Labels]:
        return {"blocks": Labels.parse(str(case.config["blocks"]))}

    def keep(self, case: Case, axis: str, labels: Labels) -> Case:
        return case.with_config(**{axis: str(labels)})

    def cost(self, case: Case, means: Means) -> float:
        graph = case.mode != "eager"
        if means.device != "cpu":
            drawn = sum(0.002 + 2e-8 * step.tokens * 16 * self._count(case.config) for step in case.steps)
            return drawn + (0.02 * len(case.buckets) if graph else 0.0)
        seconds = {t: self.cpu_seconds(t, case.config, means) for t in case.buckets}
        each = [seconds[step.tokens] for step in case.steps]
        if not graph:
            return sum(each)
        # A call is half of an eager step. Here: one to warm up a bucket, two a step, and one more for the last.
        return (sum(seconds.values()) + 2 * sum(each) + each[-1]) / 2

    def cpu_seconds(self, tokens: int, config: Mapping[str, Scalar], means: Means) -> float:
        """A case, called twice, fitted to measurements. An interpreted kernel's time is that of the padded tile."""
        blocks = self._count(config)
        elements = 16 * tokens * blocks
        if config["layout"] == "swizzled":
            elements = 16 * (-(-tokens // 128) * 128) * (-(-blocks // 4) * 4)
        halves = 2 if config["activation"] != "none" else 1
        if not means.interpreted:
            return 0.014 + 1e-6 * halves * tokens * 16 * blocks
        return 2 * (0.015 + 2.5e-7 * halves * elements) + 5e-7 * halves * tokens * 16 * blocks

    def label(self, case: Case) -> str:
        return text.label(case)

    def _count(self, config: Mapping[str, Scalar]) -> int:
        return len(Labels.parse(str(config["blocks"])))


SPACES = (QuantizeSpace(),)
