"""The planted bugs of experts: friendly input shows none of them, and each shows on its own input."""

from __future__ import annotations

import importlib
import inspect
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz.execute.tape import answer_who_asks
from moe_fuzz.planted.catalog import PLANTED, get_planted
from moe_fuzz.planted.experts_catalog import EXPERTS
from moe_fuzz.planted.experts_layer import Capturable, Layer
from moe_fuzz.planted.experts_permuted import Permuted
from moe_fuzz.reference.experts_bf16 import experts_bf16 as reference

#: Those that launch a Triton kernel, which on a CPU stores or loads past ordinary memory.
KERNELS = ("tail_read_in_vectors", "bulk_store_past_the_end", "result_cleared_in_vectors", "hidden_offset_of_32_bits",
           "map_of_dropped_unwritten")
#: Wrong from the second call on, or with nothing behind the last row: no input is friendly twice.
UNFRIENDLY = ("bulk_store_past_the_end",)


def load(name):
    return getattr(importlib.import_module(f"moe_fuzz.planted.{get_planted(name).module}"), name)


def layer(tokens=4, experts=4, hidden=32, inter=16, top_k=1, ids=None, gate=32, **options):
    """Integers that are exact in any order; ids 0, 1, …"""
    made = torch.Generator().manual_seed(3)

    def integers(*shape, most=2):
        return torch.randint(-most, most + 1, shape, generator=made).bfloat16()

    x, w13, w2 = integers(tokens, hidden), integers(experts, 2 * inter, hidden), integers(experts, hidden, inter)
    w13[:, :inter] = 0
    w13[:, :inter, 0] = gate
    x[:, 0] = 1
    if ids is None:
        ids = torch.arange(tokens * top_k, dtype=torch.int32).view(tokens, top_k) % experts
    weights = torch.exp2(torch.arange(ids.numel()).view(ids.shape) % 3).float()
    return (x, w13, w2, weights, ids), options


def differs(name, tensors, options):
    expected = reference(*tensors, **options)
    got = load(name)(*(tensor.clone() for tensor in tensors), **options)
    return not torch.equal(got, expected)


def test_they_are_in_the_catalog_under_names_of_their_own():
    assert all(get_planted(bug.name) is bug for bug in EXPERTS), "two bugs share a name"
    assert len({bug.name for bug in PLANTED}) == len(PLANTED)
    assert len(EXPERTS) >= 25
    assert {"exact", "bound", "statistical", "finite", "dropped", "isolation", "batch_invariance", "determinism",
            "fence", "canary", "written", "structure", "error", "crash"} <= {bug.check for bug in EXPERTS}  # fmt: skip


@pytest.mark.parametrize("bug", EXPERTS, ids=lambda bug: bug.name)
def test_the_docstring_names_the_upstream_issue(bug):
    assert bug.upstream in inspect.getdoc(load(bug.name))


@pytest.mark.parametrize("base", [Layer, Capturable, Permuted])
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_what_they_are_made_of_is_right(base, activation):
    for top_k, on_input in ((1, True), (2, False)):
        (x, w13, w2, weights, ids), _ = layer(top_k=top_k)
        w13 = w13[:, 16:] if activation == "relu2" else w13
        ids = torch.tensor([[0, 1], [-1, 3], [4, 2], [2, 2]], dtype=torch.int32)[:, :top_k]
        options = {"activation": activation, "apply_weight_on_input": on_input, "b2": torch.ones(4, 32)}
        got = base.run(x, w13, w2, weights, ids, **options)
        assert torch.equal(got, reference(x, w13, w2, weights, ids, **options))


@pytest.mark.parametrize("bug", [
    pytest.param(bug, id=bug.name, marks=[pytest.mark.interpreter] if bug.name in KERNELS else [])
    for bug in EXPERTS
    if bug.name not in UNFRIENDLY
])  # fmt: skip
def test_friendly_input_shows_nothing(bug):
    """A token for each expert, sizes that are powers of two, weights of 1: nothing is dropped, padded or cut."""
    if bug.devices == ("cuda",):
        pytest.skip("it needs a GPU")
    answer_who_asks()  # whether a graph is captured, as workers do: a torch without CUDA has no answer
    (x, w13, w2, weights, ids), _ = layer(tokens=8, experts=8)
    weights.fill_(1.0)
    if bug.name in ("float32_result", "bf16_partial_sums", "partial_block_writes_slot_zero", "workspace_clobbered"):
        pytest.skip("it shows on any input but the plainest, which the next tests have")
    expected = reference(x, w13, w2, weights, ids)
    assert torch.equal(load(bug.name)(x, w13, w2, weights, ids), expected)


MINUS = torch.tensor([[0], [-1], [4], [3]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("ids_clamped", layer(ids=MINUS)),
        ("dropped_sorted_first", layer(ids=MINUS)),
        ("map_of_minus_one", layer(ids=MINUS, expert_map=torch.tensor([0, 1, 2, 3, 1], dtype=torch.int32))),
        ("zero_off_rank", layer(ids=MINUS + 4, expert_map=torch.tensor([-1] * 4 + [0, 1, 2, 3, 0], dtype=torch.int32))),
        ("partial_block_writes_slot_zero", layer()),
        ("weight_applied_twice", layer(apply_weight_on_input=True)),
        ("weight_of_token", layer(top_k=2)),
        ("padded_at_the_end", layer(inter=12)),
        ("gate_and_up_swapped", layer(gate_layout="up_first")),
        ("gelu_by_tanh", layer(activation="gelu", gate=-3)),
        ("bias_offset_padded", layer(hidden=24, b2=torch.arange(96).float().view(4, 24))),
        ("biases_without_their_strides", layer(b2=torch.arange(128.0).view(32, 4).t())),
        ("one_flag_for_both_biases", layer(b2=torch.arange(128.0).view(4, 32))),
        ("bf16_partial_sums", layer(hidden=512, inter=256)),
        ("narrow_split_sums", layer(hidden=512, inter=256)),
        ("k_tail_dropped", layer(hidden=40)),
        ("last_experts_dropped", layer(experts=7, tokens=7)),
        ("duplicate_counted_once", layer(ids=torch.tensor([[1, 1]] * 4, dtype=torch.int32))),
        ("mean_of_local_slots", layer(ids=torch.tensor([[1, -1]] * 4, dtype=torch.int32))),
        ("int64_ids_read_as_int32", layer(ids=torch.tensor([[1, 2]] * 4))),
        ("int64_ids_cut_to_32_bits", layer(ids=torch.tensor([[1], [2 + (1 << 32)], [-1], [0]]))),
        ("workspace_clobbered", layer()),
    ],
)
def test_each_shows_on_its_own_input(name, made):
    assert differs(name, *made)


@pytest.mark.parametrize("gate_layout", ["first", "up_first", "interleaved"])
def test_a_nan_is_lost_in_a_clamp(gate_layout):
    (x, *rest), options = layer(activation="swiglu_oai", gate_layout=gate_layout)
    lossy = load("nan_clamped_to_the_limit")
    assert torch.equal(lossy(x, *rest, **options), Layer.run(x, *rest, **options))
    x[1] = torch.nan
    assert lossy(x, *rest, **options).isfinite().all()
    assert reference(x, *rest, **options)[1].isnan().any()


def test_a_nan_of_the_next_expert_is_no_matter_of_this_one():
    (x, w13, w2, weights, ids), options = layer(hidden=40, tokens=3, experts=4)
    assert not differs("tail_masked_on_one_side", (x, w13, w2, weights, ids), options)
    w13[3] = torch.nan  # whom nobody names
    assert differs("tail_masked_on_one_side", (x, w13, w2, weights, ids), options)


def test_a_nan_in_a_dropped_slot_gets_through():
    (x, w13, w2, weights, ids), options = layer(ids=MINUS)
    weights[1] = torch.nan
    assert differs("nan_weight_masked_by_zero", (x, w13, w2, weights, ids), options)
    assert not differs("bf16_weights", (x, w13, w2, weights, ids), options)  # powers of two are exact


def test_an_infinite_row_is_everyones():
    (x, *rest), options = layer()
    x[2] = torch.inf
    got = load("amax_of_the_layer")(x, *rest, **options)
    assert got.isnan().all()
    assert reference(x, *rest, **options)[:2].isfinite().all()


def test_the_result_has_the_dtype_of_the_sums():
    tensors, options = layer()
    assert load("float32_result")(*tensors, **options).dtype == torch.float32


def test_none_and_a_second_call():
    tensors, options = layer(tokens=0)
    with pytest.raises(RuntimeError, match="grid"):
        load("no_tokens_raises")(*tensors, **options)
    tensors, options = layer(tokens=3)
    assert not differs("slot_sums_cleared_once", tensors, options)
    assert differs("slot_sums_cleared_once", tensors, options)


@pytest.mark.parametrize("name", ["slots_added_as_blocks_end", "split_k_atomics"])
def test_bits_change_from_call_to_call(name):
    made = torch.Generator().manual_seed(1)
    x, w13, w2 = (torch.randn(shape, generator=made).bfloat16() for shape in ((600, 64), (4, 64, 64), (4, 64, 32)))
    weights, ids = torch.rand(600, 3, generator=made), torch.arange(1800, dtype=torch.int32).view(600, 3) % 4
    function = load(name)
    calls = [function(x, w13, w2, weights, ids) for _ in range(4)]
    assert not all(torch.equal(calls[0], other) for other in calls)
