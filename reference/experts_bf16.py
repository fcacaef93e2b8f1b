"""Reference of `experts_bf16`, in float64. The docstring is the contract of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fuzz.reference.align import expert_of_slot

DTYPES = (torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu", "relu2", "swiglu_oai")
GATE_LAYOUTS = ("first", "up_first", "interleaved")


def experts_bf16(
    x: Tensor,  # [T, H] bfloat16 | float16, any strides; T >= 0
    w13: Tensor,  # [E, 2I, H] (relu2: [E, I, H]), dtype of x, any strides
    w2: Tensor,  # [E, H, I], dtype of x, any strides
    weights: Tensor,  # [T, k] float32, any strides
    ids: Tensor,  # [T, k] int32 | int64, any strides; k >= 1
    *,
    expert_map: Tensor | None = None,  # [G] int32: id -> expert in [0, E), or -1
    activation: str = "silu",
    gate_layout: str = "first",
    b13: Tensor | None = None,  # [E, 2I] (relu2: [E, I]), dtype of x or float32
    b2: Tensor | None = None,  # [E, H], dtype of x or float32
    apply_weight_on_input: bool = False,
    out: Tensor | None = None,  # [T, H], dtype of x, contiguous, overlapping no input
) -> Tensor:  # [T, H], dtype of x: `out` where it was given
    """A layer of experts: y[t] = sum over j of weights[t, j] * (act(x[t] @ w13[e].T + b13[e]) @ w2[e].T + b2[e]).

    The expert e of slot (t, j) is ids[t, j], or what `expert_map` says of it. A slot is dropped when its id is not in
        [0, E), or, with a map, not in [0, G) or mapped outside [0, E). It contributes exactly 0 and touches nothing,
        whatever its weight and its x hold, NaN too; a token with no other slots gets 0. Partial results of ranks, each
        with its own experts and map, sum to the whole. A map is made once, by the server: it names one expert at least
        (a rank without any runs none of this); what an entry outside [-1, E) does, or two ids that share an expert, is
        nobody's promise; this reference drops the one, and adds up the other.
    An id that stands twice in a row is two slots, and both count. No token changes another's y. What the weights and
        biases of an expert hold, NaN and infinity too, reaches the tokens that name it, and no other.
    Activations of gate g and up-projection p: `silu` silu(g) * p; `gelu` gelu(g) * p, with erf; `swiglu_oai`
        c * sigmoid(1.702 c) * (q + 1) with c = min(g, 7) and q = p clamped to [-7, 7]; `relu2` max(p, 0)^2, without a
        gate: w13 and b13 then hold the I rows of p. A NaN of g or p is a NaN of the result.
    Rows of w13: `first` gate rows 0..I-1, then those of p; `up_first` p before the gate; `interleaved` g0 p0 g1 p1 ...
    With `apply_weight_on_input` the weight multiplies x (so the product with w13, before b13) and nothing else.
    A weight of 0 makes that product 0 where it is finite; where it is not, 0 (as here) or NaN, in its own row.
    Stores: sums are float32 or better; the activation's result, the weighted output of each slot, and y are each
        rounded to the dtype of x. A target may round elsewhere, and declares it; or less, if it declares nothing.

    Raises ValueError for anything outside these shapes, dtypes and names.
    """
    check(x, w13, w2, weights, ids, expert_map, activation, gate_layout, b13, b2, out)
    expert = expert_of_slot(ids, w13.shape[0], expert_map)  # [T, k]
    slots = x.new_zeros((*ids.shape, x.shape[1]), dtype=torch.float64)  # [T, k, H]
    for e in expert.unique().tolist():
        if e < 0:
            continue
        token, slot = (expert == e).nonzero(as_tuple=True)
        weight = weights[token, slot].double()[:, None]
        a = x[token].double() @ w13[e].double().t()  # [n, 2I]
        if apply_weight_on_input:
            a = _scaled(a, weight)
        if b13 is not None:
            a = a + b13[e].double()
        h = activate(a, activation, gate_layout).to(x.dtype).double()  # [n, I]
        y = h @ w2[e].double().t()  # [n, H]
        if b2 is not None:
            y = y + b2[e].double()
        if not apply_weight_on_input:
            y = _scaled(y, weight)
        slots[token, slot] = y.to(x.dtype).double()
    y = slots.sum(dim=1).to(x.dtype)
    return y if out is None else out.copy_(y)


def activate(a: Tensor, activation: str, gate_layout: str) -> Tensor:  # [..., 2I] -> [..., I]
    """The activation of both halves of the first product."""
    if activation == "relu2":
        return a.relu().square()
    if gate_layout == "interleaved":
        gate, up = a[..., ::2], a[..., 1::2]
    else:
        gate, up = a.chunk(2, dim=-1) if gate_layout == "first" else reversed(a.chunk(2, dim=-1))
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    if activation == "gelu":
        return torch.nn.functional.gelu(gate) * up
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * (1.702 * gate).sigmoid() * (up + 1.0)


def _scaled(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).masked_fill(weight == 0.0, 0.0)


def check(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None,
    activation: str, gate_layout: str, b13: Tensor | None, b2: Tensor | None, out: Tensor | None,
) -> None:  # fmt: skip
    """ValueError for shapes, dtypes, devices and names outside the contract."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if gate_layout not in GATE_LAYOUTS:
        raise ValueError(f"gate_layout must be one of {', '.join(GATE_LAYOUTS)}, not {gate_layout!r}")
    if x.dim() != 2 or x.dtype not in DTYPES or not x.shape[1]:
        raise ValueError(f"x must be [T, H] in bfloat16 or float16 with H >= 1, not {list(x.shape)} {x.dtype}")
    if w2.dim() != 3 or not w2.numel():
        raise ValueError(f"w2 must be [E, H, I], each at least 1, not {list(w2.shape)}")
    (tokens, hidden), (experts, _, inter) = x.shape, w2.shape
    if ids.dim() != 2 or ids.shape[0] != tokens or ids.shape[1] < 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be [{tokens}, k] in int32 or int64 with k >= 1, not {list(ids.shape)} {ids.dtype}")
    rows = inter if activation == "relu2" else 2 * inter
    same, free = (x.dtype,), (x.dtype, torch.float32)
    for name, tensor, shape, dtypes in (
        ("w13", w13, (experts, rows, hidden), same),
        ("w2", w2, (experts, hidden, inter), same),
        ("weights", weights, tuple(ids.shape), (torch.float32,)),
        ("b13", b13, (experts, rows), free),
        ("b2", b2, (experts, hidden), free),
        ("out", out, (tokens, hidden), same),
        ("ids", ids, tuple(ids.shape), (ids.dtype,)),
        ("expert_map", expert_map, (expert_map.numel() if expert_map is not None else 0,), (torch.int32,)),
    ):
        if tensor is not None and (
            tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != x.device
        ):
            raise ValueError(f"{name} must be {list(shape)} {' or '.join(map(str, dtypes))} on {x.device}, "
                             f"not {list(tensor.shape)} {tensor.dtype} on {tensor.device}")
    if expert_map is not None and not len(expert_map):
        raise ValueError("expert_map must map at least one id")
    if out is not None and not out.is_contiguous():
        raise ValueError("out must be contiguous; write into a contiguous buffer and copy")
