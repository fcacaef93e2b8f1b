"""The planted bugs of experts in NVFP4. Free of torch; `catalog.py` has them among all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_fuzz.contract import PADDING_DIALECTS
from moe_fuzz.planted.entry import Planted

_CONTRACT: Mapping[str, Any] = {"deterministic": True, "accepts": PADDING_DIALECTS, "rounding": "exact",
                                "nonfinite": "reference"}  # fmt: skip
_SENSELESS = ("power", "fitted", "small", "large", "zero", "infinite", "nan")
_W4A4: Mapping[str, Any] = {"activation_formats": ("nvfp4",)}
_W4A16: Mapping[str, Any] = {"activation_formats": ("as_given",)}
_SWIZZLED: Mapping[str, Any] = {"layouts": ("swizzled",)}


def _bug(name: str, check: str, upstream: str, story: str, **more: Any) -> Planted:
    return Planted(name, "experts_nvfp4", "experts_nvfp4", check, upstream, story, contract=_CONTRACT, **more)


EXPERTS_NVFP4: tuple[Planted, ...] = (
    # codes and scales of blocks
    _bug("codes_high_nibble_first", "exact", "openvino#32144", "takes the first code from the high nibble"),
    _bug("scales_stay_where_codes_move", "exact", "vllm#34673", "`up_first`: exchanges the halves, not their scales"),
    _bug("last_scale_a_step_off", "exact", "Model-Optimizer#2243", "scales of the last row are a step too small"),
    _bug("blocks_of_32", "exact", "vllm#43557", "two blocks have the scale of the first"),
    _bug("subnormal_block_scales_flushed", "exact", "vllm#34577", "a subnormal scale is 0"),
    _bug("signs_of_block_scales_dropped", "exact", "vllm#34577", "a scale below 0 is read as the one above",
         capabilities={"signed_scales": True}),
    _bug("nan_scales_are_the_largest", "finite", "Model-Optimizer#1397", "takes the NaN of a scale for 448", only=True,
         capabilities={"nan_scales": True}),
    # where they lie
    _bug("few_rows_are_not_swizzled", "exact", "flashinfer#1611", "up to 32 rows, takes swizzled scales for linear",
         capabilities=_SWIZZLED),
    _bug("scale_offset_of_real_rows", "exact", "vllm#35497", "experts' tables begin where real rows end",
         capabilities=_SWIZZLED),
    _bug("padded_columns_are_multiplied", "finite", "vllm#38148", "multiplies zeros by the scales of the padding",
         capabilities=_SWIZZLED),
    _bug("padding_cleared_in_place", "fence", "vllm#42988", "clears the padding of the caller's scales",
         capabilities=_SWIZZLED),
    # global scales
    _bug("alpha_of_the_first_expert", "exact", "jax#30467", "one global scale serves all experts"),
    _bug("alpha_as_bfloat16", "statistical", "flashinfer#3398", "rounds global scales to bfloat16",
         capabilities=_W4A16),
    _bug("alphas_in_sixteens", "exact", "vllm#40351", "global scales of the last E % 16 experts are 0"),
    _bug("alphas_read_in_fours", "fence", "vllm#40351", "reads global scales in fours, past the last",
         only=True, capabilities={"alignment": 1}),
    _bug("one_experts_nan_is_everyones", "finite", "flashinfer#3103", "masks results by products with 0", only=True,
         capabilities={"global_scales": _SENSELESS}),
    _bug("other_backend_without_alpha", "backends", "flashinfer#3661", "the backend that is not chosen is wrong",
         only=True, capabilities={"backends": ("small", "large")}),
    # quantized activations
    _bug("infinity_zeroes_activations", "bound", "aiter#6275", "one infinite row, and all are quantized to 0",
         capabilities=_W4A4),
    _bug("requantized_without_clamp", "finite", "Model-Optimizer#1397", "blocks beyond their calibration are NaN",
         only=True, capabilities=_W4A4),
    _bug("not_requantized", "exact", "sglang#16622", "what lies between the products is not quantized",
         capabilities=_W4A4),
    _bug("requantized_under_the_scale_of_x", "exact", "flashinfer#4486", "h is quantized under the scale of x",
         capabilities=_W4A4),
    _bug("scales_of_whole_fours", "exact", "TransformerEngine#2547", "the last rows have one row's scales",
         capabilities=_W4A4),
)  # fmt: skip
