"""allreduce_rmsnorm of all ranks on one device: launches a phase, and one launch with real barriers."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from moe_fuzz.kernels.allreduce_rmsnorm import LocalGroup, RankTimeout, allreduce_rmsnorm
from moe_fuzz.kernels.allreduce_rmsnorm.launch import shape_of
from moe_fuzz.reference.allreduce_rmsnorm import allreduce_rmsnorm as reference

pytestmark = [pytest.mark.gpu, pytest.mark.compiled]

LAUNCHES = pytest.mark.parametrize("launches", ["phases", "single"])
BACKENDS = ("one_shot", "split", "two_shot")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def drawn(world: int, tokens: int, hidden: int, dtype: torch.dtype, seed: int = 0):
    """Halves up to 4 of either sign: their sums are exact in every dtype."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def halves(*shape: int) -> torch.Tensor:
        return (torch.randint(-8, 9, shape, generator=generator, device="cuda") / 2).to(dtype)

    return halves(world, tokens, hidden), halves(tokens, hidden), halves(hidden)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@LAUNCHES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_exact_and_ranks_equal(launches, dtype):
    shapes = [(1, 2, 64), (2, 1, 2048), (2, 5, 1), (2, 300, 130), (3, 7, 2880), (4, 33, 4096), (8, 9, 24),
              (8, 40, 7168)]  # fmt: skip
    for number, (backend, (world, tokens, hidden)) in enumerate(itertools.product(BACKENDS, shapes)):
        x, residual, gamma = drawn(world, tokens, hidden, dtype)
        held, gamma = (None if number % 3 == 2 else residual), gamma.to(DTYPES[number % 3])
        group = LocalGroup(world, launches=launches, capacity=1 << 20)
        normed, total = allreduce_rmsnorm(x, held, gamma, 1e-5, group=group, backend=backend)
        group.check()
        want_normed, want_total = reference(x, held, gamma, 1e-5)
        where = (backend, world, tokens, hidden)
        for rank in range(world):
            assert same(total[rank], want_total), (where, rank)
            assert same(normed[rank], normed[0]), (where, rank)
        torch.testing.assert_close(normed[0], want_normed, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)
        assert not any(pad.any() for pad in group.signals), where


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_rows_round_as_the_reference_does(backend):
    x, residual = torch.randn(4, 64, 2048, device="cuda").bfloat16(), torch.randn(64, 2048, device="cuda").bfloat16()
    x[1, 3, 5], x[2, 9] = float("nan"), float("inf")
    x[:, 20], residual[20] = -0.0, -0.0
    x[0, 30] = -torch.finfo(torch.bfloat16).smallest_normal / 16
    gamma = torch.rand(2048, device="cuda")
    normed, total = allreduce_rmsnorm(x, residual, gamma, group=LocalGroup(4, launches="single"), backend=backend)
    want_normed, want_total = reference(x, residual, gamma)
    rows = [row for row in range(64) if row not in (3, 9)]
    # four float32 additions and a rounding against one: a tie in 2^16 falls otherwise
    assert (total[0, rows].view(torch.int16) != want_total[rows].view(torch.int16)).sum() < 16
    torch.testing.assert_close(normed[2, rows], want_normed[rows], rtol=2**-6, atol=1e-6)
    assert same(total[0, 20], want_total[20])
    assert all(same(normed[rank], normed[0]) and same(total[rank], total[0]) for rank in range(4))
    assert normed[:, 3].isnan().all()


@pytest.mark.parametrize(("hidden", "dtype", "of_gamma"), [
    (130, torch.bfloat16, torch.float32), (1025, torch.bfloat16, torch.float32), (1030, torch.bfloat16, torch.bfloat16),
    (2048, torch.bfloat16, torch.float32), (4096, torch.float32, torch.bfloat16), (7168, torch.bfloat16, torch.float32),
])  # fmt: skip
def test_a_rows_bits_depend_on_that_row_alone(hidden, dtype, of_gamma):
    """Not on how many there are, nor on the way: each is a binary of its own."""
    x = torch.randn(2, 600, hidden, device="cuda").to(dtype)
    residual = torch.randn(600, hidden, device="cuda").to(dtype)
    gamma = torch.rand(hidden, device="cuda").to(of_gamma)
    group = LocalGroup(2, launches="single", capacity=16 << 20)
    whole = allreduce_rmsnorm(x, residual, gamma, group=group, backend="one_shot")
    for backend, (first, last) in itertools.product(BACKENDS, [(0, 600), (0, 1), (7, 20), (599, 600)]):
        part = allreduce_rmsnorm(x[:, first:last], residual[first:last], gamma, group=group, backend=backend)
        for got, want in zip(part, whole, strict=True):
            assert same(got, want[:, first:last]), (backend, first, last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lone_row_has_its_bits_wherever_it_lies(backend):
    """Its tensor is packed whatever its stride, which is the distance to a row that is not there."""
    apart, residual = torch.randn(1, 64, 2048 + 5, device="cuda"), torch.randn(64, 2048, device="cuda")
    gamma = torch.rand(2048, device="cuda")
    group = LocalGroup(1, launches="single", capacity=16 << 20)
    packed = apart[..., :2048].contiguous()
    for row in range(0, 64, 4):  # rows that begin at a multiple of 16 bytes: others are copied first
        one, other = (allreduce_rmsnorm(x[:, row : row + 1], residual[row : row + 1], gamma, group=group,
                                        backend=backend) for x in (packed, apart[..., :2048]))  # fmt: skip
        for result, again in zip(one, other, strict=True):
            assert same(result, again), row


def test_a_thousand_calls_without_a_wait_between_them():
    """Sizes and backends alternate; data changes; the host never looks until the end."""
    group = LocalGroup(2, launches="single", capacity=1 << 20)
    sizes = [1, 64, 3, 130, 2, 7]
    sets = {tokens: [drawn(2, tokens, 2048, torch.bfloat16, seed) for seed in range(3)] for tokens in sizes}
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for number in range(1000):
        x, residual, gamma = sets[sizes[number % 6]][number % 3]
        _, total = allreduce_rmsnorm(x, residual, gamma, group=group, backend=BACKENDS[number // 3 % 3])
        wrong += (total != (x.float().sum(0) + residual.float()).bfloat16()).sum()
    group.check()
    assert wrong.item() == 0
    assert not any(pad.any() for pad in group.signals)


def test_rows_are_split_into_other_parts_at_each_call():
    """Which program signals a word of the second pad hangs on the parts, of which there are fewer with more rows."""
    group = LocalGroup(4, launches="single", capacity=4 << 20)
    sizes = [1, 130, 64, 200, 8, 64]
    sets = {tokens: drawn(4, tokens, 7168, torch.bfloat16, tokens) for tokens in sizes}
    wanted = {tokens: (x.float().sum(0) + residual.float()).bfloat16() for tokens, (x, residual, _) in sets.items()}
    parts = {tokens: shape_of(group, tokens, 7168, 2, "split")[-1] for tokens in sizes}
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for number in range(600):
        tokens = sizes[number % 6]
        backend = "split" if number % 7 else "two_shot"
        _, total = allreduce_rmsnorm(*sets[tokens], group=group, backend=backend)
        wrong += (total != wanted[tokens]).sum()
    group.check()
    assert wrong.item() == 0
    assert not any(pad.any() for pad in group.signals)
    assert set(parts.values()) == {1, 2, 4}, parts  # on 132 multiprocessors, and on fewer too


def test_an_odd_number_of_calls_in_a_graph_alternates_over_replays():
    group = LocalGroup(2, launches="single", capacity=1 << 20)
    x, residual, gamma = drawn(2, 40, 1024, torch.float16)
    for backend in BACKENDS:
        allreduce_rmsnorm(x, residual, gamma, group=group, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [allreduce_rmsnorm(x, residual, gamma, group=group, backend=name)[1]
                   for name in BACKENDS]  # fmt: skip
    for seed in range(20):
        new_x, new_residual, _ = drawn(2, 40, 1024, torch.float16, seed)
        x.copy_(new_x)
        residual.copy_(new_residual)
        graph.replay()
        want = reference(x, residual, gamma)[1]
        assert all(same(total[rank], want) for total in results for rank in range(2)), seed
    group.check()


def test_two_groups_at_once():
    groups = [LocalGroup(2, launches="single", capacity=1 << 20) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    x, residual, gamma = drawn(2, 256, 2048, torch.bfloat16)
    want = reference(x, residual, gamma)[1]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for group, stream in zip(groups, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(allreduce_rmsnorm(x, residual, gamma, group=group)[1])
    for group in groups:
        group.check()
    assert all(same(total[1], want) for total in results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_never_comes_is_named(backend):
    group = LocalGroup(3, launches="single", timeout_s=0.5)
    x, residual, gamma = drawn(1, 4, 512, torch.bfloat16)
    group.rank = 1  # this rank alone is launched
    began = time.monotonic()
    normed, total = allreduce_rmsnorm(x[0], residual, gamma, group=group, backend=backend)
    with pytest.raises(RankTimeout, match=r"rank 1 waited 0.5 s for rank 0 \(block \d, barrier 1\)") as caught:
        group.check()
    assert time.monotonic() - began < 30  # compiling is in it
    assert (caught.value.rank, caught.value.peer) == (1, 0)
    assert normed[1:].isnan().all() or backend != "one_shot"
    assert normed.isnan().any()
    assert total.isnan().any()
    with pytest.raises(RankTimeout):
        allreduce_rmsnorm(x[0], residual, gamma, group=group, backend=backend)
    LocalGroup(3, launches="single").check()  # the device is well


def test_calls_behind_one_that_was_given_up_do_not_wait_again():
    group = LocalGroup(2, launches="single", timeout_s=1.0)
    x, residual, gamma = drawn(1, 4, 512, torch.bfloat16)
    group.rank = 0
    allreduce_rmsnorm(x[0], residual, gamma, group=group)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    group.faults.zero_()  # so that the host goes on
    with torch.cuda.graph(graph):
        for _ in range(50):
            allreduce_rmsnorm(x[0], residual, gamma, group=group)
    began = time.monotonic()
    graph.replay()
    torch.cuda.synchronize()
    assert time.monotonic() - began < 0.9
