"""The space of `experts_nvfp4`: that of the experts ops, and what comes with weights in NVFP4. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from moe_fuzz.case import Scalar
from moe_fuzz.contract import TargetInfo
from moe_fuzz.ops.experts import cost, text
from moe_fuzz.ops.experts.fields import FIELDS
from moe_fuzz.ops.experts.presets import MODELS_NVFP4
from moe_fuzz.ops.experts.space import PLACES, WEIGHT_FAULT, ExpertsSpace
from moe_fuzz.ops.space import FaultPlace

#: How x and what lies between the products are calibrated for their data, simplest first: a power of two, a number like
#: any other, for data 2^8 times larger or smaller.
GLOBAL_SCALES = ("power", "fitted", "small", "large")

FP4_FIELDS: Mapping[str, tuple[Scalar, ...]] = {
    "scale_layout": ("linear", "swizzled"),
    "activations": ("as_given", "nvfp4"),
    "global_scale": GLOBAL_SCALES,
}
SCALES = ("w13_scales", "w2_scales")
PADDING_FAULTS = ("poison_scales", "stale_scales")
#: In either layout, and what a target must take for it.
NAN_BLOCKS, SIGNED_BLOCKS = "nan_blocks", "signed_blocks"
BLOCK_FAULTS: Mapping[str, str] = {NAN_BLOCKS: "NaN", SIGNED_BLOCKS: "scales below 0"}
#: A global scale that has no sense, as where calibration saw zeros; of weights, that of some experts.
SENSELESS = {"zero_scale": "zero", "infinite_scale": "infinite", "nan_scale": "nan"}
#: Of activations alone: the factor of a weight may be below 0, or as small.
SENSELESS_CALIBRATION = {"subnormal_scale": "subnormal", "negative_scale": "negative"}
#: Blocks of x at the ends and ties of the format, which an x in NVFP4 is quantized by.
X_BLOCKS = ("scale_ties", "code_ties", "tiny_block", "scale_saturation")
FACTORS, CALIBRATIONS = ("w13_alpha", "w2_alpha"), ("x_global", "h_global")
#: Codes are packed and start at whole blocks, and each is a number: nothing of them can be a fault.
_CODES = ("w13", "w2")
_FAULTS = {name: line for name, line in text.FAULTS.items() if name != WEIGHT_FAULT}


@dataclass(frozen=True)
class Fp4Space(ExpertsSpace):
    """`ExpertsSpace` with codes, scales in one of two layouts, global scales, and activations that may be quantized."""

    op: str = "experts_nvfp4"
    description: str = "the experts of a layer with weights in NVFP4, and activations as they are or in NVFP4, too"
    multiple: int = 16
    budget: int = cost.FP4_BUDGET
    top_ks: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 22)

    checks: ClassVar[Mapping[str, str]] = text.CHECKS | text.FP4_CHECKS
    faults: ClassVar[Mapping[str, str]] = _FAULTS | text.FP4_FAULTS
    places: ClassVar[tuple[FaultPlace, ...]] = (
        *(place for place in PLACES if place.tensor not in _CODES),
        *(FaultPlace(fault, "x", on_rows=True) for fault in X_BLOCKS),
        *(FaultPlace(fault, scales, on_rows=False) for scales in SCALES for fault in (*PADDING_FAULTS, *BLOCK_FAULTS)),
        *(FaultPlace(fault, scale, on_rows=False) for scale in (*FACTORS, *CALIBRATIONS) for fault in SENSELESS),
        *(FaultPlace(fault, scale, on_rows=False) for scale in CALIBRATIONS for fault in SENSELESS_CALIBRATION),
    )
    fields: ClassVar[Mapping[str, tuple[Scalar, ...]]] = {**FIELDS, **FP4_FIELDS}
    presets: ClassVar[Mapping[str, Mapping[str, Scalar]]] = MODELS_NVFP4
    tensors: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys((*(name for name, role in ExpertsSpace.tensors.items() if role == "input"), *SCALES,
                         *FACTORS, *CALIBRATIONS), "input"), "y": "output",
    }  # fmt: skip

    def limits(self, info: TargetInfo) -> dict[str, tuple[Scalar, ...]]:
        can = info.capabilities
        return {
            **super().limits(info),
            "scale_layout": can.layouts,
            "activations": can.activation_formats,
            "global_scale": tuple(kind for kind in GLOBAL_SCALES if kind in can.global_scales),
        }

    def places_for(self, config: Mapping[str, Scalar], info: TargetInfo) -> tuple[FaultPlace, ...]:
        given = config["activations"] == "as_given"  # there is no calibration, and x is no blocks
        packed = config["scale_layout"] == "linear"  # there is no padding
        return tuple(p for p in super().places_for(config, info)
                     if not (given and (p.tensor in CALIBRATIONS or p.fault in X_BLOCKS))
                     and not (packed and p.fault in PADDING_FAULTS))  # fmt: skip

    def _refused(self, fault: str, tensor: str, info: TargetInfo) -> str:
        kind = (SENSELESS | SENSELESS_CALIBRATION).get(fault)
        if kind and kind not in info.capabilities.global_scales:
            return f"{kind} {tensor}"
        can = info.capabilities
        if (fault == NAN_BLOCKS and not can.nan_scales) or (fault == SIGNED_BLOCKS and not can.signed_scales):
            return f"{BLOCK_FAULTS[fault]} in {tensor}"
        return super()._refused(fault, tensor, info)


SPACES = (Fp4Space(),)
