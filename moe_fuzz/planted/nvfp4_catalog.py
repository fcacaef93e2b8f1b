"""The planted bugs of nvfp4_quantize. Free of torch; `catalog.py` has them among all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_fuzz.planted.entry import Planted

_ANY_IDS = ("distinct", "minus_one", "num_experts", "garbage")
#: The contract's bytes, whatever stands in x.
_EXACT: Mapping[str, Any] = {"deterministic": True, "rounding": "exact", "nonfinite": "reference",
                             "scale_padding": "zero", "accepts": _ANY_IDS}  # fmt: skip
#: What float32 in another order may give, of finite numbers.
_NEAR: Mapping[str, Any] = {"deterministic": True, "accepts": ("distinct",)}
_CUDA: Mapping[str, Any] = {"devices": ("cuda",)}


def _exact(name: str, check: str, upstream: str, story: str, **more: Any) -> Planted:
    can = {"alignment": 1, **more.pop("capabilities", {})}
    return Planted(name, "nvfp4_quantize", "nvfp4", check, upstream, story, contract=_EXACT, capabilities=can, **more)


def _state(name: str, check: str, upstream: str, story: str, **more: Any) -> Planted:
    contract, can = {**_NEAR, **more.pop("contract", {})}, {"alignment": 1, **more.pop("capabilities", {})}
    return Planted(name, "nvfp4_quantize", "nvfp4_state", check, upstream, story, contract=contract, capabilities=can,
                   only=True, **more)  # fmt: skip


NVFP4: tuple[Planted, ...] = (
    # scales
    _exact("scale_not_clamped", "finite", "Model-Optimizer#1397",
           "a block beyond its calibration has a NaN for a scale", only=True),
    _exact("zero_block_is_nan", "finite", "Model-Optimizer#1633", "the scale of a row of zeros is 0 / 0", only=True),
    _exact("infinite_scale_times_zero", "finite", "compressed-tensors#595",
           "zeros under an infinite global scale have a NaN for a scale", only=True,
           capabilities={"global_scales": ("power", "infinite")}),
    _exact("sixth_by_reciprocal", "scale", "flashinfer#3656", "multiplies by 1/6 for a division: off on a tie",
           only=True),
    _exact("subnormal_scales_flushed", "scale", "vllm#34577", "a subnormal scale is 0, and its block is lost",
           only=True),
    _exact("maximum_of_the_last_whole_vector", "scale", "vllm#31097",
           "maxima of other blocks at the end of a row where 64 does not divide K > 64", only=True),
    _exact("bfloat16_scale_read_as_float32", "scale", "flashinfer#3398", "a bfloat16 global scale is read as float32",
           only=True, capabilities={"scale_dtypes": ("float32", "bfloat16"), "expert_scales": False}),
    _exact("minus_one_is_the_last_expert", "scale", "vllm#42034", "a row of expert -1 takes the last one's scale",
           only=True),
    _exact("room_for_128_scales", "scale", "aiter#1869", "of more than 128 experts the others have the 128th's scale"),
    _exact("ids_cut_to_32_bits", "scale", "sglang#29929", "of int64 ids takes the low 32 bits",
           only=True),
    _exact("infinity_zeroes_the_batch", "scale", "aiter#6275", "one infinite row, and every row is stored as zero"),
    _exact("swizzled_by_real_columns", "scale", "vllm#35497",
           "past 128 rows, tiles begin where real columns end: 64 must not divide K"),
    _exact("tiles_of_eight_rows", "scale", "flashinfer#1611", "up to 32 rows scales lie in tiles of 8 by 4"),
    # codes
    _exact("high_nibble_first", "codes", "openvino#32144", "packs the first of two codes into the high nibble",
           only=True),
    _exact("codes_under_the_unrounded_scale", "codes", "Model-Optimizer#2243",
           "codes are those of the scale before it was rounded", only=True),
    _exact("codes_by_two_reciprocals", "codes", "flashinfer#3656", "promises exact codes, multiplies by reciprocals",
           only=True),
    _exact("fused_halves_exchanged", "scale", "vllm#34673", "fused with an activation, takes up for the gate"),
    # what else is written
    _exact("padding_of_the_last_column", "padding", "vllm#31097",
           "the last scale of a row again in its padding, where 64 does not divide K", only=True),
    _exact("padding_left_as_it_was", "written", "vllm#42988", "allocates scales empty, and never stores their padding",
           only=True),
    _exact("scales_as_integers", "structure", "flashinfer#3644", "returns scales as uint8", only=True),
    _exact("no_rows_raise", "error", "sglang#23636", "T = 0 launches an empty grid", only=True),
    # memory
    _state("reads_scales_in_fours", "fence", "vllm#40351",
           "loads the global scales of experts in fours: past the last where 4 does not divide E"),
    _state("clears_whole_vectors", "canary", "flashinfer#3957", "clears scales 16 bytes at a time, past the end",
           capabilities={"out": True, "alignment": 16}),  # of that alignment, it stays in the slack
    _state("offset_in_32_bits", "crash", "vllm#34279", "row times stride wraps in 32 bits"),
    # other arithmetic than last time
    _state("tile_with_nan_by_reciprocals", "isolation", "vllm#37758",
           "one NaN, and the 16 rows of its tile are computed by another arithmetic"),
    _state("few_rows_by_reciprocals", "batch_invariance", "aiter#2359",
           "promises that rows are alone, takes another arithmetic up to 16 of them",
           contract={"batch_invariant": True}),
    _state("rounds_at_random", "determinism", "TransformerEngine#3281", "values near a tie fall either way"),
    # graphs
    _state("scale_read_on_host", "capture", "Megatron-LM#6999", "reads the global scale on the host",
           contract={"graph": True}, capabilities={"one_host_path": True}),
    _state("reciprocals_in_a_graph", "replay", "flashinfer#4841", "takes another arithmetic while it is captured",
           contract={"graph": True}, capabilities={"one_host_path": True}),
)  # fmt: skip
