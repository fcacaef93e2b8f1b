"""The all-reduce kernels are assembled for Hopper, which needs no GPU: how wide they read, and how they are ordered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moe_fuzz

# a process of its own: in this one Triton may have been imported to interpret
_COMPILE = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moe_fuzz.kernels.allreduce_rmsnorm import kernels

name, dtype, world, columns, single, phase, parts = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
kernel = getattr(kernels, name + "_kernel")
constants = {"WORLD": world, "WORLD_PAD": world, "ROWS": 1, "COLUMNS": columns, "HAS_RESIDUAL": True,
             "ALIKE": True, "SINGLE": bool(single), "TOGETHER": 2, "PARTS": parts, "PHASE": phase, "INTERPRETED": False}
types = {n: dtype for n in ("x_ptr", "residual_ptr", "gamma_ptr", "normed_ptr", "sum_ptr")}
types |= {n: "*i64" for n in ("buffers_ptr", "signals_ptr", "state_ptr", "fault_ptr")}
types |= {"eps": "fp32", "timeout": "i64"}
signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
plain = {"tokens", "share", "first_rank", "eps", "timeout", *constants}
attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n not in plain}
source = ASTSource(fn=kernel, signature=signature, attrs=attrs,
                   constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()})
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "maxnreg": 64})
print(json.dumps([made.asm["ptx"], len(made.asm["cubin"])]))
"""

#: The layouts of what is added up, of each binary that may compute a row of these dtypes and this width.
_LAYOUTS = """
import json, re, sys
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget, Language
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import ASTSource
from moe_fuzz.kernels.allreduce_rmsnorm import kernels, launch

target = GPUTarget("cuda", 90, 32)


def laid_out(kernel, single, together, parts):
    constants = {"WORLD": world, "WORLD_PAD": world, "ROWS": rows, "COLUMNS": columns, "HAS_RESIDUAL": True,
                 "ALIKE": alike, "SINGLE": single, "TOGETHER": together, "PARTS": parts, "PHASE": 0,
                 "INTERPRETED": False}
    types = {n: dtype for n in ("x_ptr", "residual_ptr", "normed_ptr", "sum_ptr")} | {"gamma_ptr": gamma}
    types |= {n: "*i64" for n in ("buffers_ptr", "signals_ptr", "state_ptr", "fault_ptr")}
    types |= {"eps": "fp32", "timeout": "i64"}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    plain = {"tokens", "share", "first_rank", "eps", "timeout", *constants}
    plain |= set() if whole else {"hidden", "x_stride", "residual_stride"}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n not in plain}
    source = ASTSource(fn=kernel, signature=signature, attrs=attrs,
                       constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()})
    backend, context, stages = CUDABackend(target), ir.context(), {}
    options = backend.parse_options({"num_warps": warps, "maxnreg": 64, "enable_fp_fusion": False})
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, options, Language.TRITON)
    module = source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(),
                            context)
    text = str(stages["ttgir"](stages["ttir"](module, {}), {}))
    layouts = dict(re.findall(r"^(#\\w+) = #ttg\\.blocked<(.*)>$", text, re.M))
    reduced = re.findall(r'"tt\\.reduce".*?\\) : \\(tensor<[0-9x]+f32, (#\\w+)>\\) ->', text, re.S)
    # of a row: how many neighbours a thread has, and over how many threads and warps it is spread
    return [[re.search(part + r" = \\[\\d+, (\\d+)\\]", layouts[name])[1]
             for part in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")] for name in reduced]


dtype, gamma, size, whole, columns, world = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
rows = max(1, 512 // columns)
warps = min(16, max(1, rows * columns * size // 512))
alike = bool(whole) and int(gamma[-2:]) >= 8 * size  # as launch.py has it
found = {f"one shot, single={single}": laid_out(kernels.one_shot_kernel, single, 1, 1) for single in (1, 0)}
for parts in (1, 2):
    together = launch._together(world // parts, rows * columns, warps)
    found[f"two shots, {parts} parts, {together} together"] = laid_out(kernels.two_shot_kernel, 0, together, parts)
print(json.dumps(found))
"""


def child(program: str, *arguments: object) -> Any:
    """What a program prints as JSON that compiles for a GPU."""
    pytest.importorskip("triton.backends.nvidia", reason="this build of Triton has no assembler for NVIDIA")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(moe_fuzz.__file__).parents[1])
    command = [sys.executable, "-P", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def assembled(*arguments: object) -> str:
    ptx, size = child(_COMPILE, *arguments)
    assert size > 1000
    return ptx


def lines_of(ptx: str, *parts: str) -> list[int]:
    """The lines with one of `parts`, outside comments."""
    code = [line if not line.lstrip().startswith(("//", ".loc", ".file")) else "" for line in ptx.splitlines()]
    return [number for number, line in enumerate(code) if any(part in line for part in parts)]


@pytest.mark.parametrize(
    ("name", "dtype", "world", "single", "parts", "waits"),
    [("one_shot", "*bf16", 2, 1, 1, 1), ("one_shot", "*fp32", 8, 0, 1, 1), ("two_shot", "*fp16", 4, 0, 1, 2),
     ("two_shot", "*fp16", 4, 0, 2, 2)],
)  # fmt: skip
def test_barriers_release_and_acquire_at_system_scope(name, dtype, world, single, parts, waits):
    ptx = assembled(name, dtype, world, 2048 * parts, single, 0, parts)
    released = lines_of(ptx, "atom.global.sys.release.add", "red.global.sys.release.add", "red.release.sys")
    acquired = lines_of(ptx, "ld.acquire.sys.global")
    barriers = lines_of(ptx, "bar.sync", "barrier.sync")
    assert len(released) == len(acquired) == waits
    # sixteen bytes at a time, and nothing of peers through the cache that is not coherent
    wide = "v4.b32"
    stores, loads = lines_of(ptx, f"st.global.{wide}"), lines_of(ptx, f"ld.global.{wide}")
    assert len(stores) >= world - 1 + 2
    assert len(loads) >= world + 2
    assert not lines_of(ptx, "ld.global.nc", "ld.global.b16", "st.global.b16")
    for first, second in zip(released, acquired, strict=True):
        # all threads' stores, a barrier, the signal, the wait, a barrier, all threads' loads
        before = [line for line in stores if line < first]
        behind = [line for line in loads if line > second]
        assert any(max(before) < line < first for line in barriers)
        assert any(second < line < min(behind) for line in barriers)


def test_phases_wait_for_nobody():
    ptx = assembled("two_shot", "*bf16", 2, 2048, 0, 2, 1)
    assert not lines_of(ptx, ".sys.", "globaltimer")


@pytest.mark.parametrize(
    ("dtype", "gamma", "size", "whole", "columns", "world"),
    [("*bf16", "*bf16", 2, 0, 2048, 4), ("*bf16", "*fp32", 2, 0, 1024, 4), ("*fp32", "*bf16", 4, 1, 4096, 2),
     ("*fp16", "*fp32", 2, 1, 256, 8)],
)  # fmt: skip
def test_every_binary_adds_a_rows_squares_in_one_order(dtype, gamma, size, whole, columns, world):
    """Else a row's bits would depend on how many others there are. whole: H is a multiple of 16, so that a thread can
    load 16 bytes at once; of gamma in another dtype than x that is another number of columns."""
    found = child(_LAYOUTS, dtype, gamma, size, whole, columns, world)
    assert len(found) == 4
    assert all(len(layouts) >= 1 for layouts in found.values()), found
    assert len({tuple(layout) for layouts in found.values() for layout in layouts}) == 1, found
