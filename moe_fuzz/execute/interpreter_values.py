"""Lets Triton's interpreter give what a GPU gives: a kernel is to be judged, and not the interpreter. CPU only.

By itself the interpreter
* cuts float32 off to bfloat16, garbles subnormals, and rounds to 8 bits without a carry and without NaN;
* adds, compares, multiplies and reduces bfloat16, in `tl.dot` too, as the integers that its bits are;
* makes the least integer of a float that is too large for it, and of NaN, in 32 bits: there a GPU gives the nearest,
  and 0;
* keeps the sign of NaN, and makes a negative one of inf - inf, where arithmetic and conversions on a GPU give
  0x7FFFFFFF of any: who sorts by bits finds the one below -inf, and the other above inf;
* has an error where a sum of integers does not fit, which wraps around on a GPU, and takes signs into `tl.umulhi`;
* rounds twice in `tl.fma`;
* multiplies float32 as it is in `tl.dot`, whose default on a GPU is TF32: 10 bits behind the point, the others cut off.

What is summed up in bfloat16 is rounded once here, on a GPU after each addition: `tl.sum` of it is closer than there.
benchmarks/interpreter_against_gpu.py compares all this with a GPU, and tells what still differs.

Nothing of moe_fuzz is imported: the file is copied into the scripts of findings (campaign/repro).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_ORIGINALS = "moe_fuzz_originals"  # on the builder, once it is done


def correct() -> bool:
    """Installs it; False (and nothing is changed) where this Triton's interpreter is built differently."""
    from triton.runtime import interpreter

    builder = getattr(interpreter, "InterpreterBuilder", None)
    needed = ("binary_op", "unary_op", "cast_impl", "create_fma", "create_dot", "create_umulhi",
              "create_rsqrt", "create_erf")  # fmt: skip
    if builder is None or not all(hasattr(builder, name) for name in needed):
        return False
    if not all(hasattr(interpreter, name) for name in ("_convert_float", "ReduceOps", "ScanOps", "TensorHandle")):
        return False
    if not hasattr(builder, _ORIGINALS):
        setattr(builder, _ORIGINALS, True)
        _convert(interpreter)
        _wrap_integers(interpreter, builder)
        _saturate(interpreter, builder)
        _compare(interpreter, builder)
        _make_nan_canonical(interpreter, builder)
        _compute(interpreter, builder)
        for kind in (interpreter.ReduceOps, interpreter.ScanOps):
            _reduce(interpreter, kind)
    return True


def widen(bits: Any) -> Any:
    """bfloat16, as uint16, in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(value: Any, cut: bool = False) -> Any:
    """float32 in bfloat16, as uint16: to the nearest, ties to even, or `cut` off."""
    bits = value.view(np.uint32)
    high = bits >> 16
    found = (high if cut else (bits + (0x7FFF + (high & 1))) >> 16).astype(np.uint16)
    nan = np.isnan(value)
    return np.where(nan, np.uint16(0x7FFF), found) if nan.any() else found


def _convert(interpreter: Any) -> None:
    """Conversions between two types of numbers, by their bits."""
    import triton.language as tl

    known = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32,
             tl.float64: torch.float64, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}  # fmt: skip
    eight = (tl.float8e4nv, tl.float8e5)
    toward_zero = interpreter._ir.ROUNDING_MODE.RTZ
    original = interpreter._convert_float

    def convert(given: Any, source: Any, wanted: Any, rounding: Any) -> Any:
        if source == tl.bfloat16 and wanted == tl.float32:
            return widen(given).view(np.uint32)
        if source == tl.float32 and wanted == tl.bfloat16:
            return narrow(given, rounding == toward_zero)
        if source not in known or wanted not in known or rounding == toward_zero:
            return original(given, source, wanted, rounding)
        bits = np.array(given).view(f"int{source.primitive_bitwidth}")  # a copy, that torch may have
        value = torch.from_numpy(bits).view(known[source])
        if wanted in eight:  # as cvt.satfinite does
            most = torch.finfo(known[wanted]).max
            value = value.float().clamp(-most, most)
        found = value.to(known[wanted]).view(getattr(torch, f"int{wanted.primitive_bitwidth}")).numpy()
        found = found.view(f"uint{wanted.primitive_bitwidth}")
        nan = np.isnan(value.float().numpy())
        if wanted == tl.float64 or not nan.any():
            return found
        return np.where(nan, found.dtype.type(np.iinfo(found.dtype).max >> 1), found)  # as arithmetic gives it

    interpreter._convert_float = convert


def _wrap_integers(interpreter: Any, builder: Any) -> None:
    """A sum has the bits of what is summed up, and `tl.umulhi` takes bits for unsigned numbers."""
    handle, upper_half = interpreter.TensorHandle, builder.create_umulhi

    def total(self: Any, given: Any) -> Any:
        data = given.handle.data
        return self.to_tensor(np.sum(data, axis=self.axis, keepdims=self.keep_dims, dtype=data.dtype), given.dtype)

    def create_umulhi(self: Any, lhs: Any, rhs: Any) -> Any:
        dtype = lhs.data.dtype
        unsigned = (handle(one.data.view(f"u{dtype.itemsize}"), one.dtype.scalar) for one in (lhs, rhs))
        return handle(upper_half(self, *unsigned).data.view(dtype), lhs.dtype.scalar)

    interpreter.ReduceOps.sum, builder.create_umulhi = total, create_umulhi


#: What arithmetic gives for NaN, in the bits of its result. Double keeps what it is given.
_CANONICAL = {"f4": np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0],
              "f2": np.array([0x7FFF], np.uint16).view(np.float16)[0]}  # fmt: skip


def canonical(data: Any) -> Any:
    """A result of arithmetic, as it is on a GPU: PTX ISA, "Floating Point Instructions"."""
    nan = _CANONICAL.get(data.dtype.str[1:])
    if nan is None or not (found := data != data).any():
        return data
    return np.where(found, nan, data)


def _compare(interpreter: Any, builder: Any) -> None:
    """The truth of a comparison is an int1. It has the type of what was compared, and so a scalar's, laid out beside a
    block (`(count > 0) & mask`), is a number: a float has no bits to be joined, and an integer's are not one."""
    import triton.language as tl

    binary = builder.binary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        found = binary(self, lhs, rhs, op)
        return interpreter.TensorHandle(found.data, tl.int1) if found.data.dtype == np.bool_ else found

    builder.binary_op = binary_op


def _make_nan_canonical(interpreter: Any, builder: Any) -> None:
    """bfloat16 has it of `narrow`. Sums are arithmetic, too; what picks one of two values is not."""

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def computed(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = original(self, *args, **kwargs)
            for one in found if isinstance(found, list) else (found,):
                handle: Any = getattr(one, "handle", one)
                handle.data = canonical(handle.data)
            return found

        setattr(owner, name, computed)

    for name in ("binary_op", "unary_op", "create_dot", "create_rsqrt", "create_erf"):
        wrap(builder, name)
    for owner, name in ((interpreter.ReduceOps, "sum"), (interpreter.ScanOps, "cumsum"),
                        (interpreter.ScanOps, "cumprod")):  # fmt: skip
        wrap(owner, name)
    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, wanted: Any) -> Any:
        found = cast(self, source, wanted)
        if source.data.dtype.kind == "f" and source.dtype.scalar != wanted.scalar:
            found.data = canonical(found.data)
        return found

    builder.cast_impl = cast_impl


def cut_to_tf32(value: Any) -> Any:
    """float32 as tensor cores read it: the last 13 bits are none of theirs."""
    found = (value.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    nan = np.isnan(value)
    return np.where(nan, value, found) if nan.any() else found


def to_odd(value: Any, error: Any) -> Any:
    """value + error in the type of value, which is that rounded to nearest: rounded to odd instead. Of the two numbers
    beside it the one is taken whose last bit is set; to round that again, to a narrower type, is to round once."""
    bits = value.view(f"i{value.itemsize}")
    wrong = ((error > 0) | (error < 0)) & (bits & 1 == 0)
    if not wrong.any():
        return value
    away = np.signbit(error) == np.signbit(value)
    return np.where(wrong, bits + np.where(away, 1, -1).astype(bits.dtype), bits).view(value.dtype)


def fused(x: Any, y: Any, z: Any, dtype: Any) -> Any:
    """x * y + z of numbers of at most 32 bits, rounded once: to float32, float16, or to bfloat16, as uint16."""
    with np.errstate(all="ignore"):
        product, addend = x.astype(np.float64) * y, z.astype(np.float64)  # this is exact
        total = product + addend
        rest = total - product
        total = to_odd(total, (product - (total - rest)) + (addend - rest))  # Knuth's error of a sum, exact as well
        if dtype != np.uint16:
            return canonical(total.astype(dtype))
        single = total.astype(np.float32)
        return narrow(to_odd(single, total - single))


def _compute(interpreter: Any, builder: Any) -> None:
    """bfloat16 is computed in float32, and rounded; `tl.fma` rounds once; `tl.dot` cuts off what TF32 has not."""
    import triton.language as tl

    handle, in_tf32 = interpreter.TensorHandle, interpreter._ir.INPUT_PRECISION.TF32
    binary, cast, fma, dot = builder.binary_op, builder.cast_impl, builder.create_fma, builder.create_dot

    def is_short(one: Any) -> bool:
        return bool(one.dtype.scalar == tl.bfloat16)

    def wide(one: Any) -> Any:
        return handle(widen(one.data), tl.float32) if is_short(one) else one

    def as_was(found: Any, like: Any) -> Any:
        """found: a result of `wide` operands, where `like` was one of those; of a comparison it is as it is."""
        return handle(narrow(found.data), tl.bfloat16) if is_short(like) and found.dtype != tl.int1 else found

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not is_short(lhs):
            return binary(self, lhs, rhs, op)
        return as_was(binary(self, wide(lhs), wide(rhs), op), lhs)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype.str[1:] not in ("f2", "f4") and not is_short(z):
            return fma(self, x, y, z)
        return handle(fused(wide(x).data, wide(y).data, wide(z).data, z.data.dtype), z.dtype.scalar)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *more: Any) -> Any:
        if precision == in_tf32 and a.dtype.scalar == tl.float32:
            a, b = (handle(cut_to_tf32(one.data), tl.float32) for one in (a, b))
        return as_was(dot(self, wide(a), wide(b), wide(d), precision, *more), d)

    def cast_impl(self: Any, source: Any, wanted: Any) -> Any:
        of, to = source.dtype.scalar, wanted.scalar
        if tl.bfloat16 not in (of, to) or of == to:
            return cast(self, source, wanted)
        if of == tl.bfloat16:
            return cast(self, wide(source), wanted)
        return handle(narrow(source.data.astype(np.float32)), to)

    builder.binary_op, builder.cast_impl = binary_op, cast_impl
    builder.create_fma, builder.create_dot = create_fma, create_dot
    builder.get_bf16 = lambda self, value: handle(narrow(np.array([value], dtype=np.float32)), tl.bfloat16)


def _saturate(interpreter: Any, builder: Any) -> None:
    """Floats in integers as PTX has it: toward zero, at most the least and the largest; NaN 0, the least of 64 bits."""
    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, wanted: Any) -> Any:
        to = wanted.scalar
        if source.data.dtype.kind != "f" or not to.is_int() or to.is_bool():
            return cast(self, source, wanted)
        signed = to.is_int_signed()
        limits = np.iinfo(f"{'int' if signed else 'uint'}{max(to.primitive_bitwidth, 16)}")  # 8 bits of 16, wrapped
        value = np.trunc(source.data.astype(np.float64))
        low, high, nan = value <= limits.min, value >= limits.max, np.isnan(value)
        found = np.where(low | high | nan, 0.0, value).astype(limits.dtype)
        found = np.where(low, limits.min, np.where(high, limits.max, found)).astype(limits.dtype)
        if to.primitive_bitwidth == 64:
            found = np.where(nan, limits.dtype.type(limits.min if signed else 1 << 63), found)
        return interpreter.TensorHandle(found.astype(interpreter._get_np_dtype(wanted)), to)

    builder.cast_impl = cast_impl


def _reduce(interpreter: Any, kind: Any) -> None:
    """A reduction, or a scan, of bfloat16 is one of float32, rounded."""
    import triton.language as tl

    apply = kind.apply_impl

    def apply_impl(self: Any, given: Any) -> Any:
        narrowed = [one.dtype.scalar == tl.bfloat16 for one in given]
        if not any(narrowed):
            return apply(self, given)

        def turned(one: Any, data: Any, dtype: Any) -> Any:
            return self.to_tensor(data if one.type.is_block() else data.reshape(())[()], dtype)

        found = apply(self, tuple(turned(one, widen(one.handle.data), tl.float32) if is_narrow else one
                                  for one, is_narrow in zip(given, narrowed, strict=True)))  # fmt: skip
        results = found if isinstance(found, (list, tuple)) else (found,)
        return [turned(one, narrow(one.handle.data), tl.bfloat16) if is_narrow else one
                for one, is_narrow in zip(results, narrowed, strict=False)]  # fmt: skip

    kind.apply_impl = apply_impl
