"""SGLang's moe_sum, moe_sum_reduce, and its shuffle of rows, each in its place within experts of ours. Worker side.

What is promised here was read in SGLang's public repository; docs/targets.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.targets import extension, sources
from moe_fuzz.targets.experts_parts import Experts, Gathered, permuted, summed
from moe_fuzz.targets.schema import Fixed, Names, bind_operator

_SURVIVES = "no caller survives an access outside the tensors it passed"
_CLAUSES = {
    "crash": _SURVIVES,
    "fence": _SURVIVES,
    "canary": _SURVIVES,
    "capture": "SGLang captures it with the model",
    "written": "its callers allocate the result empty, and return it",
}
#: Each launches a grid of no blocks; apply_shuffle_mul_sum divides by the number of tokens before that.
_NO_TOKENS = {"* @ T=0": "models answer an idle rank before; a batch of none does not reach this operator"}
_SUMS = Capabilities(dtypes=("bfloat16", "float16"), out=True, alignment=1)
#: Slots of no expert are cleared by what computes them, and the sum is given no ids.
_DIALECTS = ("distinct", "minus_one", "zero_weight")

_SUM: Names = {"input": "slots", "output": "out"}
_SUM_REDUCE: Names = {**_SUM, "routed_scaling_factor": Fixed(1.0)}
#: sgl-kernel/csrc/moe/moe_sum.cu: for k of 2, 3 and 4 the sum is in the dtype of x, for others it is torch's.
_IN_DTYPE = Contract(deterministic=True, reduce="dtype", accepts=_DIALECTS)
#: sgl-kernel/csrc/moe/moe_sum_reduce.cu: in float32, in ascending order of slots, then times the factor.
_IN_FLOAT32 = Contract(deterministic=True, accepts=_DIALECTS)
_REDUCE_TEST = "sgl-kernel/benchmark/bench_sum_scale.py compares it with torch to 1e-2"
#: Its vector kernel steps by 16 elements, and its launcher gives it every multiple of 8 (sglang#10321).
_REDUCE_WRITTEN = "its callers allocate the result empty, and return it; its own condition takes each multiple of 8"


def moe_sum() -> Experts:
    """`sgl_kernel::moe_sum` over the weighted outputs of our products. Raises EnvironmentProblem."""
    return _sum("moe_sum", _SUM, _IN_DTYPE, {}, {"bound": "no test of the project says how close"})


def moe_sum_reduce() -> Experts:
    """`sgl_kernel::moe_sum_reduce`, likewise. Raises EnvironmentProblem."""
    clauses = {"exact": _REDUCE_TEST, "bound": _REDUCE_TEST, "written": _REDUCE_WRITTEN}
    return _sum("moe_sum_reduce", _SUM_REDUCE, _IN_FLOAT32, clauses, {})


def _sum(
    name: str, names: Names, contract: Contract, clauses: Mapping[str, str], unpromised: Mapping[str, str]
) -> Experts:
    library = extension.load(sources.SGLANG)
    operator = library.operator(name)
    call = bind_operator(operator, names, ("slots", "out"))

    def add(slots: Tensor, ids: Tensor, expert_map: Tensor | None, out: Tensor) -> None:
        call({"slots": slots, "out": out})

    capabilities = replace(_SUMS, devices=extension.devices(operator))
    promised = {**_CLAUSES, **clauses}
    origin = library.origin(call.text)
    return declares(contract, capabilities, promised, {**_NO_TOKENS, **unpromised}, origin)(summed(add, skips=False))


# ---- prepare_moe_input, shuffle_rows, apply_shuffle_mul_sum ---------------------------------------------------------

_PREPARE: Names = {
    "topk_ids": "ids",
    "expert_offsets": "ends",
    "blockscale_offsets": Fixed(None),
    "problem_sizes1": "sizes1",
    "problem_sizes2": "sizes2",
    "input_permutation": "token_of_row",
    "output_permutation": "row_of_slot",
    "num_experts": "experts",
    "n": "intermediate",
    "k": "hidden",
}
_SHUFFLE: Names = {"input": "x", "dst2src_map": "token_of_row", "output": "rows"}
_APPLY: Names = {"input": "y", "output": "out", "permutation": "row_of_slot", "factors": "weights"}
#: sgl-kernel/csrc/moe/prepare_moe_input.cu. Rows of an expert stand in the order in which atomics gave them a place.
#: The weighted sum is in float32, its weights in the dtype of x. A slot of no expert has no place: nobody writes its
#: entries of the maps, and no caller gives such an id.
_SHUFFLED = Contract(down="dtype", slot="none", weight_dtype="dtype", accepts=("distinct", "zero_weight"))
#: shuffle_rows moves 16 bytes at a time and leaves the rest of a row; its callers assert multiples of 128. Ids and rows
#: are indexed as packed ones, unchecked; ids are checked to be int32.
_SHUFFLES = Capabilities(
    dtypes=("bfloat16", "float16"), min_multiple_h=8, strided=False, weight_on_input=False, expert_map=False, out=True,
    alignment=16,
)  # fmt: skip
#: apply_shuffle_mul_sum means to take any size, but launches a thread for each 16 elements: for 8 it has none.
_SHUFFLE_UNPROMISED = {
    **_NO_TOKENS,
    "error @ H not a multiple of 16": "sglang/srt/layers/moe/cutlass_moe.py quantizes rows in groups of 128",
}
_COMMENT = "the comment above apply_shuffle_mul_sum: equals (y[map] * weights.to(dtype)).sum(dim=1) of torch"


def shuffle() -> Experts:
    """`sgl_kernel::prepare_moe_input` and `shuffle_rows`, our products, then `apply_shuffle_mul_sum`. Raises
    EnvironmentProblem."""
    library = extension.load(sources.SGLANG)
    operator = library.operator("prepare_moe_input")
    prepare = bind_operator(operator, _PREPARE, ("ids", "ends", "token_of_row", "row_of_slot", "experts"))
    copy = bind_operator(library.operator("shuffle_rows"), _SHUFFLE, ("x", "token_of_row", "rows"))
    apply = bind_operator(library.operator("apply_shuffle_mul_sum"), _APPLY, ("y", "out", "row_of_slot", "weights"))

    def gather(x: Tensor, ids: Tensor, w2: Tensor, expert_map: Tensor | None) -> Gathered:
        # As sglang/srt/layers/moe/cutlass_moe.py allocates.
        experts, hidden, inter = w2.shape

        def made(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=x.device)

        maps = {"ends": made(experts + 1), "token_of_row": made(ids.numel()), "row_of_slot": made(ids.numel())}
        prepare({**maps, "ids": ids.int(), "sizes1": made(experts, 3), "sizes2": made(experts, 3), "experts": experts,
                 "intermediate": inter, "hidden": hidden})  # fmt: skip
        rows = x.new_empty((ids.numel(), hidden))
        copy({"x": x, "token_of_row": maps["token_of_row"], "rows": rows})
        return Gathered(rows, maps["ends"], maps["row_of_slot"])

    def combine(y: Tensor, gathered: Gathered, weights: Tensor, out: Tensor) -> None:
        apply({"y": y, "out": out, "row_of_slot": gathered.inverse, "weights": weights.to(y.dtype).view(-1)})

    clauses = {**_CLAUSES, "exact": _COMMENT, "bound": _COMMENT}
    capabilities = replace(_SHUFFLES, devices=extension.devices(operator))
    origin = "; ".join([library.origin(prepare.text), copy.text, apply.text])
    return declares(_SHUFFLED, capabilities, clauses, _SHUFFLE_UNPROMISED, origin)(permuted(gather, combine))
