"""Binds a target: loads its code and reads off its signature what it can be given. Worker side.

A function takes what its parameters name, in any library's spelling of them; what it does not name, it is never given.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_fuzz.contract import DECLARATION, PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.errors import EnvironmentProblem, UsageError
from moe_fuzz.planted.catalog import get_planted
from moe_fuzz.targets import registry
from moe_fuzz.targets.reach import has_triton
from moe_fuzz.targets.signatures import SIGNATURES, Signature

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

@dataclass(frozen=True)
class Target:
    """One implementation under test, ready to be called with the op's own arguments."""

    info: TargetInfo
    function: Callable[..., Any]
    keywords: Mapping[str, str]  # argument of the op -> this function's spelling

    positional: tuple[str, ...]  # arguments of the op that it takes by position

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """Calls the implementation with those of the op's arguments, by name, that it takes."""
        given = [arguments[name] for name in self.positional]
        return self.function(*given, **{self.keywords[k]: v for k, v in arguments.items() if k in self.keywords})


def bind(name: str) -> Target:
    """Loads the target of this full name. EnvironmentProblem if it cannot be loaded, UsageError if it is no target."""
    op, source = registry.split(name)
    return bind_at(op, source, registry.locate(name))


def bind_at(op: str, source: str, location: str) -> Target:
    """The target `op@source`, whose code lies at `module:attribute` or `/path/file.py:attribute`. Raises as `bind`."""
    function, origin = _load(location)
    promise = getattr(function, DECLARATION, {})
    planted = get_planted(source.removeprefix("planted.")) if source.startswith("planted.") else None
    if planted:
        promise = {
            "contract": Contract(**{"graph": False, **planted.contract}),
            "capabilities": Capabilities(**planted.capabilities),
            "clauses": {"*": f"planted: the bug of {planted.upstream}"},
        }
    signature = SIGNATURES[op]
    keywords, capabilities, contract = _read_signature(function, promise, signature)
    provider = source.partition(".")[0] if ":" not in source else "user"
    origin = promise.get("origin") or origin  # an adapter knows the library behind it
    clauses, unpromised = promise.get("clauses") or {}, promise.get("unpromised") or {}
    declared = promise.get("contract") is not None or provider != "user"
    triton = has_triton(function)
    triton = capabilities.compiles if triton is None else triton
    info = TargetInfo(f"{op}@{source}", op, provider, origin, contract, capabilities, clauses, unpromised, declared,
                      triton)  # fmt: skip
    return Target(info, function, keywords, signature.positional)


def _load(location: str) -> tuple[Callable[..., Any], str]:
    place, _, attribute = location.rpartition(":")
    factory = attribute.endswith("()")
    attribute = attribute.removesuffix("()")
    try:
        module = _module_from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise EnvironmentProblem(
            f"{place} cannot be imported: {type(error).__name__}: {error}", _way_to_import(place, error)
        ) from error
    function: Any = module
    for part in attribute.split("."):
        if not hasattr(function, part):
            raise UsageError(
                f"{place} has no {attribute!r}", f"it defines: {', '.join(_functions(module)) or 'no function'}"
            )
        function = getattr(function, part)
    if factory:
        function = inspect.unwrap(function)()  # unwrapped: a @fuzz test is its own factory underneath
    if not callable(function):
        raise UsageError(f"{location} is {type(function).__name__}, not a function")
    return function, str(getattr(module, "__file__", place))


def _way_to_import(place: str, error: Exception) -> str:
    if not isinstance(error, ModuleNotFoundError):
        script = f"{sys.executable} " + (place if place.endswith(".py") else f"-c 'import {place}'")
        return f"the worker imports it afresh, as `{script}` does, which shows where it fails"
    if (error.name or "") == place.partition(".")[0] and not place.endswith(".py"):
        return "the worker imports it afresh: install its project, or set PYTHONPATH to the folder that it lies in"
    return "the worker imports it afresh: what it needs must be installed, in PYTHONPATH, or lie beside it"


def _module_from_file(path: Path) -> Any:
    name = f"moe_fuzz_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # its neighbours, as when it is run as a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # what it imports later, inside of a call: they stand for nobody else's
    return module


def _functions(module: Any) -> list[str]:
    return [
        n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__ and n[0] != "_"
    ]


def _refuse_unknown(
    parameters: Mapping[str, inspect.Parameter], known: set[str], signature: Signature, can: Capabilities
) -> None:
    """UsageError for a function that could not be called: a TypeError of our own call would pass for its bug."""
    named = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    star = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    wanted, spellings = signature.positional, signature.spellings
    first = [p for p in named if p.kind is not p.KEYWORD_ONLY][: len(wanted)]
    if len(first) < len(wanted) and not star:
        factory = "" if parameters else "; one that returns it is named with () behind"
        raise UsageError(f"the function does not take {', '.join(wanted[:-1])} and {wanted[-1]} as its first "
                         f"{_NUMBERS[len(wanted)]} positional arguments",
                         f"wrap it in a function of ({', '.join(wanted)}, …){factory}")  # fmt: skip
    always = {s for name in spellings if signature.always_given(name, can) for s in spellings[name]}
    for p in named:
        if p in first or p.default is not p.empty or (p.name in known and p.name in always):
            continue
        needs = " (or declare Capabilities(bias_required=True))" if p.name in spellings.get("bias", ()) else ""
        raise UsageError(
            f"the function has a parameter {p.name!r} without a default, which not every case has a value for",
            f"give it one{needs}, or wrap the function; the names known are {', '.join(sum(spellings.values(), ()))}",
        )


def _read_signature(
    function: Callable[..., Any], promise: Mapping[str, Any], signature: Signature
) -> tuple[dict[str, str], Capabilities, Contract]:
    """What the function takes, and its promises cut down to that."""
    parameters: Mapping[str, inspect.Parameter] = {}
    has_signature = False
    with contextlib.suppress(TypeError, ValueError):  # a built-in without a signature takes the positional ones
        # What a module's __call__ takes is what its `forward` takes: its own signature says "anything".
        called = function.forward if isinstance(function, torch.nn.Module) else function
        parameters = inspect.signature(called).parameters
        has_signature = True
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    keywords = {
        argument: next((s for s in names if s in parameters), argument)
        for argument, names in signature.spellings.items()
        if takes_all or any(s in parameters for s in names)
    }
    declared: Capabilities | None = promise.get("capabilities")
    capabilities = declared or Capabilities(out="out" in keywords)
    capabilities = signature.cut(capabilities, keywords)
    if has_signature:
        _refuse_unknown(parameters, set(keywords.values()), signature, capabilities)
    contract: Contract | None = promise.get("contract")
    if contract is None:
        named = "dialect" if "dialect" in signature.spellings else "padding"  # a layer's word, and a router's
        default = parameters[named].default if named in parameters else None
        # Nobody said that it can be captured: then it need not be.
        contract = Contract(padding=(default,) if default in PADDING_DIALECTS else ("garbage",), graph=False)
    return keywords, capabilities, contract
