"""What `moe_layer` says to a person: one line for each check and fault, and the label of a case."""

from __future__ import annotations

from moe_fuzz.case import Case
from moe_fuzz.ops.routing import text

CHECKS = {
    "error": "a valid input is taken: no exception inside the declared capabilities",
    "capture": "it can be captured into a CUDA graph, where declared",
    "structure": "outputs have the contract's shape, dtype and device",
    "ids": "the router's half: the k ids of a row are distinct and name experts",
    "finite": "the router's half: weights are finite and not negative, on undefined rows too",
    "padding": "the router's half: rows flagged as padding follow the dialect",
    "written": "every element of an output is written",
    "selection": "the router's half: no unselected expert has a higher score than a selected one, beyond rounding",
    "weights": "the router's half: weights agree with float64 for its own ids, within the rounding bound",
    "bound": "the experts' half: y agrees with float64 for the router's own ids and weights, within the rounding bound",
    "exact": "the experts' half: where every sum is exact, y has the known bits, for the router's own ids and weights",
    "fence": "no read or write outside a tensor, no write into an input",
    "canary": "the slack bytes beside a tensor keep their pattern",
    "isolation": "what stands in padding and other rows does not change a real row, bit for bit, where declared",
    "replay": "a graph's replay gives what an eager call gives, bit for bit where deterministic",
    "determinism": "the same input gives the same bits, where declared; a graph is replayed",
}

_HIDDEN = ("nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "partial_inf", "huge_rows", "ladder", "ties",
           "zero_rows", "stale_rows", "extreme_bias", "negative_bias", "noncontiguous", "transposed",
           "misaligned")  # fmt: skip
FAULTS = {name: text.FAULTS[name] for name in _HIDDEN}


def label(case: Case) -> str:
    """`moe_layer ranks T=8 (3 padding) E=6 k=2 H=32 I=16 bfloat16 dp=2 ep=2 minus_one; nan_rows on hidden rows 6-7`."""
    config = case.config
    parts = [case.op] + ([case.way] if case.way else [])
    for step in case.steps:
        parts.append(f"T={step.tokens}" + (f" ({len(step.padding)} padding)" if step.padding else ""))
    parts += [f"E={len(case.experts)}", f"k={config['top_k']}", f"H={config['hidden']}", f"I={config['intermediate']}"]
    parts += [str(config["dtype"])] + [f"{name}={config[name]}" for name in ("dp", "ep") if config[name] != 1]
    parts += [str(config[name]) for name, plain in (("scoring", "softmax"), ("activation", "silu"),
                                                    ("gate_layout", "first")) if config[name] != plain]  # fmt: skip
    parts += [name for name in ("renormalize", "bias", "out") if config[name]]
    if config["expert_bias"] != "none":
        parts.append(f"expert_bias={config['expert_bias']}")
    parts += [str(config["recipe"])] if config["recipe"] != "dense" else []
    if config["gate_dtype"] != "dtype":
        parts.append(f"gate={config['gate_dtype']}")
    if config["is_padding"]:
        parts.append(f"is_padding={config['dialect']}")
    if config["scale"] != 1.0:
        parts.append(f"scale={config['scale']}")
    if config["magnitude"] != 0:
        parts.append(f"|x|<2^{config['magnitude']}")
    if config["edge"] != "right":
        parts.append(f"fenced {config['edge']}")
    faults = text.fault_lines(case)
    return " ".join(parts) + ("; " + ", ".join(faults) if faults else "")
