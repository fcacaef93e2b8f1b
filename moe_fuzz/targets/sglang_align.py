"""SGLang's moe_align_block_size, as an operator of its kernel package. Worker side.

What is promised here was read in SGLang's public repository; docs/targets.md has the table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.targets import extension, sources
from moe_fuzz.targets.plans import OPERATOR, REQUIRED, Room, planned
from moe_fuzz.targets.schema import Fixed, Names, bind_operator

_NAMES: Names = {
    **OPERATOR,
    "cumsum_buffer": "cumsum_buffer",
    "pad_sorted_token_ids": Fixed(True),  # as its caller has it: else nobody fills what holds no slot
    "ignore_invalid_expert": Fixed(False),
}

#: sgl-kernel/csrc/moe/moe_align_kernel.cu. Bucket 0 is that of the id -1: its slots are kept, first, in blocks of the
#: expert -1, which the experts kernels skip. Slots take their place by an atomic. Past the last block expert_ids is as
#: the caller allocated it: the experts kernels stop at num_tokens_post_pad.
_CONTRACT = Contract(ordered=True, accepts=("distinct", "minus_one"), tail="any", dropped="first")
#: A thread for each of num_experts + 1 buckets, of which there are 1024 at most. Ids are indexed by slot, and by
#: "ids must be in [-1, num_experts - 2]" (sglang/kernels/ops/moe/moe_align.py).
_CAPABILITIES = Capabilities(
    compiles=False, max_experts=1023, strided=False, alignment=1, block_sizes=(16, 32, 64, 128, 256), expert_map=False,
    absent=("inverse",),
)  # fmt: skip

_TEST = "sgl-kernel/tests/test_moe_align.py"
_SURVIVES = "no caller survives an access outside the tensors it passed"
_CLAUSES = {
    "count": f"{_TEST}: num_tokens_post_pad equals that of the Triton code",
    "slots": f"{_TEST}: the sorted ids of each expert equal those of the Triton code",
    "experts": f"{_TEST}: expert_ids equal those of the Triton code",
    "order": f"{_TEST}: expert_ids equal those of the Triton code",
    "fill": "its caller's docstring: padding entries are the number of slots, which the experts kernels mask off",
    "crash": _SURVIVES,
    "fence": _SURVIVES,
    "canary": _SURVIVES,
    "capture": "SGLang captures it with the model",
}
#: From 64 experts on, slots are sorted by a kernel of its own, whose grid has a block for each 256 of them.
_NO_TOKENS = {"error @ T=0": "models answer an idle rank before; a batch of none does not reach this operator"}


def align() -> Any:
    """`sgl_kernel::moe_align_block_size`. Raises EnvironmentProblem."""
    library = extension.load(sources.SGLANG)
    operator = library.operator("moe_align_block_size")
    call = bind_operator(operator, _NAMES, (*REQUIRED, "cumsum_buffer"))
    capabilities = replace(_CAPABILITIES, devices=extension.devices(operator))
    return declares(_CONTRACT, capabilities, _CLAUSES, _NO_TOKENS, library.origin(call.text))(planned(call, _room))


def _room(slots: int, num_experts: int, block_size: int) -> Room:
    """As sglang/srt/layers/moe/moe_runner/triton_utils/moe_align_block_size.py (0.5.23) allocates.

    Rounded up to four entries, because the kernel fills four at a time: releases before that did not round, and the
    last store of these kernels went past the buffer.
    """
    buckets = num_experts + 1
    padded = slots * block_size if slots < buckets else slots + buckets * (block_size - 1)
    padded = -(-padded // 4) * 4
    return Room(padded, -(-padded // block_size), buckets, {"cumsum_buffer": buckets + 1})
