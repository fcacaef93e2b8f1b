"""What a function of each op is given: by position, by keyword, in which spellings. Free of torch.

A function takes what its parameters name; what it does not name, it is never given, and its capabilities are cut down
to the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from moe_fuzz.contract import Capabilities

Cut = Callable[[Capabilities, Collection[str]], Capabilities]


@dataclass(frozen=True)
class Signature:
    """The arguments of an op."""

    positional: tuple[str, ...]  # in this order, whatever the function calls them
    spellings: Mapping[str, tuple[str, ...]]  # argument -> the names under which implementations take it
    optional: tuple[str, ...]  # arguments that not every case has
    cut: Cut  # (declared capabilities, arguments that the function takes by keyword) -> what is left of them

    def always_given(self, argument: str, can: Capabilities) -> bool:
        """Whether every case has a value for it, of those that a target of these capabilities is given."""
        if argument == "bias" and can.bias_required:
            return True
        if argument in ("x_global", "h_global") and can.activation_formats == ("nvfp4",):
            return True
        return argument not in self.optional


def _cut_common(can: Capabilities, takes: Collection[str]) -> Capabilities:
    return replace(can, out=can.out and "out" in takes, expert_map=can.expert_map and "expert_map" in takes)


def _cut_routing(can: Capabilities, takes: Collection[str]) -> Capabilities:
    can = replace(
        _cut_common(can, takes),
        renormalize=can.renormalize if "renormalize" in takes else can.renormalize[:1],
        bias=can.bias and "bias" in takes,
        scale=can.scale and "scale" in takes,
        is_padding=can.is_padding and "is_padding" in takes,
        n_shared=can.n_shared if "n_shared" in takes else 0,
        scorings=can.scorings if "scoring" in takes else can.scorings[:1],
    )
    if not can.group_score_by_bias and "group_score" not in takes:
        can = replace(can, group_scores=can.group_scores[:1])
    return can


def _cut_experts(can: Capabilities, takes: Collection[str]) -> Capabilities:
    return replace(
        _cut_common(can, takes),
        activations=can.activations if "activation" in takes else can.activations[:1],
        gate_layouts=can.gate_layouts if "gate_layout" in takes else can.gate_layouts[:1],
        biases=can.biases and {"b13", "b2"} <= set(takes),
        weight_on_input=can.weight_on_input and "apply_weight_on_input" in takes,
    )


def _cut_fp4(can: Capabilities, takes: Collection[str]) -> Capabilities:
    quantizes = {"activations", "x_global", "h_global"} <= set(takes)
    return replace(
        _cut_experts(can, takes),
        layouts=can.layouts if "scale_layout" in takes else can.layouts[:1],
        activation_formats=can.activation_formats if quantizes else can.activation_formats[:1],
        backends=can.backends if "backend" in takes else (),
    )


def _cut_layer(can: Capabilities, takes: Collection[str]) -> Capabilities:
    can = replace(_cut_routing(can, takes), expert_map=True)
    return replace(
        can,
        activations=can.activations if "activation" in takes else can.activations[:1],
        gate_layouts=can.gate_layouts if "gate_layout" in takes else can.gate_layouts[:1],
        biases=can.biases and {"b13", "b2"} <= set(takes),
        max_ranks=can.max_ranks if "ranks" in takes else 1,
        max_shards=can.max_shards if "shards" in takes else 1,
    )


def _cut_quantize(can: Capabilities, takes: Collection[str]) -> Capabilities:
    return replace(
        _cut_common(can, takes),
        layouts=can.layouts if "layout" in takes else can.layouts[:1],
        expert_scales=can.expert_scales and "expert_ids" in takes,
        activations=can.activations if "activation" in takes else (),
    )


def _cut_allreduce(can: Capabilities, takes: Collection[str]) -> Capabilities:
    return replace(
        _cut_common(can, takes), backends=can.backends if "backend" in takes else (),
        residual_in_place=can.residual_in_place and "out" in takes,
    )  # fmt: skip


_ROUTER: Mapping[str, tuple[str, ...]] = {
    "renormalize": ("renormalize", "norm_topk_prob"),
    "bias": ("bias", "correction_bias", "e_score_correction_bias"),
    "scale": ("scale", "routed_scaling_factor"),
    "is_padding": ("is_padding",),
    "padding": ("padding",),
    "out": ("out",),
}
_GROUPS: Mapping[str, tuple[str, ...]] = {
    "n_group": ("n_group", "num_expert_group"),
    "topk_group": ("topk_group",),
    "scoring": ("scoring", "scoring_func"),
    "group_score": ("group_score",),
    "n_shared": ("n_shared", "num_fused_shared_experts"),
    "expert_map": ("expert_map",),
}
_EXPERTS = {name: (name,) for name in ("expert_map", "activation", "gate_layout", "b13", "b2", "apply_weight_on_input",
                                       "out")}  # fmt: skip
_LAYER = {name: (name,) for name in ("is_padding", "ranks", "shards", "dialect", "scoring", "renormalize", "bias",
                                     "scale", "activation", "gate_layout", "b13", "b2", "observe", "out")}  # fmt: skip
_ROUTER_OPTIONAL = ("bias", "is_padding", "out", "expert_map")
_TOPK = Signature(("logits", "top_k"), _ROUTER, _ROUTER_OPTIONAL, _cut_routing)

SIGNATURES: Mapping[str, Signature] = {
    "topk_softmax": _TOPK,
    "topk_sigmoid": _TOPK,
    "grouped_topk": Signature(("logits", "top_k"), {**_ROUTER, **_GROUPS}, _ROUTER_OPTIONAL, _cut_routing),
    "align": Signature(
        ("ids", "block_size", "num_experts"),
        {"expert_map": ("expert_map",), "out": ("out",)},
        ("expert_map", "out"),
        _cut_common,
    ),
    "moe_layer": Signature(
        ("hidden", "gate", "w13", "w2", "top_k"), _LAYER, ("is_padding", "bias", "b13", "b2", "observe", "out"),
        _cut_layer,
    ),
    # (x, residual, gamma, eps, *, group, backend, out) -> (normed, residual_out).
    # group: kernels/allreduce_rmsnorm/group.py
    "allreduce_rmsnorm": Signature(
        ("x", "residual", "gamma", "eps"),
        {"group": ("group",), "backend": ("backend",), "out": ("out",)},
        ("backend", "out"),
        _cut_allreduce,
    ),
    "nvfp4_quantize": Signature(
        ("x", "global_scale"),
        {name: (name,) for name in ("layout", "expert_ids", "activation", "out")},
        ("expert_ids", "activation", "out"),
        _cut_quantize,
    ),
    "experts_bf16": Signature(
        ("x", "w13", "w2", "weights", "ids"), _EXPERTS, ("expert_map", "b13", "b2", "out"), _cut_experts
    ),
    "experts_nvfp4": Signature(
        ("x", "w13", "w2", "weights", "ids", "w13_scales", "w2_scales", "w13_alpha", "w2_alpha"),
        {**_EXPERTS, **{name: (name,) for name in ("scale_layout", "activations", "x_global", "h_global", "backend")}},
        ("expert_map", "b13", "b2", "out", "x_global", "h_global", "backend"), _cut_fp4,
    ),
}
