"""SGLang's unified router, one Triton kernel behind softmax, sigmoid and grouped routing. Worker side.

`sglang.kernels.ops.moe.moe_fused_gate` of the package sglang, as of 0.5.23; it runs in Triton's interpreter too. What
is promised was read in SGLang's public repository; docs/targets.md has the table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.execute.barecall import looks_like
from moe_fuzz.targets import extension
from moe_fuzz.targets.adapter import Router, bare, signed
from moe_fuzz.targets.schema import BoundCall, Fixed, Names, bind_function

_PLACE = "sglang.kernels.ops.moe.moe_fused_gate:moe_fused_gate"
_NAMES: Names = {
    "scores": "logits",  # its docstring: "raw GEMM logits"
    "bias": "bias",
    "topk": "slots",
    "scoring_func": "scoring",
    "num_fused_shared_experts": "n_shared",
    "renormalize": "renormalize",
    "routed_scaling_factor": "scale",
    "apply_routed_scaling_factor_on_output": Fixed(True),
    "num_expert_group": "n_group",
    "topk_group": "topk_group",
}

#: A program takes up to 4 rows, each reduced along its own axis; logits become float32 on load; of those equal to the
#: maximum the lowest index is taken, of groups too.
_CONTRACT = Contract(deterministic=True, batch_invariant=True, ordered=True, ties="lowest_index_first")
#: Sigmoids of 896 experts, 16 of them chosen, are another kernel's on a GPU, which orders slots by expert
#: (moe_route_radix.py).
_SIGMOID = replace(_CONTRACT, ordered=False)
#: It is given strides and checks dtypes. num_token_non_padded counts tokens from the front; flags it does not take.
_CAPABILITIES = Capabilities(is_padding=False, strided=True, alignment=1)
#: A group's score is the sum of its two best experts, so that a group needs two. N_GROUP unrolls a loop.
_GROUPED = Capabilities(
    is_padding=False, strided=True, alignment=1, min_experts=2, min_n_group=2, max_n_group=32, min_group_size=2,
    scorings=("sigmoid",), group_scores=("top2_sum",), expert_map=False, n_shared=2,
)  # fmt: skip
_RANGE = "sglang#30079: NaN is mapped to a finite floor so that ids are in range: moe_align indexes by them"
_CLAUSES = {
    "ids:out-of-range": _RANGE,
    "crash": "no caller survives an access outside the tensors it passed (sglang#30079)",
    "fence": "no caller survives an access outside the tensors it passed (sglang#30079)",
    "canary": "no caller survives a write outside the tensors it passed (sglang#30079)",
    "written": "moe_align_block_size indexes with every id; none may be left as it was",
    "ties": "the comments of its kernel: the lowest expert id wins a tie, and the lowest group",
    "selection": "test_moe_fused_gate.py: the ids of biased_grouped_topk_impl, whose group scores are torch.topk's "
                 "(sglang#29771)",
}
_UNPROMISED = {
    "* @ fault:int32_boundary": "a row is found by a product of 32 bits: no server has logits of 2^31 elements",
}


def topk_softmax() -> Router:
    """softmax, no bias: the kernel adds one to the logits, before the softmax. Raises EnvironmentProblem."""
    return _router("softmax", ("renormalize", "scale"), _CAPABILITIES)


def topk_sigmoid() -> Router:
    """sigmoid, where SGLang's fused_topk gives zeros for a bias that there is not. Raises EnvironmentProblem."""
    return _router("sigmoid", ("renormalize", "scale", "bias"), _CAPABILITIES, _SIGMOID)


def grouped_topk() -> Router:
    """sigmoid over two groups or more, fused shared experts. Raises EnvironmentProblem."""
    taken = ("renormalize", "scale", "bias", "n_group", "topk_group", "n_shared", "scoring", "group_score")
    return _router("sigmoid", taken, _GROUPED)


def _router(
    scoring: str, taken: tuple[str, ...], capabilities: Capabilities, contract: Contract = _CONTRACT
) -> Router:
    function, version = extension.function("sglang", (_PLACE,))
    call: BoundCall = bind_function(function, _NAMES, ("logits", "slots", "scoring", "renormalize", "scale"))

    def route(
        logits: torch.Tensor,
        top_k: int,
        *,
        bias: torch.Tensor | None = None,
        n_group: int = 1,
        topk_group: int = 1,
        n_shared: int = 0,
        renormalize: bool = False,
        scale: float = 1.0,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if bias is None and scoring == "sigmoid":
            bias = logits.new_zeros(logits.shape[1], dtype=torch.float32)
        values = {"logits": logits, "bias": bias, "slots": top_k + n_shared, "scoring": scoring, "n_shared": n_shared,
                  "renormalize": renormalize, "scale": scale, "n_group": n_group, "topk_group": topk_group}  # fmt: skip
        weights, ids = call(values)
        return weights, ids

    shared = "n_shared" in taken
    biased = "bias if bias is not None else torch.zeros(experts, device=logits.device)"
    spelled = {
        "scoring": repr(scoring),
        "slots": "top_k + n_shared" if shared else "top_k",
        "bias": biased if "bias" in taken else "None",
        **({} if shared else {"n_shared": "0", "n_group": "1", "topk_group": "1"}),
    }
    shown = looks_like(bare(call, spelled))
    origin = f"sglang {version}, {function.__module__}.{call.text}"
    return declares(contract, capabilities, _CLAUSES, _UNPROMISED, origin)(signed(shown(route), taken))
