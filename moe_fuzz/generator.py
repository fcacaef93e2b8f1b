"""The values of a case: a counter-based generator, Philox4x32-10, in integer operations of torch.

Every number is a function of (seed, tensor name, row label, column label, stream) and of nothing else: not of the
position, not of the device, not of a library's random state, not of a version. Taking a row or an expert away from a
case leaves all other values as they were.
Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the tests hold its known answers.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy
import torch

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WEYL = numpy.outer(numpy.arange(_ROUNDS), [_W0, _W1]).astype(numpy.uint32)  # what each round adds to the key
_MULTIPLIERS = numpy.array([_M0, _M1], dtype=numpy.uint64).reshape(2, 1, 1)
_HALF, _LOW = numpy.uint64(32), numpy.uint64(_MASK)
_FEW = 1 << 16  # words: below, fewer operations are faster
_AT_ONCE = 1 << 16  # words of a part, whose 1.5 MiB stay in the cache of a core

Device = torch.device | str
Word = Any  # uint32 values: torch int64, of any shape, or int


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10 on 64-bit integers that hold uint32 values; the four words broadcast against each other.

    In torch's int64 the product of two uint32 wraps; its low and high words, all that is read of it, stay right. What
    stands above a word is only cut off where it would be multiplied: each operation is a launch.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & _MASK, p0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def words(
    seed: int, name: str, rows: Sequence[int], columns: Sequence[int], stream: int = 0, device: Device = "cpu"
) -> torch.Tensor:
    """uint32 words [len(rows), len(columns)] as int64 on `device`, one for each (row label, column label).

    On the host in numpy, whose operations on a few elements cost a fifth of torch's.
    """
    key = (seed & _MASK, (seed >> 32) & _MASK)
    tensor_id = zlib.crc32(name.encode())
    if len(rows) == len(columns) == 1:
        lanes = philox((columns[0] >> 2, rows[0], tensor_id, stream), key)
        return torch.full((1, 1), lanes[columns[0] & 3], dtype=torch.int64, device=device)
    if torch.device(device).type == "cpu":
        return torch.from_numpy(_on_host(seed, name, rows, columns, stream).astype(numpy.int64))
    row = _array(rows)  # [R]
    blocks, block_of, lane_of, _ = _blocks(columns if isinstance(columns, range) else tuple(columns))
    shape = (len(rows), len(blocks))
    labels = torch.from_numpy(numpy.concatenate([blocks, row, block_of, lane_of])).pin_memory()
    there = labels.to(device, non_blocking=True).split([len(blocks), len(row), len(columns), len(columns)])
    lanes = philox((there[0][None, :], there[1][:, None], tensor_id, stream), key)
    parts = [torch.as_tensor(lane, device=device).expand(shape) for lane in lanes]
    return torch.stack(parts, dim=-1)[:, there[2], there[3]]


def several(seed: int, wanted: Sequence[tuple[str, Sequence[int], Sequence[int], int]]) -> list[torch.Tensor]:
    """On the host, for each (name, rows, columns, stream) what `words` gives, as int32. Few words are made all at once:
    their time is that of the number of operations."""
    found: list[Any] = [None] * len(wanted)
    together, room = [], _FEW // 4
    for place, (name, rows, columns, stream) in enumerate(wanted):
        calls = _blocks(columns if isinstance(columns, range) else tuple(columns))
        count = len(rows) * len(calls[0])
        if count > room:
            found[place] = torch.from_numpy(_on_host(seed, name, rows, columns, stream).view(numpy.int32))
            continue
        together.append((place, count, calls))
        room -= count
    counters = numpy.empty((4, 1, _FEW // 4 - room), dtype=numpy.uint32)
    first = 0
    for place, count, (blocks, *_) in together:
        name, rows, _, stream = wanted[place]
        part = counters[:, 0, first : first + count].reshape(4, len(rows), len(blocks))
        part[0], part[1] = blocks, _array(rows).reshape(-1, 1)
        part[2], part[3] = zlib.crc32(name.encode()), stream
        first += count
    table = numpy.empty((1, first, 4), dtype=numpy.uint32)
    _of_few(table, seed, counters[1], counters[0], counters[2], counters[3])
    first = 0
    for place, count, (blocks, block_of, lane_of, straight) in together:
        rows, columns = wanted[place][1:3]
        part = table[0, first : first + count].reshape(len(rows), len(blocks), 4)
        whole = part.reshape(len(rows), 4 * len(blocks))[:, : len(columns)] if straight else part[:, block_of, lane_of]
        found[place] = torch.from_numpy(numpy.ascontiguousarray(whole).view(numpy.int32))
        first += count
    return found


def _on_host(seed: int, name: str, rows: Sequence[int], columns: Sequence[int], stream: int) -> Any:
    """The words as numpy's uint32 [R, C], contiguous."""
    blocks, block_of, lane_of, straight = _blocks(columns if isinstance(columns, range) else tuple(columns))
    labels, tensor_id = _array(rows).reshape(-1, 1), zlib.crc32(name.encode())
    table = numpy.empty((len(labels), len(blocks), 4), dtype=numpy.uint32)
    at_once = max(1, len(labels)) if table.size <= _FEW else max(1, _AT_ONCE // (4 * len(blocks)))
    for first in range(0, len(labels), at_once):
        part = table[first : first + at_once]
        (_of_few if table.size <= _FEW else _of_many)(part, seed, labels[first : first + at_once], blocks, tensor_id,
                                                      stream)  # fmt: skip
    whole = table.reshape(len(labels), 4 * len(blocks))
    return numpy.ascontiguousarray(whole[:, : len(columns)] if straight else table[:, block_of, lane_of])


def _of_few(table: Any, seed: int, rows: Any, blocks: Any, tensor_id: int, stream: int) -> None:
    """Fills a table of words [R, B, 4]. Both products of a round are taken at once, and their halves are looked at
    instead of shifted out (the low one comes first on every machine that CUDA knows): for few elements the time is that
    of the number of operations."""
    shape = (2, *table.shape[:2])
    even, odd = numpy.empty(shape, dtype=numpy.uint32), numpy.empty(shape, dtype=numpy.uint32)  # words 0, 2 and 1, 3
    even[0], even[1], odd[0], odd[1] = blocks, tensor_id, rows, stream
    turns = []  # two products, since the low half of one is what the next round needs
    for _ in range(2):
        product = numpy.empty(shape, dtype=numpy.uint64)
        halves = product.view(numpy.uint32).reshape(*shape, 2)[::-1]
        turns.append((product, halves[..., 0], halves[..., 1]))
    multiply, xor = numpy.multiply, numpy.bitwise_xor
    for key, (product, low, high) in zip(_round_keys(seed), turns * (_ROUNDS // 2), strict=True):
        multiply(even, _MULTIPLIERS, product)
        xor(high, odd, even)
        xor(even, key, even)
        odd = low
    table[..., 0], table[..., 1], table[..., 2], table[..., 3] = even[0], odd[0], even[1], odd[1]


def _of_many(table: Any, seed: int, rows: Any, blocks: Any, tensor_id: int, stream: int) -> None:
    """The same in 64 bits throughout: two operations more a round, and all of them on what lies side by side."""
    shape = (2, *table.shape[:2])
    even, odd, product = (numpy.empty(shape, dtype=numpy.uint64) for _ in range(3))
    even[0], even[1], odd[0], odd[1] = blocks, tensor_id, rows, stream
    for key in _round_keys(seed):
        numpy.multiply(even, _MULTIPLIERS, product)
        numpy.right_shift(product, _HALF, even)
        numpy.bitwise_xor(even[::-1], odd, odd)
        numpy.bitwise_xor(odd, key, odd)
        even, odd = odd, even
        numpy.bitwise_and(product[::-1], _LOW, odd)
    table[..., 0], table[..., 1], table[..., 2], table[..., 3] = even[0], odd[0], even[1], odd[1]


@lru_cache(maxsize=16)
def _round_keys(seed: int) -> list[Any]:
    """uint32 [2, 1, 1] for each round."""
    first = numpy.array([seed & _MASK, (seed >> 32) & _MASK], dtype=numpy.uint32)
    return list((first + _WEYL).reshape(_ROUNDS, 2, 1, 1))  # modulo 2^32


def _array(labels: Sequence[int]) -> Any:
    """numpy's int64 [len(labels)]. Of a range, nobody has to look at each number."""
    if isinstance(labels, range):
        return numpy.arange(labels.start, labels.stop, labels.step)
    return numpy.asarray(labels, dtype=numpy.int64)


@lru_cache(maxsize=256)
def _blocks(columns: range | tuple[int, ...]) -> tuple[Any, Any, Any, bool]:
    """The calls that these columns need, four columns share one; which of them each column's is; its lane there; and
    whether the columns are the first of all, in order."""
    column = _array(columns)  # [C]
    blocks, block_of = numpy.unique(column >> 2, return_inverse=True)
    return blocks, block_of, column & 3, bool((column == numpy.arange(len(columns))).all())


def triangular(
    seed: int, name: str, rows: Sequence[int], columns: Sequence[int], stream: int = 0, device: Device = "cpu",
    scale: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """float32 [R, C] in (-scale, scale), steps of 2^-16 * scale, the density of a tent: the sum of two 16-bit uniforms.
    Exact: the scale is a power of two."""
    if torch.device(device).type == "cpu":
        word = _on_host(seed, name, rows, columns, stream)
        low = word & 0xFFFF
        word >>= 16
        word += low
        value = word.view(numpy.int32).astype(numpy.float32)  # which takes less time than from unsigned numbers
        value -= 0xFFFF
        value *= 2.0**-16 * scale
        return torch.from_numpy(value)
    word = words(seed, name, rows, columns, stream, device)
    return ((word & 0xFFFF) + (word >> 16) - 0xFFFF).to(torch.float32) * (2.0**-16 * scale)


def choice(
    seed: int, name: str, rows: Sequence[int], columns: Sequence[int], count: int, stream: int = 0,
    device: Device = "cpu",
) -> torch.Tensor:  # fmt: skip
    """int64 [R, C] in [0, count), count <= 2^16: which of `count` things each place takes."""
    assert count <= 1 << 16, f"{count} things are more than 16 bits tell apart"
    if torch.device(device).type == "cpu" and not len(rows) == len(columns) == 1:
        word = _on_host(seed, name, rows, columns, stream)
        word >>= 16
        word *= numpy.uint32(count)  # it has room for the product of two 16-bit numbers
        word >>= 16
        return torch.from_numpy(word.astype(numpy.int64))
    return ((words(seed, name, rows, columns, stream, device) >> 16) * count) >> 16
