"""The experts that vLLM and SGLang ship in Triton, through the functions that their layers call. Worker side.

Both need the whole package. What a release takes is read off its signature: `quant_config` since vLLM 0.11, no
`inplace` since 0.23; SGLang wraps the routing in a tuple since 0.5.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.targets import extension

Experts = Callable[..., Tensor]
_VLLM = ("vllm.model_executor.layers.fused_moe.fused_moe:fused_experts",
         "vllm.model_executor.layers.fused_moe:fused_experts")  # fmt: skip
_SGLANG = ("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:fused_experts",
           "sglang.srt.layers.moe.fused_moe_triton.fused_moe:fused_experts")  # fmt: skip
#: The product with w13 goes through a cache in the dtype of x, and the activation is another kernel; no id is checked.
_CONTRACT = Contract(gate_up="dtype", reduce="dtype")
#: `silu_and_mul` of csrc/activation_kernels.cu rounds the sigmoid's product before it meets the other half.
_VLLM_CONTRACT = replace(_CONTRACT, activation="dtype")
_CAPABILITIES = Capabilities(
    dtypes=("bfloat16", "float16"), activations=("silu",), gate_layouts=("first",), biases=False, devices=("cuda",)
)


def vllm() -> Experts:
    """vLLM's `fused_experts`, unquantized. Raises EnvironmentProblem."""
    function, version = extension.function("vllm", _VLLM)
    takes = inspect.signature(function).parameters

    def experts(
        x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, *, expert_map: Tensor | None = None,
        apply_weight_on_input: bool = False,
    ) -> Tensor:  # fmt: skip
        more: dict[str, Any] = {
            "expert_map": expert_map,
            "global_num_experts": w13.shape[0] if expert_map is None else len(expert_map),
            "apply_router_weight_on_input": apply_weight_on_input,
        }
        if "inplace" in takes:
            more["inplace"] = False
        found: Tensor = function(x, w13, w2, weights, ids, **more)
        return found

    origin = f"vllm {version}, {function.__module__}.{function.__name__}"
    return declares(contract=_VLLM_CONTRACT, capabilities=_CAPABILITIES, origin=origin)(experts)


def sglang() -> Experts:
    """SGLang's `fused_experts`, unquantized. Raises EnvironmentProblem."""
    function, version = extension.function("sglang", _SGLANG)
    takes = inspect.signature(function).parameters
    wrapped = "topk_output" in takes

    def experts(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if not wrapped:
            old: Tensor = function(x, w13, w2, weights, ids)
            return old
        # the router's logits stand third, and unquantized experts do not read them
        config = importlib.import_module("sglang.srt.layers.moe.moe_runner").MoeRunnerConfig(inplace=False)
        found: Tensor = function(x, w13, w2, (weights, ids, None), config)
        return found

    origin = f"sglang {version}, {function.__module__}.{function.__name__}"
    return declares(contract=_CONTRACT, capabilities=_CAPABILITIES, origin=origin)(experts)
