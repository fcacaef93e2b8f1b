"""Kernels compiled for a GPU that need not be here: whatever a launcher would launch is compiled, and not run.

Triton takes its arguments as it would on the device, with all it derives of them: an argument that is 1 is a constant
of the binary, and one that 16 divides makes wide loads. So what a card would refuse is refused here, without a card.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import driver
from triton.runtime.jit import JITFunction

#: Of Hopper: a block's shared memory in bytes, and its multiprocessors, of which launchers make their grids.
SHARED_BYTES = 227 << 10
_MULTIPROCESSORS = 132
#: What torch does without a launch.
_FREE = frozenset((
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "permute",
    "_reshape_alias", "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "_unsafe_view",
    "view",
))  # fmt: skip


class Resources(NamedTuple):
    registers: int  # of a thread
    spilled: int  # bytes of a thread's registers that lie in memory
    shared: int  # bytes of a block


@dataclass
class Enqueued:
    """What a launcher has enqueued, in order: names of Triton's kernels, and of operators of torch that launch."""

    names: list[str] = field(default_factory=list)
    binaries: list[tuple[str, Any]] = field(default_factory=list)  # kernel and its constants, what Triton compiled
    allocated: list[str] = field(default_factory=list)  # operators of torch that did
    seconds: float = 0.0  # spent compiling


@contextmanager
def ahead(capability: int = 90, whole: bool = False) -> Iterator[Enqueued]:
    """While it lasts, launches compile for a GPU of this compute capability, and enqueue nothing; operators of torch
    run as ever. Tensors are the host's. `whole`: to machine code, and not only as far as Triton's own checks.

    Raises whatever the compiler raises. RuntimeError where Triton interprets.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton interprets in this process; unset TRITON_INTERPRET")
    target = GPUTarget("cuda", capability, 32)
    found = Enqueued()
    device = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: f"ahead-{capability}-{whole}",
        get_current_stream=lambda device: 0, is_active=lambda: True,
    )  # fmt: skip
    launch, compile_ = JITFunction.run, compiler.compile if whole else _checked

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        started = time.monotonic()
        self.compile = compile_  # what Triton sets once for a device
        made = launch(self, *args, grid=grid, warmup=True, **options)
        self.compile = compiler.compile
        found.seconds += time.monotonic() - started
        found.names.append(self.__name__)
        constants = " ".join(f"{k}={v}" for k, v in options.items() if isinstance(v, (int, str)))
        found.binaries.append((f"{self.__name__} {constants}", made))

    properties = SimpleNamespace(multi_processor_count=_MULTIPROCESSORS, name="none")
    replaced = mock.patch.object
    with (
        replaced(JITFunction, "run", run),
        replaced(driver, "_active", device),
        replaced(torch.cuda, "get_device_properties", lambda device=None: properties),
        replaced(torch.cuda, "get_device_capability", lambda device=None: divmod(capability, 10)),
        replaced(triton.compiler, "compile", compile_),
        _Operators(found),
    ):
        yield found


def resources(binary: Any) -> Resources:
    """What a whole binary takes of a multiprocessor."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return Resources(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], binary.metadata.shared)


def _checked(source: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
    """As triton.compile, up to Triton's own code: all that depends on the arguments is decided there."""
    backend = compiler.make_backend(target)
    parsed = backend.parse_options(dict(options or {}))
    context = compiler.ir.context()
    compiler.ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)
    return SimpleNamespace(name=source.name)


class _Operators(TorchDispatchMode):
    """Notes operators that would launch a kernel, a copy or a fill, were their tensors on a GPU."""

    def __init__(self, found: Enqueued) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "empty" in name:
            self._found.allocated.append(name)
        elif name not in _FREE:
            self._found.names.append(name)
        return func(*args, **(kwargs or {}))
