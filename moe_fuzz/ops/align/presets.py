"""The routed experts of models that people serve, with the blocks that their grouped GEMMs take: of a config, the part
that each fixes. Experts and top_k are those of the published config.json; a block is what the table of a serving stack
picks for a decode batch of the model.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_fuzz.case import Scalar

MODELS: Mapping[str, Mapping[str, Scalar]] = {
    "qwen3-30b-a3b": {"experts": 128, "top_k": 8, "block_size": 16},
    "qwen3-vl-235b-a22b": {"experts": 128, "top_k": 8, "block_size": 64},
    "qwen3-next-80b-a3b": {"experts": 512, "top_k": 10, "block_size": 16},
    "qwen1.5-moe-a2.7b": {"experts": 60, "top_k": 4, "block_size": 64},
    "mixtral-8x7b": {"experts": 8, "top_k": 2, "block_size": 128},
    "deepseek-v2-lite": {"experts": 64, "top_k": 6, "block_size": 64},
    "deepseek-v3": {"experts": 256, "top_k": 8, "block_size": 64},
    "deepseek-v3-ep8": {"experts": 256, "top_k": 8, "block_size": 64, "expert_map": "shard"},
    "kimi-k2-ep16": {"experts": 384, "top_k": 8, "block_size": 32, "expert_map": "shard"},
    "gpt-oss-120b": {"experts": 128, "top_k": 4, "block_size": 32},
    "llama-4-maverick": {"experts": 128, "top_k": 1, "block_size": 32},
}
