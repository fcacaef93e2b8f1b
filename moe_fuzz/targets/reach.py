"""Whether a target has kernels of Triton's, read from its code and from what that names. Worker side; nothing is
called or imported, so the answer is the same in each process that has loaded the target.

A name counts wherever it is used: what may be such a kernel is taken for one.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

_MOST = 20_000  # objects that are looked at
_LONG = 256  # containers with more are tables of numbers
_OPAQUE = frozenset({*sys.stdlib_module_names, "torch", "numpy", "triton", "builtins"})  # with no kernel of a target's
_ATEN = frozenset({"aten", "prim", "prims"})  # of torch.ops: no operator that somebody else wrote
_PLAIN = (str, bytes, int, float, complex, type(None), BuiltinFunctionType)


def has_triton(function: Any) -> bool | None:
    """Whether a call may launch a kernel of Triton's; None where that cannot be told."""
    walk = _Walk()
    return True if walk.finds(function) else None if walk.unsure else False


class _Walk:
    def __init__(self) -> None:
        self.unsure = False  # something was named that is not there yet, or is not Python's
        self._seen: dict[int, Any] = {}  # which keeps them, so that no other object has their id
        self._looked: set[tuple[int, str]] = set()

    def finds(self, start: Any) -> bool:
        todo = [start]
        while todo:
            one = todo.pop()
            if id(one) in self._seen:
                continue
            if _is_kernel(one):
                return True
            if len(self._seen) > _MOST:
                self.unsure = True
                return False
            self._seen[id(one)] = one
            todo += self._named_by(one)
        return False

    def _named_by(self, one: Any) -> Iterator[Any]:
        if _is(one, _PLAIN):
            return
        if _is(one, (list, tuple, set, frozenset, dict)):
            if len(one) <= _LONG:
                yield from one.values() if _is(one, dict) else one
            return
        if _is(one, functools.partial):
            yield from (one.func, *one.args, *one.keywords.values())
            return
        if _is(one, MethodType):
            yield from (one.__func__, one.__self__)
            return
        if _is(one, (staticmethod, classmethod, property, functools.cached_property)):
            yield from (getattr(one, name, None) for name in ("__func__", "fget", "func"))
            return
        yield from _attributes(one, "__wrapped__")  # before all else: a compiler's wrapper is torch's
        yield from _attributes(one, "_torchdynamo_orig_callable")
        if _is(one, FunctionType):
            if not _opaque(one.__module__):
                yield from self._of_function(one)
        elif _is(one, type):
            if not _opaque(one.__module__):
                yield from (*vars(one).values(), *one.__mro__[1:])
        elif type(one).__module__ == "torch._ops":
            self.unsure = True
        elif not _is(one, ModuleType):
            yield type(one)
            if not _opaque(type(one).__module__) or "_modules" in _held(one):  # torch's containers hold a user's
                yield from _attributes(one, "__dict__")

    def _of_function(self, function: FunctionType) -> Iterator[Any]:
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        held = [cell.cell_contents for cell in function.__closure__ or () if not _empty(cell)]
        names = frozenset(_names(function.__code__))
        known = function.__globals__
        for value in (*held, *(known[name] for name in names if name in known)):
            yield value
            if _is(value, ModuleType):
                yield from self._of_module(value, names)
        for name in _imports(function.__code__, known):
            root = name.partition(".")[0]
            if root == "triton" or (not _opaque(root) and name not in sys.modules):
                self.unsure = True
            elif not _opaque(root):
                yield from self._of_module(sys.modules[name], names)
        if "import_module" in names:
            self.unsure = True

    def _of_module(self, module: ModuleType, names: frozenset[str]) -> Iterator[Any]:
        """What of a module's is named."""
        if _opaque(module.__name__):
            self.unsure |= module.__name__ == "torch" and "ops" in names and not names & _ATEN
            return
        for name in names:
            if (id(module), name) in self._looked or name not in vars(module):
                continue
            self._looked.add((id(module), name))
            value = vars(module)[name]
            yield value
            if _is(value, ModuleType):
                yield from self._of_module(value, names)


def _is_kernel(one: Any) -> bool:
    """Compiled, interpreted, tuned or with heuristics; told by name, for Triton need not be there."""
    return any(kind.__name__ == "KernelInterface" and _root(kind.__module__) == "triton" for kind in type(one).__mro__)


def _names(code: CodeType) -> Iterator[str]:
    yield from (name for name in code.co_names if not name.startswith("@"))  # which pytest puts into what it rewrites
    for inner in code.co_consts:
        if _is(inner, CodeType):
            yield from _names(inner)


def _imports(code: CodeType, known: Mapping[str, Any]) -> Iterator[str]:
    """The full names of the modules that are imported where they are used."""
    package = str(known.get("__package__") or "").split(".")
    for level, name in _import_statements(code):
        parts = package[: len(package) - level + 1] if level else []
        yield ".".join(part for part in (*parts, name) if part)


@functools.lru_cache(maxsize=1 << 14)
def _import_statements(code: CodeType) -> tuple[tuple[int, str], ...]:
    """(level, name) of each. Targets of one library share most of their code, and reading it is what costs."""
    found: list[tuple[int, str]] = []
    numbers: list[Any] = [0, 0]
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            found.append((numbers[-2] if _is(numbers[-2], int) else 0, str(step.argval)))
        elif step.opname.startswith("LOAD_"):
            numbers.append(step.argval)
    for inner in code.co_consts:
        if _is(inner, CodeType):
            found += _import_statements(inner)
    return tuple(found)


def _attributes(one: Any, name: str) -> Iterator[Any]:
    held = _held(one)
    if name == "__dict__":
        yield from list(held.values())
    elif name in held:
        yield held[name]


def _is(one: Any, kinds: type | tuple[type, ...]) -> bool:
    """Of its type alone: `isinstance` asks its `__class__`, to which a proxy without an object answers by an error."""
    return issubclass(type(one), kinds)


def _held(one: Any) -> Mapping[str, Any]:
    """Its attributes. Not by `vars`, which asks its `__getattr__`: a model of pydantic's builds itself then, or fails.
    """
    if _is(one, (type, ModuleType)):
        return vars(one)
    try:
        found: Mapping[str, Any] = object.__getattribute__(one, "__dict__")
    except AttributeError:
        return {}
    return found


def _empty(cell: Any) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


def _root(module: Any) -> str:
    return str(module).partition(".")[0]


def _opaque(module: Any) -> bool:
    return _root(module) in _OPAQUE
