"""Makes Triton's interpreter faster, without changing what it computes. Worker side, CPU only.

At each call of a jit function from inside a kernel (`tl.max` is one) the interpreter patches the whole language again,
1.6 ms each time, although during a launch every such patch after the first finds nothing left to do. Here it is done
once a launch for each set of language modules that a function sees: 1.5 times the speed of a routing kernel.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any


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
