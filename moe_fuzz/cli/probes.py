"""What `doctor` asks of a process that may import torch: programs run by `python -P -c`, one answer each.

They are texts, not modules: nothing on this side of the pipe may import what they import, and one of them must die.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moe_fuzz

_VERSIONS = """
import importlib, json, platform
found = {"python": platform.python_version()}
for name in ("numpy", "torch", "triton"):
    try:
        found[name] = importlib.import_module(name).__version__
    except Exception as error:
        found[name + "_error"] = f"{type(error).__name__}: {error}"
if "torch" in found:
    import torch
    found["cuda_build"] = torch.version.cuda
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps(found))
"""

# Reads the last byte of a fenced tensor, says so, then reads the next one. Surviving that is the failure.
_GUARD = """
import ctypes, sys
sys.path.append({root!r})  # where this package lies, be it installed or not
import torch
from moe_fuzz.fence import open_arena
from moe_fuzz.options import FenceOptions
with open_arena("cpu", FenceOptions(), "right") as arena:
    tensor = arena.tensor("probe", (64,), torch.float32, role="input")
    end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    ctypes.string_at(end - 1, 1)
    print("inside", flush=True)
    ctypes.string_at(end, 1)
    print("outside", flush=True)
"""


# On a GPU: one of our kernels is compiled and run; then one reads two bytes, one in a fenced tensor and one beyond. A
# kernel must read them: a copy is refused by the driver, which knows what is mapped, and breaks nothing.
_CUDA = """
import contextlib, os, sys
sys.path.append({root!r})
import torch
from moe_fuzz.fence import cuda_driver, open_arena
from moe_fuzz.fence.cuda_mapping import bytes_at
from moe_fuzz.kernels.routing import topk_softmax
topk_softmax(torch.zeros(4, 8, device="cuda"), 2)
torch.cuda.synchronize()
print("compiled", flush=True)
with open_arena("cuda") as arena:
    tensor = arena.tensor("probe", (64,), torch.float32, role="input")
    end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    bytes_at(end - 2, 2).neg()
    cuda_driver.synchronize()
    print("inside", flush=True)
    try:
        bytes_at(end - 1, 2).neg()
        cuda_driver.synchronize()
        print("outside", flush=True)
    except Exception:
        with contextlib.suppress(cuda_driver.DeviceLost):  # torch may have seen it first
            cuda_driver.synchronize()
        if cuda_driver.lost() is None:
            raise
        print("lost", cuda_driver.lost().symptom, flush=True)
        os._exit(0)
"""

# Whether torch takes an allocator of ours.
_ALLOCATOR = """
import sys
sys.path.append({root!r})
import torch
from moe_fuzz.fence import allocator
allocator.install()
print("sum", float(torch.ones(3, device="cuda").sum()), allocator.installed().made > 0, flush=True)
"""

# How kernels of ours that have several backends choose one.
_BACKENDS = """
import sys
sys.path.append({root!r})
from moe_fuzz.kernels.experts_nvfp4 import rule
print("experts_nvfp4:", rule())
"""


@dataclass(frozen=True)
class Answer:
    """`said` is what the program printed; `problem` why there is no good answer, empty where there is one."""

    said: str = ""
    problem: str = ""


def versions(python: str = sys.executable, timeout: float = 120.0) -> tuple[dict[str, Any], str]:
    """Versions by package name (`torch_error` where the import failed), and the problem if nothing was told."""
    done = _run(_VERSIONS, python, timeout)
    if isinstance(done, Answer):
        return {}, done.problem
    if done.returncode != 0:
        return {}, f"importing them ended in {_end(done)}"
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1])), ""
    except (ValueError, IndexError):
        return {}, f"the answer is not JSON: {done.stdout[-200:]!r}"


def guard(python: str = sys.executable, timeout: float = 120.0) -> Answer:
    """Whether one byte beyond a fenced tensor kills the process, and the last byte inside does not."""
    done = _run(_GUARD.format(root=str(Path(moe_fuzz.__file__).parents[1])), python, timeout)
    if isinstance(done, Answer):
        return done
    inside = "inside" in done.stdout.split()
    if "outside" in done.stdout.split():
        return Answer(problem="the byte beyond a fenced tensor was read, and nothing happened")
    if inside and done.returncode in (-signal.SIGSEGV, -signal.SIGBUS):
        return Answer(said=signal.Signals(-done.returncode).name)
    where = "after" if inside else "before"
    return Answer(problem=f"the probe ended in {_end(done)}, {where} it had read the last byte inside")


def cuda(python: str = sys.executable, timeout: float = 180.0) -> tuple[Answer, Answer]:
    """On a GPU: whether Triton compiles for it, and whether a byte beyond a fenced tensor breaks the context."""
    done = _run(_CUDA.format(root=str(Path(moe_fuzz.__file__).parents[1])), python, timeout)
    if isinstance(done, Answer):
        return done, done
    words = done.stdout.split()
    if "compiled" not in words:
        problem = Answer(problem=f"a Triton kernel does not run: {_end(done)}")
        return problem, Answer(problem="was not tried: no kernel runs")
    triton = Answer(said="compiles and runs a kernel")
    if "outside" in words:
        return triton, Answer(problem="the byte beyond a fenced tensor was read, and nothing happened")
    if "lost" in words:
        return triton, Answer(said=words[words.index("lost") + 1])
    where = "after" if "inside" in words else "before"
    return triton, Answer(problem=f"the probe ended in {_end(done)}, {where} it had read inside")


def allocator(python: str = sys.executable, timeout: float = 120.0) -> Answer:
    """On a GPU: whether torch can be given an allocator, as `--fence all` needs it."""
    done = _run(_ALLOCATOR.format(root=str(Path(moe_fuzz.__file__).parents[1])), python, timeout)
    if isinstance(done, Answer):
        return done
    if done.stdout.split() == ["sum", "3.0", "True"]:
        return Answer(said="replaced")
    return Answer(problem=f"torch's allocator cannot be replaced: {_end(done)}")


def backends(python: str = sys.executable, timeout: float = 120.0) -> Answer:
    """The rule by which backends are chosen, as the environment of a worker has it."""
    done = _run(_BACKENDS.format(root=str(Path(moe_fuzz.__file__).parents[1])), python, timeout)
    if isinstance(done, Answer):
        return done
    if done.returncode == 0:
        return Answer(said=done.stdout.strip())
    return Answer(problem=f"our kernels cannot be imported: {_end(done)}")


def _run(program: str, python: str, timeout: float) -> subprocess.CompletedProcess[str] | Answer:
    try:
        command = [python, "-P", "-c", program]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return Answer(problem=f"no answer in {timeout:.0f} s")
    except OSError as error:
        return Answer(problem=f"{python} cannot be started: {error.strerror}")


def _end(done: subprocess.CompletedProcess[str]) -> str:
    """`exit code 1: ImportError: …` or the signal's name."""
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return f"exit code {done.returncode}" + (f": {lines[-1]}" if lines else "")
