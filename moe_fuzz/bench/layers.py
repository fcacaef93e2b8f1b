"""What is measured of the experts of a layer: models, numbers of tokens, candidates. Free of torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from moe_fuzz.bench.points import Candidate, Point
from moe_fuzz.case import Scalar
from moe_fuzz.errors import UsageError

OP = "experts_bf16"
TOKENS = (1, 8, 64, 512, 4096)


def _model(experts: int, top_k: int, hidden: int, inter: int, **more: Scalar) -> Mapping[str, Scalar]:
    config: dict[str, Scalar] = {
        "experts": experts, "local": experts, "top_k": top_k, "hidden": hidden, "inter": inter,
        "activation": "silu", "gate_layout": "first", "bias": False,
    }  # fmt: skip
    return config | more


#: Sizes from the models' published configurations; `local` of the experts are on this GPU, each cut to `inter`.
MODELS: Mapping[str, Mapping[str, Scalar]] = {
    "qwen3-30b-a3b": _model(128, 8, 2048, 768),
    "qwen3-vl-235b-a22b-tp4": _model(128, 8, 4096, 384),
    "mixtral-8x7b": _model(8, 2, 4096, 14336),
    "deepseek-v3-ep8": _model(256, 8, 7168, 2048, local=32),
    "gpt-oss-120b": _model(128, 4, 2880, 2880, activation="swiglu_oai", gate_layout="interleaved", bias=True),
}
#: Label -> where the code lies, and whether it is another project's.
_CANDIDATES: Mapping[str, tuple[str, bool]] = {
    "builtin": ("moe_fuzz.targets.builtin:experts_bf16", False),
    "torch, grouped_mm": ("moe_fuzz.targets.torch_experts:grouped", True),
    "torch, loop": ("moe_fuzz.targets.torch_experts:experts_bf16", True),
    "vllm": ("moe_fuzz.targets.library_experts:vllm()", True),
    "sglang": ("moe_fuzz.targets.library_experts:sglang()", True),
}


def points(presets: Sequence[str] = (), tokens: Sequence[int] = TOKENS) -> tuple[Point, ...]:
    """Every model (or those named) at each number of tokens. UsageError for an unknown one."""
    for name in presets:
        if name not in MODELS:
            raise UsageError(f"{OP} has no preset {name!r}", _near(name, MODELS))
    chosen = [name for name in MODELS if not presets or name in presets]
    return tuple(Point(OP, name, count, dict(MODELS[name])) for name in chosen for count in tokens)


def candidates(labels: Sequence[str] = ()) -> tuple[Candidate, ...]:
    """Those of these labels, `module:function` or `/path/file.py:function` among them; or all. UsageError."""
    found = []
    for label in labels or _CANDIDATES:
        if label not in _CANDIDATES and ":" not in label:
            raise UsageError(f"there is no candidate {label!r} of {OP}", _near(label, _CANDIDATES))
        location, upstream = _CANDIDATES.get(label, (label, False))
        found.append(Candidate(label, location, upstream))
    return tuple(found)


def _near(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, known))}, or file.py:function"
