"""The quantizers to NVFP4 of vLLM and FlashInfer. Worker side.

Their kernels convert by an instruction that GPUs have from sm_100 on. Below that they are not to be had, and say why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.targets import extension
from moe_fuzz.targets.adapter import surface_launch_error
from moe_fuzz.targets.schema import Names, bind_operator
from moe_fuzz.targets.sources import VLLM

Quantize = Callable[..., tuple[Tensor, Tensor]]

#: scaled_fp4_quant as its releases spell it: into buffers of the caller's, then (0.18) as a function of values.
_NAMES: Names = {
    "input": "x", "input_scale": "global_scale", "input_global_scale": "global_scale", "output": "codes",
    "output_scale": "scales", "is_sf_swizzled_layout": "swizzled",
}  # fmt: skip
_VLLM = replace(VLLM, namespace="_C", patterns=("_C_stable_libtorch*.so", "_C.abi3.so", "_C*.so"))
_FLASHINFER = ("flashinfer:fp4_quantize", "flashinfer.fp4_quantization:fp4_quantize")

#: Scales by approximate reciprocals. A maximum is taken by fmaxf, which knows no NaN.
_CONTRACT = Contract(deterministic=True, scale_padding="zero")
_CAPABILITIES = Capabilities(dtypes=("bfloat16", "float16"), strided=False, expert_scales=False, devices=("cuda",))
_CLAUSES = {
    "scale": "its tests compare scales with those of the torch code",
    "codes": "its tests compare dequantized values with those of the torch code",
    "written": "vllm#38148: what is left in the padding of the scales is read by the GEMM",
    "padding": "vllm#38148: what is left in the padding of the scales is read by the GEMM",
    "crash": "no caller survives an access outside the tensors it passed",
    "fence": "no caller survives an access outside the tensors it passed",
    "canary": "no caller survives an access outside the tensors it passed",
    "capture": "it is captured with the model",
}
_UNPROMISED = {"error @ T=0": "callers pad an idle rank to a token; a batch of none does not reach this operator"}


def vllm() -> Quantize:
    """`_C::scaled_fp4_quant`. Raises EnvironmentProblem."""
    _require_sm100("vLLM's scaled_fp4_quant")
    library = extension.load(_VLLM)
    operator = library.operator("scaled_fp4_quant")
    call = bind_operator(operator, _NAMES, ("x", "global_scale"))
    layouts = ("linear", "swizzled") if call.takes("swizzled") else ("swizzled",)

    def quantize(x: Tensor, global_scale: Tensor, layout: str = layouts[0]) -> tuple[Tensor, Tensor]:
        values: dict[str, Any] = {"x": x, "global_scale": global_scale, "swizzled": layout == "swizzled"}
        if not call.takes("codes"):
            codes, scales = call(values)
        else:
            rows, blocks = x.shape[0], x.shape[1] // 16
            codes = torch.empty((rows, blocks * 8), dtype=torch.uint8, device=x.device)
            scales = _empty_scales(rows, blocks, layout, x.device)
            call(values | {"codes": codes, "scales": scales})
        surface_launch_error(x)
        return codes, scales.view(torch.float8_e4m3fn)

    capabilities = replace(_CAPABILITIES, layouts=layouts)
    return declares(_CONTRACT, capabilities, _CLAUSES, _UNPROMISED, library.origin(call.text))(quantize)


def flashinfer() -> Quantize:
    """`flashinfer.fp4_quantize`. Raises EnvironmentProblem."""
    _require_sm100("FlashInfer's fp4_quantize")
    function, version = extension.function("flashinfer-python", _FLASHINFER)

    def quantize(x: Tensor, global_scale: Tensor, layout: str = "linear") -> tuple[Tensor, Tensor]:
        codes, scales = function(x, global_scale, is_sf_swizzled_layout=layout == "swizzled")
        surface_launch_error(x)
        shape = _empty_scales(x.shape[0], x.shape[1] // 16, layout, torch.device("meta")).view(torch.uint8).shape
        return codes.view(torch.uint8), scales.view(torch.float8_e4m3fn).view(shape)  # it flattens the table

    origin = f"flashinfer-python {version}, {function.__module__}.{function.__name__}"
    return declares(_CONTRACT, replace(_CAPABILITIES, jit=True), _CLAUSES, _UNPROMISED, origin)(quantize)


def _require_sm100(what: str) -> None:
    if not torch.cuda.is_available():
        raise EnvironmentProblem(f"{what} needs a GPU of sm_100 or later, and torch sees none here",
                                 "nvfp4_quantize@builtin runs on any device")  # fmt: skip
    major, minor = torch.cuda.get_device_capability()
    if major < 10:
        raise EnvironmentProblem(
            f"{what} needs sm_100 or later, for its conversions to E2M1; this GPU is sm_{major}{minor}",
            "nvfp4_quantize@builtin runs on any device",
        )


def _empty_scales(rows: int, blocks: int, layout: str, device: torch.device) -> Tensor:
    """As its caller allocates them: whole words of four where they are swizzled."""
    if layout == "linear":
        return torch.empty((rows, blocks), dtype=torch.uint8, device=device)
    return torch.empty((-(-rows // 128) * 128, -(-blocks // 4)), dtype=torch.int32, device=device)
