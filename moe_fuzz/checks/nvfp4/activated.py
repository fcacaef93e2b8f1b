"""What a fused activation may hand to the quantizer: float32 arithmetic, then the store in the dtype of x."""

from __future__ import annotations

import torch

_U = 2.0**-24
_UNDERFLOW = 2.0**-119  # where the exponential overflows, or its reciprocal is subnormal


def activated_span(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest result of silu(gate) * up for x [M, 2K], the gate first: [M, K] in the dtype of x.

    As in docs/numerics.md: a float32 exponential loses accuracy with the size of its argument, all else is a few
    roundings. In 16 bits the store hides that but beside a tie; where a gate is 32, whose silu is 32, nothing is open.
    """
    gate, up = x.double().chunk(2, dim=1)
    value = gate * torch.sigmoid(gate) * up
    error = (17 + 2 * (-gate).clamp(min=0.0)) * _U * value.abs() + _UNDERFLOW * up.abs()
    sure = ~(error > 0) | value.isinf()  # NaN too; and a zero keeps its sign
    low, high = (torch.where(sure, value, value + part).float().to(x.dtype) for part in (-error, error))
    return low, high
