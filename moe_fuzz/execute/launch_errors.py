"""Launches that failed and that nobody checked: the CUDA runtime remembers the error until somebody asks.

A library that launches a kernel over an empty grid, or with more shared memory than there is, and does not ask, returns
as if nothing were. The next who asks is told: torch, at one of our own operations. So we ask first, after each call of
a target.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch

_LOADED = os.RTLD_NOLOAD | os.RTLD_NOW  # another copy would have a state of its own


class LaunchError(RuntimeError):
    """A kernel of the target was refused by the CUDA runtime, and the target did not look."""


def surface() -> None:
    """Raises LaunchError if a launch of this thread failed since the last call. Waits for nothing."""
    runtime = _runtime()
    code = runtime.cudaGetLastError() if runtime is not None else 0
    if code and runtime is not None:
        raise LaunchError(f"{runtime.cudaGetErrorName(code).decode()} ({code}), and the target did not look")


def forget() -> None:
    """Clears the error of a launch that failed, if there is one."""
    runtime = _runtime()
    if runtime is not None:
        runtime.cudaGetLastError()


@cache
def _runtime() -> ctypes.CDLL | None:
    """The runtime that torch has loaded, whose state libraries of operators share; None where it cannot be found."""
    try:
        found = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}", mode=_LOADED)
    except OSError:
        return None
    found.cudaGetLastError.restype = ctypes.c_int
    found.cudaGetErrorName.restype, found.cudaGetErrorName.argtypes = ctypes.c_char_p, (ctypes.c_int,)
    return found
