"""The planted bugs of experts. Free of torch; `catalog.py` has them among all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_fuzz.contract import PADDING_DIALECTS
from moe_fuzz.planted.entry import Planted

_ANY: Mapping[str, Any] = {"deterministic": True, "accepts": PADDING_DIALECTS}
#: What computes every expert on every token.
_FEW: Mapping[str, Any] = {"max_experts": 4, "max_top_k": 2, "max_hidden": 256, "max_intermediate": 256}
_CUDA: Mapping[str, Any] = {"devices": ("cuda",)}
_OUT: Mapping[str, Any] = {"out": True}


def _experts(name: str, check: str, upstream: str, story: str, module: str = "experts", **more: Any) -> Planted:
    contract = {**_ANY, **more.pop("contract", {})}
    return Planted(name, "experts_bf16", module, check, upstream, story, contract=contract, **more)


def _memory(name: str, check: str, upstream: str, story: str, **more: Any) -> Planted:
    return _experts(name, check, upstream, story, module="experts_memory", **more)


def _permuted(name: str, check: str, upstream: str, story: str) -> Planted:
    return _experts(name, check, upstream, story, module="experts_permuted")


def _bits(name: str, check: str, upstream: str, story: str, **more: Any) -> Planted:
    return _experts(name, check, upstream, story, module="experts_relations", **more)


def _relation(name: str, check: str, upstream: str, story: str) -> Planted:
    return _bits(name, check, upstream, story, only=True)


EXPERTS: tuple[Planted, ...] = (
    # ids of no expert
    _experts("map_of_minus_one", "dropped", "vllm#42034", "-1 reads the last entry of expert_map"),
    _experts("ids_clamped", "dropped", "DeepGEMM#38", "an id past the last expert is taken for the last"),
    _experts("stale_slots_summed", "dropped", "vllm#46408", "sums up the rows of dropped slots, which nobody wrote"),
    _experts("nan_weight_masked_by_zero", "dropped", "sglang#24850", "a dropped slot's NaN is multiplied by 0",
             only=True),
    _experts("zero_off_rank", "exact", "flashinfer#3547", "compares ids of all ranks with the rank's count: all zero"),
    _memory("idle_tokens_unwritten", "written", "sglang#24850", "nobody writes the row of a token without experts here",
            capabilities=_OUT),
    _permuted("dropped_sorted_first", "exact", "TransformerEngine#2908",
              "sorts slots of no expert before expert 0, and counts rows from there"),
    _permuted("map_of_dropped_unwritten", "crash", "vllm#54747",
              "gathers rows of slots without an expert by a map that nobody wrote"),
    # values
    _experts("partial_block_writes_slot_zero", "exact", "vllm#28619", "lanes past a block's end compute slot 0"),
    _experts("weight_applied_twice", "exact", "sglang#21348", "weights the input, and the output again"),
    _experts("weight_of_token", "exact", "flashinfer#2629", "all slots of a token have the weight of its first"),
    _experts("padded_at_the_end", "exact", "vllm#55649", "pads [gate; up] as one where 16 does not divide I"),
    _experts("gate_and_up_swapped", "exact", "vllm#34673", "takes `up_first` for `first`"),
    _experts("gelu_by_tanh", "bound", "vllm#41574", "of the two curves that are called gelu the other one",
             capabilities={"activations": ("gelu",)}),
    _experts("bias_offset_padded", "exact", "vllm#35497", "an expert's bias is at e * H rounded up to 16"),
    _experts("biases_without_their_strides", "exact", "vllm#34673", "reads biases that are not packed as if they were",
             capabilities={"any_strides": True}),
    _experts("bf16_partial_sums", "exact", "vllm#56887", "adds the parts of a sum in bfloat16"),
    _experts("narrow_split_sums", "exact", "vllm#56887", "stores the halves of a sum in 16 bits, and adds them up"),
    _experts("bf16_weights", "statistical", "flashinfer#3595", "rounds the router's weights to bfloat16", only=True,
             capabilities={"recipes": ("dense", "integer", "one_hot", "ladder")}),  # `fine` shows it in the bits
    _experts("bf16_biases", "exact", "vllm#22508", "keeps biases in bfloat16, whatever they come in"),
    _experts("one_flag_for_both_biases", "exact", "vllm#22508", "asks b13 alone whether there are biases"),
    _experts("k_tail_dropped", "exact", "vllm#47303", "adds whole steps of 32 along H, and drops the rest"),
    _experts("last_experts_dropped", "exact", "vllm#21079", "walks experts in fours: those left over give 0"),
    _experts("duplicate_counted_once", "exact", "flashinfer#3011", "an expert that a row names twice counts once"),
    _experts("mean_of_local_slots", "exact", "flashinfer#3191", "scales the sum of the slots that are here up to k"),
    _experts("int64_ids_read_as_int32", "bound", "sglang#29929", "of int64 ids takes the halves for ids"),
    _experts("int64_ids_cut_to_32_bits", "bound", "sglang#29929", "of int64 ids takes the low 32 bits"),
    _experts("amax_of_the_layer", "finite", "aiter#6568", "scales by the largest value of the batch: Inf is all's"),
    _memory("workspace_clobbered", "exact", "vllm#29219", "the second product overwrites its own input"),
    _experts("float32_result", "structure", "flashinfer#3644", "returns the accumulator's dtype for k = 1", only=True),
    _experts("no_tokens_raises", "error", "sglang#31794", "T = 0 makes a grid of no blocks", only=True),
    _relation("halves_rounded_away", "exact", "aiter#2586", "rounds ties away from 0 where they go to even"),
    _relation("nan_clamped_to_the_limit", "finite", "tilelang#3024", "the clamp of swiglu_oai makes a NaN its limit"),
    _relation("weights_saturate", "bound", "vllm#43557", "routing weights end at 448"),
    # relations
    _relation("prepared_by_checksum", "relabel", "sglang#28378",
              "knows weights by the sum of their bits, which experts that move do not change"),
    _relation("plan_of_another_rank", "shards", "flashinfer#3661", "keeps a plan that two ranks share by mistake"),
    _relation("tactic_by_weight", "scaling", "flashinfer#3661", "weights above 1 take another path, as right"),
    # bits
    _bits("nan_block_slow_path", "isolation", "vllm#37758",
          "a NaN, and no row of its expert is rounded between the products", only=True),
    _bits("few_slots_stay_wide", "batch_invariance", "aiter#2359", "up to 4 slots are not rounded in between",
          only=True, contract={"batch_invariant": True}),
    _bits("slots_added_as_blocks_end", "determinism", "vllm#56887", "adds slots in 16 bits, as blocks end",
          only=True, contract={"reduce": "dtype"}),
    _bits("split_k_atomics", "determinism", "vllm#56887", "adds the parts of a sum as they arrive"),
    # memory
    _memory("result_in_hidden_states", "fence", "sglang#31870", "leaves the result in x as well"),
    _memory("tail_masked_on_one_side", "finite", "triton#10772",
            "reads the next expert's weights where H ends, and multiplies them by 0", only=True,
            capabilities={"nan_weights": True}),
    _memory("tail_read_in_vectors", "fence", "flashinfer#4237", "reads eight weights at a time, past the last row",
            only=True),
    _memory("bulk_store_past_the_end", "fence", "flashinfer#3957", "stores 64 elements at a time, past the result",
            capabilities=_OUT),
    _memory("result_cleared_in_vectors", "canary", "flashinfer#3957", "clears 16 bytes at a time, past the result",
            only=True, capabilities=_OUT),
    _memory("hidden_offset_of_32_bits", "crash", "vllm#34279", "token times stride wraps in 32 bits"),
    # graphs
    _memory("slot_sums_cleared_once", "determinism", "vllm#41444", "adds into a workspace that is never cleared again",
            contract={"graph": True}, capabilities=_FEW),
    _memory("frozen_hidden_states", "exact", "vllm#52308", "each replay computes with the x of the warm-up",
            contract={"graph": True}, capabilities={**_FEW, "one_host_path": True}),
)  # fmt: skip
