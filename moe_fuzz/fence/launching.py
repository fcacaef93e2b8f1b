"""Launches of our own kernels: each has one binary a device, which is looked up once and then called straight.

Triton looks a kernel up at each launch, by the types, values and options of all that it is given: that is most of what
a launch costs the host, and a case makes a dozen of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton import JITFunction
from triton.runtime import driver


class Launcher:
    """A kernel of int64 parameters, annotated as such and not specialized: nothing that it is given makes it another.
    """

    def __init__(self, kernel: Any, **constants: int) -> None:
        """constants: the last of the kernel's parameters, in their order."""
        self._kernel, self._constants = kernel, constants
        self._last = tuple(constants.values())
        self._compiled = isinstance(kernel, JITFunction)  # and not interpreted
        self._ready: dict[int, tuple[Callable[..., None], Any, Any]] = {}  # by device

    def __call__(self, rows: int, programs: int, *arguments: int) -> None:
        """Launches a grid of [rows, programs] on the current stream of the current device."""
        if not self._compiled:
            self._kernel[rows, programs](*arguments, **self._constants)
            return
        device = torch.cuda.current_device()
        ready = self._ready.get(device)
        if ready is None:  # by Triton's own way, which compiles the kernel and loads it
            kernel = self._kernel[rows, programs](*arguments, **self._constants)
            self._ready[device] = (kernel.run, kernel.function, kernel.packed_metadata)
            return
        run, function, metadata = ready
        # Instead of the three None Triton has its hooks around a launch: for kernels of users, which ours are not.
        stream = driver.active.get_current_stream(device)
        run(rows, programs, 1, stream, function, metadata, None, None, None, *arguments, *self._last)
