"""How an adapter's call looks without moe-fuzz: so that a finding in a library can be shown to those who maintain it.

An adapter hands a library's own operator the arguments of the op, and a script for the library's maintainers must not
need the adapter. So the adapter says what it calls, as data, and `execute/exhibit.py` writes the function from it:

    @looks_like(BareCall(
        "torch.ops._moe_C.topk_softmax",
        ("weights", "ids", "source_rows", "logits", "renormalize", "bias"),
        buffers={**ROUTED, "source_rows": ("int32", ("tokens", "top_k"))},
        libraries={"MOE_FUZZ_VLLM_LIB": "/opt/vllm/_moe_C.abi3.so"},
    ))
    def topk_softmax(logits, top_k, *, renormalize=False, bias=None, out=None): …
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from moe_fuzz.errors import UsageError

_F = TypeVar("_F", bound=Callable[..., Any])
_ATTRIBUTE = "__moe_fuzz_call__"
_OP = "logits", "top_k"  # what every function of a routing op takes by position
_SIZES = "tokens", "experts"
_WIDTH = 100  # columns of a call; a longer one has an argument a line

Buffers = Mapping[str, tuple[str, tuple[int | str, ...]]]

#: The buffers of a router that writes into what it is given. A case's `out` takes their place.
ROUTED: Buffers = {"weights": ("float32", ("tokens", "top_k")), "ids": ("int32", ("tokens", "top_k"))}


@dataclass(frozen=True)
class BareCall:
    """One call of a function or operator, of which nothing is hidden.

    Arguments and results are Python expressions over the op's own argument names (`logits`, `top_k`, `bias`, …: None
    where a case has none), `tokens`, `experts`, the buffers, and, in the results, `result`: what the call returned.
    """

    function: str  # dotted: "torch.ops._moe_C.topk_softmax", "sgl_kernel.topk_softmax"
    arguments: tuple[str, ...]  # "bias", "0.0", "logits.float()", "renormalize=renormalize"
    results: tuple[str, ...] = ("weights", "ids")
    buffers: Buffers = field(default_factory=lambda: ROUTED)  # name -> dtype, shape; each fresh for each call
    libraries: Mapping[str, str] = field(default_factory=dict)  # variable that names others -> files, joined as in PATH
    imports: tuple[str, ...] = ()  # modules that register the operator; that of a dotted Python function goes unsaid
    environment: Mapping[str, str] = field(default_factory=dict)  # set before anything is imported
    surfaces_launch_error: bool = False  # raises what an unchecked launch over an empty grid left behind

    def __post_init__(self) -> None:
        for text in (*self.arguments, *self.results, self.function):
            try:
                ast.parse(f"f({text})")
            except SyntaxError as error:
                raise UsageError(f"{self.function}: {text!r} is no Python expression: {error.msg}") from error
        if unknown := {name for name, _ in self.buffers.items() if not name.isidentifier()}:
            raise UsageError(f"{self.function}: {unknown.pop()!r} is no name for a buffer")

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules to import."""
        place = self.function.rpartition(".")[0]
        return (*self.imports, *([place] if place.partition(".")[0] != "torch" else []))

    def names(self) -> frozenset[str]:
        """The op's arguments that the call makes use of, the two positional ones aside."""
        trees = [ast.parse(f"f({text})") for text in (*self.arguments, *self.results)]
        used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
        return frozenset(used - {"f", "torch", "result", *_OP, *_SIZES, *self.buffers})

    @property
    def takes_out(self) -> bool:
        return set(ROUTED) <= set(self.buffers)

    def source(self, name: str, out: bool) -> str:
        """A function `name` of the op's arguments that makes the call. out: it takes `out=(weights, ids)`."""
        keywords = [*sorted(self.names()), *(["out"] if out else [])]
        parameters = ", ".join([*_OP, *(["*", *(f"{one}=None" for one in keywords)] if keywords else [])])
        lines = [f"def {name}({parameters}):", *(f"    import {module}" for module in self.modules)]
        lines.append("    tokens, experts = logits.shape")
        for buffer, (dtype, shape) in self.buffers.items():
            given = f"out[{list(ROUTED).index(buffer)}] if out else " if out and buffer in ROUTED else ""
            sizes = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
            lines.append(f"    {buffer} = {given}torch.empty(({sizes}), dtype=torch.{dtype}, device=logits.device)")
        call = f"{self.function}({', '.join(self.arguments)})"
        if len(call) > _WIDTH:
            call = "\n".join([f"{self.function}(", *(f"        {argument}," for argument in self.arguments), "    )"])
        used = any(isinstance(node, ast.Name) and node.id == "result"
                   for text in self.results for node in ast.walk(ast.parse(text, mode="eval")))  # fmt: skip
        lines.append(f"    result = {call}" if used else f"    {call}")
        if self.surfaces_launch_error:
            lines += ["    if not tokens:  # a launch over nothing, if nobody checked it, is an error of the next one",
                      "        torch.zeros(1, device=logits.device)"]  # fmt: skip
        lines.append(f"    return {', '.join(self.results)}")
        return "\n".join(lines) + "\n"


def looks_like(call: BareCall) -> Callable[[_F], _F]:
    """Says of an adapter's function how its call looks without moe-fuzz."""

    def attach(function: _F) -> _F:
        setattr(function, _ATTRIBUTE, call)
        return function

    return attach


def bare_call(function: Callable[..., Any]) -> BareCall | None:
    """What the adapter said of this function, if it did."""
    found = getattr(function, _ATTRIBUTE, None)
    return found if isinstance(found, BareCall) else None
