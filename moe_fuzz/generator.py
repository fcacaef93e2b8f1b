"""The values of a case: a counter-based generator, Philox4x32-10, in integer operations of torch.

Every number is a function of (seed, tensor name, row label, column label, stream) and of nothing else: not of the
position, not of the device, not of a library's random state, not of a version. Taking a row or an expert away from a
case leaves all other values as they were.
Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the tests hold its known answers.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

Word = torch.Tensor | int


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10 on int64 tensors that hold uint32 values; the four words broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1  # the product of two uint32 wraps int64, but its low and high words stay right
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def words(seed: int, name: str, rows: Sequence[int], columns: Sequence[int], stream: int = 0) -> torch.Tensor:
    """uint32 words [len(rows), len(columns)] as int64, one for each (row label, column label)."""
    row = torch.tensor(list(rows), dtype=torch.int64).view(-1, 1)  # [R, 1]
    column = torch.tensor(list(columns), dtype=torch.int64)  # [C]
    blocks, block_of = torch.unique(column >> 2, return_inverse=True)  # four columns share a call
    key = (seed & _MASK, (seed >> 32) & _MASK)
    tensor_id = zlib.crc32(name.encode())
    lanes = philox((blocks.view(1, -1) + 0 * row, row, tensor_id, stream), key)  # 4 x [R, B]
    table = torch.stack([torch.as_tensor(lane).expand(len(row), len(blocks)) for lane in lanes], dim=-1)  # [R, B, 4]
    return table[:, block_of, column & 3]  # [R, C]


def triangular(seed: int, name: str, rows: Sequence[int], columns: Sequence[int], stream: int = 0) -> torch.Tensor:
    """float32 [R, C] in (-1, 1), steps of 2^-16, the density of a tent: the sum of two 16-bit uniforms, exact."""
    word = words(seed, name, rows, columns, stream)
    return ((word & 0xFFFF) + (word >> 16) - 0xFFFF).to(torch.float32) * 2.0**-16


def choice(
    seed: int, name: str, rows: Sequence[int], columns: Sequence[int], count: int, stream: int = 0
) -> torch.Tensor:
    """int64 [R, C] in [0, count), count <= 2^16: which of `count` things each place takes."""
    return ((words(seed, name, rows, columns, stream) >> 16) * count) >> 16
