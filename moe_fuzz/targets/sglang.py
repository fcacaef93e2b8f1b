"""The routers of SGLang's kernel package (sgl_kernel), as operators of its extension library. Worker side.

What is promised here was read in SGLang's public repository; docs/targets.md has the table, and what follows from it.
"""

from __future__ import annotations

from dataclasses import replace

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.targets import extension, sources
from moe_fuzz.targets.adapter import Router, into_outputs
from moe_fuzz.targets.schema import Fixed, Names, bind_operator

_OUTPUTS: Names = {
    "topk_weights": "weights",
    "topk_indices": "ids",
    "topk_ids": "ids",
    "gating_output": "logits",
    "renormalize": "renormalize",
}
#: sgl-kernel/csrc/moe/moe_topk_softmax_kernels.cu: the bias is added to the logits, before the softmax. That is another
#: function than this op's, which selects by score + bias; so it is never given.
_SOFTMAX: Names = {**_OUTPUTS, "moe_softcapping": Fixed(0.0), "correction_bias": Fixed(None)}
#: sgl-kernel/csrc/moe/moe_topk_sigmoid_kernels.cu: the weight is (score + bias) - bias, in float32.
_SIGMOID: Names = {**_OUTPUTS, "correction_bias": "bias"}

#: A row belongs to 1 to 32 lanes of a warp, or to a block where E is no power of two; nothing crosses rows. Where E is
#: no power of two, topk_softmax reduces pairs in which the later of two equals wins: ties fall either way.
_CONTRACT = Contract(deterministic=True, batch_invariant=True, ordered=True)
#: Rows are indexed by row * E from a pointer loaded 16 bytes at a time; nothing checks strides or alignment, and the
#: router's linear layer gives packed, aligned logits.
_CAPABILITIES = Capabilities(strided=False, out=True, alignment=16, scale=False)

_NAN = "sglang#30079: this kernel 'tolerated NaN rows', its ids in range; only ids out of range broke a caller"
_CLAUSES = {
    "ids:out-of-range": "moe_align_block_size indexes by id: one out of range is an illegal access (sglang#30079)",
    "ids:duplicate": "sgl-kernel/tests/test_moe_topk_{0}.py: ids equal those of torch.topk",
    "selection": "sgl-kernel/tests/test_moe_topk_{0}.py: ids equal those of torch.topk over the scores, plus the bias",
    "written": "moe_align_block_size indexes with every id; none may be left as it was",
    "crash": "no caller survives an access outside the tensors it passed (sglang#30079)",
    "fence": "no caller survives an access outside the tensors it passed (sglang#30079)",
    "canary": "no caller survives a write outside the tensors it passed (sglang#30079)",
}
_DEGENERATE = ("nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "partial_inf")
_UNPROMISED = {
    **{f"ids:duplicate @ fault:{fault}": _NAN for fault in _DEGENERATE},
    "ids:duplicate @ fault:extreme_bias": "taken experts are marked with -10000 'since values must be between 0 and 1'",
}


def topk_softmax() -> Router:
    """`sgl_kernel::topk_softmax`. Raises EnvironmentProblem."""
    return _operator("topk_softmax", _SOFTMAX)


def topk_sigmoid() -> Router:
    """`sgl_kernel::topk_sigmoid`. Raises EnvironmentProblem."""
    return _operator("topk_sigmoid", _SIGMOID)


def _operator(name: str, names: Names) -> Router:
    library = extension.load(sources.SGLANG)
    operator = library.operator(name)
    call = bind_operator(operator, names, ("weights", "ids", "logits"))
    capabilities = replace(_CAPABILITIES, devices=extension.devices(operator))
    clauses = {check: clause.replace("{0}", name.removeprefix("topk_")) for check, clause in _CLAUSES.items()}
    return declares(_CONTRACT, capabilities, clauses, _UNPROMISED, library.origin(call.text))(into_outputs(call))
