"""Calls that make every kernel of ours in every variant: what `ahead` compiles. Tensors of the host, set to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from moe_fuzz.kernels.experts_bf16 import blocks as bf16
from moe_fuzz.kernels.experts_bf16 import experts_bf16
from moe_fuzz.kernels.experts_nvfp4 import blocks, experts_nvfp4
from moe_fuzz.kernels.grouped_topk import grouped_topk
from moe_fuzz.kernels.nvfp4 import nvfp4_quantize

Call = tuple[str, Callable[[], Any]]
#: Slots that a program groups itself, 16 and up to 128; `align` in one launch and in two. With sizes that no block
#: divides, of which 16 experts' weights have 5 blocks a row, and with such that all divide.
_SHAPES = ((2, 8, 17, 256, 512), (41, 3, 5, 208, 80), (333, 2, 3, 528, 272), (700, 8, 60, 256, 256))
_GATES = (("silu", "up_first"), ("gelu", "first"), ("swiglu_oai", "interleaved"), ("relu2", "first"))


def quantizer() -> Iterator[Call]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in ("linear", "swizzled"):
            for rows, columns in ((1, 32), (300, 416), (1000, 5760)):
                x, scale = torch.empty(rows, columns, dtype=dtype), torch.ones(3)
                for activation in (None, "silu"):
                    name = f"{rows} x {columns} {dtype} {layout} {activation}"
                    yield name, partial(nvfp4_quantize, x, scale[:1], layout, activation=activation)
        ids = torch.zeros(rows, dtype=torch.int64)
        yield f"{dtype} by expert", partial(nvfp4_quantize, x, scale.bfloat16(), layout, expert_ids=ids)
        yield f"{dtype} strides", partial(nvfp4_quantize, torch.empty(300, 480, dtype=dtype)[::2, ::2], scale[1:2])


def layer(
    tokens: int, top_k: int, experts: int, hidden: int, inter: int, *, dtype: torch.dtype = torch.bfloat16,
    activation: str = "silu", bias: torch.dtype | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of a call of `experts_nvfp4` with scales in rows."""
    rows = inter if activation == "relu2" else 2 * inter

    def unset(*shape: int, of: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=of)

    made: dict[str, Any] = {
        "x": unset(tokens, hidden, of=dtype), "w13": unset(experts, rows, hidden // 2),
        "w2": unset(experts, hidden, inter // 2), "weights": unset(tokens, top_k, of=torch.float32),
        "ids": unset(tokens, top_k, of=torch.int32), "w13_scales": unset(experts, rows, hidden // 16),
        "w2_scales": unset(experts, hidden, inter // 16), "w13_alpha": torch.ones(experts),
        "w2_alpha": torch.ones(experts), "activation": activation, **options,
    }  # fmt: skip
    if bias is not None:
        made |= {"b13": unset(experts, rows, of=bias), "b2": unset(experts, hidden, of=bias)}
    return made


def swizzled(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same with scales in tiles of 128 rows and 4 columns."""
    made = {**arguments, "scale_layout": "swizzled"}
    for name in ("w13_scales", "w2_scales"):
        experts, rows, columns = arguments[name].shape
        made[name] = torch.empty((experts, rows + -rows % 128, columns + -columns % 4), dtype=torch.uint8)
    return made


def plans_nvfp4() -> Iterator[Call]:
    """Each plan with the numbers of slots that it is made for and with others, as tests force them."""
    for nth, plan in enumerate(blocks.EVERY_PLAN):
        for shape in _SHAPES if nth < 3 else _SHAPES[2:]:
            given = layer(*shape)
            yield f"plan {nth} {shape}", partial(experts_nvfp4, **given, plan=plan, backend="small")
        for dtype in (torch.bfloat16, torch.float16) if nth == 0 else (torch.bfloat16,):
            given = swizzled(layer(*_SHAPES[2], dtype=dtype))
            yield f"plan {nth} swizzled {dtype}", partial(experts_nvfp4, **given, plan=plan, backend="small")


def options_nvfp4() -> Iterator[Call]:
    for tokens in (5, 500):
        for nth, (activation, gate_layout) in enumerate(_GATES):
            one_way = (nth + (tokens > 5)) % 2 == 0
            given = layer(
                tokens, 4, 8, 160, 96, activation=activation, gate_layout=gate_layout, apply_weight_on_input=one_way,
                bias=torch.bfloat16 if one_way else torch.float32, dtype=torch.bfloat16 if one_way else torch.float16,
            )  # fmt: skip
            for backend in blocks.BACKENDS:
                yield f"{tokens} {activation} {backend}", partial(experts_nvfp4, **given, backend=backend)
        given = layer(tokens, 4, 8, 160, 96)
        given["ids"] = given["ids"].long()
        given["expert_map"] = torch.zeros(16, dtype=torch.int32)
        for backend in blocks.BACKENDS:
            yield f"{tokens} map {backend}", partial(experts_nvfp4, **given, backend=backend)
        one = torch.ones(1)
        for given in (layer(tokens, 2, 5, 272, 144), swizzled(layer(tokens, 1, 5, 16, 16, dtype=torch.float16))):
            yield f"{tokens} nvfp4", partial(experts_nvfp4, **given, activations="nvfp4", x_global=one, h_global=one)


def scaled_nvfp4() -> Iterator[Call]:
    """For sm_100 alone."""
    one: dict[str, Any] = {"activations": "nvfp4", "x_global": torch.ones(1), "h_global": torch.ones(1),
                           "backend": blocks.SCALED}  # fmt: skip
    for shape, activation in ((_SHAPES[0], "silu"), (_SHAPES[2], "relu2")):
        for given in (layer(*shape, activation=activation), swizzled(layer(*shape, activation=activation))):
            yield f"{shape} {activation} {given.get('scale_layout')}", partial(experts_nvfp4, **given, **one)


def plans_bf16() -> Iterator[Call]:
    for nth, plan in enumerate(bf16.PLANS):
        for tokens, top_k, experts, hidden, inter in _SHAPES if nth < 2 else _SHAPES[2:]:
            x = torch.empty(tokens, hidden, dtype=torch.bfloat16)
            w13, w2 = x.new_empty(experts, 2 * inter, hidden), x.new_empty(experts, hidden, inter)
            ids = torch.zeros(tokens, top_k, dtype=torch.int32)
            yield (f"plan {nth} {tokens} {hidden}",
                   partial(experts_bf16, x, w13, w2, torch.empty(tokens, top_k), ids, plan=plan))  # fmt: skip


def grouped() -> Iterator[Call]:
    """Groups that are whole lanes of a warp, of models and of none, and such that are not."""
    for dtype in (torch.bfloat16, torch.float32):
        for experts, n_group, kept, top_k, scoring, by in (
            (256, 8, 4, 8, "sigmoid", "top2_sum"), (160, 8, 3, 6, "softmax", "max"),
            (96, 4, 3, 5, "softmax", "top2_sum"), (384, 8, 4, 8, "softmax", "top2_sum"),
            (60, 4, 2, 4, "sigmoid", "max"),
        ):  # fmt: skip
            logits, numbers = torch.empty(9, experts, dtype=dtype), torch.zeros(experts)
            given = partial(grouped_topk, logits, top_k, n_group=n_group, topk_group=kept, scoring=scoring,
                            group_score=by)  # fmt: skip
            yield f"{experts} in {n_group} {dtype}", partial(given, n_shared=2, expert_map=numbers.int())
            yield f"{experts} in {n_group} {dtype} bias", partial(given, bias=numbers, renormalize=True)


GROUPS: Mapping[str, Callable[[], Iterator[Call]]] = {
    "grouped_topk": grouped,
    "nvfp4_quantize": quantizer, "experts_nvfp4": plans_nvfp4, "experts_nvfp4 options": options_nvfp4,
    "experts_bf16": plans_bf16, "experts_nvfp4 scaled": scaled_nvfp4,
}  # fmt: skip
