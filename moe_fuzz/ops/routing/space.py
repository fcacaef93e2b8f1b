"""The space of the routing ops: configs, dictionary, faults, limits and the reducer's moves. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from moe_fuzz.case import Case, Scalar
from moe_fuzz.contract import PADDING_DIALECTS, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops.routing import text
from moe_fuzz.ops.space import Axis, FaultPlace

#: Never uniform random sizes: each of these has broken a kernel, or stands next to one that has.
EXPERTS = (1, 2, 3, 5, 6, 7, 8, 10, 13, 16, 17, 32, 33, 60, 61, 64, 67, 72, 96, 127, 128, 129, 160, 192, 256, 257, 288,
           320, 384, 512, 576, 1024)  # fmt: skip
TOP_K = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 16, 17, 22, 24, 31, 32)
TOKENS = (1, 2, 3, 0, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513,
          4095, 4096, 4097, 8191)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
SCALES = (1.0, 2.5, 0.5, 16.0, 2.827)  # the last one, Kimi K2's, is no bfloat16 and no float32 either
MAGNITUDES = (2, 0, 4, -4, 7, 10, 14, -14)  # logits lie within ±2^magnitude

MAX_ELEMENTS = 1 << 27
CPU_BUDGET = 0.2  # seconds an interpreted case may take

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

PRESETS: dict[str, dict[str, Scalar]] = {
    "qwen3-30b-a3b": {"experts": 128, "top_k": 8, "renormalize": True, "dtype": "bfloat16"},
    "qwen3-vl-235b-a22b": {"experts": 128, "top_k": 8, "renormalize": True, "dtype": "bfloat16"},
    "qwen3-next-80b-a3b": {"experts": 512, "top_k": 10, "renormalize": True, "dtype": "bfloat16"},
    "qwen2-57b-a14b": {"experts": 64, "top_k": 8, "renormalize": False, "dtype": "bfloat16"},
    "mixtral-8x7b": {"experts": 8, "top_k": 2, "renormalize": True, "dtype": "bfloat16"},
    "deepseek-v2-lite": {"experts": 64, "top_k": 6, "renormalize": False, "dtype": "bfloat16"},
    "qwen1.5-moe-a2.7b": {"experts": 60, "top_k": 4, "renormalize": False, "dtype": "bfloat16"},
    "gpt-oss-120b": {"experts": 128, "top_k": 4, "renormalize": True, "dtype": "bfloat16"},
}

_ROW_FAULTS = ("nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "partial_inf", "masked_experts", "shifted_rows",
               "huge_rows", "ladder", "ties", "stale_rows")  # fmt: skip
_STRIDED = ("noncontiguous", "transposed", "int32_boundary")  # faults that need a target which takes strides
_PLACES = (
    *(FaultPlace(name, "logits", on_rows=True) for name in _ROW_FAULTS),
    FaultPlace("extreme_bias", "bias", on_rows=False, needs="bias"),
    FaultPlace("negative_bias", "bias", on_rows=False, needs="bias"),
    FaultPlace("noncontiguous", "logits", on_rows=False),
    FaultPlace("transposed", "logits", on_rows=False),
    FaultPlace("int32_boundary", "logits", on_rows=False, max_rows=64),
    FaultPlace("misaligned", "logits", on_rows=False),
)


@dataclass(frozen=True)
class RoutingSpace:
    """topk_softmax today; its siblings share all of this."""

    op: str
    description: str

    checks = text.CHECKS
    faults = text.FAULTS
    places = _PLACES
    presets = PRESETS
    sizes = ("experts", "top_k")

    @cached_property
    def tensors(self) -> Mapping[str, str]:
        return {"logits": "input", "bias": "input", "is_padding": "input", "weights": "output", "ids": "output"}

    # ---- what to draw -----------------------------------------------------------------------------------------------

    def axes(self, info: TargetInfo) -> tuple[Axis, ...]:
        can, contract = info.capabilities, info.contract
        return (
            Axis("experts", [e for e in EXPERTS if can.min_experts <= e <= can.max_experts]),
            Axis("top_k", [k for k in TOP_K if k <= can.max_top_k]),
            Axis("dtype", [d for d in DTYPES if d in can.dtypes]),
            Axis("renormalize", can.renormalize),
            Axis("bias", (False, True) if can.bias else (False,)),
            Axis("scale", SCALES if can.scale else (1.0,)),
            Axis("is_padding", (False, True) if can.is_padding else (False,)),
            Axis("padding", contract.padding),
            Axis("edge", ("right", "left")),
            Axis("out", (False, True) if can.out else (False,)),
            Axis("magnitude", MAGNITUDES),
        )

    def complete(self, config: Mapping[str, Scalar], info: TargetInfo) -> dict[str, Scalar]:
        count, top_k = int(config["experts"]), int(config["top_k"])
        whole = {**config, "experts": str(Labels.range(count)), "top_k": min(top_k, count)}
        if not config["is_padding"]:
            whole["padding"] = info.contract.padding[0]  # nobody asks: one value, so that equal cases look equal
        return whole

    def tokens(self, config: Mapping[str, Scalar], device: str) -> tuple[int, ...]:
        count = len(Labels.parse(str(config["experts"])))
        return tuple(t for t in TOKENS if device != "cpu" or _cpu_seconds(t, count, int(config["top_k"])) <= CPU_BUDGET)

    def places_for(self, config: Mapping[str, Scalar], info: TargetInfo) -> tuple[FaultPlace, ...]:
        return tuple(
            place
            for place in _PLACES
            if (not place.needs or config[place.needs])
            and (place.fault not in _STRIDED or info.capabilities.strided)
            and (place.fault != "misaligned" or info.capabilities.alignment <= 1)
        )

    # ---- what is valid ----------------------------------------------------------------------------------------------

    def validate(self, case: Case) -> None:
        config = case.config
        expected = {"experts", "top_k", *FIELDS}
        for key in sorted(set(config) ^ expected):
            raise CaseError(
                f"config.{key}",
                "is missing" if key in expected else "unknown field",
                f"the fields of {self.op} are {', '.join(sorted(expected))}",
            )
        experts, top_k = config["experts"], config["top_k"]
        try:
            labels = Labels.parse(experts) if isinstance(experts, str) else Labels()
        except ValueError as error:
            raise CaseError("config.experts", str(error)) from error
        if not 1 <= len(labels) <= 1024:
            raise CaseError("config.experts", f'must name 1 to 1024 experts as a string like "0-59", not {experts!r}')
        if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= min(32, len(labels)):
            raise CaseError("config.top_k", f"must be an integer from 1 to {min(32, len(labels))}, not {top_k!r}")
        for key, values in FIELDS.items():
            value = config[key]
            if not any(value == v and type(value) is type(v) for v in values):
                raise CaseError(f"config.{key}", f"must be one of {', '.join(map(repr, values))}, not {value!r}")
        for index, step in enumerate(case.steps):
            if step.tokens * len(labels) > MAX_ELEMENTS:
                raise CaseError(f"steps[{index}].rows", f"{step.tokens} rows x {len(labels)} experts are too many")
            for number, fault in enumerate(step.faults):
                where = f"steps[{index}].faults[{number}]"
                place = next((p for p in _PLACES if (p.fault, p.tensor) == (fault.name, fault.tensor)), None)
                if place is None:
                    raise CaseError(
                        where,
                        f"{self.op} knows no fault {fault.name!r} on {fault.tensor!r}",
                        f"`moe-fuzz list faults` shows them: {', '.join(text.FAULTS)}",
                    )
                if place.max_rows is not None and step.tokens > place.max_rows:
                    raise CaseError(where, f"{fault.name} is for {place.max_rows} rows at most, not {step.tokens}")
                if place.needs and not config[place.needs]:
                    raise CaseError(where, f"needs config.{place.needs}")
                if place.on_rows != bool(fault.rows):
                    raise CaseError(f"{where}.rows", "must name rows" if place.on_rows else "must name no rows")

    def refusal(self, case: Case, info: TargetInfo) -> str:
        can, contract, config = info.capabilities, info.contract, case.config
        count = len(case.experts)
        reasons = (
            (config["dtype"] not in can.dtypes, f"dtype {config['dtype']}"),
            (not can.min_experts <= count <= can.max_experts, f"{count} experts"),
            (int(config["top_k"]) > can.max_top_k, f"top_k {config['top_k']}"),
            (config["renormalize"] not in can.renormalize, f"renormalize={config['renormalize']}"),
            (config["bias"] and not can.bias, "bias"),
            (config["scale"] != 1.0 and not can.scale, "scale"),
            (config["is_padding"] and not can.is_padding, "is_padding"),
            (config["is_padding"] and config["padding"] not in contract.padding, f"padding={config['padding']}"),
            (config["out"] and not can.out, "out"),
            (bool(set(_STRIDED) & set(case.fault_names)) and not can.strided, "strided logits"),
            ("misaligned" in case.fault_names and can.alignment > 1, "misaligned logits"),
        )
        refused = [what for hit, what in reasons if hit]
        return f"{info.name} does not take {', '.join(refused)}" if refused else ""

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
        found |= {"scale"} if config["scale"] != 1.0 else set()
        found |= {f"padding={config['padding']}"} if config["is_padding"] else set()
        found |= {"large logits"} if int(config["magnitude"]) > 4 else set()
        found |= {f"fault:{name}" for name in case.fault_names}
        found |= {"several steps"} if len(case.steps) > 1 else set()
        return frozenset(found)

    def simplify(self, case: Case) -> Iterator[Case]:
        count, top_k = len(case.experts), int(case.config["top_k"])
        for smaller in (k for k in TOP_K if k < top_k):
            yield case.with_config(top_k=smaller)
        for fewer in (e for e in EXPERTS if e < count):
            yield self.keep(case, "experts", case.experts.first(fewer))
        for name, values in FIELDS.items():
            for value in values[: values.index(case.config[name])]:
                yield _without_orphans(case.with_config(**{name: value}))
        yield from _plainer_faults(case)

    def sharpen(self, case: Case) -> Iterator[Case]:
        if case.config["edge"] == "right":  # an access before a tensor is seen at any size only if it lies flush left
            yield case.with_config(edge="left")

    def label_axes(self, case: Case) -> Mapping[str, Labels]:
        return {"experts": case.experts}

    def keep(self, case: Case, axis: str, labels: Labels) -> Case:
        return case.with_config(**{axis: str(labels)}, top_k=min(int(case.config["top_k"]), len(labels)))

    def cost(self, case: Case, device: str) -> float:
        if device != "cpu":
            return 0.002 * len(case.steps)
        return sum(_cpu_seconds(s.tokens, len(case.experts), int(case.config["top_k"])) for s in case.steps)

    def label(self, case: Case) -> str:
        return text.label(case)


def _cpu_seconds(tokens: int, experts: int, top_k: int) -> float:
    """An interpreted case with its reruns, fitted to measurements: launches, then numpy over the block a slot."""
    padded = 1 << (experts - 1).bit_length()
    return 0.04 + 4e-4 * top_k + tokens * padded * (4e-7 + 7e-8 * top_k)


def _plainer_faults(case: Case) -> Iterator[Case]:
    """Each fault on rows replaced by those listed before it: one bug, seen through many faults, is one finding."""
    for index, step in enumerate(case.steps):
        for number, fault in enumerate(step.faults):
            if fault.name not in _ROW_FAULTS:
                continue
            for name in _ROW_FAULTS[: _ROW_FAULTS.index(fault.name)]:
                faults = (*step.faults[:number], replace(fault, name=name), *step.faults[number + 1 :])
                yield case.with_step(index, replace(step, faults=faults))


def _without_orphans(case: Case) -> Case:
    """Without the faults that lie on a tensor the config no longer has."""
    needs = {(p.fault, p.tensor): p.needs for p in _PLACES}
    for index, step in enumerate(case.steps):
        kept = tuple(f for f in step.faults if not (need := needs[f.name, f.tensor]) or case.config[need])
        if kept != step.faults:
            case = case.with_step(index, replace(step, faults=kept))
    return case


SPACES = (
    RoutingSpace("topk_softmax", "softmax over the experts' logits, then the k best (+ bias), weights renormalized"),
)
