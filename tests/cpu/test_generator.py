"""The generator: known answers, golden hashes, and independence of everything but the labels."""

from __future__ import annotations

import hashlib
import zlib

import pytest
import torch

from moe_fuzz import generator


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers of Random123's kat_vectors for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    tensors = tuple(torch.tensor([word], dtype=torch.int64) for word in counter)
    assert tuple(int(word) for word in generator.philox(tensors, key)) == expected


def test_values_depend_on_labels_alone():
    whole = generator.triangular(5, "logits", range(9), range(37))
    part = generator.triangular(5, "logits", [8, 2], [36, 0, 5])
    assert torch.equal(part, whole[[8, 2]][:, [36, 0, 5]])
    assert not torch.equal(whole, generator.triangular(6, "logits", range(9), range(37)))
    assert not torch.equal(whole, generator.triangular(5, "bias", range(9), range(37)))
    assert not torch.equal(whole, generator.triangular(5, "logits", range(9), range(37), stream=1))


def test_several_are_what_each_is_alone():
    few = [("x", range(9), [0], 3), ("x/columns", [0], range(37), 0), ("ids", [8, 2], [36, 0, 5], 1), ("w", [], [1], 0)]
    many = [("x", range(900), range(300), 3), ("x/columns", [0], range(37), 0)]
    for wanted in (few, many):
        for (name, rows, columns, stream), got in zip(wanted, generator.several(5, wanted), strict=True):
            assert got.dtype == torch.int32
            assert torch.equal(got, generator.words(5, name, rows, columns, stream).to(torch.int32))


def test_golden_hash():
    values = generator.triangular(2**62 + 12345, "logits", range(64), range(130))
    assert hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16] == "7e8b851270738383"


def test_range_and_shape_of_the_distribution():
    values = generator.triangular(1, "x", range(256), range(256)).double()
    assert values.abs().max() < 1
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 6**-0.5) < 0.01
    picks = generator.choice(1, "x", range(256), range(256), 7)
    counts = torch.bincount(picks.flatten(), minlength=7).double() / picks.numel()
    assert picks.min() == 0
    assert picks.max() == 6
    assert (counts - 1 / 7).abs().max() < 0.01


@pytest.mark.parametrize(("rows", "columns"), [([], [1, 2]), ([3], [])])
def test_empty(rows, columns):
    assert generator.words(0, "x", rows, columns).shape == (len(rows), len(columns))


def test_values_are_packed_by_rows():
    assert generator.triangular(1, "logits", range(5), [0, 2, 3, 9]).stride() == (4, 1)


@pytest.mark.parametrize("columns", [[0, 1, 2, 3, 4], [0, 1, 77]])
def test_torch_and_numpy_give_the_same_bits(columns):
    """The host's words, against the function that devices run."""
    rows, seed, stream = [3, 2**31 - 1], 0x9ABCDEF0_12345678, 63
    column = torch.tensor([columns])
    lanes = generator.philox((column >> 2, torch.tensor(rows)[:, None], zlib.crc32(b"x"), stream),
                             (seed & 0xFFFFFFFF, seed >> 32))  # fmt: skip
    expected = torch.stack(list(lanes), dim=-1).gather(2, (column & 3).expand(2, -1)[..., None])[..., 0]
    assert torch.equal(generator.words(seed, "x", rows, columns, stream), expected)
    tent = ((expected & 0xFFFF) + (expected >> 16) - 0xFFFF).to(torch.float32) * 2.0**-16
    assert torch.equal(generator.triangular(seed, "x", rows, columns, stream), tent)
