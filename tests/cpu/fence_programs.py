"""Programs that step out of their memory, and honest ones, on any device: `VICTIMS[name](source, destination)`.

The scripts that run them, fence_victims.py here and cuda_victims.py in tests/gpu, add what is their device's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 8, 16  # 512 bytes of float32: no slack


@triton.jit
def _copy_kernel(src, dst, n, src_shift, dst_shift, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(src + i + src_shift, mask=i < n)
    tl.store(dst + i + dst_shift, x, mask=i < n)


@triton.jit
def _scale_in_place_kernel(src, dst, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(src + i, mask=i < n) * 2
    tl.store(src + i, x, mask=i < n)
    tl.store(dst + i, x, mask=i < n)


def copy(src: torch.Tensor, dst: torch.Tensor, src_shift: int = 0, dst_shift: int = 0) -> None:
    n = src.numel()
    _copy_kernel[(1,)](src, dst, n, src_shift, dst_shift, BLOCK=triton.next_power_of_2(n))


def read_own_workspace(src: torch.Tensor, dst: torch.Tensor) -> None:
    workspace = torch.empty(src.numel(), device=src.device)
    copy(src, workspace)
    copy(workspace, dst, src_shift=1)


def write_own_workspace(src: torch.Tensor, dst: torch.Tensor) -> None:
    workspace = torch.empty_like(src)
    copy(src, workspace, dst_shift=1)
    copy(src, dst)


VICTIMS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "honest": copy,
    "honest_own": lambda src, dst: copy(src.clone(), dst),
    "read_right": lambda src, dst: copy(src, dst, src_shift=1),
    "read_left": lambda src, dst: copy(src, dst, src_shift=-1),
    "read_row_off_by_one": lambda src, dst: copy(src, dst, src_shift=COLUMNS),
    "write_right": lambda src, dst: copy(src, dst, dst_shift=1),
    "write_left": lambda src, dst: copy(src, dst, dst_shift=-1),
    "write_input": lambda src, dst: _scale_in_place_kernel[(1,)](src, dst, src.numel(), BLOCK=ROWS * COLUMNS),
    "torch_write_input": lambda src, dst: src.add_(1),
    "torch_read_input": lambda src, dst: dst.copy_(src),
    "read_empty": lambda src, dst: _copy_kernel[(1,)](src.new_empty(0), dst, 1, 0, 0, BLOCK=1),
    "read_own_workspace": read_own_workspace,
    "write_own_workspace": write_own_workspace,
}
