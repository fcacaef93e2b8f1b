"""The routers of models that people serve: the part of a config that each fixes, after its published config.json."""

from __future__ import annotations

from collections.abc import Mapping

from moe_fuzz.case import Scalar

Presets = Mapping[str, Mapping[str, Scalar]]

_BF16: dict[str, Scalar] = {"dtype": "bfloat16"}
_BIASED: dict[str, Scalar] = {"renormalize": True, "bias": True, "dtype": "float32"}  # their gates compute in float32

SOFTMAX_MODELS: Presets = {
    "qwen3-30b-a3b": {"experts": 128, "top_k": 8, "renormalize": True, **_BF16},
    "qwen3-vl-235b-a22b": {"experts": 128, "top_k": 8, "renormalize": True, **_BF16},
    "qwen3-next-80b-a3b": {"experts": 512, "top_k": 10, "renormalize": True, **_BF16},
    "qwen2-57b-a14b": {"experts": 64, "top_k": 8, "renormalize": False, **_BF16},
    "mixtral-8x7b": {"experts": 8, "top_k": 2, "renormalize": True, **_BF16},
    "deepseek-v2-lite": {"experts": 64, "top_k": 6, "renormalize": False, **_BF16},
    "qwen1.5-moe-a2.7b": {"experts": 60, "top_k": 4, "renormalize": False, **_BF16},
    "gpt-oss-120b": {"experts": 128, "top_k": 4, "renormalize": True, **_BF16},
}

#: Models with one group of experts are routed here by some stacks, and through grouped_topk by others.
SIGMOID_MODELS: Presets = {
    "llama-4-scout": {"experts": 16, "top_k": 1, "renormalize": False, "bias": False, **_BF16},
    "llama-4-maverick": {"experts": 128, "top_k": 1, "renormalize": False, "bias": False, **_BF16},
    "minimax-m2": {"experts": 256, "top_k": 8, **_BIASED},
    "nemotron-3-nano": {"experts": 128, "top_k": 6, "scale": 2.5, **_BIASED},
    "nemotron-3-super": {"experts": 512, "top_k": 22, "scale": 5.0, **_BIASED},
    "glm-4.5": {"experts": 160, "top_k": 8, "scale": 2.5, **_BIASED},
    "kimi-k2": {"experts": 384, "top_k": 8, "scale": 2.827, **_BIASED},
}

_V3: dict[str, Scalar] = {"scoring": "sigmoid", "group_score": "top2_sum", **_BIASED}
_ONE: dict[str, Scalar] = {"n_group": 1, "topk_group": 1}

GROUPED_MODELS: Presets = {
    "deepseek-v2": {"experts": 160, "n_group": 8, "topk_group": 3, "top_k": 6, "scoring": "softmax",
                    "group_score": "max", "renormalize": False, "bias": False, "scale": 16.0, **_BF16},
    "deepseek-v3": {"experts": 256, "n_group": 8, "topk_group": 4, "top_k": 8, "scale": 2.5, **_V3},
    "deepseek-v3-shared": {"experts": 256, "n_group": 8, "topk_group": 4, "top_k": 8, "scale": 2.5, "n_shared": 1,
                           **_V3},
    "ling-mini-2.0": {"experts": 256, "n_group": 8, "topk_group": 4, "top_k": 8, "scale": 2.5, **_V3},
    "kimi-k2": {"experts": 384, "top_k": 8, "scale": 2.827, **_ONE, **_V3},
    "nemotron-3-super": {"experts": 512, "top_k": 22, "scale": 5.0, **_ONE, **_V3},
    "glm-4.5": {"experts": 160, "top_k": 8, "scale": 2.5, **_ONE, **_V3},
    "glm-4.5-air": {"experts": 128, "top_k": 8, "scale": 1.0, **_ONE, **_V3},
}  # fmt: skip
