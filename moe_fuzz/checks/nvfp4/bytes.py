"""What bytes must be. Exactly the contract's where the target promises that; else, what another order of the same
float32 operations may give: a scale is a step off only beside a tie of E4M3, and a code is judged under the target's
own scale, a step off only beside a tie of E2M1. Below the least scale libraries differ, and values count.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_fuzz.checks import check, outputs
from moe_fuzz.checks.coordinates import first, row_text
from moe_fuzz.checks.nvfp4.observation import TINY, ULPS, QuantizeObservation, level, scale_range, value_of
from moe_fuzz.reference.nvfp4 import E2M1, E4M3, nearest
from moe_fuzz.verdict import Violation

_FAMILY = "nvfp4"


@check(_FAMILY, "structure")
def structure(seen: QuantizeObservation) -> list[Violation]:
    """Shapes and dtypes; scales of another dtype than float8_e4m3fn are a type that nobody reads right."""
    return outputs.structure(seen.outputs, seen.inputs.results)


@check(_FAMILY, "written")
def written(seen: QuantizeObservation) -> list[Violation]:
    """No byte still holds the poison it had before the call (vllm#42988)."""
    found = outputs.never_written(seen.unwritten, "bytes")
    if not found or (seen.unwritten["scales"] & ~seen.padding).any():
        return found
    return [replace(one, symptom="scales:padding", message=f"{one.message} (of the padding)")
            if one.tensor == "scales" else one for one in found]  # fmt: skip


@check(_FAMILY, "finite")
def finite(seen: QuantizeObservation) -> list[Violation]:
    """A scale byte of 0x7F or 0xFF is a NaN that a GEMM spreads over a whole row (Model-Optimizer#1397)."""
    wrong = (seen.bytes > 126) & ~seen._scale_left & seen.promised
    if not wrong.any():
        return []
    row, block = first(wrong)
    got = int(seen.bytes[row, block])
    kind = "NaN" if got in (0x7F, 0xFF) else "negative"
    message = f"the scale of block {block} of row {row} is {kind}; {_about(seen, row, block)}"
    return [Violation("finite", kind, message, "scales", (row, block), f"{int(seen.expected[row, block]):#04x}",
                      f"{got:#04x}", allowed=(0, 126))]  # fmt: skip


@check(_FAMILY, "scale", parity=True)
def scale(seen: QuantizeObservation) -> list[Violation]:
    """A scale byte rounds its block's maximum."""
    judged = seen.lawful & seen.promised
    if seen.exact:
        low, high = seen.scale_bytes
    else:
        low, high = scale_range(*seen.ideals)
        judged &= (seen.ideals[0] >= TINY) & (seen.row_scales > 0)
    wrong = judged & ((seen.bytes < low) | (seen.bytes > high))
    if not wrong.any():
        return []
    row, block = first(wrong)
    got, expected = int(seen.bytes[row, block]), int(seen.expected[row, block])
    symptom = "large" if got > expected else "small"
    message = f"the scale of block {block} of row {row} is too {symptom}; {_about(seen, row, block)}"
    message += _misplaced(seen, row, wrong[row])
    return [Violation("scale", symptom, message, "scales", (row, block), f"{expected:#04x} = {float(E4M3[expected]):g}",
                      f"{got:#04x} = {float(E4M3[got]):g}",
                      allowed=(int(low[row, block]), int(high[row, block])))]  # fmt: skip


@check(_FAMILY, "codes", parity=True)
def codes(seen: QuantizeObservation) -> list[Violation]:
    """A code is the nearest under its scale. Where the scale is to be exact and is not, `scale` has said so."""
    fit = seen.lawful & seen.promised
    if seen.exact:
        least, greatest = seen.scale_bytes
        fit = fit & (least <= seen.bytes) & (seen.bytes <= greatest)
    judged = fit[..., None].expand_as(seen.codes).clone()
    left = seen.unwritten["codes"].repeat_interleave(2, dim=1).view_as(judged)
    judged &= ~left
    wrong = judged & (_not_right(seen) if seen.exact else _not_nearest(seen))
    if not wrong.any():
        return []
    row, block, at = first(wrong)
    got, expected = int(seen.codes[row, block, at]), int(seen.right_codes[row, block, at])
    there = seen.codes[row, block]
    pairs = seen.right_codes[row, block].view(-1, 2)
    symptom = "swapped" if torch.equal(there, pairs.flip(1).flatten()) else "value"
    column, value = 16 * block + at, float(seen.values[row, block, at])
    message = (f"the code of column {column} of row {row} is not that of {value:g} "
               f"under the scale {float(E4M3[int(seen.bytes[row, block])]):g}; {_about(seen, row, block)}")  # fmt: skip
    if symptom == "swapped":
        message += "; the two nibbles of each byte are exchanged"
    right = () if seen.brief else _right_at(seen, row, block, at)
    return [Violation("codes", symptom, message, "codes", (row, column // 2), _code(expected), _code(got),
                      chosen=(int(seen.bytes[row, block]), column), right=right)]  # fmt: skip


def _right_at(seen: QuantizeObservation, row: int, block: int, at: int) -> tuple[int, ...]:
    """The codes that would be right for one number, under the target's own scale: each of the sixteen is tried."""
    tried = seen.repeated(row, block, 16)
    tried.codes[:, 0, at] = torch.arange(16)
    wrong = _not_right(tried) if seen.exact else _not_nearest(tried)
    return tuple((~wrong[:, 0, at]).nonzero().flatten().tolist())


def _misplaced(seen: QuantizeObservation, row: int, wrong: torch.Tensor) -> str:
    """`; row 1 has the scales of row 129`, or nothing. For a person: several wrong bytes that are right elsewhere."""
    if int(wrong.sum()) < 2:
        return ""
    fits = (seen.expected == seen.bytes[row]).all(dim=1)
    fits[row] = False
    others = fits.nonzero().flatten().tolist()
    return f"; row {row} has the scales that row {others[0]} should have" if others else ""


def _not_right(seen: QuantizeObservation) -> torch.Tensor:
    """bool [M, B, 16]: codes that are not the contract's, of any value that a target may have."""
    one, other = seen.span_codes
    low, high, place = level(one), level(other), level(seen.codes)
    return torch.where(one == other, seen.codes != one, (place < low) | (place > high))


def _not_nearest(seen: QuantizeObservation) -> torch.Tensor:
    """bool [M, B, 16]: codes that no order of float32 operations gives under the target's own scales. Under a scale of
    0 every code is 0; what is tiny is allowed to be 0, or anything that is as near. The contract's own order is one of
    them: where 1 / global scale, or a scale times that, is no normal float32 number, its codes may be far off, and what
    lies between them and the nearest is some order's too."""
    scale = E4M3.double().to(seen.bytes.device)[seen.bytes.clamp(max=126).long()][..., None]  # [M, B, 1]
    given, table = seen.row_scales.double()[..., None], E2M1.double()
    exact, (least, greatest) = seen.values.double() * given, (part.double() * given for part in seen.sizes)
    unit = torch.where(scale > 0, scale, 1.0)  # of what is to be code * scale
    low, high = (nearest((size / unit * factor).nan_to_num(0.0).clamp(max=6.0), table).int()
                 for size, factor in ((least, 1 - ULPS), (greatest, 1 + ULPS)))  # fmt: skip
    ours = [level(codes) for codes in seen.span_codes]
    low = torch.minimum(low, torch.where(ours[0].sign() == ours[1].sign(), torch.minimum(*map(torch.abs, ours)), 0))
    high = torch.maximum(high, torch.maximum(*map(torch.abs, ours)))
    place = level(seen.codes)
    sided = (seen.span[0] >= 0) | (seen.span[1] <= 0)  # else it may have either sign
    wrong = (place.abs() < low) | (place.abs() > high) | ((place != 0) & (place.sign() != exact.sign()) & sided)
    tiny = (seen.ideals[0] < TINY)[..., None]
    error = (value_of(seen.codes) * scale - exact).abs()
    far = error > (greatest + (exact.abs() - least)) * (1 + ULPS)
    wrong = torch.where(tiny, far & _not_right(seen), wrong)
    return wrong & (scale > 0) & (seen.row_scales > 0)[..., None]


@check(_FAMILY, "padding", parity=False)
def padding(seen: QuantizeObservation) -> list[Violation]:
    """The padding of swizzled scales is zero: its consumers multiply by it (vllm#38148, vllm#31097)."""
    if seen.info.contract.scale_padding != "zero":
        return []
    wrong = seen.padding & (seen.outputs.scales.view(torch.uint8) != 0) & ~seen.unwritten["scales"]
    if not wrong.any():
        return []
    place = first(wrong)
    got = int(seen.outputs.scales.view(torch.uint8)[place])
    symptom = "nan" if got in (0x7F, 0xFF) else "stale"
    message = f"{int(wrong.sum())} of {int(seen.padding.sum())} bytes of the padding of the scales are not zero"
    return [Violation("padding", symptom, message, "scales", place, "0x00", f"{got:#04x}", allowed=(0, 0))]


def _about(seen: QuantizeObservation, row: int, block: int) -> str:
    """The block, for a person."""
    what = f"{seen.inputs.activation} of the gate times up" if seen.inputs.activation else "the block"
    return (f"{what} {row_text(seen.values[row, block], 16)}, global scale {float(seen.row_scales[row, 0]):g}, "
            f"amax * global_scale / 6 = {float(seen.ideal[row, block]):.9g}")  # fmt: skip


def _code(code: int) -> str:
    return f"{code:#x} = {'-' if code > 7 else ''}{float(E2M1[code % 8]):g}"
