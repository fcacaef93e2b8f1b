"""Small tensors that judging needs on both sides: on the device, and on the host without asking the device for them.

Each question to a device waits until it has done all that was enqueued, and where several processes share a GPU it
waits for their turns as well. What the host made it need not ask for. Worker side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_NAME = "_moe_fuzz_mirror"


def uploaded(host: Tensor, device: torch.device | str) -> Tensor:
    """A host's tensor on `device`, without a wait; `on_host` knows it. Nobody writes into either from here on."""
    if torch.device(device).type == "cpu":
        return host
    # A copy from memory that is not pinned waits until it is done.
    there = (host.pin_memory() if host.numel() else host).to(device, non_blocking=True)
    setattr(there, _NAME, host)
    return there


def on_host(tensor: Tensor) -> Tensor:
    """The tensor's values on the host: those it was made of, or else they are fetched, once, with a wait."""
    if tensor.device.type == "cpu":
        return tensor
    kept = getattr(tensor, _NAME, None)
    if kept is None:
        kept = tensor.cpu()
        setattr(tensor, _NAME, kept)
    assert isinstance(kept, Tensor)
    return kept


def is_mirrored(tensor: Tensor) -> bool:
    """Whether `on_host` has no need to wait."""
    return tensor.device.type == "cpu" or hasattr(tensor, _NAME)


def rows_of(tensor: Tensor, rows: Tensor | slice) -> Tensor:
    """tensor[rows], mirrored if the tensor is. rows: int64 [R], mirrored, or a slice."""
    if tensor.device.type == "cpu" or isinstance(rows, slice) or not is_mirrored(tensor):
        return tensor[rows]
    return uploaded(on_host(tensor)[on_host(rows)], tensor.device)


def answers(flags: Sequence[Tensor]) -> list[float]:
    """The values of these tensors of one element each, with one wait for all of them."""
    if not flags:
        return []
    if flags[0].device.type == "cpu":
        return [float(flag) for flag in flags]
    return [float(value) for value in torch.stack([flag.double().reshape(()) for flag in flags]).tolist()]
