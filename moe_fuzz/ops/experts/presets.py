"""The routed experts of models that people serve, after their published config.json: what each fixes of a config.

hidden and intermediate are those of the model on one rank. A fuzzed case takes them scaled down, see `shrunk` in
space.py: it has the model's k, activation, layout and number of experts. A benchmark takes them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_fuzz.case import Scalar

_BF16: Mapping[str, Scalar] = {"dtype": "bfloat16", "activation": "silu", "gate_layout": "first", "bias": "none",
                               "weight_on_input": False, "expert_map": "none"}  # fmt: skip

MODELS: Mapping[str, Mapping[str, Scalar]] = {
    "qwen3-30b-a3b": {**_BF16, "experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768},
    "qwen3-vl-235b-a22b-tp4": {**_BF16, "experts": 128, "top_k": 8, "hidden": 4096, "intermediate": 384},
    "qwen2-57b-a14b": {**_BF16, "experts": 64, "top_k": 8, "hidden": 3584, "intermediate": 2560},
    "mixtral-8x7b": {**_BF16, "experts": 8, "top_k": 2, "hidden": 4096, "intermediate": 14336},
    "deepseek-v3-ep8": {**_BF16, "experts": 256, "top_k": 8, "hidden": 7168, "intermediate": 2048,
                        "expert_map": "shard"},
    # its published weights interleave gate and up-projection, and both projections have biases
    "gpt-oss-120b": {**_BF16, "experts": 128, "top_k": 4, "hidden": 2880, "intermediate": 2880,
                     "activation": "swiglu_oai", "gate_layout": "interleaved", "bias": "dtype"},
    # the router's weight multiplies the input of its one expert
    "llama-4-scout": {**_BF16, "experts": 16, "top_k": 1, "hidden": 5120, "intermediate": 8192,
                      "weight_on_input": True},
    "llama-4-maverick": {**_BF16, "experts": 128, "top_k": 1, "hidden": 5120, "intermediate": 8192,
                         "weight_on_input": True},
    # experts work on a latent narrower than the model's hidden states
    "nemotron-3-super": {**_BF16, "experts": 512, "top_k": 22, "hidden": 1024, "intermediate": 2688,
                         "activation": "relu2"},
}  # fmt: skip

#: Those that are served in NVFP4: scales swizzled as tensor cores want them, activations quantized, too.
MODELS_NVFP4: Mapping[str, Mapping[str, Scalar]] = {
    name: {**MODELS[name], "scale_layout": "swizzled", "activations": "nvfp4", "global_scale": "fitted"}
    for name in ("qwen3-30b-a3b", "qwen3-vl-235b-a22b-tp4", "nemotron-3-super", "deepseek-v3-ep8")
}  # fmt: skip
