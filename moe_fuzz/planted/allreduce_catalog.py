"""The planted bugs of allreduce_rmsnorm. Free of torch; `catalog.py` has them among all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_fuzz.planted.entry import Planted

#: Sums in float32 from rank 0 on, on every rank.
_RANKED: Mapping[str, Any] = {"deterministic": True, "isolated": True, "sum_order": "rank"}
#: In any order, the same one each time.
_ANY: Mapping[str, Any] = {"deterministic": True, "isolated": True}
#: A thousand calls in a row would take minutes: their streams are generators, and their ranks take turns in Python.
_HERE: Mapping[str, Any] = {"alignment": 1, "max_burst": 8}
_CUDA: Mapping[str, Any] = {"devices": ("cuda",)}


def _sums(name: str, check: str, upstream: str, story: str, module: str = "allreduce", **more: Any) -> Planted:
    contract, can = {**_RANKED, **more.pop("contract", {})}, {"out": True, **_HERE, **more.pop("capabilities", {})}
    return Planted(name, "allreduce_rmsnorm", module, check, upstream, story, contract=contract, capabilities=can,
                   **more)  # fmt: skip


def _state(name: str, check: str, upstream: str, story: str, **more: Any) -> Planted:
    return _sums(name, check, upstream, story, module="allreduce_state", **more)


ALLREDUCE: tuple[Planted, ...] = (
    # ranks that are not in step: shown by bursts of calls and by who is ahead of whom
    _sums("no_end_barrier", "ranks", "vllm#2760",
          "nobody waits until all have read: the next message overwrites what a late rank still reads"),
    _sums("flag_before_data", "ranks", "aiter#2890",
          "the signal comes before the message: a quick rank reads the last one"),
    _sums("memory_of_the_world", "ranks", "vllm#45917", "two groups that call at the same time share their buffers"),
    _sums("own_part_first", "ranks", "ompi#12258", "each rank begins its sums with its own part", only=True,
          contract={"sum_order": "any"}),
    # sums
    _sums("rotated_partitions", "residual", "vllm#57042",
          "promises the order of ranks; of large messages each owner begins with its own part", only=True),
    _sums("sums_before_rounding", "residual", "aiter#2586",
          "promises to round the sum before the residual is added; up to 16 rows it does not", only=True,
          contract={"rounds": ("sum", "residual")}),
    _sums("mean_times_ranks", "exact", "tt-metal#13621", "a mean over ranks, times their number", only=True,
          contract={"sum_order": "any"}),
    _sums("stale_residual", "bound", "flashinfer#2385", "residual_out is the residual that came in"),
    # the norm
    _sums("cluster_of_seven", "bound", "vllm#34412",
          "adds up the squares of blocks in pairs: of 7 blocks 3 are left out", only=True),
    _sums("second_pass_is_packed", "bound", "LightLLM#1467",
          "heeds the residual's strides where squares are summed, and not where values are scaled", only=True),
    _sums("gamma_taken_for_x", "bound", "vllm#48330", "reads gamma in the dtype of x, whatever its own is", only=True),
    # what is written
    _sums("two_shot_tail", "written", "vllm#21325", "shares few rows out among the ranks, and the rest to nobody",
          only=True),
    _sums("done_before_committed", "written", "vllm#45448",
          "up to two tokens it is done before the last rank's output is stored", only=True),
    _state("normed_in_dtype_of_gamma", "structure", "vllm#35369", "a float32 gamma makes a float32 result", only=True,
           capabilities={"out": False}),
    _state("empty_batch_raises", "error", "sglang#31794", "T = 0 launches an empty grid", only=True),
    # memory
    _state("workspace_in_whole_blocks", "fence", "flashinfer#1223", "sets its workspace up past its end"),
    _state("gamma_in_whole_vectors", "fence", "vllm#38571", "reads gamma in vectors of 16, past its end", only=True),
    _state("clears_whole_vectors_of_out", "canary", "flashinfer#3957", "clears a result 16 bytes at a time", only=True,
           capabilities={"alignment": 16}),  # of that alignment, it stays in the slack
    _state("flags_by_size", "pads", "vllm#2760", "beyond 8 rows signals are left behind", only=True),
    _state("pairs_of_vectors", "tail", "flashinfer#4473", "32 bytes are stored where 16 are left of the buffer",
           only=True),
    _state("residual_read_after_its_store", "bound", "ggml#1491",
           "reads the residual once more, where its own result lies by then", only=True,
           capabilities={"residual_in_place": True}),
    # other arithmetic than for other rows, or than last time
    _state("tile_with_nan_in_float64", "isolation", "vllm#37758",
           "one NaN, and the 16 rows of its tile are computed by other arithmetic", only=True),
    _state("few_rows_by_other_arithmetic", "batch_invariance", "aiter#2359",
           "up to 4 rows are multiplied in another order", only=True, contract={"batch_invariant": True}),
    _state("order_of_arrival", "determinism", "vllm#51290", "adds parts up in the order in which they arrive",
           only=True, contract={"sum_order": "any"}),
    # a backend that is not the chosen one
    _state("one_stage_adds_before_rounding", "backends", "aiter#2586",
           "of two ways the one that is not chosen does not round the sum", only=True,
           contract={"rounds": ("sum", "residual")}, capabilities={"backends": ("one_stage", "two_stage")}),
    _state("two_stages_by_other_arithmetic", "backends", "aiter#2359",
           "the way that is not chosen has another kernel for the norm", only=True,
           contract={"batch_invariant": True}, capabilities={"backends": ("one_stage", "two_stage")}),
    # graphs
    _state("counts_rows_on_the_host", "capture", "vllm#28334", "reads on the host whether all is finite", only=True,
           contract={"graph": True}, capabilities={"one_host_path": True, "out": False}),
    _state("other_order_in_a_graph", "replay", "flashinfer#4841", "begins with the last rank while it is captured",
           only=True, contract={"graph": True, "sum_order": "any"}, capabilities={"one_host_path": True, "out": False}),
    # processes
    _sums("zero_is_not_there_yet", "hang", "flashinfer#3304", "waits for ever for a message with -0 in it",
          symptom="deadline", only=True),
    _state("last_rank_aborts", "crash", "DeepEP#374", "the last rank exits on a single token", symptom="exit:3",
           only=True, capabilities={"processes": ("cpu", "cuda")}),
    _state("last_rank_waits_elsewhere", "hang", "flashinfer#3247", "the last rank meets with another group",
           symptom="deadline", only=True, capabilities={"processes": ("cpu", "cuda")}),
)  # fmt: skip
