"""Lets Triton's interpreter run what compiles for a GPU: it executes a kernel as Python, which is not quite Triton.

By itself the interpreter
* leaves `min`, `max`, `and`, `or` and `not` to Python, for which a tensor of several elements is true;
* counts loops in Python's integers, which have no `.to`, and takes no bool for an argument;
* takes an axis below 0 for none at all in `tl.reduce` and `tl.associative_scan` with a function of the kernel's;
* has no `tl.histogram` of 64 bits, counts one of 8 bits in 8 bits, and has what lies right behind it in its last bin;
* adds no bfloat16 atomically;
* has nothing of libdevice, and no word for dependent launches, which is none where one launch ends before the next;
* takes what points to memory and is no tensor of torch's for one: Triton asks it for `data_ptr` and a dtype alone;
* cannot time an autotuner's configs, for want of a GPU: here the first is the best.

Nothing of moe_fuzz is imported: the file is copied into the scripts of findings (campaign/repro).
"""

from __future__ import annotations

import ast
import functools
from typing import Any

import numpy as np
import torch

_DONE = "moe_fuzz_language"  # on the module of the interpreter, once it is done


def complete() -> bool:
    """Installs it; False (and nothing is changed) where this Triton's interpreter is built differently."""
    from triton.runtime import autotuner, interpreter

    needed = ("ASTTransformer", "FunctionRewriter", "ReduceOps", "ScanOps", "_implicit_cvt", "interpreter_semantic")
    builder = getattr(interpreter, "InterpreterBuilder", None)
    if not all(hasattr(interpreter, name) for name in needed) or not hasattr(autotuner.Autotuner, "_bench"):
        return False
    copied = ("_init_args_hst", "_restore_args_dev")
    if not all(hasattr(getattr(interpreter, "GridExecutor", None), name) for name in copied):
        return False
    made = ("create_histogram", "create_atomic_rmw", "create_extern_elementwise")
    if not all(hasattr(builder, name) for name in made):
        return False
    if not hasattr(interpreter, _DONE):
        setattr(interpreter, _DONE, True)
        _speak(interpreter)
        _take_bools(interpreter)
        for kind in (interpreter.ReduceOps, interpreter.ScanOps):
            _count_axes(kind)
        _count_bins(interpreter, builder)
        _add_short(interpreter, builder)
        _know_libdevice(interpreter, builder)
        _take_pointers(interpreter.GridExecutor)
        _pick_first(autotuner.Autotuner)
    return True


def _speak(interpreter: Any) -> None:
    """What Python's words mean in a kernel; they are exchanged in its code before it runs."""
    import triton.language as tl

    semantic, tensor = interpreter.interpreter_semantic, tl.tensor

    def is_block(one: Any) -> bool:
        return isinstance(one, tensor) and one.type.is_block()

    class Words:
        @staticmethod
        def both(first: Any, second: Any) -> Any:
            return semantic.logical_and(first, semantic.to_tensor(second())) if is_block(first) else first and second()

        @staticmethod
        def either(first: Any, second: Any) -> Any:
            return semantic.logical_or(first, semantic.to_tensor(second())) if is_block(first) else first or second()

        @staticmethod
        def nay(one: Any) -> Any:
            return semantic.not_(one) if isinstance(one, tensor) else not one

        @staticmethod
        def called(function: Any, *given: Any, **more: Any) -> Any:
            better = {min: tl.minimum, max: tl.maximum}.get(function)
            if better is None or not any(isinstance(one, tensor) for one in given):
                return function(*given, **more)
            return functools.reduce(lambda one, other: better(one, other, **more), given)

        @staticmethod
        def counted(function: Any, *given: Any, **more: Any) -> Any:
            steps = function(*given, **more)
            wide = any(isinstance(one, tensor) and one.dtype.primitive_bitwidth == 64 for one in given)
            return (semantic.cast(semantic.to_tensor(at), tl.int64 if wide else tl.int32) for at in steps)

    class Language(interpreter.ASTTransformer):
        def visit_Assign(self, node: ast.Assign) -> Any:
            node.value = self.visit(node.value)
            return super().visit_Assign(node)

        def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
            self.generic_visit(node)
            whole = node.values[-1]
            nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
            for value in reversed(node.values[:-1]):  # the rest is computed only where Python would
                rest = ast.Lambda(args=nothing, body=whole)
                whole = said("both" if isinstance(node.op, ast.And) else "either", node, value, rest)
            return whole

        def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
            self.generic_visit(node)
            return said("nay", node, node.operand) if isinstance(node.op, ast.Not) else node

        def visit_Call(self, node: ast.Call) -> ast.expr:
            self.generic_visit(node)
            if isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
                node.args = [node.func, *node.args]  # it may be another function of that name, as `tl.max` itself is
                node.func = said("called", node).func
            return node

        def visit_For(self, node: ast.For) -> ast.For:
            self.generic_visit(node)
            count = node.iter
            if isinstance(count, ast.Call) and named(count) == "range":  # of Python's or of tl's; not `static_range`
                count.args = [count.func, *count.args]
                count.func = said("counted", node).func
            return node

    def named(node: ast.Call) -> str:
        return getattr(node.func, "id", "") or getattr(node.func, "attr", "")

    def said(word: str, node: ast.AST, *given: ast.expr) -> ast.Call:
        """Through the one name of the interpreter's that it puts beside each kernel."""
        words = ast.Attribute(ast.Name("interpreter_semantic", ast.Load()), "moe_fuzz_words", ast.Load())
        return ast.copy_location(ast.Call(ast.Attribute(words, word, ast.Load()), list(given), []), node)

    semantic.moe_fuzz_words = Words
    interpreter.FunctionRewriter.ast_transformer = Language()


def _take_bools(interpreter: Any) -> None:
    import triton.language as tl

    convert = interpreter._implicit_cvt

    def implicit_cvt(given: Any) -> Any:
        if not isinstance(given, bool):
            return convert(given)
        return tl.tensor(interpreter.TensorHandle(np.array([given]), tl.int1), tl.int1)

    interpreter._implicit_cvt = implicit_cvt


def _count_axes(kind: Any) -> None:
    apply = kind.apply

    def applied(self: Any, given: Any) -> Any:
        one = given[0] if isinstance(given, tuple) else given
        if self.axis is not None and self.axis < 0:
            self.axis += len(one.shape)
        return apply(self, given)

    kind.apply = applied


def _count_bins(interpreter: Any, builder: Any) -> None:
    import triton.language as tl

    def create_histogram(self: Any, given: Any, bins: int, mask: Any) -> Any:
        value = given.data if mask is None else given.data[mask.data]
        known = value[(value >= 0) & (value < bins)].astype(np.int64)
        return interpreter.TensorHandle(np.bincount(known, minlength=bins).astype(np.int32), tl.int32)

    builder.create_histogram = create_histogram


def _add_short(interpreter: Any, builder: Any) -> None:
    """Atomic additions of bfloat16, one after the other."""
    import triton.language as tl

    rmw, memory, adds = builder.create_atomic_rmw, interpreter._interpreter, interpreter._ir.ATOMIC_OP.FADD

    def create_atomic_rmw(self: Any, operation: Any, pointer: Any, value: Any, mask: Any, *more: Any) -> Any:
        if operation != adds or value.dtype.scalar != tl.bfloat16:
            return rmw(self, operation, pointer, value, mask, *more)
        where, added, wanted = np.broadcast_arrays(pointer.data, value.data, mask.data)
        before = np.zeros(where.shape, dtype=np.uint16)
        for at in map(tuple, np.argwhere(wanted)):
            place, always = np.array([where[at]]), np.array([True])
            found = memory.load(place, always, np.zeros(1, dtype=np.uint16), np.dtype(np.uint16))
            handle = interpreter.TensorHandle(np.array([added[at]]), tl.bfloat16)
            total = self.create_fadd(interpreter.TensorHandle(found, tl.bfloat16), handle)
            memory.store(place, total.data, always)
            before[at] = found[0]
        return interpreter.TensorHandle(before, tl.bfloat16)

    builder.create_atomic_rmw = create_atomic_rmw


#: Functions of libdevice by torch's, good to an ulp or so: those of torch's name, and those of another.
_AS_TORCH = (
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "ceil", "copysign", "cos", "cosh", "erf", "erfc", "exp",
    "exp2", "expm1", "floor", "fmax", "fmin", "fmod", "hypot", "log", "log10", "log1p", "log2", "pow", "rsqrt", "sin",
    "sinh", "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip
_RENAMED = {
    "fabs": torch.abs, "rint": torch.round, "nearbyint": torch.round, "llrint": torch.round, "isnand": torch.isnan,
    "isnan": torch.isnan, "isinf": torch.isinf, "isinfd": torch.isinf, "finite": torch.isfinite,
    "isfinited": torch.isfinite, "signbit": torch.signbit, "fast_exp": torch.exp, "fast_log": torch.log,
    "fast_log2": torch.log2, "fast_pow": torch.pow, "fast_tanh": torch.tanh, "fast_fdivide": torch.div,
    "fdiv_rn": torch.div, "fsqrt_rn": torch.sqrt, "frsqrt_rn": torch.rsqrt, "frcp_rn": torch.reciprocal,
    "fadd_rn": torch.add, "fsub_rn": torch.sub, "fmul_rn": torch.mul, "float2int_rn": torch.round,
    "float2int_rz": torch.trunc, "float2int_rd": torch.floor, "float2int_ru": torch.ceil,
    "round": lambda x: torch.copysign((x.abs().double() + 0.5).floor(), x).to(x.dtype),
}  # fmt: skip


def _know_libdevice(interpreter: Any, builder: Any) -> None:
    """Also the two words of dependent launches, which do nothing."""
    from triton.language import extra
    from triton.language.extra import cuda, libdevice

    known = {name: getattr(torch, name) for name in _AS_TORCH} | _RENAMED

    def create_extern_elementwise(
        self: Any, library: str, path: str, symbol: str, given: Any, wanted: Any, pure: bool
    ) -> Any:
        name = symbol.removeprefix("__nv_")
        if name in ("fma", "fmaf"):
            return self.create_fma(*given)
        function = known.get(name) or known.get(name.removesuffix("f"))
        if function is None:
            raise NotImplementedError(f"libdevice's {symbol} not supported in interpreter mode")
        found = function(*(torch.from_numpy(np.array(one.data)) for one in given)).numpy()
        handle = interpreter.TensorHandle(found, given[0].dtype.scalar)
        if found.dtype.kind == "f" and function not in (torch.abs, torch.copysign):
            handle = self.unary_op(handle, lambda data: data)  # NaN is arithmetic's
            found = handle.data
        if found.dtype == interpreter._get_np_dtype(wanted.scalar):
            return interpreter.TensorHandle(found, wanted.scalar)
        return self.cast_impl(handle, wanted)

    def in_kernels(function: Any) -> Any:
        def call(*given: Any, **more: Any) -> Any:
            return function(*given, **{**more, "_semantic": interpreter.interpreter_semantic})

        return call

    def nothing(*given: Any, **more: Any) -> None:
        pass

    builder.create_extern_elementwise = create_extern_elementwise
    for name, function in list(vars(cuda.libdevice).items()):
        if callable(function) and function.__module__ == cuda.libdevice.__name__:
            for module in (cuda.libdevice, libdevice):  # the second has signatures alone, until a kernel is compiled
                setattr(module, name, in_kernels(function))
    for name in ("gdc_wait", "gdc_launch_dependents"):
        if hasattr(extra.cuda, name):
            setattr(extra.cuda, name, nothing)


def _take_pointers(executor: Any) -> None:
    """OpenAI's kernels are given tensors of their own, of which the interpreter asks a storage to copy to the host."""
    copy, restore = executor._init_args_hst, executor._restore_args_dev

    def bare(given: Any) -> bool:
        wrapped = isinstance(getattr(given, "base", None), torch.Tensor)  # Triton's own, whose memory is its tensor's
        return hasattr(given, "data_ptr") and not isinstance(given, torch.Tensor) and not wrapped

    def without(args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        return [None if bare(a) else a for a in args], {name: None if bare(a) else a for name, a in kwargs.items()}

    def init_args_hst(self: Any, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        copies, named = copy(self, *without(args, kwargs))
        copies = [a if bare(a) else c for a, c in zip(args, copies, strict=True)]
        return copies, {name: a if bare(a) else named[name] for name, a in kwargs.items()}

    def restore_args_dev(self: Any, args: Any, copies: Any, kwargs: Any, named: Any) -> None:
        (args, kwargs), (copies, named) = without(args, kwargs), without(copies, named)
        restore(self, args, copies, kwargs, named)

    executor._init_args_hst, executor._restore_args_dev = init_args_hst, restore_args_dev


def _pick_first(tuner: Any) -> None:
    tuner._bench = lambda self, *given, config, **more: [0.0, 0.0, 0.0]

    def check_disk_cache(self: Any, key: Any, configs: Any, bench: Any) -> bool:
        bench()
        return False

    tuner.check_disk_cache = check_disk_cache
