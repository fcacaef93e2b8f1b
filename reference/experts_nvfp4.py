"""Reference of `experts_nvfp4`, in float64. The docstring is the contract of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fuzz.reference.align import expert_of_slot
from moe_fuzz.reference.experts_bf16 import _scaled, activate
from moe_fuzz.reference.experts_bf16 import check as check_layer
from moe_fuzz.reference.nvfp4 import BLOCK, E2M1, E4M3, nvfp4_quantize, unswizzle

SCALE_LAYOUTS = ("linear", "swizzled")
ACTIVATION_FORMATS = ("as_given", "nvfp4")
_SCALE_DTYPES = (torch.uint8, torch.float8_e4m3fn)
#: What each byte of two codes stands for, [256, 2], the low nibble first, and each byte of a scale, [256].
_PAIRS = torch.cat([E2M1, -E2M1]).double()[torch.stack([torch.arange(256) % 16, torch.arange(256) // 16], dim=1)]
_SCALES = torch.cat([E4M3, torch.tensor([torch.nan]), -E4M3, torch.tensor([torch.nan])]).double()


def experts_nvfp4(
    x: Tensor,  # [T, H] bfloat16 | float16, any strides; T >= 0
    w13: Tensor,  # [E, 2I, H/2] (relu2: [E, I, H/2]) uint8, two codes a byte, the first in the low nibble
    w2: Tensor,  # [E, H, I/2] uint8
    weights: Tensor,  # [T, k] float32, any strides
    ids: Tensor,  # [T, k] int32 | int64, any strides; k >= 1
    w13_scales: Tensor,  # [E, 2I, H/16], or swizzled [E, 2I to whole 128, H/16 to whole 4], uint8 | float8_e4m3fn
    w2_scales: Tensor,  # [E, H, I/16], or swizzled [E, H to whole 128, I/16 to whole 4]
    w13_alpha: Tensor,  # [E] float32: the inverse of an expert's global scale
    w2_alpha: Tensor,  # [E] float32
    *,
    scale_layout: str = "linear",  # "linear" | "swizzled"
    activations: str = "as_given",  # "as_given" | "nvfp4"
    x_global: Tensor | None = None,  # [1] float32: the global scale that x is quantized with, with "nvfp4"
    h_global: Tensor | None = None,  # [1] float32: and what lies between the products
    expert_map: Tensor | None = None,  # [G] int32: id -> expert in [0, E), or -1
    activation: str = "silu",
    gate_layout: str = "first",
    b13: Tensor | None = None,  # [E, 2I] (relu2: [E, I]), dtype of x or float32
    b2: Tensor | None = None,  # [E, H], dtype of x or float32
    apply_weight_on_input: bool = False,
    out: Tensor | None = None,  # [T, H], dtype of x, contiguous, overlapping no input
) -> Tensor:  # [T, H], dtype of x: `out` where it was given
    """`experts_bf16` with weights in NVFP4. H and I are multiples of 16. Codes, scales and alphas are contiguous.

    A weight is E2M1[code] * E4M3[scale of its block of 16 along H or I] * alpha[its expert]. A scale of NaN is a NaN of
        all its block. Scales lie as `reference/nvfp4.py::swizzle` has them, each expert by itself; their padding is
        never read, whatever it holds.
    With activations "nvfp4", x is what `nvfp4_quantize` leaves of it under x_global, and so is the activation's result,
        after it was rounded to the dtype of x, under h_global. A row with NaN or Inf loses them there (see that
        contract); it still changes no other row.
    All else is the contract of `reference/experts_bf16.py`: slots that are dropped, maps, activations, layouts of the
        gate, biases, weights of 0, stores.

    Raises ValueError for anything outside these shapes, dtypes and names.
    """
    check(x, w13, w2, weights, ids, w13_scales, w2_scales, w13_alpha, w2_alpha, scale_layout, activations, x_global,
          h_global, expert_map, activation, gate_layout, b13, b2, out)  # fmt: skip
    expert = expert_of_slot(ids, w13.shape[0], expert_map)  # [T, k]
    slots = x.new_zeros((*ids.shape, x.shape[1]), dtype=torch.float64)  # [T, k, H]
    rows = x.double() if x_global is None else _requantized(x, x_global)
    for e in expert.unique().tolist():
        if e < 0:
            continue
        token, slot = (expert == e).nonzero(as_tuple=True)
        weight = weights[token, slot].double()[:, None]
        a = rows[token] @ values(w13[e], w13_scales[e], scale_layout).t() * w13_alpha[e].double()  # [n, 2I]
        if apply_weight_on_input:
            a = _scaled(a, weight)
        if b13 is not None:
            a = a + b13[e].double()
        h = activate(a, activation, gate_layout).to(x.dtype)  # [n, I]
        h = h.double() if h_global is None else _requantized(h, h_global)
        y = h @ values(w2[e], w2_scales[e], scale_layout).t() * w2_alpha[e].double()  # [n, H]
        if b2 is not None:
            y = y + b2[e].double()
        if not apply_weight_on_input:
            y = _scaled(y, weight)
        slots[token, slot] = y.to(x.dtype).double()
    y = slots.sum(dim=1).to(x.dtype)
    return y if out is None else out.copy_(y)


def values(codes: Tensor, scales: Tensor, layout: str = "linear") -> Tensor:
    """float64 [R, D]: E2M1 times E4M3, without any global scale. codes: [R, D/2]; scales: as the layout has them."""
    rows, blocks = codes.shape[0], codes.shape[1] * 2 // BLOCK
    if layout == "swizzled":
        scales = unswizzle(scales, rows, blocks)
    value = _PAIRS.to(codes.device)[codes.int()]  # [R, D/2, 2]
    scale = _SCALES.to(codes.device)[scales.view(torch.uint8).int()]
    return (value.view(rows, blocks, BLOCK) * scale[:, :, None]).flatten(1)


def _requantized(rows: Tensor, global_scale: Tensor) -> Tensor:
    """float64: what NVFP4 leaves of these rows."""
    found = values(*nvfp4_quantize(rows, global_scale))
    usable = (global_scale >= 2.0**-126) & (global_scale < torch.inf)  # where it is not, all codes are 0
    return found / torch.where(usable, global_scale, 1.0).double()


def check(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, w13_scales: Tensor, w2_scales: Tensor,
    w13_alpha: Tensor, w2_alpha: Tensor, scale_layout: str, activations: str, x_global: Tensor | None,
    h_global: Tensor | None, expert_map: Tensor | None, activation: str, gate_layout: str, b13: Tensor | None,
    b2: Tensor | None, out: Tensor | None,
) -> None:  # fmt: skip
    """ValueError for shapes, dtypes, devices and names outside the contract."""
    if scale_layout not in SCALE_LAYOUTS:
        raise ValueError(f"scale_layout must be one of {', '.join(SCALE_LAYOUTS)}, not {scale_layout!r}")
    if activations not in ACTIVATION_FORMATS:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATION_FORMATS)}, not {activations!r}")
    for name, codes in (("w13", w13), ("w2", w2)):
        if codes.dim() != 3 or codes.dtype != torch.uint8 or codes.shape[2] % 8 or not codes.numel():
            raise ValueError(f"{name} must be uint8 [E, rows, columns/2], the columns a multiple of 16, "
                             f"not {list(codes.shape)} {codes.dtype}")
    # the rest of a layer, with weights that stand for the values of these
    one = x if x.numel() else x.new_empty(1)  # nobody reads it; nothing is allocated
    full13, full2 = (one.as_strided((*codes.shape[:2], codes.shape[2] * 2), (0, 0, 0)) for codes in (w13, w2))
    check_layer(x, full13, full2, weights, ids, expert_map, activation, gate_layout, b13, b2, out)
    experts, quantizes = w13.shape[0], activations == "nvfp4"

    def scales_of(codes: Tensor) -> tuple[int, ...]:
        rows, columns = codes.shape[1], codes.shape[2] * 2 // BLOCK
        if scale_layout == "swizzled":
            return experts, rows + -rows % 128, columns + -columns % 4
        return experts, rows, columns

    for name, tensor, shape, dtypes in (
        ("w13", w13, tuple(w13.shape), (torch.uint8,)),
        ("w2", w2, tuple(w2.shape), (torch.uint8,)),
        ("w13_scales", w13_scales, scales_of(w13), _SCALE_DTYPES),
        ("w2_scales", w2_scales, scales_of(w2), _SCALE_DTYPES),
        ("w13_alpha", w13_alpha, (experts,), (torch.float32,)),
        ("w2_alpha", w2_alpha, (experts,), (torch.float32,)),
        ("x_global", x_global, (1,), (torch.float32,)),
        ("h_global", h_global, (1,), (torch.float32,)),
    ):
        if name.endswith("_global") and (tensor is not None) != quantizes:
            raise ValueError(f"{name} must be given with activations='nvfp4', and only then")
        if tensor is not None and (
            tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != x.device
            or not tensor.is_contiguous()
        ):  # fmt: skip
            raise ValueError(f"{name} must be contiguous {list(shape)} {' or '.join(map(str, dtypes))} on {x.device}, "
                             f"not {list(tensor.shape)} {tensor.dtype} on {tensor.device}")
