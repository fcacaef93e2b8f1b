"""Lets Triton's interpreter give what a GPU gives: a kernel is to be judged, and not the interpreter. CPU only.

By itself the interpreter
* cuts float32 off to bfloat16, garbles subnormals, and rounds to 8 bits without a carry and without NaN;
* adds, compares, multiplies and reduces bfloat16, in `tl.dot` too, as the integers that its bits are;
* gives NaN for `tl.maximum`, `tl.minimum` and `tl.clamp` of NaN and a number, where a GPU gives the number;
* makes the least integer of a float that is too large for it, and of NaN, in 32 bits: there a GPU gives the nearest,
  and 0;
* keeps the sign of NaN, and makes a negative one of inf - inf, where arithmetic on a GPU gives 0x7FFFFFFF of any: who
  sorts by bits finds the one below -inf, and the other above inf;
* finds NaN with `tl.argmax`. On a GPU one of two is taken by a comparison, which with NaN is false: the other one is.

What is summed up in bfloat16 is rounded once here, on a GPU after each addition: `tl.sum` of it is closer than there.

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
    needed = ("binary_op", "unary_op", "ternary_op", "cast_impl", "create_fma", "create_dot")
    if builder is None or not all(hasattr(builder, name) for name in needed):
        return False
    if not all(hasattr(interpreter, name) for name in ("_convert_float", "ReduceOps", "ScanOps", "TensorHandle")):
        return False
    if not hasattr(builder, _ORIGINALS):
        setattr(builder, _ORIGINALS, True)
        _convert(interpreter)
        _saturate(interpreter, builder)
        _make_nan_canonical(interpreter, builder)
        _compute(interpreter, builder)
        _drop_nan(interpreter, builder)
        for kind in (interpreter.ReduceOps, interpreter.ScanOps):
            _reduce(interpreter, kind)
        _compare_with_nan(interpreter, interpreter.ReduceOps)
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
        return found.view(f"uint{wanted.primitive_bitwidth}")

    interpreter._convert_float = convert


#: What arithmetic gives for NaN, in the bits of its result. Double keeps what it is given.
_CANONICAL = {"f4": np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0],
              "f2": np.array([0x7FFF], np.uint16).view(np.float16)[0]}  # fmt: skip


def canonical(data: Any) -> Any:
    """A result of arithmetic, as it is on a GPU: PTX ISA, "Floating Point Instructions"."""
    nan = _CANONICAL.get(data.dtype.str[1:])
    if nan is None or not (found := data != data).any():
        return data
    return np.where(found, nan, data)


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

    for name in ("binary_op", "unary_op", "create_fma", "create_dot"):
        wrap(builder, name)
    for owner, name in ((interpreter.ReduceOps, "sum"), (interpreter.ScanOps, "cumsum"),
                        (interpreter.ScanOps, "cumprod")):  # fmt: skip
        wrap(owner, name)


def _compute(interpreter: Any, builder: Any) -> None:
    """bfloat16 is computed in float32, and rounded."""
    import triton.language as tl

    handle = interpreter.TensorHandle
    binary, cast, fma, dot = builder.binary_op, builder.cast_impl, builder.create_fma, builder.create_dot

    def is_short(one: Any) -> bool:
        """The truth of a comparison has the type of what was compared."""
        return one.dtype.scalar == tl.bfloat16 and one.data.dtype == np.uint16

    def wide(one: Any) -> Any:
        return handle(widen(one.data), tl.float32) if is_short(one) else one

    def as_was(found: Any, like: Any) -> Any:
        """found: a result of `wide` operands, where `like` was one of those."""
        if not is_short(like):
            return found
        is_number = found.data.dtype == np.float32
        return handle(narrow(found.data) if is_number else found.data, tl.bfloat16)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not is_short(lhs):
            return binary(self, lhs, rhs, op)
        return as_was(binary(self, wide(lhs), wide(rhs), op), lhs)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return as_was(fma(self, wide(x), wide(y), wide(z)), z)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *more: Any) -> Any:
        return as_was(dot(self, wide(a), wide(b), wide(d), *more), d)

    def cast_impl(self: Any, source: Any, wanted: Any) -> Any:
        of, to = source.dtype.scalar, wanted.scalar
        if tl.bfloat16 not in (of, to) or of == to or (of == tl.bfloat16 and not is_short(source)):
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


def _drop_nan(interpreter: Any, builder: Any) -> None:
    """What is to propagate NaN calls create_maximumf, create_minimumf."""
    everywhere = interpreter._ir.PROPAGATE_NAN.ALL
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)

    def create_clampf(self: Any, value: Any, low: Any, high: Any, propagate: Any) -> Any:
        if propagate == everywhere:
            return self.ternary_op(value, low, high, np.clip)
        return self.create_minnumf(self.create_maxnumf(value, low), high)

    builder.create_clampf = create_clampf


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


def _compare_with_nan(interpreter: Any, kind: Any) -> None:
    """tl.argmax, tl.argmin, and tl.max and tl.min with indices: of two the first is taken if it is better, or as good
    and to be preferred; so of a pair with NaN the second. Who that is depends on the order of pairs: on a GPU on the
    layout of the tensor, and on anything else here."""
    from triton.language import standard

    better = {"_argmax_combine": np.greater, "_argmin_combine": np.less}
    ways = {getattr(standard, f"{name}_tie_break_{side}"): (way, side == "left")
            for name, way in better.items() for side in ("left", "fast")
            if hasattr(standard, f"{name}_tie_break_{side}")}  # fmt: skip
    apply = kind.apply_impl

    def apply_impl(self: Any, given: Any) -> Any:
        way, leftmost = next((found for combine, found in ways.items() if self.combine_fn == combine), (None, False))
        value = given[0].handle.data
        if way is None or len(given) != 2 or (leftmost and not (value.dtype.kind == "f" and np.isnan(value).any())):
            return apply(self, given)
        index = given[1].handle.data
        shape = value.shape
        axis = 0 if self.axis is None else self.axis % len(shape)
        if self.axis is None:
            value, index = value.reshape(-1), index.reshape(-1)
        value, index = np.moveaxis(value, axis, 0), np.moveaxis(index, axis, 0)
        while len(value) > 1:
            half = len(value) // 2
            first, second = (value[:half], index[:half]), (value[half:], index[half:])
            taken = way(first[0], second[0]) | (leftmost & (first[0] == second[0]) & (first[1] < second[1]))
            value, index = (np.where(taken, a, b) for a, b in zip(first, second, strict=True))
        results = (value[0], index[0])
        if self.keep_dims:
            kept = [1] * len(shape) if self.axis is None else [*shape[:axis], 1, *shape[axis + 1 :]]
            results = value.reshape(kept), index.reshape(kept)
        return [self.to_tensor(one, of.dtype) for one, of in zip(results, given, strict=True)]

    kind.apply_impl = apply_impl
