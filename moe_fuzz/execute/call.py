"""One guarded call of a target: its exceptions become violations, those of our own code do not.

On CUDA nobody waits for a call that went well. A kernel that broke the context is DeviceLost, whatever else the target
raised: that is a consequence. Whoever waits next is told.
"""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from moe_fuzz.execute import launch_errors
from moe_fuzz.fence import cuda_driver
from moe_fuzz.fence.canary import spelled
from moe_fuzz.verdict import Violation

_T = TypeVar("_T")
_MACHINERY = ("moe_fuzz/execute", "moe_fuzz/targets/bind.py", "moe_fuzz/fence", "site-packages/torch",
              "site-packages/triton", "site-packages/numpy")  # fmt: skip
_LIBRARY = tuple({sysconfig.get_path("stdlib") + os.sep, sysconfig.get_path("platstdlib") + os.sep})
#: What Triton's interpreter raises -> what it has not.
_UNINTERPRETED = {
    "inline_asm not supported in interpreter mode": "inline assembly",
    "'InterpreterBuilder' object has no attribute 'create_dot_scaled'": "tl.dot_scaled",
    "'InterpreterBuilder' object has no attribute": "an operation of this kernel",
    "not supported in interpreter mode": "a function of libdevice",
}


class TargetError(Exception):
    """The target raised: the violation it is, and the traceback for a person."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.text = "".join(traceback.format_exception(error))
        # In Triton's interpreter a kernel's error comes as the text of one, once more for each function it passes.
        while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
            error = error.__cause__
        message = (str(error).strip().splitlines() or [""])[0][:300]
        name = type(error).__name__
        self.out_of_memory = (
            isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in message
        )
        #: What the target needs and Triton's interpreter has not: no word on the target.
        self.uninterpreted = next((has_not for told, has_not in _UNINTERPRETED.items() if told in str(error)), "")
        unwritten = f"; {poison} was never written: it is uninitialised memory" if (poison := spelled(message)) else ""
        self.violation = Violation(
            "error",
            name,
            f"raised {name} on a valid input{f': {message}' if message else ''}{unwritten}",
            expected="a result",
            got=f"{name}: {message}" if message else name,
            site=site_of(error),
        )


class CaptureFailed(Exception):
    """The target cannot be captured. torch's allocator may go on believing that a capture is under way, so this
    process must not run another case."""

    def __init__(self, error: TargetError) -> None:
        super().__init__(str(error))
        self.error = error


def guarded(call: Callable[[], _T], device: str) -> _T:
    """Runs the target's code; whatever it raises comes out as TargetError, or as the DeviceLost that it comes of.

    sys.exit in a kernel library is an error like any other, and so is KeyboardInterrupt: no terminal reaches a worker.
    """
    process = os.getpid()
    try:
        try:
            result = call()
        finally:
            if os.getpid() != process:  # a fork of the target's that came back, and would give verdicts, too
                os._exit(0)
        if device == "cuda":
            launch_errors.surface()
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if device == "cuda":
            launch_errors.forget()  # what the target has told of; the next to ask would be told it again
            cuda_driver.synchronize()
        raise TargetError(error) from error
    return result


def site_of(error: BaseException) -> str:
    """file:line in function of the innermost frame that is the target's own code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_machinery(f.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""


def _is_machinery(file: str) -> bool:
    """Whether nobody would look for a target's bug here: ours, the standard library, or what `exec` made of a string,
    a dataclass's `__init__` say, whose caller has a file."""
    library = file.startswith(_LIBRARY) and not any(room in file for room in ("/site-packages/", "/dist-packages/"))
    return library or file.startswith("<") or any(part in file for part in _MACHINERY)
