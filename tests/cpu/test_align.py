"""`align`: the reference by its invariants, and the Triton kernel against the reference, in the interpreter."""

from __future__ import annotations

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch
from torch import Tensor

from moe_fuzz.kernels.align import align
from moe_fuzz.kernels.align import align_shapes as kernel_shapes
from moe_fuzz.reference.align import align as reference

BOTH = pytest.mark.parametrize(
    "sort", [pytest.param(align, marks=pytest.mark.interpreter), reference], ids=["kernel", "reference"]
)
BOTH_UNLAUNCHED = pytest.mark.parametrize("sort", [align, reference], ids=["kernel", "reference"])
SIZES = [  # T, k, B, E
    (1, 1, 1, 1), (3, 2, 16, 4), (5, 3, 7, 6), (33, 2, 1, 1), (17, 8, 16, 128), (64, 4, 128, 2), (9, 5, 64, 1024),
    (4, 6, 16, 1100),
]  # fmt: skip


def ids_of(tokens: int, top_k: int, experts: int, seed: int = 0) -> Tensor:
    """With duplicates in a row and sentinels on both sides of the range."""
    return torch.randint(-2, experts + 2, (tokens, top_k), dtype=torch.int32, generator=generator(seed))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive(ids: Tensor, block: int, experts: int, expert_map: Tensor | None) -> tuple[list[int], list[int], list[int]]:
    """Sorted ids and experts of the blocks in use, and the inverse, by the letter of the contract."""
    slots: list[list[int]] = [[] for _ in range(experts)]
    for slot, expert in enumerate(ids.flatten().tolist()):
        if expert_map is not None:
            expert = int(expert_map[expert]) if 0 <= expert < len(expert_map) else -1
        if 0 <= expert < experts:
            slots[expert].append(slot)
    found: list[int] = []
    owners: list[int] = []
    inverse = [-1] * ids.numel()
    for expert, members in enumerate(slots):
        for slot in members:
            inverse[slot] = len(found)
            found.append(slot)
        while len(found) % block:
            found.append(ids.numel())
        owners += [expert] * (len(found) // block - len(owners))
    return found, owners, inverse


def assert_plan(got: tuple[Tensor, ...], ids: Tensor, block: int, experts: int, expert_map: Tensor | None) -> None:
    sorted_ids, owners, padded, inverse = got
    assert all(t.dtype == torch.int32 for t in got)
    assert inverse.shape == ids.shape
    wanted, wanted_owners, wanted_inverse = naive(ids, block, experts, expert_map)
    assert padded.tolist() == [len(wanted)]
    assert len(sorted_ids) == len(owners) * block >= len(wanted)
    assert sorted_ids.tolist() == wanted + [ids.numel()] * (len(sorted_ids) - len(wanted))
    assert owners.tolist() == wanted_owners + [-1] * (len(owners) - len(wanted_owners))
    assert inverse.flatten().tolist() == wanted_inverse


@BOTH
@pytest.mark.parametrize(("tokens", "top_k", "block", "experts"), SIZES)
@pytest.mark.parametrize("mapped", [False, True])
def test_keeps_the_contract(sort, tokens, top_k, block, experts, mapped):
    ids = ids_of(tokens, top_k, experts, seed=tokens)
    expert_map = torch.randint(-1, experts + 1, (experts,), dtype=torch.int32, generator=generator(1))
    assert_plan(
        sort(ids, block, experts, expert_map=expert_map if mapped else None), ids, block, experts,
        expert_map if mapped else None,
    )  # fmt: skip


@BOTH
@pytest.mark.parametrize(
    "rows",
    [
        [[2, 2], [2, 2], [2, 2]],  # all to one, twice in a row
        [[0, 4], [4, 0], [0, 4]],  # empty experts between
        [[-1, -1], [5, 5], [2**31 - 1, -(2**31)]],  # nothing but sentinels
        [[0, 1], [2, 3], [4, -1]],  # one slot each: as many blocks as there can be
    ],
)
def test_skewed_ids(sort, rows):
    ids = torch.tensor(rows, dtype=torch.int32)
    for block in (1, 4, 16):
        assert_plan(sort(ids, block, 5), ids, block, 5, None)


@BOTH
def test_an_id_beyond_32_bits_is_out_of_range_not_cut_to_them(sort):
    ids = torch.tensor([[2**32 + 1, 1], [-(2**32), 0]], dtype=torch.int64)
    assert sort(ids, 2, 3)[3].tolist() == [[-1, 2], [-1, 0]]


@BOTH_UNLAUNCHED
def test_no_tokens(sort):
    ids = torch.empty((0, 4), dtype=torch.int32)
    out = tuple(torch.full(shape, 77, dtype=torch.int32) for shape in ((0,), (0,), (1,), (0, 4)))
    assert_plan(sort(ids, 16, 8, out=out), ids, 16, 8, None)
    assert out[2].tolist() == [0]


@BOTH
def test_every_element_of_out_is_written(sort):
    ids = ids_of(19, 3, 9)
    out = tuple(torch.full_like(t, 1_000_000) for t in reference(ids, 8, 9))
    assert all(a is b for a, b in zip(sort(ids, 8, 9, out=out), out, strict=True))
    assert_plan(out, ids, 8, 9, None)


@BOTH
def test_a_map_longer_or_shorter_than_the_experts(sort):
    """A rank's share: 12 ids, of which 4 experts are here, in another order; and a map that takes few ids."""
    ids = ids_of(20, 3, 12)
    for expert_map in (torch.tensor([-1, 3, -1, 0, -1, -1, 2, -1, 9, -1, 1, -1]), torch.tensor([3])):
        mapped = expert_map.int()
        assert_plan(sort(ids, 4, 4, expert_map=mapped), ids, 4, 4, mapped)


@BOTH
def test_any_strides(sort):
    ids = ids_of(24, 6, 10)
    for view in (ids[::2], ids[:, 1::2], ids.t(), ids[:1].expand(7, 6)):
        assert_plan(sort(view, 4, 10), view, 4, 10, None)


@pytest.mark.interpreter
@pytest.mark.parametrize("slots", [1024, 1025, 1026, 2500])
def test_the_kernel_ranks_across_chunks(slots):
    """More slots than a program takes: counts go through memory, and ranks add up."""
    for experts in (3, 70):
        ids = ids_of(slots, 1, experts, seed=slots)
        for got, expected in zip(align(ids, 16, experts), reference(ids, 16, experts), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(("slots", "experts", "block"), [(4, 3, 2), (5, 2, 3), (3, 4, 2), (6, 2, 1)])
def test_sizes_are_the_least_that_always_suffice(slots, experts, block):
    """Of all ids that there can be, some fill the last block, and none needs more."""
    most = 0
    for ids in itertools.product(range(experts), repeat=slots):
        got = reference(torch.tensor([ids], dtype=torch.int32), block, experts)
        most = max(most, int(got[2]))
    assert most == len(got[0])
    assert [tuple(t.shape) for t in got] == kernel_shapes(torch.Size((1, slots)), block, experts)


@BOTH_UNLAUNCHED
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(4, dtype=torch.int32)}, r"ids must be \[T, k\]"),
        ({"ids": torch.zeros(4, 2)}, r"ids must be \[T, k\]"),
        ({"ids": torch.zeros(4, 0, dtype=torch.int32)}, r"ids must be \[T, k\]"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"num_experts": 0}, "num_experts must be"),
        ({"expert_map": torch.zeros(0, dtype=torch.int32)}, "expert_map must be"),
        ({"expert_map": torch.zeros(4)}, "expert_map must be"),
        ({"out": tuple(torch.zeros(3, dtype=torch.int32) for _ in range(4))}, "out must be contiguous int32"),
    ],
)
def test_refuses_what_it_cannot_take(sort, change, message):
    arguments = {"ids": torch.zeros(4, 2, dtype=torch.int32), "block_size": 4, "num_experts": 4, **change}
    with pytest.raises(ValueError, match=message):
        sort(**arguments)
