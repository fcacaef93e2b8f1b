"""The few calls of the CUDA driver that fences need, through ctypes: virtual memory management, and waiting.

No Python package is needed, only the driver's own library. It is loaded at the first call, in the worker.
Source: CUDA Driver API reference, "Virtual Memory Management".
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_size_t, c_ubyte, c_uint64, c_ushort, c_void_p
from functools import cache
from typing import Any

from moe_fuzz.errors import EnvironmentProblem

READ, WRITE = 1, 3  # CUmemAccess_flags
_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_OUT_OF_MEMORY = 2

#: Errors after which the context, and with it the process, can do nothing more on the device -> symptom.
_FATAL = {
    214: "ecc-error",
    220: "nvlink-error",
    700: "illegal-access",
    702: "launch-timeout",
    710: "device-assert",
    714: "stack-error",
    715: "illegal-instruction",
    716: "misaligned-access",
    717: "invalid-address-space",
    718: "invalid-pc",
    719: "launch-failure",
}
_NO_CONTEXT = (3, 4, 201)  # of a wait: not initialized, shut down, no current context
_lost: DeviceLost | None = None
_limit: int | None = None  # bytes of memory that this process may map
_backed = 0  # bytes mapped
_sizes: dict[int, int] = {}  # by the address where memory was first mapped


class DeviceLost(Exception):
    """A kernel broke the CUDA context: nothing works on the device in this process any more."""

    def __init__(self, symptom: str, message: str) -> None:
        super().__init__(message)
        self.symptom = symptom


class _Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class _AllocFlags(ctypes.Structure):
    _fields_ = (("compression", c_ubyte), ("rdma", c_ubyte), ("usage", c_ushort), ("reserved", c_ubyte * 4))


class _AllocationProp(ctypes.Structure):
    _fields_ = (("type", c_int), ("handle_types", c_int), ("location", _Location), ("win32", c_void_p),
                ("flags", _AllocFlags))  # fmt: skip


class _AccessDesc(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", c_int))


_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (c_int, c_void_p),
    "cuCtxSynchronize": (),
    "cuCtxGetCurrent": (c_void_p,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuMemsetD16Async": (c_uint64, c_ushort, c_size_t, c_void_p),
    "cuMemGetAllocationGranularity": (c_void_p, c_void_p, c_int),
    "cuMemAddressReserve": (c_void_p, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemCreate": (c_void_p, c_size_t, c_void_p, c_uint64),
    "cuMemRelease": (c_uint64,),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuMemSetAccess": (c_uint64, c_size_t, c_void_p, c_size_t),
}


def synchronize() -> None:
    """Waits for all work of this process on the current device. Raises DeviceLost."""
    _call("cuCtxSynchronize")


def make_current(device: int) -> None:
    """Gives this thread the context that torch uses, where it has none yet: a thread's first call may be ours."""
    context = c_void_p()
    _call("cuCtxGetCurrent", ctypes.byref(context))
    if not context.value:
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        _call("cuCtxSetCurrent", context)


def fill(address: int, word: int, size: int, stream: int) -> None:
    """Writes a 16-bit word over `size` bytes, in the order of the stream."""
    _call("cuMemsetD16Async", address, word, size // 2, stream)


def lost() -> DeviceLost | None:
    """The error that broke the context, once one has."""
    return _lost


@cache
def granularity(device: int) -> int:
    """Bytes of the unit in which memory is mapped and protected: 2 MiB on every GPU so far."""
    size = c_size_t()
    _call("cuMemGetAllocationGranularity", ctypes.byref(size), ctypes.byref(_prop(device)), 0)
    return size.value


def reserve(size: int) -> int:
    """The address of `size` bytes of address space. An access to them faults until memory is mapped there."""
    address = c_uint64()
    _call("cuMemAddressReserve", ctypes.byref(address), size, 0, 0, 0)
    return address.value


def free(address: int, size: int) -> None:
    """Gives a reservation back, whole."""
    _call("cuMemAddressFree", address, size)


def back(address: int, size: int, device: int, times: int = 1, twin: int | None = None) -> None:
    """Maps new memory of `size` bytes at `address`, `times` times in a row: the same memory again and again; and once
    more at `twin`. Each mapping is protected, and unmapped, by itself.

    It cannot be accessed before `protect`. `unmap` frees it. Raises MemoryError, also where `limit` is reached.
    """
    global _backed
    if _limit is not None and _backed + size > _limit:
        raise MemoryError(f"{size} bytes for a memory fence: this worker has {_backed} of its {_limit}")
    handle = c_uint64()
    _call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(_prop(device)), 0)
    try:
        for i in range(times):
            _call("cuMemMap", address + i * size, size, 0, handle, 0)
        if twin is not None:
            _call("cuMemMap", twin, size, 0, handle, 0)
    finally:
        _call("cuMemRelease", handle)  # the memory lives as long as it is mapped
    _backed += size
    _sizes[address] = size


def protect(address: int, size: int, device: int, access: int) -> None:
    """READ or WRITE for whole mapped granules. The device must be done with them: see `synchronize`."""
    desc = _AccessDesc(_Location(_DEVICE, device), access)
    _call("cuMemSetAccess", address, size, ctypes.byref(desc), 1)


def unmap(address: int, size: int) -> None:
    """Unmaps whole mappings. The device must be done with them."""
    global _backed
    _call("cuMemUnmap", address, size)
    _backed -= _sizes.pop(address, 0)


def limit(size: int) -> None:
    """At most this many bytes may be mapped from now on: what the workers on one GPU owe each other."""
    global _limit
    _limit = size


def _prop(device: int) -> _AllocationProp:
    return _AllocationProp(type=_PINNED, location=_Location(_DEVICE, device))


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EnvironmentProblem(f"the CUDA driver cannot be loaded: {error}", "install an NVIDIA driver") from error
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    return library


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_library(), name)(*arguments)
    if code:
        raise _failure(name, code)


def _failure(call: str, code: int) -> Exception:
    global _lost
    found = ctypes.c_char_p()
    _library().cuGetErrorName(code, ctypes.byref(found))
    name = (found.value or b"an unknown error").decode()
    if code == _OUT_OF_MEMORY:
        return MemoryError(f"{call} for a memory fence: {name}")
    symptom = _FATAL.get(code, f"cuda-error-{code}" if call == "cuCtxSynchronize" and code not in _NO_CONTEXT else "")
    if symptom:
        _lost = _lost or DeviceLost(symptom, f"a kernel broke the CUDA context: {name}")
        return _lost
    return EnvironmentProblem(f"{call} failed: {name} ({code})", "fences need virtual memory management of the driver")
