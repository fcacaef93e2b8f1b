"""The generator: known answers, golden hashes, and independence of everything but the labels."""

from __future__ import annotations

import hashlib

import numpy
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


def test_torch_and_numpy_give_the_same_bits():
    columns, rows = torch.tensor([[0, 1, 77]]), torch.tensor([[3], [2**31 - 1]])
    in_torch = generator.philox((columns, rows, 5, 63), (0x12345678, 0x9ABCDEF0))
    in_numpy = generator.philox((columns.numpy().astype(numpy.uint64), rows.numpy().astype(numpy.uint64),
                       numpy.uint64(5), numpy.uint64(63)), (0x12345678, 0x9ABCDEF0))  # fmt: skip
    for one, other in zip(in_torch, in_numpy, strict=True):
        assert one.tolist() == other.tolist()
