"""NVFP4 to numbers on the device, and the order of columns in which that is cheap.

A block of 16 codes is one int64, nibble n of it column n. Shifts and masks make a bfloat16 of the four bits of a code:
the sign at the top, two bits of exponent and one of mantissa where bfloat16 has its own, which is the code times 2^-126
(a code of 0.5 is a subnormal there, as in E2M1). One product with the block's scale times 2^118 makes it normal again:
code * scale * 2^-8, exact, as no product of a code and a scale has more than six significant bits.

Nibbles n and n + 4 lie at the same place of both halves of a register, so the two are decoded together; and what a
thread hands to the tensor cores at once are two such neighbours of each of a few blocks. So the columns are summed over
in another order, in which the activations are stored, too: `place`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

#: Columns that are reordered among themselves.
GROUP = 128


def _twice(bits: int) -> str:
    return f"0x{bits << 16 | bits:08X}"


def _machine_code(scale: str, left: int, mask: int, dtype: str) -> str:
    """PTX for one block: `scale` leaves the scale in both halves of sc; bits go `left` from nibble 0 to their place."""
    lines = ["{", ".reg .b16 s, t; .reg .f32 f; .reg .b32 lo, hi, next, sign, p, sc;",
             "cvt.u16.u32 s, $17;", "cvt.rn.f16x2.e4m3x2 p, s;", "mov.b32 {s, t}, p;", scale,
             "mov.b64 {lo, hi}, $16;"]  # fmt: skip
    for word, first in (("lo", 0), ("hi", 4)):
        lines.append(f"shr.b32 next, {word}, 8;")
        for pair, half in enumerate((word, word, "next", "next"), first):
            at = 4 * (pair % 2)  # of the nibble; its sign goes 12 - at to the left, the rest left - at
            if 12 - left > 3:  # apart by more than a nibble: one product shifts to both places
                lines += [f"and.b32 p, {half}, {_twice(0xF << at)};",
                          f"mul.lo.u32 p, p, {(1 << (12 - at)) + (1 << (left - at))};",
                          f"and.b32 p, p, {_twice(mask | 0x8000)};"]  # fmt: skip
            else:
                lines += [f"shl.b32 sign, {half}, {12 - at};", f"and.b32 sign, sign, {_twice(0x8000)};",
                          f"shl.b32 p, {half}, {left - at};",
                          f"lop3.b32 p, p, {_twice(mask)}, sign, 0xEA;"]  # (p & mask) | sign  # fmt: skip
            lines += [f"mul.{dtype}x2 p, p, sc;", f"mov.b32 {{${2 * pair}, ${2 * pair + 1}}}, p;"]
    return "\n".join([*lines, "}"])


#: The exponent ends at bit 7: two bits of exponent and one of mantissa stand in 8..6, and are the code times 2^-126.
_BFLOAT16: tl.constexpr = tl.constexpr(_machine_code(
    "cvt.f32.f16 f, s; mul.f32 f, f, 0f7A800000; cvt.rn.bf16x2.f32 sc, f, f;", 6, 0x01C0, "bf16"  # 2^118
))  # fmt: skip
#: It ends at bit 10: 11..9, the code times 2^-14.
_FLOAT16: tl.constexpr = tl.constexpr(_machine_code(
    "mov.b32 sc, {s, s}; mov.b32 p, 0x58005800; mul.f16x2 sc, sc, p;", 9, 0x0E00, "f16"  # 2^7
))  # fmt: skip
_REGISTERS: tl.constexpr = tl.constexpr(",".join(["=h"] * 16 + ["l", "r"]))


@triton.jit
def place(column):
    """Where the column of a row stands in the order of the products."""
    n = column % 16
    return column // 128 * 128 + (n % 4 + n // 8 * 4) * 16 + column % 128 // 16 * 2 + n // 4 % 2


@triton.jit
def in_place(x):
    """[R, 128 G]: the columns where `place` has them."""
    rows: tl.constexpr = x.shape[0]
    groups: tl.constexpr = x.shape[1] // 128
    column = tl.reshape(x, (rows, groups, 8, 2, 2, 4))  # 128, 16, n // 8, n // 4 % 2, n % 4
    return tl.reshape(tl.permute(column, (0, 1, 3, 5, 2, 4)), x.shape)


@triton.jit
def placed(x, first):
    """[C, M], the columns from `first` on, a multiple of C -> the same in the order of `place`, and where each stands:
    what is written at once lies side by side."""
    COLUMNS: tl.constexpr = x.shape[0]
    if COLUMNS < 16:
        return x, place(first + tl.arange(0, COLUMNS))
    else:
        SPAN: tl.constexpr = min(COLUMNS, 128)  # of columns that `place` leaves among themselves
        parts = tl.reshape(x, (COLUMNS // SPAN, SPAN // 16, 2, 2, 4, x.shape[1]))  # 128, 16, n // 8, n // 4 % 2, n % 4
        nth = tl.arange(0, COLUMNS)
        start = tl.multiple_of(first % 128 // 8, SPAN // 8)
        at = first // 128 * 128 + nth // SPAN * 128 + nth % SPAN // (SPAN // 8) * 16 + start + nth % (SPAN // 8)
        return tl.reshape(tl.permute(parts, (0, 2, 4, 1, 3, 5)), x.shape), at


@triton.jit
def shift_back(DTYPE: tl.constexpr):
    """What the decoded values must be multiplied by."""
    if DTYPE.is_bf16():
        return 256.0  # the largest scale, 448, times 2^118 is in range; the least product, 2^-10 * 2^-8, is normal
    else:
        return 128.0


@triton.jit
def decode_blocks(codes, scales, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """[R, B] int64 and uint8 -> [R, 16 B] in the order of `place`: the values over `shift_back`. B: 8, 16, 24, ...

    `PLAIN`: without machine code, in float32, for the interpreter.
    """
    rows: tl.constexpr = codes.shape[0]
    groups: tl.constexpr = codes.shape[1] // 8
    if PLAIN:
        i = tl.arange(0, 8)[None, None, :, None, None]  # the pair
        n = i % 4 + i // 4 * 8 + 4 * tl.arange(0, 2)[None, None, None, None, :]
        scale = tl.reshape(_plain_scale(scales) / shift_back(DTYPE), (rows, groups, 1, 8, 1))
        found = plain_code(tl.reshape(codes, (rows, groups, 1, 8, 1)) >> (4 * n)) * scale
    else:
        c0, c4, c1, c5, c2, c6, c3, c7, c8, c12, c9, c13, c10, c14, c11, c15 = _decode_asm(codes, scales, DTYPE)
        # the last dimension of what comes of joins: halves of a pair first, then pairs by bits of their number
        pairs = tl.join(
            tl.join(tl.join(tl.join(c0, c4), tl.join(c8, c12)), tl.join(tl.join(c2, c6), tl.join(c10, c14))),
            tl.join(tl.join(tl.join(c1, c5), tl.join(c9, c13)), tl.join(tl.join(c3, c7), tl.join(c11, c15))),
        )  # [R, B, half, 8..15, 2 of 4, 1 of 2]
        found = tl.permute(tl.reshape(pairs, (rows, groups, 8, 2, 2, 2, 2)), (0, 1, 4, 5, 6, 2, 3))
    return tl.reshape(found, (rows, groups * 128))


@triton.jit
def decode_in_order(codes, scales, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """As `decode_blocks`, with the columns as they are: what a thread has of a block are 32 bytes of a row."""
    rows: tl.constexpr = codes.shape[0]
    if PLAIN:
        scale = (_plain_scale(scales) / shift_back(DTYPE))[:, :, None]
        found = plain_code(codes[:, :, None] >> (4 * tl.arange(0, 16)[None, None, :])) * scale
    else:
        c0, c4, c1, c5, c2, c6, c3, c7, c8, c12, c9, c13, c10, c14, c11, c15 = _decode_asm(codes, scales, DTYPE)
        # of what comes of joins the last one is the last bit of the column
        even = tl.join(tl.join(tl.join(c0, c8), tl.join(c4, c12)), tl.join(tl.join(c2, c10), tl.join(c6, c14)))
        odd = tl.join(tl.join(tl.join(c1, c9), tl.join(c5, c13)), tl.join(tl.join(c3, c11), tl.join(c7, c15)))
        found = tl.join(even, odd)  # [R, B, 8..15, 4 of 8, 2 of 4, 1 of 2]
    return tl.reshape(found, (rows, 16 * codes.shape[1]))


@triton.jit
def plain_code(code):
    """The value of the lowest four bits, in float32."""
    magnitude = (code & 7).to(tl.int32)
    exponent = tl.maximum(magnitude >> 1, 1)
    mantissa = tl.where(magnitude >= 2, 2 + (magnitude & 1), magnitude)
    value = (mantissa << exponent).to(tl.float32) * 0.25
    return tl.where((code & 8) != 0, -value, value)


@triton.jit
def _plain_scale(scale):
    """E4M3 in float32."""
    bits = scale.to(tl.int32)
    # as a float32, exponent and mantissa are the value times 2^-120, subnormals too
    value = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    value = tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
    return tl.where((bits & 0x80) != 0, -value, value)


@triton.jit
def _decode_asm(codes, scales, DTYPE: tl.constexpr):
    wide = scales.to(tl.uint32)
    if DTYPE.is_bf16():
        return tl.inline_asm_elementwise(
            _BFLOAT16, _REGISTERS, [codes, wide],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
             tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            _FLOAT16, _REGISTERS, [codes, wide],
            (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
             tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=1,
        )  # fmt: skip
