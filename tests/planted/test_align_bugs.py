"""The planted bugs of align: friendly input shows none of them, and each shows on its own input."""

from __future__ import annotations

import importlib
import inspect
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz.planted.align_catalog import ALIGN
from moe_fuzz.planted.catalog import PLANTED, get_planted
from moe_fuzz.reference.align import align as reference

#: Those that launch a Triton kernel whatever the input.
KERNELS = ("counts_before_the_table", "fills_whole_vectors", "row_offset_of_32_bits")
EVERY = pytest.mark.parametrize("planted", [
    pytest.param(bug, id=bug.name, marks=[pytest.mark.interpreter] if bug.name in KERNELS else []) for bug in ALIGN
])  # fmt: skip


def load(name):
    planted = get_planted(name)
    return getattr(importlib.import_module(f"moe_fuzz.planted.{planted.module}"), planted.function)


def ids_of(*rows, dtype=torch.int32):
    return torch.tensor(rows, dtype=dtype)


def filled(ids, block, experts, value=-77):
    return tuple(torch.full_like(part, value) for part in reference(ids, block, experts))


def test_they_are_in_the_catalog():
    assert all(bug in PLANTED for bug in ALIGN)
    assert len(ALIGN) >= 20
    assert {"count", "slots", "experts", "fill", "tail", "inverse", "stable"} <= {p.check for p in ALIGN if p.only}


@EVERY
def test_the_docstring_names_the_upstream_issue(planted):
    function = load(planted.name)
    assert planted.upstream in inspect.getdoc(function)
    assert list(inspect.signature(function).parameters)[:3] == ["ids", "block_size", "num_experts"]
    imports = {line for line in inspect.getsource(sys.modules[function.__module__]).splitlines() if "import" in line}
    assert not [line for line in imports if "moe_fuzz" in line]


@EVERY
def test_friendly_input_shows_nothing(planted):
    """A token for each expert, k = 1, blocks of 1: nothing is dropped, nothing padded, and no order can be wrong."""
    ids = torch.arange(8, dtype=torch.int32)[:, None]
    got, expected = load(planted.name)(ids.clone(), 1, 8), reference(ids, 1, 8)
    for one, other in zip(got, expected, strict=False):
        assert torch.equal(one, other)
    assert len(got) == 4 - len(planted.capabilities.get("absent", ()))


def test_minus_one_is_the_last_expert():
    assert load("negative_id_counts")(ids_of([-1, 0]), 2, 4)[1].tolist() == [0, 3]


def test_minus_one_is_the_maps_last_entry():
    align, last = load("map_indexed_by_minus_one"), torch.tensor([-1, 0, 1], dtype=torch.int32)
    assert align(ids_of([-1, 1]), 2, 3, expert_map=last)[1].tolist() == [0, 1]
    elsewhere = torch.tensor([0, 1, -1], dtype=torch.int32)
    assert align(ids_of([-1, 1]), 2, 3, expert_map=elsewhere)[1].tolist() == [1, -1]


def test_whole_tiles_have_a_block_too_many():
    for count, blocks in ((63, 4), (64, 5), (65, 5), (128, 9)):
        ids = ids_of(*[[0]] * count, [1])
        assert load("whole_tiles_need_one_more")(ids, 16, 2)[2].tolist() == [16 * (blocks + 1)]


def test_a_map_is_read_as_if_it_were_packed():
    align, wide = load("map_without_its_stride"), torch.tensor([1, 7, 0, 7], dtype=torch.int32)
    assert align(ids_of([0, 1]), 2, 2, expert_map=wide[::2])[1].tolist() == [1, -1]
    assert align(ids_of([0, 1]), 2, 2, expert_map=wide[::2].contiguous())[1].tolist() == [0, 1]


def test_a_wide_id_passes_for_an_expert():
    assert load("id_cut_to_32_bits")(ids_of([2**32 + 1, 0], dtype=torch.int64), 1, 2)[2].tolist() == [2]


def test_counts_wrap_past_32767():
    align = load("counts_of_16_bits")
    ids = torch.zeros((32768, 1), dtype=torch.int32)
    assert align(ids[1:], 256, 2)[2].tolist() == reference(ids[1:], 256, 2)[2].tolist()
    assert align(ids, 256, 2)[2].tolist() == [0]


def test_thread_1024_is_not_there():
    for experts, total in ((1023, 2), (1024, -77)):
        ids = ids_of([0, 5])
        assert load("scan_of_1024_threads")(ids, 1, experts, out=filled(ids, 1, experts))[2].tolist() == [total]


def test_the_second_slot_of_an_expert_is_nobodys():
    ids = torch.tensor([[0, 1]] * 17, dtype=torch.int32)
    ids[3] = 2
    got = load("stops_at_first_match")(ids, 4, 3, out=filled(ids, 4, 3))
    assert got[3][3].tolist() == [32, -77]
    assert (got[3] != -77).sum() == 33
    few = load("stops_at_first_match")(ids[:16], 4, 3, out=filled(ids[:16], 4, 3))
    assert all(map(torch.equal, few, reference(ids[:16], 4, 3)))


def test_what_is_dropped_stands_at_place_zero():
    assert load("dropped_go_to_place_zero")(ids_of([-1, 0]), 2, 2)[0].tolist()[:2] == [0, 2]


def test_the_rest_of_the_last_warp_has_no_place():
    ids = torch.zeros((70, 1), dtype=torch.int32)
    held = load("last_warp_not_placed")(ids, 16, 1)[0]
    assert (held < 70).sum() == 64
    assert (load("last_warp_not_placed")(ids[:64], 16, 1)[0] < 64).sum() == 64


def test_the_total_is_that_of_slots():
    assert load("total_before_padding")(ids_of([0, 1], [0, 2]), 4, 3)[2].tolist() == [4]


def test_the_token_stands_for_the_slot():
    assert load("token_for_slot")(ids_of([0, 1], [1, 0]), 2, 2)[0].tolist() == [0, 1, 0, 1, 4, 4]


def test_blocks_bear_global_ids():
    shard = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)
    got = load("global_expert_ids")(ids_of([2, 0], [3, 1]), 1, 4, expert_map=shard)
    assert got[1].tolist() == [2, 3, -1, -1]


def test_padding_of_blocks_and_tail():
    ids = ids_of([0, 0])
    assert load("padding_of_minus_one")(ids, 4, 2)[0].tolist() == [0, 1, -1, -1] + [-1] * 4
    assert load("tail_of_expert_zero")(ids, 4, 2)[1].tolist() == [0, 0]


def test_the_way_back_is_that_of_the_compact_order():
    assert load("inverse_without_padding")(ids_of([0, 1], [1, -1]), 4, 2)[3].tolist() == [[0, 1], [2, -1]]


def test_the_room_is_what_the_ids_need():
    got = load("room_by_count")(ids_of([0, 0]), 4, 2)
    assert [len(part) for part in got[:2]] == [4, 1]


def test_no_slots_raise():
    with pytest.raises(ValueError, match="0 blocks"):
        load("no_slots_raises")(torch.empty((0, 2), dtype=torch.int32), 4, 2)


def test_order_of_experts_and_of_slots():
    ids = ids_of([0, 1], [1, 1])
    assert load("full_experts_first")(ids, 1, 2)[1].tolist() == [1, 1, 1, 0]
    many = torch.zeros((33, 1), dtype=torch.int32)
    assert load("later_slots_first")(many, 33, 1)[0].tolist() == [*range(1, 33), 0]
    assert load("later_slots_first")(many[:32], 32, 1)[0].tolist() == [*range(32)]


def test_arrival_is_another_each_time():
    ids = torch.zeros((64, 1), dtype=torch.int32)
    one, other = (load("slots_in_order_of_arrival")(ids, 64, 1)[0] for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(one.sort().values, other.sort().values)


@pytest.mark.interpreter
def test_the_last_vector_is_stored_whole():
    ids, memory = ids_of([0], [1]), torch.full((16,), -77, dtype=torch.int32)
    out = filled(ids, 3, 2)
    load("fills_whole_vectors")(ids, 3, 2, out=(memory[:6], *out[1:]))
    assert (memory == -77).nonzero().flatten().tolist() == [*range(8, 16)]


@pytest.mark.interpreter
def test_minus_one_is_counted_before_the_table(monkeypatch):
    """With what lies before the table unmapped the process would die; here it is watched."""
    memory = torch.zeros(8, dtype=torch.int32)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **more: memory[4:6] if size == (2,) else zeros(*size, **more))
    load("counts_before_the_table")(ids_of([-1], [1]), 4, 2)
    assert memory.tolist() == [0, 0, 0, 1, 0, 1, 0, 0]


def test_counts_are_cleared_once():
    ids = ids_of([0], [0])
    align = load("counts_cleared_once")
    first, second = align(ids, 2, 2), align(ids, 2, 2)
    assert (first[2].tolist(), second[2].tolist()) == ([2], [4])


def test_the_total_is_that_of_what_the_buffer_held():
    align, ids = load("total_kept_by_address"), ids_of([0], [1])
    assert align(ids, 2, 2)[2].tolist() == [4]
    ids[1] = 0
    assert align(ids, 2, 2)[2].tolist() == [4]
    assert align(ids.clone(), 2, 2)[2].tolist() == [2]


def test_the_plan_is_filled_once():
    align, ids = load("filled_once"), ids_of([0], [1])
    align(ids, 2, 2)
    ids[1] = -1
    assert align(ids, 2, 2)[0].tolist() == [0, 2, 1, 2]


@pytest.mark.parametrize("name", ["total_read_on_host", "ranked_backwards_in_a_graph"])
def test_on_a_cpu_they_are_right(name):
    ids = torch.randint(-1, 9, (20, 3), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    assert all(map(torch.equal, load(name)(ids, 4, 8), reference(ids, 4, 8)))


def test_ranked_backwards_is_a_right_plan_too():
    from moe_fuzz.planted import align_memory

    ids = ids_of([0, 1], [1, 0], [1, 1])
    plan = align_memory._empty(ids, 4, 2)
    plan[0].fill_(6)
    got = align_memory._sort_into(plan, ids, 4, 2, backwards=True)
    assert got[0].tolist() == [3, 0, 6, 6, 5, 4, 2, 1, 6, 6, 6, 6]
    assert got[3].tolist() == [[1, 7], [6, 0], [5, 4]]
