"""What is simpler than an experts case, and the classes it belongs to. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from moe_fuzz.case import MODES, Case, Fault, Scalar
from moe_fuzz.labels import Labels
from moe_fuzz.ops.experts.fields import FIELDS, NO_CLAMP, bias_dtypes
from moe_fuzz.ops.moves import plainer_faults, simpler_runs, with_fitting_faults

Fields = Mapping[str, tuple[Scalar, ...]]


def mended(config: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The config with what depends on other fields cut down to them, so that equal cases look equal."""
    whole = {**config, "top_k": min(int(config["top_k"]), len(Labels.parse(str(config["experts"]))))}
    if whole["activation"] == "swiglu_oai" and whole["recipe"] in NO_CLAMP:
        whole["recipe"] = "one_hot"
    if whole["activation"] == "relu2" and whole["recipe"] == "curve":
        whole["recipe"] = "one_hot"
    if whole["recipe"] != "dense":
        whole |= {name: FIELDS[name][0] for name in ("magnitude", "weight_scale")}
    elif whole["dtype"] == "float16":  # whose range ends where these begin
        whole |= {"magnitude": min(int(whole["magnitude"]), 2), "weight_scale": min(int(whole["weight_scale"]), -3)}
    known = whole["recipe"] not in ("dense", "ladder")  # with powers of two alone, and nothing cut off
    if whole.get("activations") == "as_given" or (known and whole.get("global_scale") in ("fitted", "large")):
        whole["global_scale"] = "power"
    return whole


def has_tensor(config: Mapping[str, Scalar], tensor: str) -> bool:
    """Whether a case of this config has the tensor: biases and a map it need not have."""
    if tensor in ("b13", "b2"):
        return bias_dtypes(config["bias"])[tensor == "b2"] != "none"
    return tensor != "expert_map" or config["expert_map"] != "none"


def _has_room_for(config: Mapping[str, Scalar], fault: Fault) -> bool:
    return has_tensor(config, fault.tensor)


def keep(case: Case, axis: str, labels: Labels) -> Case:
    return replace(case, config=mended({**case.config, axis: str(labels)}))


def features(case: Case, fields: Fields) -> frozenset[str]:
    """The classes that the case belongs to: what a finding may need."""
    config, count, top_k = case.config, len(case.experts), int(case.config["top_k"])
    hidden, inter = int(config["hidden"]), int(config["intermediate"])
    most = max(step.tokens for step in case.steps)
    found = {f"E>{limit}" for limit in (1, 8, 32, 128) if count > limit}
    found |= {f"k>{limit}" for limit in (1, 4, 8, 16) if top_k > limit}
    found |= {f"T>{limit}" for limit in (1, 8, 32, 128, 512) if most > limit}
    found |= {f"slots>{limit}" for limit in (16, 128, 1024) if most * top_k > limit}
    found |= {f"H>{limit}" for limit in (16, 128, 1024) if hidden > limit}
    found |= {f"I>{limit}" for limit in (16, 128, 1024) if inter > limit}
    found |= {"H not a multiple of 16"} if hidden % 16 else set()
    found |= {"I not a multiple of 16"} if inter % 16 else set()
    found |= {"E not a power of two"} if count & (count - 1) else set()
    found |= {"k=E"} if top_k == count > 1 else set()
    found |= {"T=0"} if any(step.tokens == 0 for step in case.steps) else set()
    padded = any(step.padding for step in case.steps)
    for name, values in fields.items():
        if config[name] == values[0] or name in ("magnitude", "weight_scale") or (name == "dialect" and not padded):
            continue
        found |= {name if config[name] is True else f"{name}={config[name]}"}
    found |= {"large values"} if int(config["magnitude"]) > 4 or int(config["weight_scale"]) > 0 else set()
    found |= {f"fault:{name}" for name in case.fault_names}
    found |= {"several steps"} if len(case.steps) > 1 else set()
    found |= {"several buckets"} if case.mode != "eager" and len(case.buckets) > 1 else set()
    return frozenset(found)


def simplify(
    case: Case, fields: Fields, experts: Sequence[int], top_k: Sequence[int], sizes: Mapping[str, Sequence[int]],
    *row_faults: Sequence[str],
) -> Iterator[Case]:  # fmt: skip
    """Valid and strictly simpler cases, the most ambitious first. row_faults: each the faults of a tensor, the plainest
    first."""
    yield from simpler_runs(case, MODES)
    for smaller in (k for k in top_k if k < int(case.config["top_k"])):
        yield case.with_config(top_k=smaller)
    for fewer in (e for e in experts if e < len(case.experts)):
        yield keep(case, "experts", case.experts.first(fewer))
    for name, known in sizes.items():
        value = int(case.config[name])
        plainer = known[: known.index(value) if value in known else None]
        for size in plainer:  # 16 is simpler than 1, where there is no vector or block to see
            yield case.with_config(**{name: size})
    for name, values in fields.items():
        for other in values[: values.index(case.config[name])]:
            simpler = replace(case, config=mended({**case.config, name: other}))
            if simpler != case and simpler.config[name] == other:  # else it has been mended back
                yield with_fitting_faults(simpler, partial(_has_room_for, simpler.config))
    for faults in row_faults:
        yield from plainer_faults(case, faults)
