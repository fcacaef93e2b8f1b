"""From the device to the host with one wait, however many tensors there are."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def ends(*tensors: torch.Tensor) -> list[float]:
    """The lowest and the highest of each tensor, none of them empty: both NaN where an element is."""
    found = [end for tensor in tensors for end in tensor.aminmax()]
    if tensors[0].device.type == "cpu":
        return [float(end) for end in found]
    return list(torch.stack([end.double() for end in found]).tolist())


def to_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the host, to the bit; those that are there already as they are."""
    found = dict(tensors)
    there = {name: tensor for name, tensor in tensors.items() if tensor.device.type != "cpu"}
    for name, tensor in there.items():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        found[name] = copy.copy_(tensor, non_blocking=True)
    if there:
        torch.cuda.current_stream().synchronize()
    return found
