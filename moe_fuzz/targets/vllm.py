"""The routers that vLLM ships, as operators of its extension library and as its Python functions. Worker side.

What is promised here was read in vLLM's public repository; docs/targets.md has the table, and what follows from it.
"""

from __future__ import annotations

from dataclasses import replace

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.targets import extension, sources
from moe_fuzz.targets.adapter import Libraries, Router, grouped, into_outputs, returning
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
_GROUPED: Names = {
    "scores": "scores",
    "scores_with_bias": "biased",  # until 0.11.0
    "n_group": "n_group",
    "topk_group": "topk_group",
    "topk": "top_k",
    "renormalize": "renormalize",
    "routed_scaling_factor": "scale",
    "bias": "bias",
    "scoring_func": "scoring_func",
}
_GROUPED_FUNCTION: Names = {
    **_FUNCTION,
    "num_expert_group": "n_group",
    "topk_group": "topk_group",
    "scoring_func": "scoring",
}

#: csrc/moe/topk_softmax_kernels.cu (between, csrc/libtorch_stable/moe/). One to 32 lanes of a warp take a row, or a
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
_CAPABILITIES = Capabilities(compiles=False, strided=False, out=True, alignment=16)

_CLAUSES = {
    "ids": f"{_TEST}: k distinct ids, on rows of NaN and Inf too; duplicates crash the experts' sort (vllm#39391)",
    "finite:nan on an undefined row": f"{_TEST}: finite weights on rows of NaN and Inf too (vllm#39391)",
    "finite:infinite on an undefined row": f"{_TEST}: finite weights on rows of NaN and Inf too (vllm#39391)",
    "selection": f"{_TEST}: ids equal those of torch.topk over the scores, plus a bias drawn from randn",
    "padding": "vllm#48979: a row flagged in is_padding gets the id -1, which the experts kernels skip",
    "written": "the experts kernels index with every id (moe_align_block_size); none may be left as it was",
    "crash": "no caller survives an access outside the tensors it passed (vllm#40351, vllm#39244)",
    "fence": "no caller survives an access outside the tensors it passed (vllm#40351, vllm#39244)",
    "canary": "no caller survives a write outside the tensors it passed (vllm#40351)",
}
_BIAS = "the kernel marks taken experts with -10000 and the block kernel starts at -1, for scores 'between 0 and 1'"
_EMPTY = "vLLM's callers pad an idle rank to a token; a batch of none does not reach this operator"
_UNPROMISED = {
    "finite": "of rows without NaN and Inf no test or issue says what becomes of a sum of scores below 2^-128",
    "weights": f"{_TEST} compares weights to 1e-2",
    "ids @ fault:extreme_bias": f"a bias of -Inf or below -1e4 is no model's: {_BIAS}",
    "selection @ fault:extreme_bias": f"a bias of -Inf or below -1e4 is no model's: {_BIAS}",
    "finite @ fault:extreme_bias": f"a bias of -Inf or below -1e4 is no model's: {_BIAS}",
    "error @ T=0": _EMPTY,
}

#: csrc/libtorch_stable/moe/grouped_topk_kernels.cu (csrc/moe/ before 0.24). A block takes a row and a warp a group.
#: The sigmoid is 0.5 * tanh(x / 2) + 0.5: exact to an absolute error only. Softmax is computed before the call.
_GROUPED_CONTRACT = Contract(sigmoid="tanh", deterministic=True, batch_invariant=True, ordered=True)
#: The operator checks n_group <= 32, top_k <= 32 and that groups are whole. A group's score is the sum of its two best
#: experts, so that a group needs two: GroupedTopKRouter takes another path where E <= n_group, and without a bias.
#: With logits in 16 bits one of its two kernels computes in 16 bits, which no bound of ours allows for: float32 alone.
_GROUPED_CAPABILITIES = Capabilities(
    compiles=False, dtypes=("float32",), min_experts=2, bias_required=True, is_padding=False, strided=False,
    alignment=1,
    max_n_group=32, min_group_size=2, group_scores=("top2_sum",), n_shared=0, expert_map=False,
)  # fmt: skip
_GROUPED_TEST = "vllm tests/kernels/moe/test_grouped_topk.py"
_GROUPED_CLAUSES = {
    **{check: _CLAUSES[check] for check in ("written", "crash", "fence", "canary")},
    "ids": "duplicates crash the experts' sort (vllm#39244); a row without a finite score is given the ids 0 to k-1",
    "selection": f"{_GROUPED_TEST}: ids equal those of the torch code; the operator itself admits 32 groups",
}
_GROUPED_UNPROMISED = {
    "finite": "the tests of the grouped path have no rows of NaN or Inf; its torch code gives NaN there",
    "weights": f"{_GROUPED_TEST} compares weights to 2e-2",
    "order": "the torch code asks torch.topk for sorted slots in batch-invariant mode alone",
    "determinism": "nothing says it of ids outside batch-invariant mode",
    "ids @ fault:extreme_bias": "no model's bias is -Inf",
    "selection @ fault:extreme_bias": "no model's bias is -Inf",
    "error @ T=0": "vllm/_custom_ops.py answers a batch of no tokens before the operator is called (0.33)",
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


def grouped_topk() -> Router:
    """`_moe_C::grouped_topk`. Raises EnvironmentProblem."""
    library = extension.load(sources.VLLM)
    operator = library.operator("grouped_topk")
    call = bind_operator(operator, _GROUPED, ("scores", "n_group", "topk_group", "top_k"))
    return _promise_grouped(call, extension.devices(operator), library.origin(call.text), library.named)


def grouped_topk_function() -> Router:
    """`fused_grouped_topk`, as vLLM's layers call it where there is a bias. Needs the whole package."""
    router = f"{_PACKAGE}.router.grouped_topk_router:fused_grouped_topk"
    function, version = extension.function("vllm", (router, f"{_PACKAGE}.fused_moe:fused_grouped_topk"))
    call = bind_function(function, _GROUPED_FUNCTION, ("logits", "n_group", "topk_group", "top_k", "bias", "scoring"))
    return _promise_grouped(call, ("cuda",), f"vllm {version}, {function.__module__}.{call.text}")


def _promise_grouped(
    call: BoundCall, devices: tuple[str, ...], origin: str, libraries: Libraries | None = None
) -> Router:
    # Before it had a scoring_func, the caller applied the sigmoid, in torch's arithmetic: that is not the same for
    # every place of a row in a batch (on a CPU the last elements take another path).
    fused = call.takes("scoring_func") or call.takes("scoring")
    contract = _GROUPED_CONTRACT if fused else replace(_GROUPED_CONTRACT, sigmoid="exp", batch_invariant=False)
    capabilities = replace(_GROUPED_CAPABILITIES, devices=devices)
    return declares(contract, capabilities, _GROUPED_CLAUSES, _GROUPED_UNPROMISED, origin)(grouped(call, libraries))


def _operator(name: str) -> Router:
    library = extension.load(sources.VLLM)
    operator = library.operator(name)
    call = bind_operator(operator, _OPERATOR, ("weights", "ids", "logits"))
    devices = extension.devices(operator)
    router = into_outputs(call, library.named)
    return _promise(router, call, replace(_CAPABILITIES, devices=devices), library.origin(call.text))


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
