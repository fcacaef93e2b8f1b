"""The fields of an experts config: what each may be, what a target takes of it, and whether a case has them all.

`FIELDS` are those of both ops; what `experts_nvfp4` has beyond them is in `fp4.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_fuzz.case import Case, Scalar
from moe_fuzz.contract import PADDING_DIALECTS, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.ops.validity import require_experts, require_fields, require_integer, require_values

SIZES = ("hidden", "intermediate")
MAX_SIZE = 1 << 16
RECIPES = ("dense", "integer", "one_hot", "ladder", "fine", "curve", "cancel")
NO_CLAMP = ("integer", "fine", "cancel")  # are exact by their gate, and no gate makes swiglu_oai so

#: What b13 is and what b2 is, or both of them: a checkpoint may have either without the other.
BIASES = ("none", "dtype/none", "none/dtype", "dtype", "float32/none", "none/float32", "float32", "dtype/float32",
          "float32/dtype")  # fmt: skip
TOGETHER = ("none", "dtype", "float32")  # both, or none: what most models have
#: Values that are drawn once more for each mention, as in `Axis`.
OFTEN: Mapping[str, tuple[Scalar, ...]] = {
    "bias": ("none", *TOGETHER, "none"),  # else few cases would be without
    "recipe": ("curve",),  # no other shows an activation, of which there are several
}

#: The simplest value first. experts is a labels string, top_k and the sizes are numbers; they stand apart.
FIELDS: Mapping[str, tuple[Scalar, ...]] = {
    "dtype": ("bfloat16", "float16"),
    "activation": ("silu", "gelu", "relu2", "swiglu_oai"),
    "gate_layout": ("first", "up_first", "interleaved"),
    "bias": BIASES,
    "weight_on_input": (False, True),
    "expert_map": ("none", "permuted", "shard"),
    "recipe": RECIPES,
    "dialect": PADDING_DIALECTS,  # how a router has written the slots of rows that are flagged as padding
    "edge": ("right", "left"),
    "out": (False, True),
    "magnitude": (0, 2, -4, 4, 7, 10, 14, -14),  # of the dense recipe: |x| < 2^magnitude,
    "weight_scale": (-3, 0, -6, 2, -10, 7, -14),  # and each weight of a projection < 2^weight_scale
}


def limits_of(info: TargetInfo) -> dict[str, tuple[Scalar, ...]]:
    """Of each of `FIELDS`, the values that the target takes."""
    can = info.capabilities
    taken: dict[str, bool] = {"weight_on_input": can.weight_on_input, "expert_map": can.expert_map, "out": can.out}
    limits = {name: values if taken.get(name, True) else values[:1] for name, values in FIELDS.items()}
    limits |= {
        "bias": biases_of(info),
        "dtype": tuple(v for v in FIELDS["dtype"] if v in can.dtypes),
        "activation": tuple(v for v in FIELDS["activation"] if v in can.activations),
        "gate_layout": tuple(v for v in FIELDS["gate_layout"] if v in can.gate_layouts),
        "recipe": tuple(v for v in RECIPES if v in can.recipes
                        and (v not in NO_CLAMP or set(can.activations) - {"swiglu_oai"})
                        and (v != "curve" or set(can.activations) - {"relu2"})),
        "dialect": tuple(v for v in FIELDS["dialect"] if v in info.contract.accepts),
    }
    return limits


def biases_of(info: TargetInfo) -> tuple[Scalar, ...]:
    """Of `BIASES` those that the target takes."""
    can = info.capabilities
    return BIASES[:1] if not can.biases else BIASES if can.separate_biases else TOGETHER


def bias_dtypes(bias: Scalar) -> tuple[str, str]:
    """Of b13 and of b2: "none", "dtype" or "float32"."""
    b13, _, b2 = str(bias).partition("/")
    return b13, b2 or b13


def config_of(case: Case, fields: Mapping[str, tuple[Scalar, ...]], most_experts: int, most_k: int) -> None:
    """Raises CaseError unless the config has every field, each with a value that it may have."""
    config = case.config
    require_fields(case, {"experts", "top_k", *SIZES, *fields})
    labels = require_experts(case, most_experts)
    require_integer(case, "top_k", min(most_k, len(labels)))
    for name in SIZES:
        require_integer(case, name, MAX_SIZE)
    require_values(case, fields)
    if config["recipe"] in NO_CLAMP and config["activation"] == "swiglu_oai":
        raise CaseError("config.recipe", "no gate makes swiglu_oai exact", "use one_hot, which its bound judges")
    if config["recipe"] == "curve" and config["activation"] == "relu2":
        raise CaseError("config.recipe", "relu2 has no gate", "use one_hot")
