"""The space of the experts ops: configs, dictionary, faults and limits. Free of torch."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from moe_fuzz.case import MODES, Case, Scalar
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops.experts import cost, moves, text
from moe_fuzz.ops.experts.fields import FIELDS, OFTEN, SIZES, config_of, limits_of
from moe_fuzz.ops.experts.presets import MODELS
from moe_fuzz.ops.moves import flush_left
from moe_fuzz.ops.space import Axis, FaultPlace, Means
from moe_fuzz.ops.validity import require_place, require_rows, require_stream
from moe_fuzz.sizes import any_number

#: Never uniform random sizes: blocks, vectors and warps end at each of these, or right before or after.
EXPERTS = (1, 2, 3, 5, 7, 8, 10, 13, 16, 17, 33, 60, 64, 67, 96, 127, 128, 129, 160, 192, 256, 257, 320, 512)
TOP_K = (1, 2, 3, 4, 5, 6, 8, 9, 10, 16, 22, 32)
HIDDEN = (16, 32, 64, 128, 1, 2, 3, 7, 8, 15, 17, 24, 31, 33, 40, 48, 63, 65, 72, 96, 100, 127, 129, 144, 176, 192, 255,
          256, 257, 320, 360, 384, 512, 513, 720, 1024, 1440, 2048, 2688, 2880, 3584, 4096, 5120, 7168)  # fmt: skip
INTERMEDIATE = (16, 32, 64, 128, 1, 2, 3, 7, 8, 15, 17, 24, 31, 33, 40, 48, 63, 65, 72, 90, 96, 127, 129, 168, 192, 256,
                257, 336, 384, 512, 704, 768, 1024, 1408, 2048, 2560, 2688, 2816, 2880, 8192, 14336)  # fmt: skip
TOKENS = (1, 2, 3, 0, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513,
          1023, 1025, 2049, 4097)  # fmt: skip
_FEW = 4  # token counts
TOP_K_LIMIT, EXPERTS_LIMIT = 64, 4096
_SHARE = "share of the budget"  # is drawn, and is no field of a config

#: What may break one row. On x, the plainest first.
X_FAULTS = ("zero_rows", "nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "partial_inf", "huge_rows", "ladder",
            "stale_rows")  # fmt: skip
IDS_FAULTS = ("all_to_one", "hot_expert", "duplicate_experts", "empty_experts", "last_experts", "sentinel_ids",
              "wide_ids")  # fmt: skip
_EAGER_IDS = ("wide_ids",)  # they are int64, and a graph's buffer has one dtype for all its steps
_DUPLICATES = ("all_to_one", "hot_expert", "duplicate_experts", "empty_experts")
_STRIDED = ("noncontiguous", "transposed", "int32_boundary")
_BIASES = ("b13", "b2")
BIAS_FAULT, WEIGHT_FAULT = "broken_biases", "broken_weights"  # those of some experts
BROKEN = (BIAS_FAULT, WEIGHT_FAULT)
_PROJECTIONS = ("w13", "w2")
_NO_PIECES = ("eager", "graph")  # a producer's graph would need real memory for all that lies between rows
PLACES = (
    *(FaultPlace(name, "x", on_rows=True) for name in X_FAULTS),
    *(FaultPlace(name, "ids", on_rows=True, modes=("eager",) if name in _EAGER_IDS else MODES) for name in IDS_FAULTS),
    FaultPlace("extreme_weights", "weights", on_rows=True),
    FaultPlace("nan_dropped", "weights", on_rows=True),
    FaultPlace("int64_ids", "ids", on_rows=False),
    FaultPlace("exact_count", "ids", on_rows=False),
    *(FaultPlace("noncontiguous", name, on_rows=False) for name in ("x", "w13", "w2", "weights", "ids")),
    *(FaultPlace("misaligned", name, on_rows=False) for name in ("x", "w13", "w2", "weights", "ids")),
    *(FaultPlace("transposed", name, on_rows=False) for name in ("x", "weights", "ids", *_PROJECTIONS)),
    *(FaultPlace("int32_boundary", name, on_rows=False, max_rows=64, modes=_NO_PIECES) for name in ("x", "w13", "w2")),
    *(FaultPlace("far_columns", name, on_rows=False, modes=_NO_PIECES) for name in ("x", "weights", "ids")),
    *(FaultPlace(fault, name, on_rows=False, needs="bias") for fault in _STRIDED[:2] for name in _BIASES),
    FaultPlace(BIAS_FAULT, "b13", on_rows=False, needs="bias", often=3),  # which of its halves, and in front of a curve
    FaultPlace(BIAS_FAULT, "b2", on_rows=False, needs="bias"),
    *(FaultPlace(WEIGHT_FAULT, name, on_rows=False) for name in _PROJECTIONS),
    FaultPlace("noncontiguous", "expert_map", on_rows=False, needs="expert_map"),
)


@dataclass(frozen=True)
class ExpertsSpace:
    """Grouped gate and up-projection, activation, down-projection, weighted sum. See ops/space.py for each member."""

    op: str = "experts_bf16"
    description: str = "the experts of a layer: two grouped products, an activation between them, and a weighted sum"
    multiple: int = 1  # of which hidden and intermediate sizes are
    budget: int = cost.BUDGET  # elements of the projections of a case that is drawn
    top_ks: tuple[int, ...] = TOP_K  # that are drawn

    family: ClassVar[str] = "experts"
    checks: ClassVar[Mapping[str, str]] = text.CHECKS
    faults: ClassVar[Mapping[str, str]] = text.FAULTS
    places: ClassVar[tuple[FaultPlace, ...]] = PLACES
    sizes: ClassVar[tuple[str, ...]] = ("experts", "top_k", *SIZES)
    fields: ClassVar[Mapping[str, tuple[Scalar, ...]]] = FIELDS
    presets: ClassVar[Mapping[str, Mapping[str, Scalar]]] = MODELS
    tensors: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("x", "w13", "w2", "weights", "ids", "expert_map", "b13", "b2"), "input"), "y": "output",
    }  # fmt: skip

    # ---- what to draw -----------------------------------------------------------------------------------------------

    def axes(self, info: TargetInfo) -> tuple[Axis, ...]:
        can = info.capabilities
        return (
            Axis("experts", can.numbers_of_experts(EXPERTS), between=can.takes_experts),
            Axis("top_k", [k for k in self.top_ks if k <= can.max_top_k], between=any_number),
            self._sizes("hidden", HIDDEN, can.max_hidden, can.min_multiple_h),
            self._sizes("intermediate", INTERMEDIATE, can.max_intermediate, can.min_multiple_i),
            *(Axis(name, values, self._often(name, values)) for name, values in self.limits(info).items()),
            Axis(_SHARE, (*cost.SHARES, cost.LONG)),
        )

    @staticmethod
    def _often(name: str, values: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
        return tuple(value for value in OFTEN.get(name, ()) if len(values) > 1 and value in values)

    def _sizes(self, name: str, values: tuple[int, ...], most: int, multiple: int) -> Axis:
        """Those of the sizes that a target takes; the least that it takes, where it takes none of them."""
        multiple = math.lcm(multiple, self.multiple)
        taken = [value for value in values if value <= most and value % multiple == 0] or [multiple]
        return Axis(name, taken, between=lambda size: size % multiple == 0)

    def limits(self, info: TargetInfo) -> dict[str, tuple[Scalar, ...]]:
        """Of each field, the values that the target takes."""
        return limits_of(info)

    @staticmethod
    def sometimes(config: Mapping[str, Scalar]) -> tuple[str, ...]:
        """Who clamps may lose a NaN: `swiglu_oai` does, both halves apart. Elsewhere hardly anything can go wrong."""
        return (BIAS_FAULT,) if config["activation"] == "swiglu_oai" else (BIAS_FAULT, "", "", "", "", "")

    def modes(self, info: TargetInfo) -> tuple[str, ...]:
        return MODES if info.contract.graph else MODES[:1]

    def complete(self, config: Mapping[str, Scalar], info: TargetInfo) -> dict[str, Scalar]:
        share = config.get(_SHARE, 1)
        drawn = {name: value for name, value in config.items() if name != _SHARE}
        whole = {**drawn, "experts": str(Labels.range(int(config["experts"])))}
        allowed = {axis.name: [int(value) for value in axis.values] for axis in self.axes(info)
                   if axis.name in ("experts", *SIZES)}  # fmt: skip
        counts = allowed.pop("experts")
        if share == cost.LONG:
            return moves.mended(cost.lengthy(whole, allowed, counts, self.budget))
        return cost.afforded(moves.mended(whole), allowed, self.budget * float(share))

    def crowded(
        self, config: dict[str, Scalar], allowed: Mapping[str, Sequence[Scalar]], info: TargetInfo, means: Means,
        chosen: random.Random,
    ) -> dict[str, Scalar]:  # fmt: skip
        """The config with small projections of an expert or two, which then have hundreds of slots each: among many, an
        expert has as many only where far more can be afforded. There: more experts than 8 bits count, as many slots.
        allowed: of each axis, the values that may be drawn."""
        dear = means.interpreted or "activations" in config  # each expert with a slot
        most = min(2, int(config["top_k"]))  # more of them than a row has slots would share these
        counts = [int(n) for n in allowed["experts"] if (int(n) <= most if dear else int(n) > 256)]
        if not counts:
            return config
        whole = self.complete({**config, "experts": chosen.choice(counts)}, info)
        sizes = {name: [int(value) for value in allowed[name]] for name in SIZES if name in allowed}
        return cost.shrunk(whole, sizes, cost.CROWD * len(Labels.parse(str(whole["experts"]))))

    def tokens(self, config: Mapping[str, Scalar], means: Means) -> tuple[int, ...]:
        found = tuple(t for t in TOKENS if cost.affordable_tokens(t, config, means))
        # Where hardly more than a token or none can be afforded, none would be every second or third case.
        return found if len(found) > _FEW else tuple(t for t in found if t)

    def affordable(self, case: Case, means: Means) -> bool:
        return means.device != "cpu" or self.cost(case, means) <= means.budget(cost.CPU_BUDGET, cost.HOST_BUDGET)

    def places_for(self, config: Mapping[str, Scalar], info: TargetInfo) -> tuple[FaultPlace, ...]:
        far = len(Labels.parse(str(config["experts"]))) > 64  # each has pages of its own
        return tuple(p for p in self.places if not self._refused(p.fault, p.tensor, info)
                     and moves.has_tensor(config, p.tensor)
                     and not (p.fault == "int32_boundary" and p.tensor != "x" and far))  # fmt: skip

    def _refused(self, fault: str, tensor: str, info: TargetInfo) -> str:
        """Why the target does not take the fault; empty if it does."""
        can, contract = info.capabilities, info.contract
        if fault in ("sentinel_ids", "wide_ids") and "garbage" not in contract.accepts:
            return "ids of no expert"
        if fault in ("int64_ids", "wide_ids") and not can.int64_ids:
            return "int64 ids"
        if fault in _DUPLICATES and not can.duplicate_ids:
            return "an expert twice in a row"
        if fault == BIAS_FAULT:
            return "" if can.nan_biases else f"NaN in {tensor}"
        if fault == WEIGHT_FAULT:
            return "" if can.nan_weights else f"NaN in {tensor}"
        any_strides = fault == "far_columns" or tensor in (*_BIASES, "expert_map")
        any_strides |= fault == "transposed" and tensor in _PROJECTIONS
        if (fault in _STRIDED and not can.strided) or (any_strides and not can.any_strides):
            return f"strided {tensor}"
        return f"misaligned {tensor}" if fault == "misaligned" and can.alignment > 1 else ""

    # ---- what is valid ----------------------------------------------------------------------------------------------

    def validate(self, case: Case) -> None:
        config_of(case, self.fields, EXPERTS_LIMIT, TOP_K_LIMIT)
        for name in SIZES:
            if int(case.config[name]) % self.multiple:
                raise CaseError(f"config.{name}", f"must be a multiple of {self.multiple}, not {case.config[name]}")
        for index, step in enumerate(case.steps):
            if step.tokens * int(case.config["hidden"]) > cost.MAX_ELEMENTS:
                raise CaseError(f"steps[{index}].rows", f"{step.tokens} rows of {case.config['hidden']} are too many")
            for number, fault in enumerate(step.faults):
                where = f"steps[{index}].faults[{number}]"
                place = require_place(self, case, fault, where)
                if place.max_rows is not None and max(step.tokens, len(case.experts) * (place.tensor != "x")) > 64:
                    raise CaseError(where, f"{fault.name} is for 64 rows or experts at most")
                if not moves.has_tensor(case.config, fault.tensor):
                    raise CaseError(where, f"{fault.name} on {fault.tensor} needs config.{place.needs}")
                require_rows(place, fault, where)
                require_stream(fault, where)

    def refusal(self, case: Case, info: TargetInfo) -> str:
        refused = [what for hit, what in self._refusals(case, info) if hit]
        for tensor, name in sorted({(fault.tensor, fault.name) for step in case.steps for fault in step.faults}):
            refused += [why] if (why := self._refused(name, tensor, info)) else []
        return f"{info.name} does not take {', '.join(refused)}" if refused else ""

    def _refusals(self, case: Case, info: TargetInfo) -> Iterator[tuple[object, str]]:
        can, config = info.capabilities, case.config
        count, limits = len(case.experts), self.limits(info)
        yield not can.takes_experts(count), f"{count} experts"
        yield int(config["top_k"]) > can.max_top_k, f"top_k {config['top_k']}"
        for name, most, multiple in (("hidden", can.max_hidden, can.min_multiple_h),
                                     ("intermediate", can.max_intermediate, can.min_multiple_i)):  # fmt: skip
            yield int(config[name]) > most or int(config[name]) % multiple, f"{name} {config[name]}"
        padded = any(step.padding for step in case.steps)
        for name in self.fields:
            # Without padding rows there is nothing to say of theirs; without a gate none of where it stands.
            plain = not padded if name == "dialect" else name == "gate_layout" and config["activation"] == "relu2"
            yield name in limits and config[name] not in limits[name] and not plain, f"{name}={config[name]}"
        yield not can.zero_tokens and not all(step.tokens for step in case.steps), "no tokens"

    # ---- what it is like --------------------------------------------------------------------------------------------

    def features(self, case: Case) -> frozenset[str]:
        return moves.features(case, self.fields)

    def simplify(self, case: Case) -> Iterator[Case]:
        sizes = {name: [size for size in known if size % self.multiple == 0]
                 for name, known in (("hidden", HIDDEN), ("intermediate", INTERMEDIATE))}  # fmt: skip
        yield from moves.simplify(case, self.fields, EXPERTS, TOP_K, sizes, X_FAULTS, IDS_FAULTS)

    def sharpen(self, case: Case) -> Iterator[Case]:
        yield from flush_left(case)

    def label_axes(self, case: Case) -> Mapping[str, Labels]:
        return {"experts": case.experts}

    def keep(self, case: Case, axis: str, labels: Labels) -> Case:
        return moves.keep(case, axis, labels)

    def cost(self, case: Case, means: Means) -> float:
        return cost.seconds(case, means)

    def label(self, case: Case) -> str:
        return text.label(case)


SPACES = (ExpertsSpace(),)
