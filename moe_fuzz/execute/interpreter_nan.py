"""Lets Triton's interpreter pick what a GPU picks where NaN is among what is picked from. CPU only.

By itself the interpreter
* gives NaN for `tl.maximum`, `tl.minimum` and `tl.clamp` of NaN and a number, where a GPU gives the number;
* finds NaN with `tl.argmax`. On a GPU one of two is taken by a comparison, which with NaN is false: the other one is.

`tl.clamp` of NaN gives the lower limit. Of limits that the compiler sees to be -c and c a GPU makes one instruction
(min.xorsign.abs), which gives c with the sign of NaN; what the compiler sees is not known here.

Nothing of moe_fuzz is imported: the file is copied into the scripts of findings (campaign/repro).
"""

from __future__ import annotations

from typing import Any

import numpy as np

_DONE_PICKING = "moe_fuzz_picks"  # on the builder, once it is done


def pick() -> bool:
    """Installs it; False (and nothing is changed) where this Triton's interpreter is built differently."""
    from triton.runtime import interpreter

    builder = getattr(interpreter, "InterpreterBuilder", None)
    if not all(hasattr(builder, name) for name in ("binary_op", "ternary_op", "create_clampf")):
        return False
    if not hasattr(interpreter, "ReduceOps"):
        return False
    if not hasattr(builder, _DONE_PICKING):
        setattr(builder, _DONE_PICKING, True)
        _drop_nan(interpreter, builder)
        _compare_with_nan(interpreter, interpreter.ReduceOps)
    return True


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
