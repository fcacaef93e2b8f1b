"""The routers that vLLM ships, as operators of its extension library and as its Python functions. Worker side.

What is promised here was read in vLLM's public repository; docs/targets.md has the table, and what follows from it.
"""

from __future__ import annotations

from dataclasses import replace

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.targets import extension, sources
from moe_fuzz.targets.adapter import Router, into_outputs, returning
from moe_fuzz.targets.schema import BoundCall, Fixed, Names, bind_function, bind_operator

_TEST = "vllm tests/kernels/moe/test_fused_topk.py"
_PACKAGE = "vllm.model_executor.layers.fused_moe"

#: Arguments of the operators topk_softmax and topk_sigmoid, from 0.10 to 0.33.
_OPERATOR: Names = {
    "topk_weights": "weights",
    "topk_indices": "ids",
    "token_expert_indices": "token_expert_indices",
    "gating_output": "logits",
    "renormalize": "renormalize",  # until 0.11.0 the Python caller divided
    "bias": "bias",  # since 0.16
    "routed_scaling_factor": "scale",  # topk_sigmoid, since 0.27
    "is_padding": "is_padding",  # since 0.27
}
_FUNCTION: Names = {
    "hidden_states": "hidden",
    "gating_output": "logits",
    "topk": "top_k",
    "renormalize": "renormalize",
    "e_score_correction_bias": "bias",
    "routed_scaling_factor": "scale",
}

#: csrc/libtorch_stable/moe/topk_softmax_kernels.cu (csrc/moe/ before 0.24). One to 32 lanes of a warp take a row, or a
#: block where E has no kernel of its own; nothing crosses rows, nothing is atomic. Logits become float32, and so do
#: scores and weights. Each slot is the argmax of what is left, the lowest id among equals.
_CONTRACT = Contract(
    deterministic=True,
    batch_invariant=True,
    ties="lowest_index_first",
    ordered=True,
    padding_weight="any",  # a flagged row keeps its softmax weights beside the ids -1
)
#: The kernels index rows by row * E from a pointer they load 16 bytes from: logits must be packed and aligned, which
#: the router's linear layer gives, and nothing checks.
_CAPABILITIES = Capabilities(strided=False, out=True, alignment=16)

_CLAUSES = {
    "ids": f"{_TEST}: k distinct ids on rows of NaN and Inf too; duplicates crash the experts' sort (vllm#39391)",
    "finite": f"{_TEST}: finite weights on rows of NaN and Inf too (vllm#39391)",
    "selection": f"{_TEST}: ids equal those of torch.topk over the scores, plus the bias where there is one",
    "padding": "vllm#48979: a row flagged in is_padding gets the id -1, which the experts kernels skip",
    "written": "the experts kernels index with every id (moe_align_block_size); none may be left as it was",
    "crash": "no caller survives an access outside the tensors it passed (vllm#40351, vllm#39244)",
    "fence": "no caller survives an access outside the tensors it passed (vllm#40351, vllm#39244)",
    "canary": "no caller survives a write outside the tensors it passed (vllm#40351)",
}
_BIAS = "the kernel marks taken experts with -10000 and the block kernel starts at -1, for scores 'between 0 and 1'"
_EMPTY = "vLLM's callers pad an idle rank to a token; a batch of none does not reach this operator"
_UNPROMISED = {
    "ids @ fault:extreme_bias": f"a bias of -Inf or below -1e4 is no model's: {_BIAS}",
    "selection @ fault:extreme_bias": f"a bias of -Inf or below -1e4 is no model's: {_BIAS}",
    "error @ T=0": _EMPTY,
}


def topk_softmax() -> Router:
    """`_moe_C::topk_softmax`. Raises EnvironmentProblem."""
    return _operator("topk_softmax")


def topk_sigmoid() -> Router:
    """`_moe_C::topk_sigmoid` (since 0.16). Raises EnvironmentProblem."""
    return _operator("topk_sigmoid")


def topk_softmax_fused_topk() -> Router:
    """`fused_topk(scoring_func="softmax")`, as vLLM's layers call it. Needs the whole package."""
    return _function("fused_topk", "softmax")


def topk_sigmoid_fused_topk() -> Router:
    """`fused_topk(scoring_func="sigmoid")`, as vLLM's layers call it. Needs the whole package."""
    return _function("fused_topk", "sigmoid")


def topk_softmax_fused_topk_bias() -> Router:
    """`fused_topk_bias(scoring_func="softmax")`, as vLLM's layers call it. Needs the whole package."""
    return _function("fused_topk_bias", "softmax")


def topk_sigmoid_fused_topk_bias() -> Router:
    """`fused_topk_bias(scoring_func="sigmoid")`, as vLLM's layers call it. Needs the whole package."""
    return _function("fused_topk_bias", "sigmoid")


def _operator(name: str) -> Router:
    library = extension.load(sources.VLLM)
    operator = library.operator(name)
    call = bind_operator(operator, _OPERATOR, ("weights", "ids", "logits"))
    devices = extension.devices(operator)
    return _promise(into_outputs(call), call, replace(_CAPABILITIES, devices=devices), library.origin(call.text))


def _function(name: str, scoring: str) -> Router:
    router = f"{_PACKAGE}.router.{name}_router:{name}"  # since 0.14; before, all stood in one module
    function, version = extension.function("vllm", (router, f"{_PACKAGE}.fused_moe:{name}"))
    call = bind_function(function, {**_FUNCTION, "scoring_func": Fixed(scoring)}, ("logits", "top_k"))
    origin = f"vllm {version}, {function.__module__}.{call.text}"
    capabilities = replace(_CAPABILITIES, out=False, devices=("cuda",))
    return _promise(returning(call), call, capabilities, origin)


def _promise(router: Router, call: BoundCall, capabilities: Capabilities, origin: str) -> Router:
    contract = replace(_CONTRACT, padding=("minus_one",)) if call.takes("is_padding") else _CONTRACT
    return declares(contract, capabilities, _CLAUSES, _UNPROMISED, origin)(router)
