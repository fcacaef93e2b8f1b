"""The planted bugs, by name. Free of torch: the parent lists them, the worker loads them.

The target of a planted bug is `OP@planted.NAME`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_fuzz.planted.align_catalog import ALIGN
from moe_fuzz.planted.allreduce_catalog import ALLREDUCE
from moe_fuzz.planted.entry import Planted
from moe_fuzz.planted.experts_catalog import EXPERTS
from moe_fuzz.planted.experts_nvfp4_catalog import EXPERTS_NVFP4
from moe_fuzz.planted.layer_catalog import LAYER
from moe_fuzz.planted.nvfp4_catalog import NVFP4


def _router(name: str, module: str, check: str, upstream: str, story: str, **more: Any) -> Planted:
    return Planted(name, "topk_softmax", module, check, upstream, story, **more)


_GRAPH = {"deterministic": True, "graph": True}
_CUDA: Mapping[str, Any] = {"devices": ("cuda",)}
_ONE_PATH: Mapping[str, Any] = {"one_host_path": True}


def _sigmoid(name: str, check: str, upstream: str, story: str, **more: Any) -> Planted:
    return Planted(name, "topk_sigmoid", "routing_sigmoid", check, upstream, story, **more)


def _grouped(name: str, check: str, upstream: str, story: str, module: str = "grouped", **more: Any) -> Planted:
    return Planted(name, "grouped_topk", module, check, upstream, story, **more)


def _slots(name: str, check: str, upstream: str, story: str, **more: Any) -> Planted:
    return _grouped(name, check, upstream, story, module="grouped_slots", **more)


_ROUTERS: tuple[Planted, ...] = (
    # what a NaN does
    _router("nan_argmax", "routing_nan", "ids", "vllm#39391", "on a row of NaN `>` is never true: expert 0, k times"),
    _router("nan_sentinel", "routing_nan", "ids", "sglang#30079", "on a row with NaN `==` is never true: id E"),
    _router("negative_nan_key", "routing_nan", "ids", "aiter#4530",
            "NaN with a sign bit orders below the lanes past E: ids beyond E", only=True),
    # memory
    _router("reads_past_logits", "routing_memory", "fence", "vllm#40351",
            "reads in vectors of four without a mask: past the last row where 4 does not divide E", only=True),
    _router("writes_past_ids", "routing_memory", "fence", "flashinfer#3957",
            "stores its last block of rows whole: past the ids where the block does not divide T",
            capabilities={"out": True}),
    _router("scratch_in_input", "routing_memory", "fence", "sglang#31870",
            "masks the taken experts in the logits themselves", only=True),
    _router("memset_rounded_up", "routing_memory", "canary", "flashinfer#3957",
            "clears the outputs in steps of 16 bytes: into the slack behind them", only=True,
            capabilities={"out": True}),
    _router("id_left_unwritten", "routing_memory", "written", "flashinfer#3011",
            "stores ids in pairs: the last one of an odd k stays as it was", only=True, capabilities={"out": True}),
    _router("padding_weight_not_zeroed", "routing_memory", "padding", "vllm#46408",
            "a padding row gets id -1 and keeps its weight", only=True,
            contract={"deterministic": True, "padding": ("minus_one",)}),
    # numerics
    _router("renorm_zero_division", "routing_numerics", "finite", "sglang#31017",
            "renormalizes 0/0 where a bias selects experts whose scores underflow", only=True),
    _router("masked_with_zero", "routing_numerics", "ids", "sglang#3705",
            "masks taken experts with 0: they win again over negative biased scores"),
    _router("biased_weight", "routing_numerics", "weights", "vllm#34673", "takes the weight from the biased score"),
    _router("branch_128_8", "routing_numerics", "weights", "vllm-metax#270",
            "renormalizes for E = 128, k = 8 even if not asked to", only=True),
    _router("padded_lanes_in_sum", "routing_numerics", "weights", "sglang#23874",
            "lanes past E add exp(0 - max) to the sum, unless E is a power of two", only=True),
    _router("tail_experts_dropped", "routing_numerics", "selection", "vllm#21079",
            "searches E // 32 blocks of 32 experts: never the tail", only=True),
    _router("four_a_lane", "routing_numerics", "selection", "TensorRT-LLM#7068",
            "keeps four candidates of each of 32 lanes: too few where more of the best are in one", only=True),
    _router("bf16_scores", "routing_numerics", "selection", "flashinfer#3595", "ranks scores rounded to bfloat16"),
    _router("reversed_ties", "routing_numerics", "ties", "sglang#31001",
            "promises the lowest id of equal experts, takes the highest", only=True,
            contract={"deterministic": True, "ties": "lowest_index_first"}),
    _router("unsorted_slots", "routing_numerics", "order", "sglang#8125",
            "does not sort its slots, which shows for k > 2 where k is not far below E", only=True,
            contract={"deterministic": True, "ordered": True}),
    _router("int64_ids", "routing_numerics", "structure", "sglang#29929",
            "returns int64 ids, unless E is a power of two", only=True),
    _router("weights_in_input_dtype", "routing_numerics", "structure", "flashinfer#3644",
            "returns weights in the dtype of the logits"),
    _router("zero_tokens_raises", "routing_numerics", "error", "sglang#22455", "divides by T = 0", only=True),
    # state
    _router("nan_tile_slow_path", "routing_state", "isolation", "vllm#37758",
            "one NaN, and the 16 rows of its tile are computed by another arithmetic", only=True),
    _router("small_batch_path", "routing_state", "batch_invariance", "aiter#2359",
            "up to 16 tokens are computed by another arithmetic", only=True,
            contract={"deterministic": True, "batch_invariant": True}),
    _router("arrival_order", "routing_state", "determinism", "vllm#56887",
            "adds partial sums in the order in which blocks arrive, for E > 8"),
    _router("arrival_fill", "routing_state", "determinism", "sglang#30645",
            "fills slots that no finite score claims in the order in which lanes arrive", only=True),
    _router("stale_row_max", "routing_state", "weights", "vllm#49139",
            "row maxima outlive the call: a huge row spoils what stands in its place later"),
    # graphs: where nothing else is said, a planted bug promises nothing about being captured
    _router("counts_rows_on_host", "routing_graph", "capture", "Megatron-LM#6999",
            "reads a count on the host: cannot be captured", only=True, contract=_GRAPH, capabilities=_ONE_PATH),
    _router("tactic_of_the_capture", "routing_graph", "replay", "flashinfer#4841",
            "takes another arithmetic while it is captured", only=True, contract=_GRAPH, capabilities=_ONE_PATH),
    _router("frozen_staging", "routing_graph", "selection", "vllm#52308",
            "captures a padded copy that the warm-up made: every replay routes its zeros",
            contract=_GRAPH, capabilities=_ONE_PATH),
    _router("epoch_baked_in", "routing_graph", "replay", "vllm#28334",
            "the number of the call is baked in: row maxima of earlier replays count as this one's",
            contract=_GRAPH, capabilities=_ONE_PATH),
    _router("side_stream_not_joined", "routing_graph", "written", "flashinfer#1894",
            "computes the weights on a stream that the graph does not know", contract=_GRAPH, capabilities=_CUDA),
    _router("padding_mask_mirrored", "routing_graph", "padding", "sglang#30895",
            "keeps the first padding mask that it sees at an address", contract=_GRAPH | {"padding": ("minus_one",)}),
    _router("sums_cleared_once", "routing_graph", "weights", "vllm#41444",
            "adds into a workspace that is cleared when a buffer is first seen, and never again", contract=_GRAPH),
    _router("amax_of_the_batch", "routing_graph", "weights", "aiter#6568",
            "subtracts the maximum of the batch, with all that its tail holds", contract=_GRAPH),
    # the process
    _router("null_workspace", "routing_process", "crash", "flashinfer#3558", "clears a null workspace for k > 8",
            symptom="SIGSEGV", only=True, capabilities={"devices": ("cpu",)}),
    _router("aborts_on_one_token", "routing_process", "crash", "DeepEP#374", "aborts on T = 1",
            symptom="SIGABRT", only=True),
    _router("exits_on_launch_error", "routing_process", "crash", "aiter#2359",
            "exits for T > 16, unless E is a power of two", symptom="exit:3", only=True),
    _router("waits_for_a_tile", "routing_process", "hang", "flashinfer#4531",
            "waits for a tile that nobody produces where E is odd", symptom="deadline", only=True),
    _router("counts_below_zero", "routing_process", "oom", "flashinfer#4595",
            "an unsigned count below zero: asks for 16 GiB where E < 8", only=True, capabilities={"devices": ("cpu",)}),
    _router("narrow_index", "routing_sigmoid", "written", "vllm#12413",
            "indices of 16 bits wrap where T x k is beyond 65536", capabilities={"devices": ("cuda",)}),
    # the sigmoid
    _sigmoid("sigmoid_nan_fallback", "ids", "vllm#39391",
             "the fallback for E not a power of two knows no NaN: expert 0, k times"),
    _sigmoid("saturated_ties", "ids", "sglang#30645",
             "a winner leaves by its value, and all that tie with it: then none is left"),
    _sigmoid("sigmoid_zero_division", "finite", "flashinfer#3803",
             "renormalizes 0/0 where all selected sigmoids underflow", only=True),
    _sigmoid("sigmoid_in_input_dtype", "weights", "flashinfer#3595",
             "computes the sigmoid in the dtype of the logits", only=True),
    _sigmoid("floor_of_minus_one", "ids", "vllm#31478",
             "searches from -1 and expert 0 where E is no power of two: biased scores below -1 lose to it"),
    _sigmoid("bias_taken_back", "weights", "sglang#13049",
             "takes the weight from the biased score less the bias: a small score loses its digits", only=True),
    _sigmoid("no_scale_of_zero", "weights", "aiconfigurator#1452", "`scale or 1.0`: a scale of 0 is none at all",
             only=True),
    # groups
    _grouped("nan_groups", "ids", "vllm#39391", "on a row of NaN group 0 stays topk_group times, and expert 0 k times"),
    _grouped("masked_groups_zero", "selection", "transformers#45440",
             "experts of the groups that are out get 0, and beat negative biased scores", only=True),
    _grouped("top2_for_every_rule", "selection", "vllm#34673",
             "ranks groups by their two best experts where one is asked for", only=True),
    _grouped("tied_best_counted_once", "selection", "sglang#29771",
             "seeks the second best of a group below the best: of all that tie for it one counts", only=True),
    _grouped("groups_before_bias", "selection", "vllm#34673", "ranks groups before the bias is added", only=True),
    _grouped("group_of_one", "error", "vllm#29439", "takes the two best of a group of one", only=True),
    _grouped("padded_group_lanes", "selection", "sglang#23874",
             "lanes past a group's size hold 0, and beat negative biased scores", only=True),
    _grouped("last_of_tied_groups", "ties", "sglang#31001", "of tied groups the last stays", only=True,
             contract={"deterministic": True, "ties": "lowest_index_first"}),
    _grouped("bits_of_negative_scores", "selection", "sglang#23874",
             "orders the bits of scores as integers, which is wrong for negative ones", only=True),
    _grouped("groups_beyond_eight", "selection", "vllm#34206", "scores the first eight groups, however many there are",
             only=True),
    _grouped("four_groups_kept", "selection", "flashinfer#5165", "keeps four groups at most", only=True),
    _grouped("unwritten_candidates", "ids", "flashinfer#5165",
             "merges eight candidates of each 128 experts where k were written: the rest are expert 0, its score 1"),
    _grouped("grouped_zero_division", "finite", "flashinfer#3946",
             "no epsilon where there are several groups: 0/0", only=True),
    _grouped("grouped_biased_weight", "weights", "vllm#34673", "takes the weight from the biased score"),
    # shared experts and mapped ids
    _slots("shared_id_off_by_one", "shared", "sglang#8125", "the first shared expert has the id E - 1", only=True),
    _slots("two_shared_in_turns", "shared", "sglang#6736", "the slots of more than two shared experts name these two",
           only=True),
    _slots("shared_guard_missing", "selection", "sglang#17325", "ignores groups where there are shared experts",
           only=True),
    _slots("renormalized_with_shared", "weights", "sglang#8125", "divides by a sum with the shared experts in it",
           only=True),
    _slots("unmapped_on_one_path", "expert_map", "sglang#28378", "does not look ids up where there is one group",
           only=True),
    _slots("mapped_in_place", "ids", "sglang#22525", "looks up again what it has looked up"),
    _slots("shared_ids_looked_up", "fence", "sglang#22525", "reads past the map for the ids of shared experts",
           only=True),
    # the device
    _router("asserts_on_sentinel", "routing_device", "crash", "TransformerEngine#2907",
            "looks the id E of a row of NaN up in a table of E: a device-side assertion", symptom="device-assert",
            only=True, capabilities=_CUDA),
    _router("loads_words", "routing_device", "crash", "flashinfer#4473",
            "reads 8 bytes at once where only an element is aligned", symptom="misaligned-access",
            only=True, capabilities={**_CUDA, "alignment": 1}),
    _router("waits_for_a_partner", "routing_device", "hang", "Liger-Kernel#1368",
            "the one block of T = 1 waits for a second one, on the device", symptom="deadline", only=True,
            capabilities=_CUDA),
    _router("int32_row_offset", "routing_device", "crash", "vllm#42201",
            "row times stride wraps in 32 bits where a row begins past 2^31 elements"),
    _router("int32_column_offset", "routing_strides", "crash", "vllm#42201",
            "column times stride wraps in 32 bits where a column begins past 2^31 elements", only=True,
            capabilities={"any_strides": True}),
    _router("bias_without_its_stride", "routing_strides", "selection", "vllm#34673",
            "reads a bias whose elements stand apart as if they were packed", capabilities={"any_strides": True}),
    _router("flags_without_their_stride", "routing_strides", "padding", "vllm#46408",
            "reads the flags of padding rows, which stand apart, as if they were packed",
            contract={"deterministic": True, "padding": ("minus_one",)}, capabilities={"any_strides": True}),
    _router("overruns_hidden_scratch", "routing_device", "fence", "flashinfer#3957",
            "stores past a workspace from a helper thread where E is odd", symptom="own:right:write", only=True,
            capabilities=_CUDA, fence="all"),
)  # fmt: skip

PLANTED: tuple[Planted, ...] = (*_ROUTERS, *ALIGN, *EXPERTS, *LAYER, *NVFP4, *EXPERTS_NVFP4, *ALLREDUCE)


def get_planted(name: str) -> Planted | None:
    """The planted bug of this name."""
    return next((planted for planted in PLANTED if planted.name == name), None)
