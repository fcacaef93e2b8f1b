"""The adapters of vLLM's and FlashInfer's quantizers, with stand-ins in their place; and who they refuse."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.reference.nvfp4 import nvfp4_quantize as reference
from moe_fuzz.targets import bind, extension, library_nvfp4
from moe_fuzz.targets.extension import Library

TARGETS = ("nvfp4_quantize@vllm", "nvfp4_quantize@flashinfer")
X, SCALE = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.tensor([99.0])
_VALUES = "(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout) -> (Tensor, Tensor)"
_BUFFERS = "(Tensor! output, Tensor input, Tensor! output_scale, Tensor input_scale, bool is_sf_swizzled_layout) -> ()"
_OLD = "(Tensor! output, Tensor input, Tensor! output_scale, Tensor input_scale) -> ()"


@pytest.fixture
def blackwell(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))


@pytest.mark.parametrize("target", TARGETS)
def test_without_a_gpu_they_say_why(target, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentProblem, match="needs a GPU of sm_100"):
        bind.bind(target)


@pytest.mark.parametrize("target", TARGETS)
def test_on_hopper_they_say_why(target, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with pytest.raises(EnvironmentProblem, match="this GPU is sm_90") as refused:
        bind.bind(target)
    assert "builtin" in refused.value.hint


def into(output, given, output_scale, scale, swizzled=True):
    codes, scales = reference(given, scale, "swizzled" if swizzled else "linear")
    output.copy_(codes)
    output_scale.view(torch.uint8).copy_(scales.view(torch.uint8))


@pytest.mark.parametrize(("schema", "kernel", "layouts"), [
    (_VALUES, lambda x, scale, swizzled: reference(x, scale, "swizzled" if swizzled else "linear"),
     ("linear", "swizzled")),
    (_BUFFERS, into, ("linear", "swizzled")), (_OLD, into, ("swizzled",)),
], ids=["values", "buffers", "old"])  # fmt: skip
def test_vllm_in_each_of_its_signatures(schema, kernel, layouts, blackwell, monkeypatch, request):
    space = f"moe_fuzz_stand_in_{request.node.callspec.id}"
    library = torch.library.Library(space, "DEF")
    library.define(f"scaled_fp4_quant{schema}")
    library.impl("scaled_fp4_quant", kernel, "CPU")
    source = library_nvfp4.replace(library_nvfp4._VLLM, namespace=space)
    monkeypatch.setattr(extension, "load", lambda _: Library(source, (), "0.33.0"))
    target = bind.bind("nvfp4_quantize@vllm")
    assert target.info.capabilities.layouts == layouts
    assert not target.info.capabilities.expert_scales
    for layout in layouts:
        given = target({"x": X, "global_scale": SCALE, "layout": layout})
        expected = reference(X, SCALE, layout)
        assert given[1].dtype == torch.float8_e4m3fn
        for one, other in zip(given, expected, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_flashinfer_flattens_its_table(blackwell, monkeypatch):
    def fp4_quantize(input, global_scale=None, sf_vec_size=16, is_sf_swizzled_layout=True):
        codes, scales = reference(input, global_scale, "swizzled" if is_sf_swizzled_layout else "linear")
        return codes, scales.view(torch.uint8).flatten()

    module = ModuleType("flashinfer")
    module.fp4_quantize = fp4_quantize
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    target = bind.bind("nvfp4_quantize@flashinfer")
    for layout in ("linear", "swizzled"):
        given = target({"x": X, "global_scale": SCALE, "layout": layout})
        for one, other in zip(given, reference(X, SCALE, layout), strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
