"""The CUDA driver's memory calls on memory of this process: arenas of CUDA run whole, twins and protection too.

`pretend()` is for a process that ends soon: torch's own functions are replaced too. Kernels are interpreted. What a
target allocates itself stays ordinary memory, and nothing is asynchronous.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from typing import Any

import numpy
import torch

from moe_fuzz.fence import cuda_driver, cuda_mapping, cuda_placed

_GRANULE = 1 << 12
_PRIVATE, _FIXED_SHARED = 0x4022, 0x11  # anonymous, no reserve; at this very address


def pretend(synchronize: Callable[[], None]) -> None:
    """synchronize: in the place of every wait of ours."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def reserve(size: int) -> int:
        found: int = libc.mmap(None, size + _GRANULE, 0, _PRIVATE, -1, 0)
        return -(-found // _GRANULE) * _GRANULE

    def back(address: int, size: int, device: int, times: int = 1, twin: int | None = None) -> None:
        file = os.memfd_create("memory")
        os.ftruncate(file, size)
        for place in (*(address + i * size for i in range(times)), *([] if twin is None else [twin])):
            assert libc.mmap(place, size, 0, _FIXED_SHARED, file, 0) == place
        os.close(file)

    def protect(address: int, size: int, device: int, access: int) -> None:
        assert libc.mprotect(address, size, access) == 0  # READ and WRITE are 1 and 3 there too

    for name, function in {
        "reserve": reserve, "back": back, "protect": protect, "synchronize": synchronize,
        "granularity": lambda device: _GRANULE, "make_current": lambda device: None,
        "free": lambda address, size: None, "unmap": lambda address, size: None,
    }.items():  # fmt: skip
        setattr(cuda_driver, name, function)
    cuda_placed.MIN_GUARD = cuda_mapping._ALIAS = 1 << 20
    torch.cuda.is_available, torch.cuda.current_device = (lambda: True), (lambda: 0)  # type: ignore[assignment]
    torch.Tensor.pin_memory = torch.Tensor.clone  # type: ignore[assignment, method-assign]
    moved, as_tensor = torch.Tensor.to, torch.as_tensor

    def to(self: torch.Tensor, *where: Any, **more: Any) -> torch.Tensor:
        return self.clone() if where and where[0] == "cuda" else moved(self, *where, **more)

    def from_address(one: Any, **where: Any) -> torch.Tensor:
        if not hasattr(one, "__cuda_array_interface__"):
            return as_tensor(one, **where)
        described = one.__cuda_array_interface__
        kind, shape = numpy.dtype(described["typestr"]), described["shape"]
        memory = (ctypes.c_ubyte * (math.prod(shape) * kind.itemsize)).from_address(described["data"][0])
        memory.keeper = one  # type: ignore[attr-defined]
        return torch.frombuffer(memory, dtype=as_tensor(numpy.zeros(0, kind)).dtype).view(shape)

    torch.Tensor.to, torch.as_tensor = to, from_address  # type: ignore[assignment, method-assign]
    for name in ("zeros", "empty", "arange", "empty_strided"):
        setattr(torch, name, _on_host(getattr(torch, name)))


def _on_host(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*given: Any, **more: Any) -> torch.Tensor:
        more.pop("pin_memory", None)
        if more.get("device") == "cuda":
            del more["device"]
        return make(*given, **more)

    return made
