"""What is measured of the experts of a layer: models, numbers of tokens, candidates. Free of torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from moe_fuzz.bench.points import Candidate, Point
from moe_fuzz.case import Scalar
from moe_fuzz.errors import UsageError

OP = "experts_bf16"
OP_NVFP4 = "experts_nvfp4"
OPS = (OP, OP_NVFP4)
TOKENS = (1, 8, 64, 512, 4096)


def _model(experts: int, top_k: int, hidden: int, inter: int, **more: Scalar) -> Mapping[str, Scalar]:
    config: dict[str, Scalar] = {
        "experts": experts, "local": experts, "top_k": top_k, "hidden": hidden, "inter": inter,
        "activation": "silu", "gate_layout": "first", "bias": False,
    }  # fmt: skip
    return config | more


#: Sizes from the models' published configurations; `local` of the experts are on this GPU, each cut to `inter`.
_QWEN_30B = _model(128, 8, 2048, 768)
_QWEN_235B_TP4 = _model(128, 8, 4096, 384)
_DEEPSEEK_EP8 = _model(256, 8, 7168, 2048, local=32)
MODELS: Mapping[str, Mapping[str, Mapping[str, Scalar]]] = {
    OP: {
        "qwen3-30b-a3b": _QWEN_30B,
        "qwen3-vl-235b-a22b-tp4": _QWEN_235B_TP4,
        "mixtral-8x7b": _model(8, 2, 4096, 14336),
        "deepseek-v3-ep8": _DEEPSEEK_EP8,
        "gpt-oss-120b": _model(128, 4, 2880, 2880, activation="swiglu_oai", gate_layout="interleaved", bias=True),
    },
    OP_NVFP4: {
        "qwen3-30b-a3b": _QWEN_30B,
        "qwen3-vl-235b-a22b-tp4": _QWEN_235B_TP4,
        "nemotron-3-super": _model(512, 22, 1024, 2688, activation="relu2"),
        "deepseek-v3-ep8": _DEEPSEEK_EP8,
    },
}
#: Label -> where the code lies, and whether it is another project's.
_CANDIDATES: Mapping[str, Mapping[str, tuple[str, bool]]] = {
    OP: {
        "builtin": ("moe_fuzz.targets.builtin:experts_bf16", False),
        "torch, grouped_mm": ("moe_fuzz.targets.torch_experts:grouped", True),
        "torch, loop": ("moe_fuzz.targets.torch_experts:experts_bf16", True),
        "vllm": ("moe_fuzz.targets.library_experts:vllm()", True),
        "sglang": ("moe_fuzz.targets.library_experts:sglang()", True),
    },
    OP_NVFP4: {
        "builtin": ("moe_fuzz.bench.layer_candidates:chosen", False),
        "builtin, small": ("moe_fuzz.bench.layer_candidates:small", False),
        "builtin, large": ("moe_fuzz.bench.layer_candidates:large", False),
        "builtin, three fills": ("moe_fuzz.bench.layer_candidates:three_fills", False),
        "builtin, bf16": ("moe_fuzz.targets.builtin:experts_bf16", False),
        "vllm, Marlin": ("moe_fuzz.targets.vllm_marlin:served()", True),
    },
}
#: Candidates that are given the same weights decoded, and are bound as another op.
_DECODED = {"builtin, bf16": OP}


def points(presets: Sequence[str] = (), tokens: Sequence[int] = TOKENS, op: str = OP) -> tuple[Point, ...]:
    """Every model (or those named) at each number of tokens. UsageError for an unknown one."""
    models = MODELS[op]
    for name in presets:
        if name not in models:
            raise UsageError(f"{op} has no preset {name!r}", _near(name, models))
    chosen = [name for name in models if not presets or name in presets]
    return tuple(Point(op, name, count, dict(models[name])) for name in chosen for count in tokens)


def candidates(labels: Sequence[str] = (), op: str = OP) -> tuple[Candidate, ...]:
    """Those of these labels, `module:function` or `/path/file.py:function` among them; or all. UsageError."""
    found, known = [], _CANDIDATES[op]
    for label in labels or known:
        if label not in known and ":" not in label:
            raise UsageError(f"there is no candidate {label!r} of {op}", _near(label, known))
        location, upstream = known.get(label, (label, False))
        found.append(Candidate(label, location, upstream))
    return tuple(found)


def bound_as(candidate: Candidate, op: str) -> str:
    """The op whose arguments a candidate is given."""
    return _DECODED.get(candidate.label, op)


def _near(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, known))}, or file.py:function"
