"""The space of the routing ops: configs, dictionary, faults, limits and the reducer's moves. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from moe_fuzz.case import MODES, Case, Fault, Scalar
from moe_fuzz.contract import PADDING_DIALECTS, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops import moves
from moe_fuzz.ops.routing import text
from moe_fuzz.ops.routing.presets import SIGMOID_MODELS, SOFTMAX_MODELS
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

#: Never uniform random sizes: each of these has broken a kernel, or stands next to one that has.
EXPERTS = (1, 2, 3, 5, 6, 7, 8, 10, 13, 16, 17, 32, 33, 60, 61, 64, 67, 72, 96, 127, 128, 129, 160, 192, 256, 257, 288,
           320, 384, 512, 513, 576, 1023, 1024)  # fmt: skip
TOP_K = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 16, 17, 22, 24, 31, 32)
TOKENS = (1, 2, 3, 0, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513,
          4095, 4096, 4097, 8191, 16385, 32769, 65537)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
#: Kimi K2's, 2.827, is no bfloat16 and no float32 either; 0, which `scale or 1.0` takes for none, is legal.
SCALES = (1.0, 2.5, 0.5, 16.0, 2.827, 5.0, 0.0)
MAGNITUDES = (2, 0, 4, -4, 7, 10, 14, -14)  # logits lie within ±2^magnitude

MAX_ELEMENTS = 1 << 27
CPU_BUDGET = 0.2  # seconds an interpreted case may take
CPU_TOKENS = 8191  # of one
HOST_BUDGET = 0.015  # seconds of a case whose target is no kernel of Triton's
#: T x E on a device: the host draws and judges each element. T x k still passes 2^16, and where rows stand apart
#: T x stride passes 2^24, which is what narrow indices cannot hold.
CUDA_ELEMENTS = 1 << 21

#: What each field of a config may be; `experts` is a labels string and stands apart.
FIELDS: dict[str, tuple[Scalar, ...]] = {
    "dtype": DTYPES,
    "renormalize": (False, True),
    "bias": (False, True),
    "scale": SCALES,
    "is_padding": (False, True),
    "padding": PADDING_DIALECTS,
    "edge": ("right", "left"),
    "out": (False, True),
    "magnitude": MAGNITUDES,
}
SIMPLEST: dict[str, Scalar] = {name: values[0] for name, values in FIELDS.items()}

ROW_FAULTS = ("nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "partial_inf", "masked_experts",
               "clustered_top", "shifted_rows", "huge_rows", "ladder", "ties", "tied_lane", "tied_best",
               "signed_zeros", "zero_rows", "stale_rows")  # fmt: skip
_OFTEN = {"clustered_top": 4, "tied_lane": 4}  # a kernel has few of the lanes that it may have
_STRIDED = ("noncontiguous", "transposed", "int32_boundary")  # faults that need a target which takes strides
PLACES = (
    *(FaultPlace(name, "logits", on_rows=True, often=_OFTEN.get(name, 1)) for name in ROW_FAULTS),
    FaultPlace("extreme_bias", "bias", on_rows=False, needs="bias"),
    FaultPlace("negative_bias", "bias", on_rows=False, needs="bias"),
    FaultPlace("tied_bias", "bias", on_rows=False, needs="bias"),
    FaultPlace("broken_bias", "bias", on_rows=False, needs="bias"),
    FaultPlace("noncontiguous", "logits", on_rows=False),
    FaultPlace("transposed", "logits", on_rows=False),
    # Not piecewise: the producer's graph would need real memory for all that lies between the rows.
    FaultPlace("int32_boundary", "logits", on_rows=False, max_rows=64, modes=("eager", "graph")),
    FaultPlace("misaligned", "logits", on_rows=False),
    FaultPlace("far_columns", "logits", on_rows=False, modes=("eager", "graph")),
    *(FaultPlace("noncontiguous", name, on_rows=False, needs=name) for name in ("bias", "is_padding")),
)


#: Faults of rows beside which a fault of the whole case lies most often: a bias of many values leaves no ties.
BESIDE = dict.fromkeys(("ties", "tied_lane", "tied_best", "signed_zeros", "zero_rows"), "tied_bias")


def _odd_strides(laid: FaultPlace | Fault) -> bool:
    """Whether it takes a target with `any_strides`."""
    name = laid.fault if isinstance(laid, FaultPlace) else laid.name
    return name == "far_columns" or (name in ("noncontiguous", "transposed") and laid.tensor != "logits")


@dataclass(frozen=True)
class RoutingSpace:
    """topk_softmax and topk_sigmoid; grouped_topk extends it (grouped.py)."""

    op: str
    description: str
    presets: Mapping[str, Mapping[str, Scalar]]

    family: ClassVar[str] = "routing"
    checks: ClassVar[Mapping[str, str]] = text.CHECKS
    faults: ClassVar[Mapping[str, str]] = text.FAULTS
    places: ClassVar[tuple[FaultPlace, ...]] = PLACES
    sizes: ClassVar[tuple[str, ...]] = ("experts", "top_k")
    fields: ClassVar[Mapping[str, tuple[Scalar, ...]]] = FIELDS
    row_faults: ClassVar[tuple[str, ...]] = ROW_FAULTS  # the plainest first
    beside: ClassVar[Mapping[str, str]] = BESIDE

    @cached_property
    def simplest(self) -> Mapping[str, Scalar]:
        """Every field of a config but experts and top_k at its simplest value."""
        return {name: values[0] for name, values in self.fields.items()}

    @cached_property
    def tensors(self) -> Mapping[str, str]:
        return {"logits": "input", "bias": "input", "is_padding": "input", "weights": "output", "ids": "output"}

    # ---- what to draw -----------------------------------------------------------------------------------------------

    def axes(self, info: TargetInfo) -> tuple[Axis, ...]:
        can, contract = info.capabilities, info.contract
        return (
            Axis("experts", can.numbers_of_experts(EXPERTS), between=can.takes_experts),
            Axis("top_k", [k for k in TOP_K if k <= can.max_top_k], often=(1,), between=any_number),
            Axis("dtype", [d for d in DTYPES if d in can.dtypes]),
            Axis("renormalize", can.renormalize),
            Axis("bias", (True,) if can.bias_required else (False, True) if can.bias else (False,)),
            Axis("scale", [s for s in SCALES if s or can.zero_scale] if can.scale else (1.0,)),
            Axis("is_padding", (False, True) if can.is_padding else (False,), often=(True,) * can.is_padding),
            Axis("padding", contract.padding),
            Axis("edge", ("right", "left")),
            Axis("out", (False, True) if can.out else (False,)),
            Axis("magnitude", MAGNITUDES),
        )

    @staticmethod
    def sometimes(config: Mapping[str, Scalar]) -> tuple[str, ...]:
        """Each number of experts may have a way of its own to break ties, and a few rows hide nothing."""
        return ("tied_best", "tied_best", "tied_lane")

    def modes(self, info: TargetInfo) -> tuple[str, ...]:
        return MODES if info.contract.graph else MODES[:1]

    def complete(self, config: Mapping[str, Scalar], info: TargetInfo) -> dict[str, Scalar]:
        whole = self.mended({**config, "experts": str(Labels.range(int(config["experts"])))})
        if not config["is_padding"]:
            whole["padding"] = info.contract.padding[0]  # nobody asks: one value, so that equal cases look equal
        return whole

    def tokens(self, config: Mapping[str, Scalar], means: Means) -> tuple[int, ...]:
        if means.device == "cpu":
            most, known = means.budget(CPU_BUDGET, HOST_BUDGET), CPU_TOKENS if means.interpreted else TOKENS[-1]
            return tuple(t for t in TOKENS if t <= known and self.cpu_seconds(t, config, means) <= most)
        count = len(Labels.parse(str(config["experts"])))
        return tuple(t for t in TOKENS if t * count <= CUDA_ELEMENTS)

    def affordable(self, case: Case, means: Means) -> bool:
        return means.device != "cpu" or self.cost(case, means) <= means.budget(CPU_BUDGET, HOST_BUDGET)

    def places_for(self, config: Mapping[str, Scalar], info: TargetInfo) -> tuple[FaultPlace, ...]:
        return tuple(
            place
            for place in self.places
            if (not place.needs or config[place.needs])
            and (place.fault not in _STRIDED or info.capabilities.strided)
            and (not _odd_strides(place) or info.capabilities.any_strides)
            and (place.fault != "misaligned" or info.capabilities.alignment <= 1)
        )

    # ---- what is valid ----------------------------------------------------------------------------------------------

    def validate(self, case: Case) -> None:
        require_fields(case, {*self.sizes, *self.fields})
        labels = require_experts(case, 1024)
        require_integer(case, "top_k", min(32, len(labels)))
        require_values(case, self.fields)
        for index, step in enumerate(case.steps):
            if step.tokens * len(labels) > MAX_ELEMENTS:
                raise CaseError(f"steps[{index}].rows", f"{step.tokens} rows x {len(labels)} experts are too many")
            for number, fault in enumerate(step.faults):
                where = f"steps[{index}].faults[{number}]"
                place = require_place(self, case, fault, where)
                require_few_rows(place, step.tokens, where)
                if place.needs and not case.config[place.needs]:
                    raise CaseError(where, f"needs config.{place.needs}")
                require_rows(place, fault, where)
                require_stream(fault, where)

    def refusal(self, case: Case, info: TargetInfo) -> str:
        refused = [what for hit, what in self.refusals(case, info) if hit]
        return f"{info.name} does not take {', '.join(refused)}" if refused else ""

    def refusals(self, case: Case, info: TargetInfo) -> Iterator[tuple[object, str]]:
        """Each limit of the target's capabilities: whether the case is outside it, and what that is."""
        can, contract, config = info.capabilities, info.contract, case.config
        count = len(case.experts)
        yield config["dtype"] not in can.dtypes, f"dtype {config['dtype']}"
        yield not can.takes_experts(count), f"{count} experts"
        yield int(config["top_k"]) > can.max_top_k, f"top_k {config['top_k']}"
        yield config["renormalize"] not in can.renormalize, f"renormalize={config['renormalize']}"
        yield config["bias"] and not can.bias, "bias"
        yield can.bias_required and not config["bias"], "logits without a bias"
        yield config["scale"] != 1.0 and not can.scale, "scale"
        yield config["scale"] == 0.0 and not can.zero_scale, "a scale of 0"
        yield config["is_padding"] and not can.is_padding, "is_padding"
        yield config["is_padding"] and config["padding"] not in contract.padding, f"padding={config['padding']}"
        yield config["out"] and not can.out, "out"
        laid = [fault for step in case.steps for fault in step.faults]
        odd = any(_odd_strides(fault) for fault in laid)
        strided = any(fault.name in _STRIDED and not _odd_strides(fault) for fault in laid)
        yield strided and not can.strided, "strided logits"
        yield odd and not can.any_strides, "strided vectors or weights, or columns that stand apart"
        yield "misaligned" in case.fault_names and can.alignment > 1, "misaligned logits"

    # ---- what it is like --------------------------------------------------------------------------------------------

    def features(self, case: Case) -> frozenset[str]:
        config, count, top_k = case.config, len(case.experts), int(case.config["top_k"])
        tokens = [step.tokens for step in case.steps]
        found = {f"E>{limit}" for limit in (1, 8, 32, 128, 512) if count > limit}
        found |= {f"k>{limit}" for limit in (1, 4, 8, 16) if top_k > limit}
        found |= {f"T>{limit}" for limit in (1, 8, 32, 128, 512) if max(tokens) > limit}
        found |= {"T=0"} if 0 in tokens else set()
        found |= {"E not a power of two"} if count & (count - 1) else set()
        found |= {"k=E"} if top_k == count > 1 else set()
        found |= {f"{name}={config[name]}" for name in ("dtype", "edge") if config[name] != SIMPLEST[name]}
        found |= {name for name in ("renormalize", "bias", "is_padding", "out") if config[name]}
        found |= {"scale" if config["scale"] else "scale=0"} if config["scale"] != 1.0 else set()
        found |= {f"padding={config['padding']}"} if config["is_padding"] else set()
        found |= {"large logits"} if int(config["magnitude"]) > 4 else set()
        found |= {f"fault:{name}" for name in case.fault_names}
        found |= {"several steps"} if len(case.steps) > 1 else set()
        found |= {"several buckets"} if case.mode != "eager" and len(case.buckets) > 1 else set()
        return frozenset(found)

    def simplify(self, case: Case) -> Iterator[Case]:
        yield from moves.simpler_runs(case)
        count, top_k = len(case.experts), int(case.config["top_k"])
        for smaller in (k for k in TOP_K if k < top_k):
            yield case.with_config(top_k=smaller)
        for fewer in (e for e in EXPERTS if e < count):
            yield self.keep(case, "experts", case.experts.first(fewer))
        for name, values in self.fields.items():
            for value in values[: values.index(case.config[name])]:
                simpler = self.without_orphans(replace(case, config=self.mended({**case.config, name: value})))
                if simpler != case:  # mended back
                    yield simpler
        yield from moves.plainer_faults(case, self.row_faults)

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
            return sum(0.002 + 5e-7 * step.tokens * len(case.experts) for step in case.steps) + (
                0.02 * len(case.buckets) if graph else 0.0
            )
        seconds = {t: self.cpu_seconds(t, case.config, means) for t in case.buckets}
        each = [seconds[step.tokens] for step in case.steps]
        if not graph:
            return sum(each)
        # A call is a third of an eager step. Here: one to warm up a bucket, two a step, and the relations of the last.
        return (sum(seconds.values()) + 2 * sum(each) + 3 * each[-1]) / 3

    def cpu_seconds(self, tokens: int, config: Mapping[str, Scalar], means: Means) -> float:
        """A case with its reruns, fitted to measurements. Interpreted: launches, then numpy over the block a slot."""
        count, top_k = len(Labels.parse(str(config["experts"]))), int(config["top_k"])
        if not means.interpreted:
            return 0.004 + tokens * (2e-7 + 3e-8 * count + 8e-8 * top_k)
        padded = 1 << (count - 1).bit_length()
        return 0.04 + 4e-4 * top_k + tokens * padded * (4e-7 + 7e-8 * top_k)

    def label(self, case: Case) -> str:
        return text.label(case)

    def without_orphans(self, case: Case) -> Case:
        """Without the faults that lie on a tensor the config no longer has."""
        needs = {(p.fault, p.tensor): p.needs for p in self.places}
        return moves.with_fitting_faults(
            case, lambda fault: not (need := needs[fault.name, fault.tensor]) or bool(case.config[need])
        )


SPACES = (
    RoutingSpace("topk_softmax", "softmax over the experts' logits, then the k best (+ bias), weights renormalized",
                 SOFTMAX_MODELS),
    RoutingSpace("topk_sigmoid", "the sigmoid of each expert's logit, then the k best (+ bias), weights renormalized",
                 SIGMOID_MODELS),
)  # fmt: skip
