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
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moe_fuzz.kernels.experts_nvfp4.prepare import decode_weights_kernel as kernel

dtype = sys.argv[1]
constants = {"SWIZZLED": True, "ROWS": 16, "BLOCKS": 32, "INTERPRETED": False}
types = {"w13_ptr": "*i64", "w2_ptr": "*i64", "scales13_ptr": "*u8", "scales2_ptr": "*u8",
         "out13_ptr": dtype, "out2_ptr": dtype}
signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(made.asm["ptx"].count("cvt.rn.f16x2.e4m3x2"), made.asm["ptx"].count("mul." + sys.argv[2]), len(made.asm["cubin"]))
"""


@pytest.mark.parametrize(("dtype", "product"), [("*bf16", "bf16x2"), ("*fp16", "f16x2")])
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
