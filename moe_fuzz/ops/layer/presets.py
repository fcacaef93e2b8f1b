"""What models fix of a layer. Their own H and I are thousands: sizes come from the dictionary. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping

from moe_fuzz.case import Scalar

_SOFTMAX: dict[str, Scalar] = {"scoring": "softmax", "renormalize": True, "bias": False, "scale": 1.0,
                               "activation": "silu", "gate_layout": "first", "expert_bias": "none"}  # fmt: skip
_SIGMOID: dict[str, Scalar] = {**_SOFTMAX, "scoring": "sigmoid", "bias": True}

MODELS: Mapping[str, Mapping[str, Scalar]] = {
    "qwen3-30b-a3b": {"experts": 128, "top_k": 8, **_SOFTMAX},
    "qwen3-next-80b-a3b": {"experts": 512, "top_k": 10, **_SOFTMAX},
    "qwen2-57b-a14b": {"experts": 64, "top_k": 8, **_SOFTMAX, "renormalize": False},
    "mixtral-8x7b": {"experts": 8, "top_k": 2, **_SOFTMAX},
    "gpt-oss-120b": {"experts": 128, "top_k": 4, **_SOFTMAX, "activation": "swiglu_oai", "gate_layout": "interleaved",
                     "expert_bias": "dtype"},
    "nemotron-3-nano": {"experts": 128, "top_k": 6, **_SIGMOID, "activation": "relu2", "scale": 2.5},
    "glm-4.5": {"experts": 160, "top_k": 8, **_SIGMOID, "scale": 2.5},
    "kimi-k2": {"experts": 384, "top_k": 8, **_SIGMOID, "scale": 2.827},
    "llama-4-scout": {"experts": 16, "top_k": 1, **_SIGMOID, "bias": False, "renormalize": False},
}  # fmt: skip
