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
#: vLLM's sum is told no ids: of a slot that its alignment drops for the id -1 it adds what nobody wrote.
_CONTRACT = Contract(gate_up="dtype", reduce="dtype")
#: `silu_and_mul` of csrc/activation_kernels.cu rounds the sigmoid's product before it meets the other half.
_VLLM_CONTRACT = replace(_CONTRACT, activation="dtype")
#: SGLang (triton_utils/fused_moe.py, 0.5.23): silu_and_mul stays in float32 up to its store, as in
#: elementwise/activation.cuh, and so do all three sums; of two slots the only addition is rounded once. A bias is added
#: to the float32 sum; blocks of the id -1 write zeros. Before 0.5 slots were added up by an operator of vLLM's.
_SGLANG_CONTRACT = replace(_CONTRACT, reduce="float32", accepts=("distinct", "minus_one", "zero_weight"))
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
    biased = wrapped and {"b1", "b2"} <= set(takes)

    def experts(
        x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, *, b13: Tensor | None = None,
        b2: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if not wrapped:
            old: Tensor = function(x, w13, w2, weights, ids)
            return old
        # the router's logits stand third, and unquantized experts do not read them
        config = importlib.import_module("sglang.srt.layers.moe.moe_runner").MoeRunnerConfig(inplace=False)
        biases = {"b1": b13, "b2": b2} if biased else {}
        found: Tensor = function(x, w13, w2, (weights, ids, None), config, **biases)
        return found

    origin = f"sglang {version}, {function.__module__}.{function.__name__}"
    contract, capabilities = _SGLANG_CONTRACT if wrapped else _CONTRACT, replace(_CAPABILITIES, biases=biased)
    return declares(contract=contract, capabilities=capabilities, origin=origin)(experts)
