"""What models fix of a fused all-reduce and RMSNorm: hidden size and epsilon. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping

from moe_fuzz.case import Scalar

_BF16: dict[str, Scalar] = {"dtype": "bfloat16", "gamma_dtype": "dtype", "residual": True}

MODELS: Mapping[str, Mapping[str, Scalar]] = {
    "qwen3-30b-a3b": {"hidden": 2048, "eps": 1e-6, **_BF16},
    "qwen3-235b-a22b": {"hidden": 4096, "eps": 1e-6, **_BF16},
    "gpt-oss-120b": {"hidden": 2880, "eps": 1e-5, **_BF16},
    "nemotron-3-nano": {"hidden": 2688, "eps": 1e-5, **_BF16},
    "llama-4-scout": {"hidden": 5120, "eps": 1e-5, **_BF16},
    "deepseek-v3": {"hidden": 7168, "eps": 1e-6, **_BF16},
}
