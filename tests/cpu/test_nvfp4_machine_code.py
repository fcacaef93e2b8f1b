"""The machine code that decodes NVFP4 is assembled for Hopper, which needs no GPU; what it computes, tests/gpu sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moe_fuzz

# a process of its own: in this one Triton may have been imported to interpret
_COMPILE = """
import sys, torch
from moe_fuzz.bench.ahead import ahead
from moe_fuzz.bench.ahead_calls import layer, swizzled
from moe_fuzz.kernels.experts_nvfp4 import experts_nvfp4

with ahead(whole=True) as found:
    experts_nvfp4(**swizzled(layer(1, 1, 2, 512, 512, dtype=getattr(torch, sys.argv[1]))), backend="large")
made = next(binary for name, binary in found.binaries if name.startswith("decode_weights_kernel"))
print(made.asm["ptx"].count("cvt.rn.f16x2.e4m3x2"), made.asm["ptx"].count("mul." + sys.argv[2]), len(made.asm["cubin"]))
"""


@pytest.mark.parametrize(("dtype", "product"), [("bfloat16", "bf16x2"), ("float16", "f16x2")])
def test_it_assembles(dtype: str, product: str) -> None:
    pytest.importorskip("triton.backends.nvidia", reason="this build of Triton has no assembler for NVIDIA")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-c", _COMPILE, dtype, product]
    environment["PYTHONPATH"] = str(Path(moe_fuzz.__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    scales, products, size = map(int, done.stdout.split())
    assert scales > 0
    assert products >= 8 * scales  # eight pairs a block, none of them apart
    assert size > 1000


_SCALED = """
import re
from moe_fuzz.bench.ahead import SHARED_BYTES, ahead, resources
from moe_fuzz.bench.ahead_calls import GROUPS

_, call = next(GROUPS["experts_nvfp4 scaled"]())
with ahead(100, whole=True) as found:
    call()
for name, binary in found.binaries:
    if name.startswith("fp4_product_kernel"):
        print(*set(re.findall(r"tcgen05\\.mma[\\w.:]*|mma\\.sync[\\w.:]*", binary.asm["ptx"])),
              resources(binary).shared <= SHARED_BYTES)
"""


def test_sm_100_multiplies_codes_under_scales() -> None:
    """What is never chosen unasked, as no such GPU has run it: it is the instruction for NVFP4 that it is made of."""
    pytest.importorskip("triton.backends.nvidia", reason="this build of Triton has no assembler for NVIDIA")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(moe_fuzz.__file__).parents[1])
    done = subprocess.run([sys.executable, "-P", "-c", _SCALED], capture_output=True, text=True, timeout=240,
                          env=environment, check=False)  # fmt: skip
    line = "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X True"
    assert done.stdout.splitlines() == [line, line], done.stdout + done.stderr[-2000:]
