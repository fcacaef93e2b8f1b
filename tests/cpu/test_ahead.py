"""Every kernel of ours in every variant passes Triton's checks for Hopper, on a machine without a GPU.

The first run on a card is dear, and Triton's interpreter does not specialize: an argument that is 1 is a plain number
in a kernel that is compiled, and has no `.to`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# a process of its own: in this one Triton may have been imported to interpret
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
    "PYTHONPATH": str(ROOT)
}
#: By compute capability. `grouped_topk` has a test of its own, which goes further.
GROUPS = {"90": ("nvfp4_quantize", "experts_nvfp4", "experts_nvfp4 options", "experts_bf16"),
          "100": ("experts_nvfp4 scaled",)}  # fmt: skip

_PROGRAM = """
import torch, triton, triton.language as tl
from moe_fuzz.bench.ahead import Enqueued, ahead, resources

@triton.jit
def narrow(pointer, size):
    tl.store(pointer + size.to(tl.int64), 1)

@triton.jit
def wide(pointer, size):
    tl.store(pointer + tl.cast(size, tl.int64), 1)

def call(kernel):
    kernel[(1,)](torch.zeros(8), 1)
    return torch.full((3,), 7).view(3, 1)  # a launch, and none

try:
    with ahead():
        call(narrow)
except Exception as refused:
    print(str(refused).splitlines()[-1])
with ahead(whole=True) as found:
    call(wide)
print(found.names, *[resources(binary).shared for _, binary in found.binaries])
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT, check=False)


@pytest.mark.parametrize("capability", GROUPS)
def test_a_card_will_take_it(capability: str) -> None:
    pytest.importorskip("triton.backends.nvidia", reason="this build of Triton has no compiler for NVIDIA")
    done = run(str(ROOT / "benchmarks" / "ahead.py"), "--capability", capability, *GROUPS[capability])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    told = re.findall(r"^(.+): (\d+) calls, (\d+) that would fail$", done.stdout, re.MULTILINE)
    assert [(group, failed) for group, _, failed in told] == [(group, "0") for group in GROUPS[capability]]
    assert all(int(calls) >= 4 for _, calls, _ in told), told


def test_routers_of_groups_stay_in_registers() -> None:
    """Where a score met a sum of its row behind the groups, Triton laid out all of the row anew: 5 KiB a thread."""
    pytest.importorskip("triton.backends.nvidia", reason="this build of Triton has no compiler for NVIDIA")
    done = run(str(ROOT / "benchmarks" / "ahead.py"), "--whole", "grouped_topk")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"^grouped_topk: \d+ calls, 0 that would fail$", done.stdout, re.MULTILINE)
    spilled = [int(line.split()[2]) for line in done.stdout.splitlines() if " spilled " in line]
    assert len(spilled) >= 16
    assert set(spilled) == {0}, done.stdout[-4000:]


def test_it_refuses_what_a_card_would(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia", reason="this build of Triton has no compiler for NVIDIA")
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM, encoding="utf-8")
    done = run(str(program))
    assert done.returncode == 0, done.stderr[-2000:]
    refused, taken = done.stdout.splitlines()
    assert "'int' object has no attribute 'to'" in refused
    assert taken == "['zeros', 'wide', 'full'] 0"


_LAUNCHES = """
import torch
from moe_fuzz.bench.ahead import ahead
from moe_fuzz.bench.ahead_calls import layer
from moe_fuzz.kernels.experts_nvfp4 import experts_nvfp4, workspace_bytes

for tokens, options in {calls}:
    given = layer(tokens, 8, 60, 256, 128) | options
    if "activations" in options:
        given |= {{"x_global": torch.ones(1), "h_global": torch.ones(1)}}
    chosen = {{name: options[name] for name in ("activations", "backend") if name in options}}
    size = workspace_bytes(tokens, 8, 256, 128, 60, **chosen)
    given |= {{"out": torch.empty_like(given["x"]), "workspace": torch.empty(size, dtype=torch.uint8)}}
    with ahead() as found:
        experts_nvfp4(**given)
    assert not found.allocated, found.allocated
    print(*found.names)
"""
_CALLS = ((1, {}), (16, {}), (17, {}), (17, {"activations": "nvfp4"}), (1, {"backend": "large"}),
          (5, {"backend": "large"}), (900, {"backend": "large"}))  # fmt: skip
_FIRST, _REST = "reorder_kernel", "fp4_product_kernel fp4_product_kernel sum_slots_kernel"
_PLAIN = "grouped_product_kernel grouped_product_kernel sum_slots_kernel"


def test_what_a_call_of_experts_nvfp4_enqueues(tmp_path: Path) -> None:
    """The slots are grouped in two launches at most, of which `small` needs the first anyway; nothing is filled, where
    vllm#31837 took three fills a product."""
    pytest.importorskip("triton.backends.nvidia", reason="this build of Triton has no compiler for NVIDIA")
    program = tmp_path / "program.py"
    program.write_text(_LAUNCHES.format(calls=_CALLS), encoding="utf-8")
    done = run(str(program))
    assert done.stdout.splitlines() == [
        f"{_FIRST} {_REST}",
        f"{_FIRST} {_REST}",
        f"{_FIRST} _place_kernel {_REST}",
        f"{_FIRST} _place_kernel fp4_product_kernel reorder_kernel fp4_product_kernel sum_slots_kernel",
        f"decode_weights_kernel {_PLAIN}",
        f"_count_kernel decode_weights_kernel {_PLAIN}",
        f"_count_kernel decode_weights_kernel _place_kernel {_PLAIN}",
    ], done.stderr[-2000:]
