"""The planted bugs of nvfp4_quantize: friendly input shows none of them, and each shows on its own input."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz.planted.catalog import PLANTED, get_planted
from moe_fuzz.planted.nvfp4_catalog import NVFP4
from moe_fuzz.reference.nvfp4 import E4M3, unpack, unswizzle
from moe_fuzz.reference.nvfp4 import nvfp4_quantize as reference

#: Those that launch a Triton kernel on any input of rows.
KERNELS = ("offset_in_32_bits",)
EVERY = pytest.mark.parametrize("planted", [
    pytest.param(bug, id=bug.name, marks=[pytest.mark.interpreter] if bug.name in KERNELS else []) for bug in NVFP4
])  # fmt: skip


def load(name):
    planted = get_planted(name)
    return getattr(importlib.import_module(f"moe_fuzz.planted.{planted.module}"), planted.function)


def data(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def scale_of(*values):
    return torch.tensor(values)


def grid(rows, columns):
    """Values that codes hold exactly, 6 first, none of them a tie or a zero; the scale is 1 under a global one of 1."""
    values = torch.tensor([6.0, 1.0, -2.0, 3.0, -4.0, 0.5, 1.5, -6.0]).repeat(rows, columns // 8)
    return values * torch.where(torch.arange(rows) % 2 == 0, 1.0, -1.0)[:, None]


def same(one, other):
    return torch.equal(one[0], other[0]) and torch.equal(one[1].view(torch.uint8), other[1].view(torch.uint8))


def differing(name, x, scale, layout="linear", **more):
    """(rows, blocks of codes that differ, places of scales that do)"""
    given = {"layout": layout} if "layout" in inspect.signature(load(name)).parameters else {}
    got, right = load(name)(x, scale, **given, **more), reference(x, scale, layout, **more)
    codes = (unpack(got[0]) != unpack(right[0])).view(len(x), -1, 16).any(dim=2)
    return codes.nonzero().tolist(), (got[1].view(torch.uint8) != right[1].view(torch.uint8)).nonzero().tolist()


def test_they_are_in_the_catalog():
    assert all(bug in PLANTED for bug in NVFP4)
    assert len(NVFP4) >= 20
    alone = {"finite", "scale", "codes", "padding", "written", "structure", "error", "fence", "canary", "isolation",
             "batch_invariance", "determinism", "capture", "replay"}  # fmt: skip
    assert alone <= {p.check for p in NVFP4 if p.only}


@EVERY
def test_the_docstring_names_the_upstream_issue(planted):
    function = load(planted.name)
    assert planted.upstream in inspect.getdoc(function)
    assert list(inspect.signature(function).parameters)[:2] == ["x", "global_scale"]
    imports = {line for line in inspect.getsource(sys.modules[function.__module__]).splitlines() if "import" in line}
    assert not [line for line in imports if "moe_fuzz" in line]


@EVERY
def test_friendly_input_shows_nothing(planted):
    """33 rows of 64 columns on the grid, under a global scale of 1: whole vectors, no tie, no padding of columns."""
    x = grid(33, 64)
    got, right = load(planted.name)(x, scale_of(1.0)), reference(x, scale_of(1.0))
    if planted.check == "codes" and planted.name == "high_nibble_first":
        assert not same(got, right)  # shows on any input where two neighbours differ
    elif planted.check == "structure":
        assert torch.equal(got[1], right[1].view(torch.uint8))
    else:
        assert same(got, right)


def test_beyond_calibration_the_scale_is_nan():
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 460 * 6, 470 * 6
    assert load("scale_not_clamped")(x, scale_of(1.0))[1].view(torch.uint8).tolist() == [[0x7E, 0x7F]]


def test_a_row_of_zeros_has_nan_for_scales():
    x = data(3, 32)
    x[1], x[2, :16] = 0, 0
    assert differing("zero_block_is_nan", x, scale_of(1.0)) == ([], [[1, 0], [1, 1]])


def test_zero_times_infinity():
    x = data(2, 32)
    x[1, 16:] = 0
    assert differing("infinite_scale_times_zero", x, scale_of(math.inf)) == ([], [[1, 1]])
    assert differing("infinite_scale_times_zero", x, scale_of(5.0)) == ([], [])


def test_reciprocals_differ_on_ties_alone():
    x = torch.zeros(126 * 40, 16)
    for number in range(40):
        middle = (E4M3[1:] + E4M3[:-1]) / 2
        x[126 * number : 126 * (number + 1), 0] = middle * 6 / (number + 1)
    scales = torch.arange(1, 41).float()
    ids = torch.arange(40).repeat_interleave(126)
    codes, off = differing("sixth_by_reciprocal", x, scales, expert_ids=ids)
    assert 5 < len(off) < 2000
    assert differing("sixth_by_reciprocal", data(50, 160), scale_of(37.0)) == ([], [])
    ties = data(400, 64).abs() + 0.1
    ties[:, ::16] = 6.0 * 7 / 37.25
    ties[:, 1::16] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] * 58)[:400, None] * 7 / 37.25
    codes, off = differing("codes_by_two_reciprocals", ties, scale_of(37.25))
    assert not off
    assert codes


def test_subnormal_scales_are_lost():
    x = torch.full((1, 32), 6 * 2.0**-7)
    x[0, 16:] = 6 * 2.0**-6
    assert differing("subnormal_scales_flushed", x, scale_of(1.0)) == ([[0, 0]], [[0, 0]])


def test_the_last_vector_is_moved_back():
    x = data(1, 16 * 6) * torch.arange(1, 7).float().exp2().repeat_interleave(16)
    assert differing("maximum_of_the_last_whole_vector", x, scale_of(1.0))[1] == [[0, 4], [0, 5]]
    assert differing("maximum_of_the_last_whole_vector", x[:, :64], scale_of(1.0)) == ([], [])


def test_a_bfloat16_scale_is_no_float32():
    codes, scales = load("bfloat16_scale_read_as_float32")(data(2, 16), scale_of(37.0).bfloat16())
    assert not codes.any()
    assert not scales.view(torch.uint8).any()


def test_minus_one_is_the_last():
    ids = torch.tensor([-1, 0, 5])
    assert {row for row, _ in differing("minus_one_is_the_last_expert", data(3, 32), scale_of(1.0, 9.0),
                                        expert_ids=ids)[1]} == {0}  # fmt: skip


def test_there_is_room_for_128_scales():
    scales, ids = scale_of(*[1.0] * 128, *[9.0] * 72), torch.tensor([0, 127, 128, 199, 200])
    assert {row for row, _ in differing("room_for_128_scales", data(5, 32), scales, expert_ids=ids)[1]} == {2, 3}


def test_ids_lose_their_upper_half():
    ids = torch.tensor([1, 1 + (1 << 32), -(1 << 63)])
    assert {row for row, _ in differing("ids_cut_to_32_bits", data(3, 32), scale_of(1.0, 9.0), expert_ids=ids)[1]} == {
        1, 2}  # fmt: skip


def test_the_gate_is_the_first_half():
    x = data(3, 64)
    found, right = (quantize(x, scale_of(9.0), activation="silu")
                    for quantize in (load("fused_halves_exchanged"), reference))  # fmt: skip
    assert not same(found, right)
    assert same(load("fused_halves_exchanged")(x.roll(32, 1), scale_of(9.0), activation="silu"), right)


def test_one_infinity_zeroes_all_rows():
    x = data(4, 32)
    x[2, 3] = math.inf
    codes, scales = load("infinity_zeroes_the_batch")(x, scale_of(100.0))
    assert not codes.any()
    assert not scales.view(torch.uint8).any()


def test_codes_of_an_unrounded_scale():
    codes, scales = differing("codes_under_the_unrounded_scale", data(40, 64), scale_of(100.0))
    assert codes
    assert not scales


@pytest.mark.parametrize(("name", "rows", "columns", "shows"), [
    ("swizzled_by_real_columns", 129, 80, True), ("swizzled_by_real_columns", 128, 80, False),
    ("swizzled_by_real_columns", 129, 64, False), ("tiles_of_eight_rows", 32, 128, True),
    ("tiles_of_eight_rows", 33, 128, False), ("padding_of_the_last_column", 5, 80, True),
    ("padding_of_the_last_column", 5, 64, False),
])  # fmt: skip
def test_where_scales_lie(name, rows, columns, shows):
    x = data(rows, columns)
    codes, scales = differing(name, x, scale_of(10.0), "swizzled")
    assert not codes
    assert bool(scales) == shows
    assert differing(name, x, scale_of(10.0)) == ([], [])
    if name == "padding_of_the_last_column":
        table = load(name)(x, scale_of(10.0), "swizzled")[1]
        real = unswizzle(table, rows, columns // 16).view(torch.uint8)
        assert torch.equal(real, reference(x, scale_of(10.0))[1].view(torch.uint8))


def test_no_rows():
    with pytest.raises(RuntimeError, match="configuration"):
        load("no_rows_raise")(data(0, 16), scale_of(1.0))


@pytest.mark.interpreter
def test_whole_vectors_are_cleared():
    x, whole = data(1, 80), torch.full((64,), 0x33, dtype=torch.uint8)
    out = torch.empty(1, 40, dtype=torch.uint8), whole[:5].view(1, 5).view(torch.float8_e4m3fn)
    assert load("clears_whole_vectors")(x, scale_of(1.0), out=out) is out
    assert whole[5:16].tolist() == [0] * 11
    assert whole[16:].tolist() == [0x33] * 48


@pytest.mark.interpreter
@pytest.mark.parametrize(("experts", "shows"), [(4, False), (5, True)])
def test_scales_are_read_in_fours(experts, shows):
    """Nothing is wrong with what comes of it: the fence alone sees the read. Here, its mask is looked at."""
    planted = importlib.import_module("moe_fuzz.planted.nvfp4_state")
    held = torch.cat([torch.arange(1.0, experts + 1), torch.full((8,), -7.0)])
    copied = torch.zeros(8)
    planted._copy_in_fours_kernel[(1,)](held, copied, -(-experts // 4), BLOCK=8)
    assert copied[:experts].tolist() == held[:experts].tolist()
    assert (-7.0 in copied.tolist()) == shows


def test_other_arithmetic_for_some_rows():
    ties = data(17, 1600, seed=3)
    ties[:, ::16], ties[:, 1::16] = 6.0 * 7 / 37.25, 1.75 * 7 / 37.25
    ties[:, 2::16] = 0.75 * 7 / 37.25
    scale = scale_of(37.25)
    few = load("few_rows_by_reciprocals")
    assert same(few(ties, scale), reference(ties, scale))
    assert not same(few(ties[:16], scale), reference(ties[:16], scale))
    ties[16, 5] = math.nan
    codes, _ = differing("tile_with_nan_by_reciprocals", ties, scale)
    assert {row for row, _ in codes} == {16}
    ties[0, 5] = math.nan
    codes, _ = differing("tile_with_nan_by_reciprocals", ties, scale)
    assert {row for row, _ in codes} == set(range(17))
    noisy = load("rounds_at_random")
    torch.manual_seed(0)
    assert not same(noisy(ties, scale), noisy(ties, scale))
