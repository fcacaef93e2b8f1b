"""The activations in float64, and how far a float32 one may be off. Derived in docs/numerics.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fuzz.checks.experts.rounding import TINY, U

_STEEP = 1.702
_UNDERFLOW = 2.0**-119  # what |g| / (1 + exp(-g)) may lose where exp overflows or its reciprocal is subnormal


def _silu(g: Tensor) -> Tensor:
    return g * torch.sigmoid(g)


def _gelu(g: Tensor) -> Tensor:
    return 0.5 * g * torch.erfc(g * -math.sqrt(0.5))


def _clamped(g: Tensor) -> Tensor:
    c = g.clamp(max=7.0)
    return c * torch.sigmoid(_STEEP * c)


def _relu2(p: Tensor) -> Tensor:
    return p.clamp(min=0.0).square()


@dataclass(frozen=True)
class Curve:
    """The function of the gate (relu2: of p). It falls up to `bottom` and rises from there on."""

    of: Callable[[Tensor], Tensor]
    bottom: float
    exponent: float = 0.0  # units of roundoff per unit of -g: what the exponential's argument loses
    absolute: float = 0.0  # units of roundoff of |g|: where 1 + erf(g) cancels
    exponential: bool = True


#: The minima solve 1 + g(1 - s(g)) = 0 and, for gelu, Φ(g) + gφ(g) = 0.
CURVES = {
    "silu": Curve(_silu, -1.2784645427610738, exponent=2.0),
    "gelu": Curve(_gelu, -0.7517915247051603, absolute=8.0),
    "swiglu_oai": Curve(_clamped, -1.2784645427610738 / _STEEP, exponent=4.0 * _STEEP),
    "relu2": Curve(_relu2, 0.0, exponential=False),
}


def halves(a: Tensor, activation: str, gate_layout: str) -> tuple[Tensor, Tensor | None]:
    """Gate and up-projection [..., I] of the first product [..., 2I]; (p, None) where there is no gate."""
    if activation == "relu2":
        return a, None
    if gate_layout == "interleaved":
        return a[..., ::2], a[..., 1::2]
    one, other = a.chunk(2, dim=-1)
    return (one, other) if gate_layout == "first" else (other, one)


def spread(curve: Curve, g: Tensor, error: Tensor, at: Tensor) -> Tensor:
    """max |f(v) - f(g)| over v in g ± error: at an end of the interval, or at the bottom where that lies inside. at:
    f(g)."""
    ends = torch.stack([g - error, g + error])
    inside = (ends[0] < curve.bottom) & (curve.bottom < ends[1])
    # All at once, since small tensors cost what their operations cost to launch. Where the bottom does not lie inside,
    # an end stands for it. It rarely does: a host, which has the answer, asks first.
    if inside.device.type != "cpu" or bool(inside.any()):
        ends = torch.cat([ends, torch.where(inside, curve.bottom, ends[0])[None]])
    return curve.of(ends).sub_(at).abs_().amax(dim=0)


def activated(activation: str, gate: Tensor, up: Tensor | None, e_gate: Tensor, e_up: Tensor | None,
              sizes: tuple[Tensor, Tensor | None], u_op: float, floor: float,
              tanh: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """h; how far what a target computes from gate ± e_gate and up ± e_up may be from it, before it is stored; and the
    curve at the gate.

    sizes: |gate| + e_gate, and of up.
    u_op: unit roundoff of the dtype to which each operation but the last is rounded beyond float32; 0 for none.
    floor: the absolute error of such a rounding.
    tanh: sigmoids are made of 0.5 tanh(z / 2) + 0.5, which has an absolute accuracy only.
    """
    curve = CURVES[activation]
    f = curve.of(gate)
    d = spread(curve, gate, e_gate, f)
    if up is None or e_up is None:
        return f, (f + d).mul_(2 * U).add_(d).add_(TINY), f
    size_gate, largest = sizes
    if activation == "swiglu_oai":
        factor = up.clamp(-7.0, 7.0) + 1.0
        e_factor = torch.maximum(((up + e_up).clamp(-7.0, 7.0) + 1.0 - factor).abs(),
                                 (factor - 1.0 - (up - e_up).clamp(-7.0, 7.0)).abs())  # fmt: skip
    else:
        factor, e_factor = up, e_up
    if largest is None or factor is not up:
        largest = factor.abs().add_(e_factor)
    h = f * factor
    here = f.abs()
    size = (here + d).mul_(largest)  # at least |h|, and what is computed in its place
    below = (e_gate - gate).clamp_(min=0.0)  # how far a gate that a target has may lie below 0
    lost = (d * largest).addcmul_(here, e_factor).addcmul_(below.mul(curve.exponent * U).add_(17 * U), size)
    lost.add_(largest, alpha=_UNDERFLOW).add_(TINY)
    if curve.absolute:
        lost.addcmul_(size_gate, largest, value=curve.absolute * U)
    if tanh and curve.exponent:
        lost.addcmul_(size_gate, largest, value=2 * U)
    if u_op:  # silu and gelu: the curve's own result; swiglu_oai: 1.702 c, the sigmoid, c times it, and q + 1
        rounded = 1.0 if activation != "swiglu_oai" else 3.5 + _STEEP * below
        lost = lost + 1.02 * rounded * u_op * size + 3 * floor * (1 + size_gate) * largest
    return h, lost, f
