"""Tells when code is being compiled, so that a slow compiler is no hang and a kernel that spins is one at once.

Three places, each stable over the versions we run on: Triton's compiler and its loading of what it compiled (3.6, 3.7),
waiting for another process (nvcc, ninja and gcc, whoever starts them: torch's extensions, FlashInfer's, Triton's own
launchers), and Dynamo. A compiler that works inside the process and shows itself nowhere is declared:
`Capabilities(jit=True)`.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from moe_fuzz.execute import clock

_MARK = "__moe_fuzz_clock__"
_dynamo_told = False


def watch_compilers() -> None:
    """Installs the hooks. Idempotent."""
    import triton.compiler
    import triton.compiler.compiler

    # JITFunction looks `triton.compiler.compile` up when it first meets a device, so this name is the one that counts.
    _wrap(triton.compiler, "compile")
    # Triton asks for the handles at each launch. A message to the parent there would cost more than the launch.
    _wrap(triton.compiler.compiler.CompiledKernel, "_init_handles", unless=_is_loaded)
    for name in ("wait", "communicate"):
        _wrap(subprocess.Popen, name, anywhere=False)


def watch_dynamo() -> None:
    """Hears Dynamo too, once somebody has loaded it: doing so ourselves would cost every worker a second."""
    global _dynamo_told
    if _dynamo_told or "torch._dynamo" not in sys.modules:
        return
    _dynamo_told = True
    callbacks = sys.modules.get("torch._dynamo.callback")
    handler = getattr(callbacks, "callback_handler", None)
    if handler is None:
        return
    open_blocks: list[Any] = []

    def start(*_: Any) -> None:
        block = clock.stopped("compile")
        block.__enter__()
        open_blocks.append(block)

    def end(*_: Any) -> None:
        if open_blocks:
            open_blocks.pop().__exit__(None, None, None)

    handler.register_start_callback(start)
    handler.register_end_callback(end)


def _is_loaded(kernel: Any) -> bool:
    return getattr(kernel, "module", None) is not None


def _wrap(owner: Any, name: str, anywhere: bool = True, unless: Callable[[Any], bool] | None = None) -> None:
    """anywhere: in any thread. A library's own thread may wait for its helper process as long as it lives. unless: says
    of the first argument that there is nothing left to do."""
    original: Callable[..., Any] | None = getattr(owner, name, None)
    if original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def compiling(*args: Any, **kwargs: Any) -> Any:
        if unless is not None and unless(args[0]):
            return original(*args, **kwargs)
        if not anywhere and threading.current_thread() is not threading.main_thread():
            return original(*args, **kwargs)
        with clock.stopped("compile"):
            return original(*args, **kwargs)

    setattr(compiling, _MARK, True)
    setattr(owner, name, compiling)
