"""The two bit patterns of fenced memory: the canary around a tensor, and the poison inside an output.

The canary is the 16-bit word 0x7FFD again and again. An element of it that a kernel reads by mistake is a quiet NaN in
float16, bfloat16, float32, float64 and float8_e5m2; as int32 it is 2147319805, as int64 9223090559730712573: an index
that lands far outside of anything. (0xFF bytes would be NaN as well, but -1 as an integer: an honest sentinel.)

The poison is a *signaling* NaN with a payload of its own in each float type: arithmetic on it sets the quiet bit, so a
kernel that merely computed with what it found leaves other bits. Integers get 0xA5 bytes: a large negative number.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from typing import NamedTuple

import torch

WORD = b"\xfd\x7f"  # little endian

_CHUNK = 1 << 18
_CANARY = ctypes.create_string_buffer(WORD * (_CHUNK // 2 + 1), _CHUNK + 2)
_TEMPLATE = ctypes.addressof(_CANARY)

_memcmp = ctypes.PyDLL(None).memcmp  # PyDLL: these calls are too short to be worth giving the interpreter lock away
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_POISON = {  # as the signed integer of the element's size
    torch.float16: 0x7DA5,
    torch.bfloat16: 0x7FA5,
    torch.float32: 0x7FA5A5A5,
    torch.float64: 0x7FF4A5A5A5A5A5A5,
    torch.complex64: 0x7FA5A5A57FA5A5A5,
    torch.complex128: 0x7FF4A5A5A5A5A5A5,  # of each half
    torch.float8_e4m3fn: 0xFF,  # one byte has no room for a payload; these are at least NaN
    torch.float8_e5m2: 0xFF,
    torch.float8_e4m3fnuz: 0x80,
    torch.float8_e5m2fnuz: 0x80,
}
_POISON_INTEGER = {1: 0xA5, 2: -0x5A5B, 4: -0x5A5A5A5B, 8: -0x5A5A5A5A5A5A5A5B}  # 0xA5 bytes

#: Those of 4 and 8 bytes, signed and not, and in hexadecimal: shorter ones may be anything.
_SPELLED = re.compile(
    "|".join(
        rf"(?<!\d){number % (1 << 8 * size) if unsigned else number}(?!\d)"
        for size, number in _POISON_INTEGER.items() if size >= 4 for unsigned in (False, True)
    )
    + "|0x(?:a5){4,8}", re.IGNORECASE,
)  # fmt: skip


def spelled(text: str) -> str:
    """The poison of an integer where a text has it, as the message of an index that is out of range; else empty."""
    found = _SPELLED.search(text)
    return found[0] if found else ""


class Damage(NamedTuple):
    """Canary bytes that changed."""

    first: int  # offset of the first one in the range that was compared
    last: int
    size: int  # how many bytes changed
    expected: bytes  # up to 8 bytes from the first one on
    got: bytes


def fill(address: int, size: int) -> None:
    """Writes canaries over `size` bytes of host memory."""
    source = _TEMPLATE + (address & 1)
    while size > 0:
        part = min(size, _CHUNK)
        ctypes.memmove(address, source, part)
        address, size = address + part, size - part


def compare(address: int, size: int, where: torch.Tensor | None = None) -> Damage | None:
    """What changed in `size` bytes of host memory filled by `fill`; `where`, a bool mask [size], leaves bytes out."""
    if where is None:
        source, done = _TEMPLATE + (address & 1), 0
        while done < size and not _memcmp(address + done, source, min(size - done, _CHUNK)):
            done += _CHUNK
        if done >= size:
            return None
    got = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    phase = address & 1
    expected = torch.tensor(list(WORD * 2)[phase : phase + 2], dtype=torch.uint8).repeat(size // 2 + 1)[:size]
    differs = got != expected
    if where is not None:
        differs &= where
    changed = differs.nonzero().flatten()
    if not len(changed):
        return None
    first = int(changed[0])
    return Damage(first, int(changed[-1]), len(changed), bytes(expected[first : first + 8].tolist()),
                  bytes(got[first : first + 8].tolist()))


def poison(tensor: torch.Tensor) -> None:
    """Fills a tensor of any device and strides with the poison of its dtype."""
    bits, value = _as_bits(tensor)
    bits.fill_(value)


@cache
def poison_pattern(dtype: torch.dtype) -> int:
    """Eight bytes of the dtype's poison, as a signed integer."""
    size = min(dtype.itemsize, 8)
    value = _POISON.get(dtype, _POISON_INTEGER[size])
    return int.from_bytes((value % (1 << 8 * size)).to_bytes(size, "little") * (8 // size), "little", signed=True)


def unwritten(tensor: torch.Tensor) -> torch.Tensor:
    """A bool mask, of the tensor's shape, of the elements that still hold the poison of its dtype, bit for bit."""
    bits, value = _as_bits(tensor)
    same = bits == value
    return same.all(-1) if tensor.dtype == torch.complex128 else same


def _as_bits(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The same memory as integers of the element's size, and the poison as such an integer."""
    tensor = tensor.detach()
    if tensor.dtype == torch.complex128:  # there is no integer of 16 bytes
        tensor = torch.view_as_real(tensor)
    size, dtype = tensor.element_size(), tensor.dtype
    value = _POISON.get(dtype, _POISON_INTEGER[size])
    return (tensor if dtype == _BITS[size] else tensor.view(_BITS[size])), value
