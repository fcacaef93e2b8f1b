"""The experts of a layer in plain PyTorch: a loop over experts, and grouped products. Worker side."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.reference.align import expert_of_slot
from moe_fuzz.reference.experts_bf16 import activate


def _product(a: Tensor, w: Tensor) -> Tensor:  # [n, D], [R, D] -> [n, R] float32
    """a @ w.T with nothing rounded on the way. A CPU's own product has no float32 result of 16-bit operands."""
    return torch.mm(a, w.t(), out_dtype=torch.float32) if a.is_cuda else a.float() @ w.float().t()


@declares(
    contract=Contract(deterministic=True, graph=False, slot="float32"),  # it asks the device which experts have tokens
    capabilities=Capabilities(compiles=False, dtypes=("bfloat16", "float16"), out=True, alignment=1),
)
def experts_bf16(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, *, expert_map: Tensor | None = None,
    activation: str = "silu", gate_layout: str = "first", b13: Tensor | None = None, b2: Tensor | None = None,
    apply_weight_on_input: bool = False, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """An expert after the other, as most model files have it. Shapes: `reference/experts_bf16.py`."""
    expert = expert_of_slot(ids, w13.shape[0], expert_map)  # [T, k]
    slots = torch.zeros((*ids.shape, x.shape[1]), dtype=torch.float32, device=x.device)  # [T, k, H]
    for e in expert.unique().tolist():
        if e < 0:
            continue
        token, slot = (expert == e).nonzero(as_tuple=True)
        weight = weights[token, slot][:, None]
        a = _product(x[token], w13[e])
        if apply_weight_on_input:
            a = a * weight
        if b13 is not None:
            a = a + b13[e].float()
        y = _product(activate(a, activation, gate_layout).to(x.dtype), w2[e])
        if b2 is not None:
            y = y + b2[e].float()
        slots[token, slot] = y if apply_weight_on_input else y * weight
    total = slots.sum(dim=1).to(x.dtype)
    return total if out is None else out.copy_(total)


@declares(
    contract=Contract(gate_up="dtype", activation="dtype", down="dtype", reduce="dtype", weight_dtype="dtype"),
    capabilities=Capabilities(
        compiles=False, dtypes=("bfloat16",), weight_on_input=False, strided=False, min_multiple_h=8, min_multiple_i=8
    ),
)
def grouped(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, *, expert_map: Tensor | None = None,
    activation: str = "silu", gate_layout: str = "first", b13: Tensor | None = None, b2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Slots sorted by expert, then `grouped_mm` twice, without a sync: what model code does that wants to be fast.

    The first product is rounded to the dtype of x before the activation. Shapes: `reference/experts_bf16.py`.
    """
    (tokens, top_k), experts = ids.shape, w13.shape[0]
    flat = ids.reshape(-1).long()  # [N]
    if expert_map is not None:
        flat = expert_map[flat].long()
        flat = torch.where(flat < 0, experts, flat)  # sorted last, where no group is
    expert, order = torch.sort(flat)  # [N]
    ends = torch.searchsorted(expert, torch.arange(experts, device=x.device), right=True).int()  # [E]
    a = torch.nn.functional.grouped_mm(x[order // top_k], w13.transpose(1, 2), offs=ends)  # [N, 2I]
    here = expert.clamp(max=experts - 1)
    if b13 is not None:
        a = a + b13[here]
    if activation == "silu" and gate_layout == "first":
        gate, up = a.chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up
    else:
        h = activate(a, activation, gate_layout)
    y = torch.nn.functional.grouped_mm(h.to(x.dtype), w2.transpose(1, 2), offs=ends)  # [N, H]
    if b2 is not None:
        y = y + b2[here]
    y = y * weights.reshape(-1)[order, None].to(x.dtype)
    if expert_map is not None:
        y = y.masked_fill((expert == experts)[:, None], 0.0)  # rows that no group has written
    slot = torch.empty_like(order)
    slot[order] = torch.arange(len(order), device=x.device)  # cheaper than a second sort
    return y[slot].view(tokens, top_k, x.shape[1]).sum(dim=1).to(x.dtype)
