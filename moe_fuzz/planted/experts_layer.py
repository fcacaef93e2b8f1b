"""A right layer of experts in plain torch, in pieces that a planted bug replaces one of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from moe_fuzz.mirror import uploaded
from moe_fuzz.planted.layer_parts import by_expert
from moe_fuzz.reference.align import expert_of_slot
from moe_fuzz.reference.experts_bf16 import activate
from moe_fuzz.reference.experts_nvfp4 import values
from moe_fuzz.reference.nvfp4 import nvfp4_quantize, unswizzle


class Layer:
    """Contract and shapes: `reference/experts_bf16.py`. Sums are those of torch in float32.

    On the host: a hundred small steps an expert take a GPU far longer, most of all one that processes share, and what
    is wrong with the numbers is wrong there too. What is wrong with memory shows where that is: such a bug says
    `on_device`, or stands in `given`, which puts the result where it belongs.
    """

    on_device = False

    def __init__(
        self, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, *, expert_map: Tensor | None = None,
        activation: str = "silu", gate_layout: str = "first", b13: Tensor | None = None, b2: Tensor | None = None,
        apply_weight_on_input: bool = False, out: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.x, self.w13, self.w2, self.weights, self.ids = x, w13, w2, weights, ids
        self.expert_map, self.activation, self.gate_layout = expert_map, activation, gate_layout
        self.b13, self.b2, self.on_input, self.out = b13, b2, apply_weight_on_input, out
        self.experts, self.hidden, self.inter = w2.shape
        self.top_k = ids.shape[1]

    @classmethod
    def run(cls, *tensors: Tensor, **options: Any) -> Tensor:
        layer = cls(*tensors, **options)
        if cls.on_device:
            return layer.given(layer.result())
        values = _on_host([*tensors, *options.values()])
        given = dict(zip(options, values[len(tensors) :], strict=True)) | {"out": None}
        with _disable_current_modes():  # to see what is allocated costs as much as the layer; none of it is the GPU's
            y = cls(*values[: len(tensors)], **given).result()
        return layer.given(uploaded(y, layer.x.device) if layer.x.is_cuda else y)

    def result(self) -> Tensor:
        expert = self.expert_of_slots()  # [T, k], below 0: none
        return self.combine(self.slots(expert), expert)

    def expert_of_slots(self) -> Tensor:
        return expert_of_slot(self.ids, self.experts, self.expert_map)

    def slots(self, expert: Tensor) -> Tensor:
        """The weighted outputs of the slots, dtype of x [T, k, H]; those of dropped slots are unset."""
        slots = self.x.new_empty((*expert.shape, self.hidden))
        for e, at in by_expert(expert):
            token, slot = at // self.top_k, at % self.top_k
            slots[token, slot] = self.of_expert(e, token, slot)
        return slots

    def present(self, expert: Tensor) -> list[int]:
        return [int(e) for e in expert.unique().tolist() if e >= 0]

    def of_expert(self, e: int, token: Tensor, slot: Tensor) -> Tensor:
        """[n, H] for the n slots of one expert."""
        weight = self.weight(token, slot)[:, None]
        return self.down(e, self.gate_up(e, token, weight), weight)

    def weight(self, token: Tensor, slot: Tensor) -> Tensor:
        return self.weights[token, slot]

    def gate_up(self, e: int, token: Tensor, weight: Tensor) -> Tensor:
        """The activation's result, dtype of x [n, I]."""
        a = self.up_product(e, token)
        if self.on_input:
            a = scaled(a, weight)
        if self.b13 is not None:
            a = a + self.b13[e].float()
        return self.activate(a).to(self.x.dtype)

    def down(self, e: int, h: Tensor, weight: Tensor) -> Tensor:
        y = self.down_product(e, h)
        if self.b2 is not None:
            y = y + self.bias(e)
        return (y if self.on_input else scaled(y, weight)).to(self.x.dtype)

    def up_product(self, e: int, token: Tensor) -> Tensor:
        return self.first(self.x[token], self.w13[e])

    def down_product(self, e: int, h: Tensor) -> Tensor:
        return self.second(h, self.w2[e])

    def first(self, x: Tensor, w: Tensor) -> Tensor:
        return self.product(x, w)

    def second(self, h: Tensor, w: Tensor) -> Tensor:
        return self.product(h, w)

    def product(self, a: Tensor, w: Tensor) -> Tensor:
        return a.float() @ w.float().t()

    def activate(self, a: Tensor) -> Tensor:
        return activate(a, self.activation, self.gate_layout)

    def bias(self, e: int) -> Tensor:
        assert self.b2 is not None
        return self.b2[e].float()

    def combine(self, slots: Tensor, expert: Tensor) -> Tensor:
        """The sum over the slots of each token, dtype of x [T, H]."""
        return slots.masked_fill((expert < 0)[:, :, None], 0.0).float().sum(dim=1).to(self.x.dtype)

    def given(self, y: Tensor) -> Tensor:
        return y if self.out is None else self.out.copy_(y)


def _on_host(values: Sequence[Any]) -> list[Any]:
    """The values, with tensors copied to the host, for which the device is waited for once."""
    copies = [_enqueued(value) if isinstance(value, Tensor) and value.is_cuda else value for value in values]
    if any(copy is not value for copy, value in zip(copies, values, strict=True)):
        torch.cuda.current_stream().synchronize()
    return copies


def _enqueued(tensor: Tensor) -> Tensor:
    """A copy in memory of the host that is pinned: only into such one is copied without a wait. It is there after one.
    """
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


class Fp4Layer(Layer):
    """Contract and shapes: `reference/experts_nvfp4.py`."""

    def __init__(
        self, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, w13_scales: Tensor, w2_scales: Tensor,
        w13_alpha: Tensor, w2_alpha: Tensor, *, scale_layout: str = "linear", activations: str = "as_given",
        x_global: Tensor | None = None, h_global: Tensor | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(x, w13, w2, weights, ids, **options)
        self.inter = 2 * w2.shape[2]
        self.codes = {"w13": w13, "w2": w2}
        self.tables = {"w13": w13_scales, "w2": w2_scales}
        self.alphas = {"w13": w13_alpha, "w2": w2_alpha}
        self.swizzled, self.quantizes = scale_layout == "swizzled", activations == "nvfp4"
        self.globals = {"w13": x_global, "w2": h_global}  # of what is multiplied with either
        self._shown: Tensor | None = None
        self._linear: dict[str, Tensor] = {}

    def up_product(self, e: int, token: Tensor) -> Tensor:
        return self.first(self.shown(token), self.decoded("w13", e)) * self.factor("w13", e)

    def shown(self, token: Tensor) -> Tensor:
        """What is multiplied of these tokens: made of all at once, as no row hangs on another."""
        if self._shown is None:
            self._shown = self.left("w13", self.x)
        return self._shown[token]

    def slots(self, expert: Tensor) -> Tensor:
        slots = self.x.new_empty((*expert.shape, self.hidden))
        chosen = [(e, at // self.top_k, at % self.top_k) for e, at in by_expert(expert)]
        between = [self.gate_up(e, token, self.weight(token, slot)[:, None]) for e, token, slot in chosen]
        for (e, token, slot), h in zip(chosen, self.kept(between), strict=True):
            slots[token, slot] = self.down(e, h, self.weight(token, slot)[:, None])
        return slots

    def kept(self, between: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is multiplied of the activation's results of each expert [n, I]: it too is made of all at once."""
        if not between:
            return between
        return self.left("w2", torch.cat(list(between))).split([len(h) for h in between])

    def down_product(self, e: int, h: Tensor) -> Tensor:
        return self.second(h, self.decoded("w2", e)) * self.factor("w2", e)

    def decoded(self, name: str, e: int) -> Tensor:
        """float32 [R, C] without the global scale."""
        codes, scales = self.codes[name][e], self.scales(name, e)
        return values(codes, scales).float()

    def scales(self, name: str, e: int) -> Tensor:
        """uint8 [R, C/16] of an expert."""
        if not self.swizzled:
            return self.tables[name][e]
        if name not in self._linear:  # of all experts at once: tables of whole tiles lie one behind the other
            table, codes = self.tables[name].view(torch.uint8), self.codes[name]
            plain = unswizzle(table.flatten(0, 1), table.shape[0] * table.shape[1], table.shape[2])
            self._linear[name] = plain.view(table.shape)[:, : codes.shape[1], : codes.shape[2] // 8]
        return self._linear[name][e]

    def factor(self, name: str, e: int) -> Tensor:
        given, alpha = self.globals[name], self.alphas[name][e]
        if given is None:
            return alpha
        return torch.where((given >= 2.0**-126) & (given < torch.inf), alpha / given, alpha)

    def left(self, name: str, rows: Tensor) -> Tensor:
        """What is multiplied of these rows, without the global scale."""
        given = self.globals[name]
        return rows if given is None else self.quantized(rows, given)

    def quantized(self, rows: Tensor, given: Tensor) -> Tensor:
        return values(*nvfp4_quantize(rows, given)).to(rows.dtype)


class Capturable(Layer):
    """Every expert on every token, so that no shape hangs on the ids: a graph can be captured. For few experts."""

    on_device = True

    def slots(self, expert: Tensor) -> Tensor:
        tokens = torch.arange(len(expert), device=self.x.device)
        slots = torch.zeros((*expert.shape, self.hidden), dtype=self.x.dtype, device=self.x.device)
        for j in range(self.top_k):
            weight = self.weights[:, j, None]
            for e in range(self.experts):
                y = self.down(e, self.gate_up(e, tokens, weight), weight)
                slots[:, j] = torch.where((expert[:, j] == e)[:, None], y, slots[:, j])
        return slots


def scaled(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).masked_fill(weight == 0.0, 0.0)


def halves(a: Tensor, w: Tensor) -> Tensor:
    """The same product, summed up in two parts: other bits."""
    middle = max(1, a.shape[1] // 3)
    a, w = a.float(), w.float()
    return a[:, middle:] @ w[:, middle:].t() + a[:, :middle] @ w[:, :middle].t()
