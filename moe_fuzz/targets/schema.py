"""Binds a call by the names of its arguments, as the library itself declares them. Worker side.

Signatures of serving libraries move from release to release: an argument is added at the end or in the middle, or
renamed. What a release takes is read off its operator's schema or its function's signature, never off a version number.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_fuzz.errors import EnvironmentProblem


@dataclass(frozen=True)
class Fixed:
    """An argument that is always given the same value."""

    value: Any


#: Spelling of an argument -> the value of ours that it takes, or the one it is always given.
Names = Mapping[str, "str | Fixed"]


@dataclass(frozen=True)
class Argument:
    """One argument of a schema. `omissible`: the call may leave it out, or give it None."""

    name: str
    omissible: bool
    default: Any = None


@dataclass(frozen=True)
class BoundCall:
    """A function of a library, called with our values under its names."""

    function: Callable[..., Any]
    text: str  # the schema or signature, as the library spells it
    plan: tuple[tuple[str, str | Fixed], ...]  # its name of each argument -> our value's name
    place: str  # its dotted name: torch.ops._moe_C.topk_softmax, or module and function

    def takes(self, value: str) -> bool:
        return any(role == value for _, role in self.plan)

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Calls it. Values that it does not take are left out; those that it takes must be there."""
        return self.function(
            **{name: role.value if isinstance(role, Fixed) else values[role] for name, role in self.plan}
        )


def bind_operator(operator: Any, names: Names, required: Iterable[str]) -> BoundCall:
    """An overload such as `torch.ops._moe_C.topk_softmax.default`. EnvironmentProblem for a schema not understood."""
    schema = operator._schema
    arguments = [
        Argument(a.name, a.has_default_value() or str(a.type).startswith("Optional"), a.default_value)
        for a in schema.arguments
    ]
    text = re.sub(r"\(\$?\w+! -> [^)]*\)", "!", str(schema))  # as the library wrote it: Tensor!, not Tensor($0! -> )
    place = f"torch.ops.{schema.name.replace('::', '.')}"
    if schema.overload_name or len(operator.overloadpacket.overloads()) > 1:
        place += f".{schema.overload_name or 'default'}"
    return _bind(operator, place, text, arguments, names, required)


def bind_function(function: Callable[..., Any], names: Names, required: Iterable[str]) -> BoundCall:
    """A Python function, by inspect.signature. EnvironmentProblem if its parameters are not understood."""
    signature = inspect.signature(function)
    arguments = [
        Argument(p.name, p.default is not p.empty, p.default)
        for p in signature.parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    text = f"{getattr(function, '__qualname__', 'function')}({', '.join(signature.parameters)})"
    place = f"{function.__module__}.{getattr(function, '__qualname__', 'function')}"
    return _bind(function, place, text, arguments, names, required)


def _bind(
    function: Callable[..., Any], place: str, text: str, arguments: Iterable[Argument], names: Names,
    required: Iterable[str],
) -> BoundCall:  # fmt: skip
    plan: list[tuple[str, str | Fixed]] = []
    for argument in arguments:
        if argument.name in names:
            plan.append((argument.name, names[argument.name]))
        elif argument.omissible:
            plan.append((argument.name, Fixed(argument.default)))
        else:
            raise EnvironmentProblem(
                f"the argument {argument.name!r} of {text} is not known, and has no default",
                "this release is newer or older than those in docs/targets.md; wrap it in a function of "
                "(logits, top_k, …) and name that: file.py:function",
            )
    bound = BoundCall(function, text, tuple(plan), place)
    for value in required:
        if not bound.takes(value):
            spellings = ", ".join(name for name, role in names.items() if role == value)
            raise EnvironmentProblem(
                f"{text} has no argument for the {value}, under any of the names {spellings}",
                "this release is newer or older than those in docs/targets.md",
            )
    return bound
