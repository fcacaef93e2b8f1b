"""The planted bugs of layers. Free of torch; `catalog.py` has them among all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_fuzz.planted.entry import Planted

#: What plain float32 promises. Nothing here is captured: they look at numbers on the host.
_LAYER: Mapping[str, Any] = {"deterministic": True, "intermediate": "float32", "slot": "none", "padding": ("distinct",)}
#: Numbers whose sums are not exact: where they are, the check of that name finds it as well.
_DENSE: Mapping[str, Any] = {"recipes": ("dense",)}


def _layer(name: str, check: str, upstream: str, story: str, dialects: tuple[str, ...] = ("distinct",),
           **more: Any) -> Planted:  # fmt: skip
    contract = {**_LAYER, "padding": dialects, **more.pop("promises", {})}
    return Planted(name, "moe_layer", "layer", check, upstream, story, contract=contract, **more)


LAYER: tuple[Planted, ...] = (
    # a layer: what one half does to the other, one rank to another, one step to the next
    _layer("nan_blind_layer", "crash", "vllm#37758",
           "a router blind to NaN names expert 0 k times; experts that trust its ids read where nothing was written"),
    _layer("raw_sentinel", "fence", "vllm#48979", "takes the weights of an expert by the id -1",
           dialects=("minus_one",)),
    _layer("sentinel_wraps_map", "bound", "vllm#42034",
           "-1 is taken for the last expert, and fills the places of another rank's rows", dialects=("minus_one",),
           only=True, capabilities=_DENSE),
    _layer("shard_offset_ignored", "bound", "flashinfer#3547", "every shard numbers its experts from 0", only=True,
           capabilities=_DENSE),
    _layer("bias_of_every_shard", "bound", "flashinfer#3547", "adds an expert's bias on every shard", only=True,
           capabilities=_DENSE),
    _layer("shards_added_in_16_bits", "exact", "vllm#56887", "adds the shards' results in the dtype they come in",
           only=True, promises={"intermediate": "dtype"}),
    _layer("rounded_logits_of_few_rows", "weights", "sglang#33764",
           "the router's logits are rounded to 16 bits, of few tokens alone"),
    _layer("gate_in_tf32", "weights", "triton#8654", "a float32 gate is multiplied in TF32"),
    _layer("amax_of_all_ranks", "bound", "aiter#6275", "one infinite padding row, and every row is scaled by infinity"),
    _layer("dense_combine", "bound", "sglang#24850", "multiplies the NaN of padding rows by 0 into every row"),
    _layer("idle_rank_skipped", "bound", "sglang#31794",
           "a rank without tokens does not run its experts: the combine finds the step before", only=True,
           capabilities=_DENSE),
    _layer("rank_bucket_baked", "bound", "sglang#30242",
           "as many rows of a rank are sent as the first step had"),
    _layer("shifted_tail_block", "bound", "flashinfer#3957",
           "a store of fewer than eight slots begins before its buffer: a later step has lost experts", only=True,
           promises={"deterministic": False}, capabilities=_DENSE),
)
