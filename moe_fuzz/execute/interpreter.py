"""Makes Triton's interpreter faster, without changing what it computes. Worker side, CPU only.

An operation of a small kernel costs what its types cost, not its arithmetic. `remember_types` keeps what follows from a
shape or a dtype alone: 1.5 times the speed. `skip_unread_overflow` drops what nobody reads: outside debug mode, a sum
or product of integers is computed once more in 64 bits, for an assertion that is then not made; 1.5 times again.

At each call of a jit function from inside a kernel (`tl.max` is one) the interpreter patches the whole language again,
1.6 ms each time, although during a launch every such patch after the first finds nothing left to do. Here it is done
once a launch for each set of language modules that a function sees: 1.5 times the speed of a routing kernel.

A reduction by a function that the interpreter does not know calls it for each element. `tl.sort` and `tl.topk` are made
of such: a row of 256 experts took ten seconds, which is a hang to who waits for it. `combine_whole_slices` calls it for
all that stands at one place of the axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from moe_fuzz.execute import clock


def hasten() -> bool:
    """Installs all of them. Whether each could be."""
    return all([patch_language_once(), remember_types(), skip_unread_overflow(), combine_whole_slices()])


def tell_of_programs() -> bool:
    """The parent hears of programs that begin: a kernel with many of them is slow here, and that is no hang. False (and
    nothing is changed) where this Triton's interpreter is built differently."""
    from triton.runtime import interpreter

    builder = getattr(interpreter, "InterpreterBuilder", None)
    begin = getattr(builder, "set_grid_idx", None)
    if builder is None or begin is None:
        return False
    if hasattr(begin, "moe_fuzz_original"):
        return True

    def begins(self: Any, x: int, y: int, z: int) -> None:
        if x or y or z:  # of one launch: launches alone may go on for ever
            clock.goes_on()
        begin(self, x, y, z)

    begins.moe_fuzz_original = begin  # type: ignore[attr-defined]
    builder.set_grid_idx = begins
    return True


def patch_language_once() -> bool:
    """Installs it; False (and nothing is changed) where this Triton's interpreter is built differently."""
    from triton.runtime import interpreter

    original = getattr(interpreter, "_patch_lang", None)
    executor = getattr(interpreter, "GridExecutor", None)
    if original is None or executor is None or not hasattr(interpreter, "InterpretedFunction"):
        return False
    if hasattr(original, "moe_fuzz_original"):
        return True
    launch = executor.__call__
    patched: set[frozenset[int]] = set()
    depth = 0

    def patch_lang(function: Any) -> Any:
        seen = frozenset(id(v) for v in function.__globals__.values() if isinstance(v, ModuleType))
        if depth and seen in patched:
            return None
        patched.add(seen)
        return original(function)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        outer, depth = depth, 0  # the launch's own patch is never skipped: it is the one that is restored
        patched.clear()

        try:
            return launch(self, *args, **kwargs)
        finally:
            depth = outer
            patched.clear()

    def nested(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            return device_call(self, *args, **kwargs)
        finally:
            depth -= 1

    device_call = interpreter.InterpretedFunction.__call__
    patch_lang.moe_fuzz_original = original  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_lang
    executor.__call__ = call
    interpreter.InterpretedFunction.__call__ = nested
    return True


def remember_types() -> bool:
    """Installs it; False (and nothing is changed) where this Triton's types are built differently."""
    from triton.language import core
    from triton.runtime import interpreter

    block, tensor, numpy_type = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    if hasattr(block, "moe_fuzz_original"):
        return True
    if not _same_types(core):
        return False

    blocks: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    tensors: dict[int, tuple[Any, Any]] = {}  # by the identity of a shape in `blocks`, which keeps it alive

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        plain = (*[size.value if type(size) is core.constexpr else size for size in shape],)
        known = blocks.get(plain)
        if known is None:
            block(self, element_ty, shape)
            blocks[plain] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, of_shape = known
        self.name = f"<{of_shape}, {element_ty}>"

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        known = tensors.get(id(type.shape)) if type.is_block() else None
        if known is None:
            tensor(self, handle, type)
            if type.is_block() and any(type.shape is shape for shape, _, _ in blocks.values()):
                tensors[id(type.shape)] = self.numel, self.shape
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = known

    named: dict[str, Any] = {}

    def get_np_dtype(tt_dtype: Any) -> Any:
        scalar = tt_dtype.scalar
        found = named.get(scalar.name)
        if found is None:
            found = named[scalar.name] = numpy_type(tt_dtype)
        return found

    block_init.moe_fuzz_original = block  # type: ignore[attr-defined]
    core.block_type.__init__ = block_init
    core.tensor.__init__ = tensor_init
    interpreter._get_np_dtype = get_np_dtype
    return True


def skip_unread_overflow() -> bool:
    """Installs it; False (and nothing is changed) where this Triton has no such check. In debug mode it is made."""
    from triton.language.semantic import TritonSemantic

    original = getattr(TritonSemantic, "binary_op_sanitize_overflow_impl", None)
    if original is None:
        return False
    if hasattr(original, "moe_fuzz_original"):
        return True

    def sanitize(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs) if self.builder.options.debug else None

    sanitize.moe_fuzz_original = original  # type: ignore[attr-defined]
    TritonSemantic.binary_op_sanitize_overflow_impl = sanitize
    return True


class _Branches(Exception):
    """A function asks for the truth of a whole slice: it has to be called for each element."""


def combine_whole_slices() -> bool:
    """Installs it; False (and nothing is changed) where this Triton's interpreter is built differently. The order in
    which elements are combined stays as it is, and so do the bits. A function that branches is called as before."""
    from triton.runtime import interpreter

    reducer, scanner = getattr(interpreter, "ReduceOps", None), getattr(interpreter, "ScanOps", None)
    patch_tensor = getattr(interpreter, "_patch_lang_tensor", None)
    reduce, scan = getattr(reducer, "generic_reduce", None), getattr(scanner, "generic_scan", None)
    if reducer is None or scanner is None or patch_tensor is None or reduce is None or scan is None:
        return False
    if hasattr(reduce, "moe_fuzz_original"):
        return True
    in_slices = False

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        truth = tensor.__bool__

        def is_true(self: Any) -> bool:
            if in_slices and self.handle.data.size > 1:
                raise _Branches
            return bool(truth(self))

        (scope[0].set_attr if scope else setattr)(tensor, "__bool__", is_true)

    def combined(self: Any, given: Any, data: list[Any]) -> Iterator[list[Any]]:
        """data: of each input, its axis in front. What all until each place of it are combined to."""
        nonlocal in_slices
        so_far = [one[0] for one in data]
        yield so_far
        for place in range(1, len(data[0])):
            arguments = [self.to_tensor(one, of.dtype) for one, of in zip(so_far, given, strict=True)]
            arguments += [self.to_tensor(one[place], of.dtype) for one, of in zip(data, given, strict=True)]
            in_slices = True
            try:
                found = self.combine_fn.fn(*arguments)
            finally:
                in_slices = False
            results = found if isinstance(found, tuple) else (found,)
            values = [one.handle.data if hasattr(one, "handle") else one for one in results]
            so_far = [np.broadcast_to(np.asarray(value), like.size if not like.shape else like.shape)
                      .astype(like.dtype).reshape(like.shape) for value, like in zip(values, so_far, strict=True)]
            yield so_far

    def generic_reduce(self: Any, given: Any) -> Any:
        data = [one.handle.data for one in given]
        shape, axis = data[0].shape, self.axis
        flat = [one.reshape(-1) if axis is None else np.moveaxis(one, axis, 0) for one in data]
        try:
            *_, last = combined(self, given, flat)
        except _Branches:
            return reduce(self, given)
        if self.keep_dims:
            last = [np.reshape(one, [1] * len(shape)) if axis is None else np.expand_dims(one, axis) for one in last]
        return [self.to_tensor(one, of.dtype) for one, of in zip(last, given, strict=True)]

    def generic_scan(self: Any, given: Any) -> Any:
        flat = [np.moveaxis(one.handle.data, self.axis, 0) for one in given]
        try:
            places = list(combined(self, given, flat))
        except _Branches:
            return scan(self, given)
        return [self.to_tensor(np.stack(one, self.axis), of.dtype)
                for one, of in zip(zip(*places, strict=True), given, strict=True)]  # fmt: skip

    generic_reduce.moe_fuzz_original = reduce  # type: ignore[attr-defined]
    reducer.generic_reduce, scanner.generic_scan = generic_reduce, generic_scan
    interpreter._patch_lang_tensor = patch_lang_tensor
    return True


def _same_types(core: Any) -> bool:
    """Whether a block type and a tensor hold what they are known to hold, and nothing else."""
    one = core.block_type(core.int32, [2, core.constexpr(4)])
    value = core.tensor(None, one)
    return (
        set(vars(one)) == {"element_ty", "shape", "numel", "name"} and one.numel == 8
        and one.name == f"<{one.shape}, {one.element_ty}>" and [*one.shape] == [2, 4]
        and set(vars(value)) == {"handle", "shape", "numel", "type", "dtype"}
        and value.dtype == core.int32 and value.type is one
    )  # fmt: skip
