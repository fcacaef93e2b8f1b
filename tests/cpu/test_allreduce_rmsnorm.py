"""All-reduce with residual and norm, phase by phase in the interpreter: against the reference, to the bit."""

from __future__ import annotations

import pytest
import torch

from moe_fuzz.execute.interpreter import hasten
from moe_fuzz.kernels.allreduce_rmsnorm import LocalGroup, RankTimeout, allreduce_rmsnorm, dispatch, launch
from moe_fuzz.kernels.allreduce_rmsnorm.barrier import unpack_fault
from moe_fuzz.reference.allreduce_rmsnorm import allreduce_rmsnorm as reference

BACKENDS = pytest.mark.parametrize("backend", dispatch.BACKENDS)
#: world, T, H: no token, fewer tokens than ranks, one column, less than a warp, odd, just past a power of two
SHAPES = [(1, 3, 64), (2, 0, 64), (2, 1, 1), (2, 1, 2048), (2, 7, 33), (3, 2, 257), (3, 11, 130), (4, 5, 64),
          (8, 3, 16)]  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True, scope="module")
def _fast() -> None:
    hasten()


def drawn(world: int, tokens: int, hidden: int, dtype: torch.dtype, seed: int = 0):
    """Halves up to 4 of either sign: sums of nine are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)

    def halves(*shape: int) -> torch.Tensor:
        return (torch.randint(-8, 9, shape, generator=generator) / 2).to(dtype)

    return halves(world, tokens, hidden), halves(tokens, hidden), halves(hidden)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.interpreter
@BACKENDS
@pytest.mark.parametrize(("world", "tokens", "hidden"), SHAPES)
def test_sums_are_exact_and_norms_within_an_ulp(backend, world, tokens, hidden):
    dtype = DTYPES[(world + hidden) % 3]
    x, residual, gamma = drawn(world, tokens, hidden, dtype)
    gamma = gamma.to(DTYPES[hidden % 3])
    group = LocalGroup(world, "cpu", capacity=1 << 14)
    for held in (residual, None):
        normed, total = allreduce_rmsnorm(x, held, gamma, 1e-5, group=group, backend=backend)
        want_normed, want_total = reference(x, held, gamma, 1e-5)
        for rank in range(world):
            assert torch.equal(bits(total[rank]), bits(want_total)), rank
            assert torch.equal(bits(normed[rank]), bits(normed[0])), rank
        torch.testing.assert_close(normed[0], want_normed, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.interpreter
@BACKENDS
def test_a_norm_of_equal_magnitudes_is_exact(backend):
    """Rows of +-2^k: the mean square is a power of four, and eps vanishes beside it. One rank holds it, the rest 0."""
    signs = torch.randint(0, 2, (2, 5, 48), generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = (signs * 2.0 ** torch.arange(4, 9)[:, None]).to(torch.bfloat16)
    x[1] = 0
    gamma = torch.arange(48).to(torch.float32)
    got = allreduce_rmsnorm(x, None, gamma, group=LocalGroup(2, "cpu"), backend=backend)
    for result, want in zip(got, reference(x, None, gamma), strict=True):
        assert torch.equal(bits(result[1]), bits(want))


@pytest.mark.interpreter
@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stores_round_to_nearest_even_and_keep_minus_zero(backend, dtype):
    x = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[:, 0], x[:, 1, :32] = -0.0, -torch.finfo(dtype).smallest_normal / 8
    residual = torch.full_like(x[0], -0.0)
    group = LocalGroup(2, "cpu")
    _, total = allreduce_rmsnorm(x, residual, torch.ones(64, dtype=dtype), group=group, backend=backend)
    assert torch.equal(bits(total[0]), bits(reference(x, residual, torch.ones(64))[1]))
    assert torch.equal(bits(total[0, 0]), bits(torch.full_like(x[0, 0], -0.0)))


@pytest.mark.interpreter
@BACKENDS
def test_a_row_with_nan_stays_alone(backend):
    x, residual, gamma = drawn(2, 6, 40, torch.bfloat16)
    clean = allreduce_rmsnorm(x, residual, gamma, group=LocalGroup(2, "cpu"), backend=backend)
    x[1, 2, 3], x[0, 4, 39], residual[5, 0] = float("nan"), float("inf"), -float("nan")
    dirty = allreduce_rmsnorm(x, residual, gamma, group=LocalGroup(2, "cpu"), backend=backend)
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(bits(after[:, [0, 1, 3]]), bits(before[:, [0, 1, 3]]))
        assert torch.equal(bits(after[0]), bits(after[1]))
    assert dirty[0][0, 2].isnan().all()
    assert dirty[0][0, 5].isnan().all()


@pytest.mark.interpreter
def test_calls_of_all_sizes_alternate_between_the_halves():
    """More than the capacity goes in several launches. Each of them is a call for the halves; the pads stay zero."""
    group = LocalGroup(2, "cpu", capacity=1024)
    launches = 0
    for tokens, backend in ((1, "one_shot"), (9, "two_shot"), (0, "one_shot"), (17, "one_shot"), (3, "two_shot")):
        x, residual, gamma = drawn(2, tokens, 64, torch.bfloat16, seed=tokens)
        _, total = allreduce_rmsnorm(x, residual, gamma, group=group, backend=backend)
        assert torch.equal(bits(total[1]), bits(reference(x, residual, gamma)[1]))
        launches += -(-tokens // 8)  # rows of 128 bytes
        assert [state >> 16 for state in group.state.tolist()] == [launches] * 2
        assert all(state & 0xFFFF == 0 for state in group.state.tolist())
    assert not any(pad.any() for pad in group.signals)


@pytest.mark.interpreter
def test_rows_that_are_not_packed_and_results_that_are_given():
    x, residual, gamma = drawn(2, 5, 24, torch.float16)
    wide = torch.zeros(2, 5, 31, dtype=torch.float16)
    wide[:, :, 3:27] = x
    odd = torch.zeros(25, dtype=torch.float16)
    odd[1:] = gamma
    held = residual.expand(2, 5, 24).contiguous()
    out = (torch.full((2 * 5 * 24 + 1,), 7.0, dtype=torch.float16)[1:].view(2, 5, 24), held)  # misaligned, in place
    got = allreduce_rmsnorm(wide[:, :, 3:27], held, odd[1:], group=LocalGroup(2, "cpu"), out=out)
    assert got is out
    want = allreduce_rmsnorm(x, residual, gamma, group=LocalGroup(2, "cpu"))
    for result, wanted in zip(got, want, strict=True):
        assert torch.equal(bits(result), bits(wanted))


@BACKENDS
def test_the_strides_of_a_lone_row_choose_no_other_binary(backend, monkeypatch):
    """A packed tensor may have any stride where there is one row and one rank: Triton compiles for what divides it, and
    another binary might add in another order."""
    asked: list[tuple[int, int]] = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: asked.append((args[13], args[14]))

    monkeypatch.setattr(launch, "one_shot_kernel" if backend == "one_shot" else "two_shot_kernel", Kernel())
    x, residual, gamma = drawn(1, 1, 16, torch.float32)
    odd = torch.zeros(1, 1, 21)[..., :16]
    assert odd.is_contiguous()
    assert odd.stride(0) == 21
    for tensor, held in ((x, residual), (odd, residual), (odd, odd), (x, None)):
        allreduce_rmsnorm(tensor, held, gamma, group=LocalGroup(1, "cpu"), backend=backend)
    assert set(asked) == {(16, 0)}


def test_a_fault_is_raised_by_the_next_call_and_by_check():
    group = LocalGroup(2, "cpu", timeout_s=3)
    group.check()
    group.faults[1] = (1 << 40) + (1 << 32) + (0 << 24) + (300 << 8) + 2  # as pack_fault has it
    assert unpack_fault(int(group.faults[1])) == (1, 0, 300, 2)
    with pytest.raises(RankTimeout, match=r"rank 1 waited 3 s for rank 0 \(block 300, barrier 2\)"):
        group.check()
    x, residual, gamma = drawn(2, 1, 8, torch.bfloat16)
    with pytest.raises(RankTimeout):
        allreduce_rmsnorm(x, residual, gamma, group=group)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"gamma": torch.ones(8, dtype=torch.float64)}, "gamma must be"),
        ({"gamma": torch.ones(9)}, "gamma must be"),
        ({"x": torch.zeros(2, 8, dtype=torch.bfloat16)}, r"x must be \[R, T, H\]"),
        ({"x": torch.zeros(3, 2, 8, dtype=torch.bfloat16)}, "x must be of 2 ranks"),
        ({"residual": torch.zeros(2, 8)}, "residual must be"),
        ({"residual": torch.zeros(3, 2, 8, dtype=torch.bfloat16)}, "residual must be"),
        ({"eps": 0.0}, "eps must be"),
        ({"backend": "multimem"}, "backend must be one of one_shot, split, two_shot"),
        ({"out": (torch.zeros(2, 2, 8), torch.zeros(2, 2, 8))}, "out: normed must be"),
        ({"x": torch.zeros(2, 1, 1024, dtype=torch.bfloat16), "residual": None, "gamma": torch.ones(1024)},
         "a row has 2048 bytes, and the group a capacity of 1024"),
    ],
)  # fmt: skip
def test_what_is_refused(change, problem):
    x, residual, gamma = drawn(2, 2, 8, torch.bfloat16)
    arguments = {"x": x, "residual": residual, "gamma": gamma, "group": LocalGroup(2, "cpu", capacity=1), **change}
    with pytest.raises(ValueError, match=problem):
        allreduce_rmsnorm(**arguments)


def test_groups_that_are_refused():
    with pytest.raises(ValueError, match="1 to 8 ranks"):
        LocalGroup(9, "cpu")
    with pytest.raises(ValueError, match="needs a GPU"):
        LocalGroup(2, "cpu", launches="single")


def test_the_reference_rounds_where_it_is_told():
    def called(x: list[list[float]], residual: list[float], gamma: float, rounds: tuple[str, ...]):
        parts = torch.tensor(x, dtype=torch.bfloat16)[:, None]
        held = torch.tensor([residual], dtype=torch.bfloat16)
        return reference(parts, held, torch.full((len(residual),), gamma), 1e-30, rounds=rounds)

    half = 2.0**-8  # half a step behind 1
    for rounds, total in (((), 1 + 2 * half), (("residual",), 1 + 2 * half), (("sum", "residual"), 1.0)):
        assert called([[1.0], [half]], [half], 1.0, rounds)[1].item() == total
    # of (1 + half, 1): normed to 1.0019 where it is not rounded before, and 1.0025 times that is nearer to 1 + 2 half
    for rounds, normed in (((), 1 + 2 * half), (("residual",), 1.0), (("normed",), 1.0)):
        assert called([[1.0, 1.0], [half, 0.0]], [0.0, 0.0], 1.0025, rounds)[0][0, 0].item() == normed
    with pytest.raises(ValueError, match="rounds may name"):
        called([[1.0]], [1.0], 1.0, ("all",))


def test_a_table_of_caps_goes_to_a_file_and_back(tmp_path, monkeypatch):
    table = {(2, "sm90", "nvlink"): dispatch.Caps(4096, {"nccl": 1 << 20}, "measured")}
    assert dispatch.from_json(dispatch.to_json(table)) == table
    with pytest.raises(ValueError, match="not a dispatch table"):
        dispatch.from_json('{"entries": [{"world": 2}]}')
    assert dispatch.choose(2, "sm90", "nvlink", 1 << 20) == "one_shot"
    path = tmp_path / "table.json"
    path.write_text(dispatch.to_json(table))
    monkeypatch.setenv(dispatch.TABLE_VARIABLE, str(path))
    assert [dispatch.choose(2, "sm90", "nvlink", size) for size in (4096, 4097)] == ["one_shot", "two_shot"]
    assert dispatch.fuses(2, "sm90", "nvlink", 1 << 20, "nccl")
    assert not dispatch.fuses(2, "sm90", "nvlink", (1 << 20) + 1, "nccl")
    assert dispatch.choose(8, "sm90", "nvlink", 256 << 10) == "one_shot"  # not in the file: the table here
    assert dispatch.choose(8, "sm90", "nvlink", (256 << 10) + 2) == "two_shot"
    assert not dispatch.fuses(8, "sm90", "nvlink", 384 << 10, "multimem")  # vllm#44079
    assert dispatch.choose(1, "cpu", "local", 1 << 40) == "one_shot"
