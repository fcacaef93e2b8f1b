"""Where fenced tensors lie, what their canaries and poison say, and what becomes of their memory."""

from __future__ import annotations

import ctypes
import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_fuzz.errors import UsageError
from moe_fuzz.fence import FenceOptions, canary, cpu, mapping, open_arena, unwritten
from moe_fuzz.fence.mapping import PAGE, SOFT, Pool

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (*FLOATS, torch.int32, torch.int64, torch.int16, torch.uint8, torch.bool, torch.complex64, torch.complex128)


def poke(address: int, *values: int) -> None:
    ctypes.memmove(address, bytes(values), len(values))


def protection(address: int) -> str:
    """The `rwxp` field of the mapping that holds the address; empty where nothing is mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high, access = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line).groups()  # type: ignore[union-attr]
        if int(low, 16) <= address < int(high, 16):
            return access
    return ""


def some_values(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if tensor.dtype == torch.bool else 100, tensor.shape, generator=draw).to(tensor.dtype)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...] | None, int]:
    shape = tuple(draw(st.lists(st.integers(1, 40), max_size=3)))
    if draw(st.booleans()):
        return shape, None, draw(st.integers(0, 3))
    strides, reach = [0] * len(shape), 1
    for i in draw(st.permutations(range(len(shape)))):
        strides[i] = reach + draw(st.integers(0, 3))
        reach = strides[i] * shape[i]
    return shape, tuple(strides), draw(st.integers(0, 3))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    geometry=geometries(),
    dtype=st.sampled_from(DTYPES),
    edge=st.sampled_from(["right", "left"]),
    alignment=st.sampled_from([1, 2, 16, 64, 4096]),
    role=st.sampled_from(["input", "output"]),
    hard=st.sampled_from([None, ()]),
    seed=st.integers(0, 1000),
)
def test_layout(geometry, dtype, edge, alignment, role, hard, seed) -> None:
    shape, strides, offset = geometry
    with open_arena("cpu", FenceOptions(hard=hard), edge) as arena:
        tensor = arena.tensor("x", shape, dtype, role, alignment, strides, offset)
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.storage_offset() == offset
        assert strides is None or tensor.stride() == strides
        storage = tensor.untyped_storage()
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        size = tensor.element_size()
        assert start % max(alignment, size) == 0
        last = offset + sum((n - 1) * s for n, s in zip(shape, tensor.stride(), strict=True))
        assert storage.nbytes() == (last + 1) * size
        far = -(-end // PAGE) * PAGE
        assert start % PAGE == 0 if edge == "left" else far - end < max(alignment, size)
        guard = "---p" if hard is None else "rw-p"
        assert protection(start // PAGE * PAGE - 1) == guard
        assert protection(far) == guard
        assert protection(start // PAGE * PAGE - 1 - SOFT) == protection(far + SOFT) == "---p"
        if role == "output":
            assert unwritten(tensor).all()
        values = some_values(tensor, seed)
        tensor.copy_(values)
        arena.protect()
        assert protection(start) == ("r--p" if role == "input" else "rw-p")
        arena.unprotect()
        assert protection(start) == "rw-p"
        assert torch.equal(tensor, values)
        assert arena.check() == []


@pytest.mark.parametrize("alignment", [1, 4, 16])
def test_no_slack_where_the_size_allows_it(alignment: int) -> None:
    with open_arena("cpu") as arena:
        tensor = arena.tensor("x", (7, 4), torch.float32, alignment=alignment)  # 112 bytes
        assert (tensor.data_ptr() + tensor.nbytes) % PAGE == 0


def test_guards_are_as_wide_as_two_rows() -> None:
    with open_arena("cpu") as arena:
        tensor = arena.tensor("x", (2, 1 << 20), torch.float32)  # rows of 4 MiB
        assert protection(tensor.data_ptr() + tensor.nbytes + (8 << 20) - 1) == "---p"
        assert protection(tensor.data_ptr() - (8 << 20)) == "---p"


@pytest.mark.parametrize("shape", [(0,), (0, 128), (4, 0)])
@pytest.mark.parametrize("role", ["input", "output"])
def test_tensor_without_elements(shape: tuple[int, ...], role: str) -> None:
    with open_arena("cpu") as arena:
        tensor = arena.tensor("x", shape, torch.bfloat16, role)
        arena.protect()
        assert tensor.shape == shape
        assert tensor.data_ptr() == 0
        assert unwritten(tensor).shape == shape
        assert arena.check() == []


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("at", [0, 1, 12])
def test_damage_right_of_the_tensor(dtype: torch.dtype, at: int) -> None:
    with open_arena("cpu") as arena:
        tensor = arena.tensor("logits", (3, 1) if dtype == torch.uint8 else (3,), dtype)
        slack = 16 - tensor.nbytes
        at = min(at, slack - 1)
        poke(tensor.data_ptr() + tensor.nbytes + at, 1)
        (violation,) = arena.check()
        assert (violation.check, violation.symptom, violation.tensor) == ("canary", "logits:right", "logits")
        assert violation.where == (tensor.nbytes + at,)
        past = f"{at + 1} byte{'s' * (at > 0)}"
        assert violation.message.startswith(f"1 byte overwritten {past} past the last byte of logits [3")
        assert violation.got.startswith("01")
        assert violation.expected[:2] in ("fd", "7f")


def test_damage_left_of_the_tensor() -> None:
    with open_arena("cpu") as arena:
        tensor = arena.tensor("ids", (5,), torch.int32, "output")
        other = arena.tensor("bias", (5,), torch.float32)
        poke(tensor.data_ptr() - 3, 0, 0)
        (violation,) = arena.check()
        assert (violation.symptom, violation.where) == ("ids:left", (-3,))
        assert violation.message == "2 bytes overwritten 2 to 3 bytes before the first byte of ids [5] int32"
        assert other.isnan().all()  # an input that nobody filled


def test_both_sides_and_a_gap() -> None:
    with open_arena("cpu", edge="left") as arena:
        tensor = arena.tensor("x", (4, 3), torch.int32, "output", strides=(5, 1), offset=1)
        start, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        assert size == 4 * (1 + 3 * 5 + 2 + 1)
        tensor.fill_(7)
        assert arena.check() == []
        poke(start + 3, 0)  # before the offset
        poke(start + 4 * 4, 0)  # between rows 0 and 1
        poke(start + size, 0)
        right, gap = arena.check()
        assert (right.symptom, right.where) == ("x:right", (size,))
        assert (gap.symptom, gap.where) == ("x:gap", (3,))
        assert "2 bytes overwritten between the elements of x [4, 3] int32, 3 to 16 bytes into" in gap.message


def test_soft_guards_are_watched_to_their_end() -> None:
    with open_arena("cpu", FenceOptions(hard=("other",))) as arena:
        tensor = arena.tensor("x", (1024,), torch.float32)
        poke(tensor.data_ptr() + tensor.nbytes + SOFT - 1, 0)
        poke(tensor.data_ptr() - SOFT, 0)
        assert [v.where for v in arena.check()] == [(-SOFT,), (tensor.nbytes + SOFT - 1,)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_is_told_from_everything_else(dtype: torch.dtype) -> None:
    with open_arena("cpu") as arena:
        tensor = arena.tensor("x", (6, 5), dtype, "output")
        assert unwritten(tensor).all()
        if dtype.is_floating_point or dtype.is_complex:
            assert tensor.isnan().all()
            assert not unwritten(tensor + 0).any()  # arithmetic quiets it
            ordinary = torch.full((3,), float("nan"), dtype=dtype)
        else:
            ordinary = torch.full((3,), -1 if dtype.is_signed else 1).to(dtype)
        tensor[1, 1:4] = ordinary
        expected = torch.ones(6, 5, dtype=torch.bool)
        expected[1, 1:4] = False
        assert torch.equal(unwritten(tensor), expected)
        assert torch.equal(unwritten(tensor.t()), expected.t())


def test_one_wrong_bit_is_written() -> None:
    with open_arena("cpu") as arena:
        tensor = arena.tensor("x", (3,), torch.float32, "output")
        tensor.view(torch.int32)[1] ^= 1
        assert unwritten(tensor).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e5m2])
def test_canary_reads_as_nan(dtype: torch.dtype) -> None:
    memory = ctypes.create_string_buffer(64)
    canary.fill(ctypes.addressof(memory), 64)
    read = torch.frombuffer(memory, dtype=dtype)
    words = read[1::2] if dtype == torch.float8_e5m2 else read
    assert words.float().isnan().all()
    assert not unwritten(read).any()
    assert (torch.frombuffer(memory, dtype=torch.int32) > 1 << 30).all()


@pytest.mark.parametrize("size", [0, 1, 2, 100, (1 << 18) + 3, 3 << 18])
@pytest.mark.parametrize("phase", [0, 1])
def test_canary_finds_each_byte(size: int, phase: int) -> None:
    memory = ctypes.create_string_buffer(size + 2)
    address = ctypes.addressof(memory) + phase
    canary.fill(address, size)
    assert canary.compare(address, size) is None
    assert memory.raw[size + phase] == 0
    for at in {0, size // 2, size - 1} if size else ():
        canary.fill(address, size)
        poke(address + at, 0x11)
        damage = canary.compare(address, size)
        assert damage is not None
        assert (damage.first, damage.last, damage.size, damage.got[:1]) == (at, at, 1, b"\x11")


# ---- memory over many cases -----------------------------------------------------------------------------------------


def one_case(edge: str, hard: tuple[str, ...] | None, tokens: int) -> None:
    with open_arena("cpu", FenceOptions(hard=hard), edge) as arena:
        arena.tensor("logits", (tokens, 128), torch.bfloat16).zero_()
        arena.tensor("weights", (tokens, 8), torch.float32, "output")
        arena.protect()
        with arena.own():
            torch.empty(tokens, 8)
        assert arena.check() == []


def footprint() -> tuple[int, int]:
    """Mappings, and resident pages, of this process."""
    return len(Path("/proc/self/maps").read_text().splitlines()), int(Path("/proc/self/statm").read_text().split()[1])


def test_a_thousand_arenas_take_no_more_memory_than_a_few() -> None:
    def some(count: int) -> None:
        for i in range(count):
            one_case("left" if i % 2 else "right", () if i % 3 else None, (1, 7, 64, 300)[i % 4])

    some(48)
    mappings, resident = footprint()
    some(1000)
    mappings_after, resident_after = footprint()
    assert mappings_after <= mappings + 8
    assert resident_after <= resident + 256  # 1 MiB


def test_reused_memory_is_clean() -> None:
    for role in ("output", "input", "output"):
        with open_arena("cpu") as arena:
            tensor = arena.tensor("x", (8, 33), torch.float32, role)
            assert unwritten(tensor).all() if role == "output" else tensor.isnan().all()
            tensor.fill_(1)
            poke(tensor.data_ptr() - 1, 0)
            assert len(arena.check()) == 1
            del tensor


def test_pool_is_bounded() -> None:
    pool = Pool(max_bytes=1 << 20, max_blocks=3)
    blocks = [pool.take(1, 1 << 20) for _ in range(5)]
    for block in blocks:
        pool.give(block)
    assert len(pool) == 3
    assert protection(blocks[0].base) == "" or protection(blocks[4].base) == "---p"
    assert pool.take(1, 1 << 20) is blocks[4]
    large = pool.take(1000, 1 << 20)
    pool.give(large)
    assert large not in pool._order
    assert pool.idle_bytes <= 1 << 20


def test_memory_of_a_living_tensor_is_not_reused() -> None:
    with open_arena("cpu") as arena:
        kept = arena.tensor("x", (16,), torch.float32)[3:]
        kept.fill_(5)
        arena.protect()
    for _ in range(3):
        with open_arena("cpu") as arena:
            assert arena.tensor("x", (16,), torch.float32).isnan().all()
            kept += 1  # writable again, and nobody else's
            assert arena.check() == []
    assert kept.tolist() == [8.0] * 13
    address = kept.untyped_storage().data_ptr()
    del kept
    gc.collect()
    with open_arena("cpu") as arena:
        assert arena.tensor("x", (16,), torch.float32).data_ptr() == address


def test_a_later_arena_sees_damage_around_a_kept_tensor() -> None:
    with open_arena("cpu") as arena, arena.own():
        workspace = torch.empty(3)
    poke(workspace.data_ptr() + 12, 0)
    with open_arena("cpu") as arena:
        (violation,) = arena.check()
        assert violation.symptom == "own:right:stale"
        assert arena.check() == []


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_arguments_that_make_no_sense() -> None:
    with open_arena("cpu") as arena:
        for kwargs in ({"role": "both"}, {"alignment": 3}, {"alignment": 2 * PAGE}, {"strides": (1,)}, {"offset": -1}):
            with pytest.raises(UsageError):
                arena.tensor("x", (2, 2), torch.float32, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="closed"):
        arena.tensor("x", (2, 2), torch.float32)
    arena.close()
    with pytest.raises(UsageError, match="edge"):
        open_arena("cpu", edge="top")
    with pytest.raises(UsageError, match="device"):
        open_arena("tpu")
    with pytest.raises(UsageError, match="sides"):
        FenceOptions(sides="none")
    with pytest.raises(UsageError, match="access"):
        FenceOptions(access="read")
    with pytest.raises(UsageError, match="unknown key 'soft'"):
        FenceOptions.from_json({"soft": True})


def test_no_memory_is_a_memory_error() -> None:
    with open_arena("cpu") as arena, pytest.raises(MemoryError):
        arena.tensor("x", (1 << 47,), torch.uint8)


def test_a_refused_block_leaves_nothing_behind() -> None:
    program = """if True:
        import resource, torch
        from moe_fuzz.fence import open_arena
        maps = lambda: len(open("/proc/self/maps").readlines())
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
        with open_arena("cpu") as arena:
            before = maps()
            for _ in range(20):
                try:
                    arena.tensor("x", (2 << 30,), torch.uint8)
                except MemoryError:
                    continue
                raise SystemExit("the limit does not hold")
            assert maps() <= before + 2, (before, maps())
            assert arena.tensor("y", (4,), torch.float32).isnan().all()
            assert arena.check() == []"""
    assert subprocess.run([sys.executable, "-P", "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("hard", [None, (), ("a", "b")])
def test_options_travel_as_json(hard: tuple[str, ...] | None) -> None:
    options = FenceOptions(hard, "left", "write", ("logits",), False)
    assert FenceOptions.from_json(options.to_json()) == options


def test_options_need_no_torch() -> None:
    program = "import sys, moe_fuzz.options; sys.exit(bool({'torch', 'numpy', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-P", "-c", program], check=False).returncode == 0


def test_seconds_count() -> None:
    with open_arena("cpu") as arena:
        before = arena.seconds
        arena.tensor("x", (1 << 20,), torch.float32)
        assert arena.seconds > before


def test_pool_serves_the_arenas() -> None:
    gc.collect()
    with open_arena("cpu"):
        held = list(cpu._KEPT)  # by targets that other tests of this process have run
    one_case("right", None, 64)
    gc.collect()
    with open_arena("cpu"):
        assert held == cpu._KEPT
        assert len(cpu._POOL) > 0
        assert mapping.SOFT >= 1 << 16
