"""The router that FlashInfer ships, DeepSeek-V3's. Worker side; its quantizer and its all-reduce are in library_*.py.

What is promised here was read in flashinfer-python 0.7.2; docs/targets.md has the table, and what follows from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.execute.barecall import ROUTED, looks_like
from moe_fuzz.targets import extension
from moe_fuzz.targets.adapter import DEFAULTS, Router, bare, signed, surface_launch_error
from moe_fuzz.targets.schema import Names, bind_function

_PLACES = ("flashinfer.fused_moe:fused_topk_deepseek", "flashinfer.dsv3_ops:fused_topk_deepseek")
_NAMES: Names = {
    "scores": "logits",
    "bias": "bias",
    "n_group": "n_group",
    "topk_group": "topk_group",
    "topk": "top_k",
    "routed_scaling_factor": "scale",
    "topk_values": "weights",
    "topk_indices": "ids",
}
#: csrc/fused_moe/noAuxTcKernels.cu: a block takes a row, a warp a group; nothing is atomic. It is compiled with
#: -use_fast_math, so tanhf is tanh.approx.f32. Slots come in descending order of key, a key has the index in it.
_CONTRACT = Contract(sigmoid="tanh.approx", deterministic=True, batch_invariant=True, ordered=True)
#: Its docstring and its checks. The weights are in the dtype of the scores, and the op's are float32.
_CAPABILITIES = Capabilities(
    compiles=False, jit=True, devices=("cuda",), dtypes=("float32",), max_top_k=8, top_k_by_groups=True,
    renormalize=(True,), bias_required=True, is_padding=False, strided=False, out=True, scorings=("sigmoid",),
    group_scores=("top2_sum",), n_shared=0, expert_map=False,
)  # fmt: skip
#: A group's score is the sum of its two best experts, so that a group needs two.
_GROUPS = replace(
    _CAPABILITIES, max_experts=256, min_experts=4, min_n_group=2, max_n_group=32, min_group_size=2, max_group_size=32,
    max_kept=128,
)
_ONE_GROUP = replace(_CAPABILITIES, max_experts=384, max_n_group=1)

_TEST = "flashinfer tests/model_optimizations/test_dsv3_fused_routing.py"
_DOC = "the docstring of fused_topk_deepseek"
_CLAUSES = {
    "ids": f"{_TEST}: the selected experts are those of the torch code, k of them",
    "selection": f"{_TEST}: ids equal those of the torch code but for near ties; {_DOC} admits this config",
    "error": f"{_DOC} admits this config",
    "written": "the experts kernels index with every id; none may be left as it was",
    "crash": "no caller survives an access outside the tensors it passed",
    "fence": "no caller survives an access outside the tensors it passed",
    "canary": "no caller survives a write outside the tensors it passed",
}
_UNPROMISED = {
    "finite": "its tests have no rows of NaN or Inf, and nothing says what becomes of them",
    "weights": f"{_TEST} compares weights to 1e-2",
    "order": "its tests sort the slots before they compare them",
    "determinism": "nothing says it",
    "ids @ fault:extreme_bias": "no model's bias is -Inf",
    "selection @ fault:extreme_bias": "no model's bias is -Inf",
    "error @ T=0": "nothing says it of a batch of no tokens",
}


def grouped_topk() -> Router:
    """`fused_topk_deepseek` with two groups or more. Raises EnvironmentProblem."""
    return _router(_GROUPS)


def grouped_topk_one_group() -> Router:
    """`fused_topk_deepseek` with all experts in one group, which is another kernel. Raises EnvironmentProblem."""
    return _router(_ONE_GROUP)


def _router(capabilities: Capabilities) -> Router:
    function, version = extension.function("flashinfer-python", _PLACES)
    call = bind_function(function, _NAMES, ("logits", "bias", "n_group", "topk_group", "top_k", "weights", "ids"))

    def route(
        logits: torch.Tensor, top_k: int, *, out: tuple[torch.Tensor, torch.Tensor] | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (logits.shape[0], top_k)
        weights, ids = out or (logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32))
        call({**DEFAULTS, **options, "logits": logits, "top_k": top_k, "weights": weights, "ids": ids})
        surface_launch_error(logits)
        return weights, ids

    shown = looks_like(bare(call, {}, ("weights", "ids"), ROUTED))
    # Without `renormalize`, `scoring` and `group_score` they could not be asked for; they are always the same.
    taken = ["bias", "n_group", "topk_group", "scale", "renormalize", "scoring", "group_score", "out"]
    origin = f"flashinfer-python {version}, {function.__module__}.{call.text}"
    return declares(_CONTRACT, capabilities, _CLAUSES, _UNPROMISED, origin)(signed(shown(route), taken))
