"""vLLM's moe_align_block_size, as an operator of its extension library. Worker side.

What is promised here was read in vLLM's public repository; docs/targets.md has the table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, declares
from moe_fuzz.targets import extension, sources
from moe_fuzz.targets.plans import OPERATOR, REQUIRED, Room, planned
from moe_fuzz.targets.schema import Fixed, Names, bind_operator

#: Since 0.14 it takes the map, which its caller gives with ignore_invalid_experts. scatter_idx (since 0.31) is no
#: inverse: it says of each slot whether it was kept.
_NAMES: Names = {**OPERATOR, "maybe_expert_map": "expert_map", "expert_map": "expert_map", "scatter_idx": Fixed(None)}

#: csrc/libtorch_stable/moe/moe_align_sum_kernels.cu (csrc/moe/ before 0.24). A block counts in shared memory and scans;
#: beyond 1023 slots or 64 experts, slots take their place by an atomic, so that their order is any.
_CONTRACT = Contract(ordered=True, accepts=PADDING_DIALECTS)
#: It checks that experts, rounded up to whole warps, are below 1024. It indexes ids by slot and the map by id: both are
#: packed, the map has an entry for each of num_experts, and its numbers are -1 or experts of this rank.
_CAPABILITIES = Capabilities(
    compiles=False, max_experts=992, strided=False, alignment=1, block_sizes=(8, 16, 32, 48, 64, 128, 256),
    fewer_than_map=False, absent=("inverse",),
)  # fmt: skip

_TEST = "vllm tests/kernels/moe/test_moe_align_block_size.py"
_SURVIVES = "no caller survives an access outside the tensors it passed"
_CLAUSES = {
    "count": f"{_TEST}: num_tokens_post_pad equals that of the torch code",
    "slots": f"{_TEST}: each expert has the tokens that the torch code gives it; vllm#47785: -1 has no place",
    "experts": f"{_TEST}: expert_ids equal those of the torch code",
    "order": f"{_TEST}: expert_ids equal those of the torch code",
    "fill": "its caller's docstring: padding entries are the number of slots, which the experts kernels mask off",
    "tail": "vllm#35161: past the last block expert_ids is -1, since the experts kernels skip it",
    "written": "vllm#35161: the experts kernels read expert_ids past the last block",
    "crash": f"{_SURVIVES}; vllm#47785: -1 is an id that it is given",
    "fence": f"{_SURVIVES}; vllm#47785: -1 is an id that it is given",
    "canary": f"{_SURVIVES}; vllm#47785: -1 is an id that it is given",
    "capture": "vLLM captures it with the model",
}
_UNPROMISED = {
    "* @ fault:sentinel_ids": "no router of vLLM writes another id than an expert's or -1",
    "* @ fault:wide_ids": "ids beyond 32 bits are nobody's: expert_id is an int",
    "* @ fault:num_experts_ids": "vLLM's own padding is -1",
    "error @ T=0": "vLLM's callers pad an idle rank to a token; a batch of none does not reach this operator",
}


def align() -> Any:
    """`_moe_C::moe_align_block_size`. Raises EnvironmentProblem."""
    library = extension.load(sources.VLLM)
    operator = library.operator("moe_align_block_size")
    call = bind_operator(operator, _NAMES, REQUIRED)
    capabilities = replace(_CAPABILITIES, devices=extension.devices(operator))
    return declares(_CONTRACT, capabilities, _CLAUSES, _UNPROMISED, library.origin(call.text))(planned(call, _room))


def _room(slots: int, num_experts: int, block_size: int) -> Room:
    """As vllm/model_executor/layers/fused_moe/moe_align_block_size.py allocates, from 0.20 to 0.33."""
    padded = slots + num_experts * (block_size - 1)
    if slots < num_experts:
        padded = min(slots * block_size, padded)
    return Room(padded, -(-padded // block_size), num_experts, {})
