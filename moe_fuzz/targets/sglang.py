"""The routers of SGLang's kernel package (sgl_kernel), as operators of its extension library. Worker side.

What is promised here was read in SGLang's public repository; docs/targets.md has the table, and what follows from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.execute.barecall import looks_like
from moe_fuzz.targets import extension, sources
from moe_fuzz.targets.adapter import DEFAULTS, Router, bare, into_outputs, signed, surface_launch_error
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
_CAPABILITIES = Capabilities(compiles=False, strided=False, out=True, alignment=16, scale=False)

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
_UNDERFLOW = "sglang#31017: where the selected sigmoids underflow, renormalizing is not 0/0: NaN spoils the token"
_TO_A_THOUSANDTH = "sgl-kernel/tests/test_moe_topk_sigmoid.py: weights equal torch's to 1e-3, with a bias of randn too"
_EMPTY = "models answer an idle rank before (empty_topk_output); sglang#22455 reports one that did not"
_SIGMOID_CLAUSES = {
    "finite:nan": _UNDERFLOW, "finite:infinite": _TO_A_THOUSANDTH, "finite:negative": _TO_A_THOUSANDTH,
}  # fmt: skip
_DEGENERATE = ("nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "partial_inf")
_UNPROMISED = {
    **{f"ids:duplicate @ fault:{fault}": _NAN for fault in _DEGENERATE},
    **{
        f"{check} @ fault:extreme_bias": "experts are marked with -10000 and -1, 'since values must be between 0 and 1'"
        for check in ("ids:duplicate", "selection", "finite")
    },
    "finite": "sglang#30079: the callers of this kernel bear rows of NaN and Inf",
    "weights": "sgl-kernel/tests compare weights to 1e-3",
    "error @ T=0": _EMPTY,
}

#: sgl-kernel/csrc/moe/moe_fused_gate.cu (until 0.4.2): DeepSeek-V3's router. Always divides by the sum; with
#: apply_routed_scaling_factor_on_output the routed weights are multiplied by the factor and a shared expert's is 1.
_GATE: Names = {
    "input": "logits",
    "bias": "bias",
    "num_expert_group": "n_group",
    "topk_group": "topk_group",
    "topk": "slots",
    "num_fused_shared_experts": "n_shared",
    "routed_scaling_factor": "scale",
    "apply_routed_scaling_factor_on_output": Fixed(True),
}
#: Its checks: E a power of two, E / n_group <= 32. Its comment: 8 <= E / n_group. A row is 32 lanes' at most, a group a
#: lane's. Its caller (biased_grouped_topk_gpu) casts to float32, since it computes in the dtype of the logits.
_GATE_CAPABILITIES = Capabilities(
    compiles=False, dtypes=("float32",), min_experts=8, renormalize=(True,), bias_required=True, is_padding=False,
    strided=False,
    experts_power_of_two=True, max_n_group=32, min_group_size=8, max_group_size=32, scorings=("sigmoid",),
    group_scores=("top2_sum",), n_shared=2, expert_map=False,
    zero_scale=False,  # a shared expert's weight is the sum of the others divided by it, before it is multiplied
)  # fmt: skip
_GATE_TEST = "sgl-kernel/tests/test_moe_fused_gate.py: ids equal those of the torch code"
_GATE_CLAUSES = {
    **{check: _CLAUSES[check] for check in ("ids:out-of-range", "written", "crash", "fence", "canary")},
    "finite:nan": _UNDERFLOW,
    "ids:duplicate": _GATE_TEST,
    "selection": _GATE_TEST,
}


def topk_softmax() -> Router:
    """`sgl_kernel::topk_softmax`. Raises EnvironmentProblem."""
    return _operator("topk_softmax", _SOFTMAX)


def topk_sigmoid() -> Router:
    """`sgl_kernel::topk_sigmoid`. Raises EnvironmentProblem."""
    return _operator("topk_sigmoid", _SIGMOID)


def grouped_topk() -> Router:
    """`sgl_kernel::moe_fused_gate` (until 0.4.2). Raises EnvironmentProblem."""
    library = extension.load(sources.SGLANG)
    operator = library.operator("moe_fused_gate")
    call = bind_operator(operator, _GATE, ("logits", "bias", "n_group", "topk_group", "slots"))

    def route(
        logits: torch.Tensor, top_k: int, *, n_shared: int = 0, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = call({**DEFAULTS, **options, "logits": logits, "slots": top_k + n_shared, "n_shared": n_shared})
        surface_launch_error(logits)
        return weights, ids

    shown = looks_like(bare(call, {"slots": "top_k + n_shared"}, libraries=library.named))
    # Without `renormalize` it could not be asked for; it is always done.
    taken = ["bias", "n_group", "topk_group", "n_shared", "scale", "renormalize", "scoring", "group_score"]
    capabilities = replace(_GATE_CAPABILITIES, devices=extension.devices(operator))
    origin = library.origin(call.text)
    return declares(_CONTRACT, capabilities, _GATE_CLAUSES, _UNPROMISED, origin)(signed(shown(route), taken))


def _operator(name: str, names: Names) -> Router:
    library = extension.load(sources.SGLANG)
    operator = library.operator(name)
    call = bind_operator(operator, names, ("weights", "ids", "logits"))
    capabilities = replace(_CAPABILITIES, devices=extension.devices(operator))
    promised = _CLAUSES if name == "topk_softmax" else {**_CLAUSES, **_SIGMOID_CLAUSES}
    clauses = {check: clause.replace("{0}", name.removeprefix("topk_")) for check, clause in promised.items()}
    return declares(_CONTRACT, capabilities, clauses, _UNPROMISED, library.origin(call.text))(
        into_outputs(call, library.named)
    )
