"""One buffer cut into tensors."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

#: name -> shape and dtype
Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]
_ALIGNMENT = 256  # bytes, of each part: what the caching allocator gives, too


def bytes_of(parts: Parts) -> int:
    return sum(_size(*part) for part in parts.values())


def take(parts: Parts, device: torch.device, workspace: Tensor | None) -> dict[str, Tensor]:
    """Unset memory for each part: out of the workspace, or allocated. ValueError for a workspace that will not do."""
    if workspace is None:
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in parts.items()}
    needed = bytes_of(parts)
    if (
        workspace.dtype != torch.uint8 or workspace.dim() != 1 or not workspace.is_contiguous()
        or workspace.device != device or workspace.numel() < needed or workspace.data_ptr() % 16
    ):  # fmt: skip
        raise ValueError(f"workspace must be at least {needed} contiguous uint8 on {device}, aligned to 16 bytes "
                         f"(workspace_bytes tells how many), not {list(workspace.shape)} {workspace.dtype}")
    found, used = {}, 0
    for name, (shape, dtype) in parts.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        found[name] = workspace[used : used + size].view(dtype).view(shape)
        used += _size(shape, dtype)
    return found


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(triton.cdiv(torch.Size(shape).numel() * dtype.itemsize, _ALIGNMENT)) * _ALIGNMENT
