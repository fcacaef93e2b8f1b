"""The planted bugs of experts in NVFP4: each is wrong on a case of its own, and what they are made of is right."""

from __future__ import annotations

import importlib
import inspect
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz.case import Fault
from moe_fuzz.labels import Labels
from moe_fuzz.ops.experts.fp4_inputs import materialize
from moe_fuzz.planted.catalog import PLANTED, get_planted
from moe_fuzz.planted.experts_layer import Fp4Layer
from moe_fuzz.planted.experts_nvfp4_catalog import EXPERTS_NVFP4
from moe_fuzz.targets.signatures import SIGNATURES
from tests.cpu.experts_seen import fp4_case_of, reference

EVERY = pytest.mark.parametrize("bug", EXPERTS_NVFP4, ids=lambda bug: bug.name)
ORDER = SIGNATURES["experts_nvfp4"].positional
INF = (Fault("inf_rows", "x", Labels.of([2])),)
#: What shows each; the fence alone sees the two that are not here.
SHOWS = {
    "codes_high_nibble_first": {}, "last_scale_a_step_off": {}, "blocks_of_32": {}, "alpha_of_the_first_expert": {},
    "scales_stay_where_codes_move": {"gate_layout": "up_first"},
    "subnormal_block_scales_flushed": {}, "alphas_in_sixteens": {"experts": 17, "rows": 40},
    "signs_of_block_scales_dropped": {"faults": (Fault("signed_blocks", "w2_scales"),)},
    "nan_scales_are_the_largest": {"experts": 12, "rows": 24, "faults": (Fault("nan_blocks", "w2_scales"),)},
    "few_rows_are_not_swizzled": {"scale_layout": "swizzled", "intermediate": 16},
    "scale_offset_of_real_rows": {"scale_layout": "swizzled"},
    "padded_columns_are_multiplied": {"scale_layout": "swizzled", "faults": (Fault("poison_scales", "w13_scales"),)},
    "alpha_as_bfloat16": {"recipe": "dense", "rows": 64},
    "one_experts_nan_is_everyones": {"experts": 12, "rows": 24, "faults": (Fault("nan_scale", "w13_alpha"),)},
    "other_backend_without_alpha": {"backend": "large"},
    "infinity_zeroes_activations": {"activations": "nvfp4", "faults": INF},
    "requantized_without_clamp": {"activations": "nvfp4", "recipe": "dense", "global_scale": "large"},
    "not_requantized": {"activations": "nvfp4", "recipe": "integer"},
    "requantized_under_the_scale_of_x": {"activations": "nvfp4", "recipe": "dense"},
    "scales_of_whole_fours": {"activations": "nvfp4", "recipe": "dense", "rows": 7},
}  # fmt: skip


def load(name):
    return getattr(importlib.import_module(f"moe_fuzz.planted.{get_planted(name).module}"), name)


def run(function, backend=None, **config):
    """(its result, the right one) on a case whose bits are known, unless the config says otherwise."""
    inputs = materialize(fp4_case_of(**{"recipe": "one_hot", **config}), 0)
    tensors = {name: tensor.clone() for name, tensor in inputs.plain.items()}
    operands = [tensors.pop(name) for name in ORDER]
    options = {**inputs.options, **tensors, **({"backend": backend} if backend else {})}
    return function(*operands, **options), reference(inputs)


def same(one, other):
    return torch.equal(one.nan_to_num(), other.nan_to_num()) and torch.equal(one.isnan(), other.isnan())


def test_they_are_in_the_catalog_under_names_of_their_own():
    assert all(get_planted(bug.name) is bug for bug in EXPERTS_NVFP4), "two bugs share a name"
    assert len([bug for bug in PLANTED if "nvfp4" in bug.op]) >= 40
    assert {"exact", "bound", "statistical", "finite", "fence", "backends"} <= {bug.check for bug in EXPERTS_NVFP4}
    assert {bug.name for bug in EXPERTS_NVFP4} - set(SHOWS) == {"padding_cleared_in_place", "alphas_read_in_fours"}


@EVERY
def test_the_docstring_names_the_upstream_issue(bug):
    assert bug.upstream in inspect.getdoc(load(bug.name))


@pytest.mark.parametrize("activations", ["as_given", "nvfp4"])
@pytest.mark.parametrize("layout", ["linear", "swizzled"])
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_what_they_are_made_of_is_right(activation, layout, activations):
    for recipe, on_input in (("one_hot", False), ("integer", True)):
        got, right = run(Fp4Layer.run, recipe=recipe, activation=activation, scale_layout=layout, bias="float32",
                         activations=activations, weight_on_input=on_input)  # fmt: skip
        assert same(got, right)


@pytest.mark.parametrize("name", SHOWS)
def test_each_shows_on_its_own_input(name):
    got, right = run(load(name), **SHOWS[name])
    assert not same(got, right)


def test_the_padding_of_the_caller_is_cleared():
    """And the result is right: it is the write that is wrong."""
    inputs = materialize(fp4_case_of(scale_layout="swizzled", recipe="one_hot",
                                     faults=(Fault("poison_scales", "w13_scales"),)), 0)  # fmt: skip
    tensors = {name: tensor.clone() for name, tensor in inputs.plain.items()}
    y = load("padding_cleared_in_place")(*(tensors[name] for name in ORDER), **inputs.options)
    assert same(y, reference(inputs))
    assert not torch.equal(tensors["w13_scales"], inputs.plain["w13_scales"])


@pytest.mark.interpreter
@pytest.mark.parametrize(("experts", "shows"), [(4, False), (5, True)])
def test_global_scales_are_read_in_fours(experts, shows):
    """Nothing is wrong with what comes of it: the fence alone sees the read. Here, its mask is looked at."""
    planted = importlib.import_module("moe_fuzz.planted.experts_nvfp4")
    held = torch.cat([torch.arange(1.0, experts + 1), torch.full((8,), -7.0)])
    out = torch.zeros(8)
    planted._copy_in_fours_kernel[(1,)](held, out, experts, BLOCK=8)
    assert torch.equal(out[:experts], held[:experts])
    copied = load("alphas_read_in_fours")
    got, right = run(copied, experts=experts)
    assert same(got, right)
    assert (-(-experts // 4) * 4 > experts) == shows
