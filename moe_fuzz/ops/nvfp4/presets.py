"""The rows that models people serve have quantized: of a config, the part that each fixes, hidden or intermediate sizes
in blocks of 16. Sizes are those of the published config.json; where a rank has a part of the intermediate size, the
name says of how many.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_fuzz.case import Scalar

MODELS: Mapping[str, Mapping[str, Scalar]] = {
    "qwen3-30b-a3b": {"blocks": 128, "layout": "swizzled"},
    "qwen3-30b-a3b-tp2-intermediate": {"blocks": 24, "layout": "swizzled", "expert_ids": "int32"},
    "qwen3-vl-235b-a22b": {"blocks": 256, "layout": "swizzled"},
    "qwen3-vl-235b-a22b-tp4-intermediate": {"blocks": 24, "layout": "swizzled", "expert_ids": "int32"},
    "nemotron-3-super": {"blocks": 168, "layout": "swizzled"},
    "gpt-oss-120b": {"blocks": 180, "layout": "swizzled"},
    "llama-4-maverick": {"blocks": 320, "layout": "swizzled"},
    "deepseek-v3": {"blocks": 448, "layout": "swizzled"},
    "deepseek-v3-intermediate": {"blocks": 128, "layout": "swizzled", "expert_ids": "int32"},
}
