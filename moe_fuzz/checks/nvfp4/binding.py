"""Wrong answers, made from the right one. A case on which one of them passes proves nothing about parity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from moe_fuzz.checks.binding import rejected
from moe_fuzz.checks.nvfp4.observation import Outputs, QuantizeObservation


def wrong_answers(seen: QuantizeObservation) -> Iterator[tuple[str, Outputs]]:
    """All zero; one scale two steps off; the nibbles exchanged; a row's codes moved by a byte."""
    outputs = seen.outputs
    codes, scales = outputs.codes, outputs.scales.view(torch.uint8)
    yield "all zero", Outputs(torch.zeros_like(codes), torch.zeros_like(scales).view(outputs.scales.dtype))
    off = torch.where(scales > 4, scales - 2, scales + 2)
    yield "scales off", replace(outputs, scales=off.where(~seen.padding, scales).view(outputs.scales.dtype))
    yield "nibbles exchanged", replace(outputs, codes=codes >> 4 | codes << 4)
    yield "codes moved", replace(outputs, codes=codes.roll(1, dims=1))


def binding(seen: QuantizeObservation) -> list[str]:
    """The wrong answers that no check rejected; empty when the case proves parity."""
    if not seen.values.numel():
        return ["no number"]
    return [name for name, outputs in wrong_answers(seen) if not rejected(seen.with_outputs(outputs), "nvfp4")]
