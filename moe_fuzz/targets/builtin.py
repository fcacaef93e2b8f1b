"""Our own kernels as targets, and what they promise."""

from __future__ import annotations

from typing import Any

from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, declares
from moe_fuzz.kernels import align as sorting
from moe_fuzz.kernels import experts_bf16 as experts
from moe_fuzz.kernels import grouped_topk as grouped
from moe_fuzz.kernels import moe_layer as layer
from moe_fuzz.kernels import nvfp4 as fp4
from moe_fuzz.kernels import routing
from moe_fuzz.ops.nvfp4.space import GLOBAL_SCALES
from moe_fuzz.targets.builtin_allreduce import allreduce_rmsnorm as _allreduce
from moe_fuzz.targets.builtin_nvfp4 import experts_nvfp4 as _experts_nvfp4

_CONTRACT = Contract(
    deterministic=True, batch_invariant=True, ties="lowest_index_first", ordered=True, padding=PADDING_DIALECTS
)
_CAPABILITIES = Capabilities(out=True, alignment=1, any_strides=True, one_host_path=True)
_SORTED = Contract(deterministic=True, ordered=True, stable=True, accepts=PADDING_DIALECTS)
_BLOCKS = Capabilities(
    max_experts=8192, max_top_k=64, out=True, alignment=1, any_strides=True, one_host_path=True, block_sizes=()
)


def _promises(
    module: str, contract: Contract = _CONTRACT, capabilities: Capabilities = _CAPABILITIES
) -> dict[str, Any]:
    clause = f"the contract in the docstring of moe_fuzz.reference.{module}"
    return {"contract": contract, "capabilities": capabilities, "clauses": {"*": clause}}


allreduce_rmsnorm = _allreduce
experts_nvfp4 = _experts_nvfp4
topk_softmax = declares(**_promises("routing"))(routing.topk_softmax)
topk_sigmoid = declares(**_promises("routing"))(routing.topk_sigmoid)
grouped_topk = declares(**_promises("grouped_topk"))(grouped.grouped_topk)
align = declares(**_promises("align", _SORTED, _BLOCKS))(sorting.align)
nvfp4_quantize = declares(
    **_promises(
        "nvfp4",
        Contract(
            deterministic=True, batch_invariant=True, rounding="exact", nonfinite="reference", scale_padding="zero",
            accepts=PADDING_DIALECTS,
        ),
        Capabilities(
            out=True, alignment=1, any_strides=True, one_host_path=True, global_scales=GLOBAL_SCALES,
            scale_dtypes=("float32", "bfloat16"),
        ),
    )
)(fp4.nvfp4_quantize)
experts_bf16 = declares(
    # not batch-invariant: block shapes follow the number of slots, and with them the order of a sum
    contract=Contract(deterministic=True, accepts=PADDING_DIALECTS),
    capabilities=Capabilities(dtypes=("bfloat16", "float16"), out=True, alignment=1, any_strides=True,
                              nan_weights=True, nan_biases=True, one_host_path=True),
    clauses={"*": "the contract in the docstring of moe_fuzz.reference.experts_bf16"},
)(experts.experts_bf16)  # fmt: skip
moe_layer = declares(
    contract=Contract(deterministic=True, isolated=True, ties="lowest_index_first", ordered=True,
                      padding=PADDING_DIALECTS, accepts=PADDING_DIALECTS),
    capabilities=_CAPABILITIES,
    clauses={"*": "the contract in the docstring of moe_fuzz.reference.moe_layer"},
)(layer.moe_layer)  # fmt: skip
