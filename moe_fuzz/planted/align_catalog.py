"""The planted bugs of align. Free of torch; `catalog.py` has them among all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_fuzz.planted.entry import Planted

_ANY_IDS: Mapping[str, Any] = {"deterministic": True,
                               "accepts": ("distinct", "minus_one", "num_experts", "garbage")}  # fmt: skip
#: Their dictionary is that of the op itself.
_ANY_SIZES: Mapping[str, Any] = {"max_experts": 8192, "block_sizes": (), "fewer_than_map": False}
_CUDA: Mapping[str, Any] = {"devices": ("cuda",)}
_GRAPH: Mapping[str, Any] = {"graph": True}


def _align(name: str, check: str, upstream: str, story: str, module: str = "align", **more: Any) -> Planted:
    contract, can = {**_ANY_IDS, **more.pop("contract", {})}, {**_ANY_SIZES, **more.pop("capabilities", {})}
    return Planted(name, "align", module, check, upstream, story, contract=contract, capabilities=can, **more)


ALIGN: tuple[Planted, ...] = (
    # ids of no expert
    _align("negative_id_counts", "count", "vllm#55231", "-1 is below E, and counted as the last expert"),
    _align("map_indexed_by_minus_one", "count", "vllm#42034", "-1 reads the last entry of expert_map"),
    _align("id_cut_to_32_bits", "count", "sglang#29929", "an int64 id is judged by its low 32 bits"),
    _align("whole_tiles_need_one_more", "count", "vllm#28619",
           "an expert of exactly 64 or 128 slots has a block too many"),
    _align("map_without_its_stride", "count", "vllm#34673",
           "reads an expert_map whose entries stand apart as if they were packed", capabilities={"any_strides": True}),
    _align("counts_before_the_table", "canary", "vllm#57036", "-1 is counted before the table of counts",
           module="align_memory"),
    _align("dropped_go_to_place_zero", "slots", "vllm#28619", "what has no place is stored at place 0"),
    # the plan
    _align("counts_of_16_bits", "count", "vllm#12413", "an expert of more than 32767 slots wraps its count",
           capabilities=_CUDA),
    _align("scan_of_1024_threads", "written", "vllm#21079", "thread E writes the total: with E = 1024 there is none",
           capabilities={"out": True}),
    _align("total_before_padding", "count", "DeepEP#427", "the total is that of the slots, before padding", only=True),
    _align("stops_at_first_match", "written", "flashinfer#3011",
           "for T > 16 the second slot of an expert that a row names twice is nobody's", capabilities={"out": True}),
    _align("last_warp_not_placed", "slots", "flashinfer#3011", "past 64 slots only whole warps of them have a place",
           only=True, capabilities={"absent": ("inverse",)}),
    _align("token_for_slot", "slots", "flashinfer#2629", "holds the token's number where k > 1 wants the slot's"),
    _align("global_expert_ids", "experts", "flashinfer#3547", "blocks bear the ids of all ranks' experts", only=True),
    _align("padding_of_minus_one", "fill", "aiter#2644", "pads blocks with -1, which is below N as well", only=True),
    _align("tail_of_expert_zero", "tail", "vllm#35161", "past the blocks in use expert_ids is 0, an expert", only=True),
    _align("inverse_without_padding", "inverse", "flashinfer#3191", "the way back is that of the compact order",
           only=True),
    _align("room_by_count", "structure", "flashinfer#2821", "sizes the plan by what these ids need", only=True),
    _align("no_slots_raises", "error", "sglang#31794", "T = 0 makes a grid of no blocks", only=True),
    _align("full_experts_first", "order", "sglang#8125", "promises ascending experts, puts the fullest first",
           only=True, contract={"ordered": True}),
    _align("later_slots_first", "stable", "vllm#56887", "promises ascending slots, ranks the last warp first",
           only=True, contract={"stable": True}),
    _align("slots_in_order_of_arrival", "determinism", "vllm#56887", "ranks slots as they come, another time otherwise",
           only=True),
    # memory
    _align("fills_whole_vectors", "canary", "flashinfer#3957", "fills four entries at a time, past the end",
           only=True, module="align_memory", capabilities={"out": True}),
    _align("row_offset_of_32_bits", "crash", "vllm#34279", "token times stride wraps in 32 bits",
           module="align_memory"),
    _align("total_kept_by_address", "count", "flashinfer#3516", "reads the total once for each address and shape",
           only=True, module="align_memory"),
    # graphs
    _align("counts_cleared_once", "count", "vllm#41444", "counts in a workspace that is never cleared again",
           module="align_memory", contract=_GRAPH),
    _align("filled_once", "fill", "vllm#52308", "fills the plan's buffer when it is made, never again",
           module="align_memory", contract=_GRAPH),
    _align("total_read_on_host", "capture", "Megatron-LM#6999", "reads the total on the host: cannot be captured",
           only=True, module="align_memory", contract=_GRAPH, capabilities={"one_host_path": True}),
    _align("ranked_backwards_in_a_graph", "replay", "flashinfer#4841", "ranks slots from the last while it is captured",
           only=True, module="align_memory", contract=_GRAPH, capabilities={"one_host_path": True}),
)  # fmt: skip
