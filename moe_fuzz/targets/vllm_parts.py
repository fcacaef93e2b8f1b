"""vLLM's moe_permute, moe_unpermute and moe_sum, each in its place within experts of ours. Worker side.

What is promised here was read in vLLM's public repository; docs/targets.md has the table.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.targets import extension, sources
from moe_fuzz.targets.experts_parts import Experts, Gathered, permuted, summed
from moe_fuzz.targets.schema import Names, bind_operator

_SURVIVES = "no caller survives an access outside the tensors it passed"
_EMPTY = "vLLM's callers pad an idle rank to a token; a batch of none does not reach this operator"
_CAPTURED = "vLLM captures it with the model"
_MEMORY = {"crash": _SURVIVES, "fence": _SURVIVES, "canary": _SURVIVES, "capture": _CAPTURED}
#: A launch over nothing; and with a map, before 0.33, a division on the host by the size of a block of no threads.
_NO_TOKENS = {"* @ T=0": _EMPTY}

# ---- moe_sum --------------------------------------------------------------------------------------------------------

_SUM: Names = {
    "input": "slots",
    "output": "out",
    "topk_ids": "ids",  # since 0.27, with expert_map: slots of no expert here are left out
    "expert_map": "expert_map",
}
_SUM_TEST = "vllm tests/kernels/moe/test_moe.py (test_moe_sum)"
_SKIPS = "vllm#48385: slots of the id -1 and of another rank's expert are skipped, and nobody clears their rows"
_SUM_CLAUSES = {
    **_MEMORY,
    "exact": f"{_SUM_TEST}: equal to torch's sum",
    "bound": f"{_SUM_TEST}: equal to torch's sum",
    "written": "its caller allocates the result empty, and returns it",
}
_SUM_UNPROMISED = {**_NO_TOKENS, "statistical": f"{_SUM_TEST} compares to 2e-2"}


def moe_sum() -> Experts:
    """`_moe_C::moe_sum` over the weighted outputs of our products. Raises EnvironmentProblem."""
    library = extension.load(sources.VLLM)
    operator = library.operator("moe_sum")
    call = bind_operator(operator, _SUM, ("slots", "out"))
    skips = call.takes("ids")

    def add(slots: Tensor, ids: Tensor, expert_map: Tensor | None, out: Tensor) -> None:
        call({"slots": slots, "ids": ids, "expert_map": expert_map, "out": out})

    # csrc/libtorch_stable/moe/moe_align_sum_kernels.cu. The kernels that skip (in 0.33, not in 0.24) add up in float32,
    # in ascending order; those before, for k of 2, 3 and 4, in the dtype of x. No id but a negative one is judged: it
    # is an index of expert_map.
    contract = Contract(deterministic=True, reduce="float32" if skips else "dtype",
                        accepts=("distinct", "minus_one", "zero_weight"))  # fmt: skip
    capabilities = Capabilities(dtypes=("bfloat16", "float16"), out=True, alignment=1,
                                devices=extension.devices(operator))  # fmt: skip
    clauses = {**_SUM_CLAUSES, **(dict.fromkeys(("dropped", "finite", "shards"), _SKIPS) if skips else {})}
    return declares(contract, capabilities, clauses, _SUM_UNPROMISED, library.origin(call.text))(summed(add, skips))


# ---- moe_permute and moe_unpermute ----------------------------------------------------------------------------------

_PERMUTE: Names = {
    "input": "x",
    "topk_ids": "ids",
    "token_expert_indices": "slots",
    "expert_map": "expert_map",
    "n_expert": "ids_of_all_ranks",
    "n_local_expert": "experts",
    "topk": "top_k",
    "permuted_input": "rows",
    "expert_first_token_offset": "ends",
    "inv_permuted_idx": "inverse",
    "permuted_idx": "order",
    # of moe_permute_with_scratch
    "sort_workspace": "sort_workspace",
    "permuted_experts_id": "sorted_ids",
    "sorted_row_idx": "sorted_slots",
    "topk_ids_for_sort": "mapped_ids",
}
_PERMUTED = ("x", "ids", "slots", "ids_of_all_ranks", "experts", "top_k", "rows", "ends", "inverse", "order")
_UNPERMUTE: Names = {
    "permuted_hidden_states": "y",
    "topk_weights": "weights",
    "inv_permuted_idx": "inverse",
    "expert_first_token_offset": "ends",
    "topk": "top_k",
    "hidden_states": "out",
}
_PERMUTE_TEST = "vllm tests/kernels/moe/test_moe_permute_unpermute.py"
_INVALID = f"{_PERMUTE_TEST} (…_ignores_invalid_expert_ids…): ids -1 and E have no row that counts"
_PERMUTE_CLAUSES = {
    **_MEMORY,
    "exact": f"{_PERMUTE_TEST}: offsets, rows and their inverse equal those of the torch code, bit for bit",
    "bound": f"{_PERMUTE_TEST}: the sum equals that of the torch code, with rows of other ranks' experts as 0",
    "finite": f"{_PERMUTE_TEST}: rows past the last expert's do not count",
    "dropped": f"{_PERMUTE_TEST}: rows past the last expert's do not count",
    "shards": f"{_PERMUTE_TEST}: rows past the last expert's do not count",
    "written": "its caller allocates the result empty, and returns it",
}
_PERMUTE_UNPROMISED = {**_NO_TOKENS, "statistical": f"{_PERMUTE_TEST} compares the sum to 2e-2"}
#: Both move 16 bytes at a time and leave the rest of a row, which the Python functions around them assert that there is
#: not; rows are indexed by row * H, ids and weights by slot, unchecked. A weight on the input is the caller's business.
_PERMUTE_CAPABILITIES = Capabilities(
    dtypes=("bfloat16", "float16"), min_multiple_h=8, strided=False, weight_on_input=False, out=True, alignment=16
)


def moe_permute() -> Experts:
    """`_moe_C::moe_permute`, `moe_permute_with_scratch` where the library has it, then our products, then
    `_moe_C::moe_unpermute`. Raises EnvironmentProblem."""
    library = extension.load(sources.VLLM)
    scratch = library.holds("moe_permute_with_scratch")  # since 0.24, and what its callers call since then
    operator = library.operator("moe_permute_with_scratch" if scratch else "moe_permute")
    call = bind_operator(operator, _PERMUTE, _PERMUTED)
    back = bind_operator(library.operator("moe_unpermute"), _UNPERMUTE, ("y", "weights", "inverse", "top_k", "out"))
    size = library.operator("moe_permute_sort_workspace_size") if scratch else None

    def gather(x: Tensor, ids: Tensor, w2: Tensor, expert_map: Tensor | None) -> Gathered:
        # As vllm/model_executor/layers/fused_moe/moe_permute_unpermute.py allocates, to the element.
        (tokens, top_k), hidden, experts = ids.shape, x.shape[1], w2.shape[0]
        count = tokens * top_k
        all_ids = experts if expert_map is None else len(expert_map)

        def made(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        rows, ends, inverse = made(count, hidden, dtype=x.dtype), made(experts + 1, dtype=torch.int64), made(*ids.shape)
        values = {
            "x": x, "ids": ids.int(), "expert_map": expert_map, "ids_of_all_ranks": all_ids, "experts": experts,
            "slots": torch.arange(count, dtype=torch.int32, device=x.device).view(ids.shape), "top_k": top_k,
            "rows": rows, "ends": ends, "inverse": inverse, "order": made(count).fill_(count),
        }  # fmt: skip
        if size is not None:
            values |= {name: made(*ids.shape) for name in ("sorted_ids", "sorted_slots", "mapped_ids")}
            values["sort_workspace"] = made(size(count, all_ids), dtype=torch.int8)
        call(values)
        return Gathered(rows, ends, inverse)

    def combine(y: Tensor, gathered: Gathered, weights: Tensor, out: Tensor) -> None:
        back({"y": y, "weights": weights, "inverse": gathered.inverse.view(-1), "ends": gathered.ends,
              "top_k": weights.shape[1], "out": out})  # fmt: skip

    # csrc/libtorch_stable/moe/permute_unpermute_kernels (csrc/moe/ before 0.24). A stable radix sort; the weighted sum
    # is float32, in ascending order of slots, without atomics. Releases with moe_prepare_scatter sort what is no
    # expert's last; before, -1 was an index of expert_map, or first in a search that expects ascending ids.
    takes_invalid = library.holds("moe_prepare_scatter")
    accepts = ("distinct", "zero_weight", *(("minus_one", "num_experts") if takes_invalid else ()))
    contract = Contract(deterministic=True, down="dtype", slot="none", accepts=accepts)
    clauses = {**_PERMUTE_CLAUSES, **({"dropped": _INVALID} if takes_invalid else {})}
    capabilities = replace(_PERMUTE_CAPABILITIES, devices=extension.devices(operator))
    origin = f"{library.origin(call.text)}; {back.text}"
    return declares(contract, capabilities, clauses, _PERMUTE_UNPROMISED, origin)(permuted(gather, combine))
