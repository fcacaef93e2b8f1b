"""The process under the tool: makes the calls of a case on plain memory, and writes what came of it. Worker side.

    python -m moe_fuzz.sanitize.child FOLDER

Nothing is fenced and nothing is judged. Each tensor is an allocation of its own, of its very size, because torch's
caching allocator is off (PYTORCH_NO_CUDA_MEMORY_CACHING): inside a segment of that, the tool is blind. Outputs are not
written before the call, and not read after it, so what initcheck sees is the target's doing. Replays of a graph are
called as plain steps: without the caching allocator nothing can be captured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

if os.environ.get("MOE_FUZZ_DEVICE") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

import torch

from moe_fuzz.case import Case, targets_of
from moe_fuzz.checks.families import FAMILIES
from moe_fuzz.execute.calls import Call
from moe_fuzz.fence import Arena
from moe_fuzz.options import FenceOptions
from moe_fuzz.sanitize.spec import Result, read_spec, write_result
from moe_fuzz.targets.bind import Target, bind
from moe_fuzz.verdict import Violation


class Bare(Arena):
    """Memory as anybody gets it, each tensor of exactly its size."""

    def __init__(self, device: str) -> None:
        self.options = FenceOptions(hard=(), readonly=(), own="off")
        self.weights = {}
        self._device = device

    def tensor(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, role: str = "input", alignment: int = 16,
        strides: Sequence[int] | None = None, offset: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        if strides is None:
            strides = _packed(shape)
        # Nothing behind the last element: that is where an access must be seen.
        extent = 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        storage = torch.empty(offset + extent, dtype=dtype, device=self._device)
        return storage.as_strided(tuple(shape), tuple(strides), offset)

    def filled(
        self, name: str, value: torch.Tensor, alignment: int = 16, strides: Sequence[int] | None = None, offset: int = 0
    ) -> torch.Tensor:  # fmt: skip
        tensor = self.tensor(name, value.shape, value.dtype, "input", alignment, strides, offset)
        self.fill(tensor, value)
        return tensor

    def fill(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        tensor.copy_(value)

    def protect(self) -> None:
        pass

    def unprotect(self) -> None:
        pass

    def check(self) -> list[Violation]:
        return []

    def own(self) -> AbstractContextManager[object]:
        return nullcontext()

    def close(self) -> None:
        pass


def _packed(shape: Sequence[int]) -> list[int]:
    strides, run = [], 1
    for size in reversed(shape):
        strides.append(run)
        run *= max(size, 1)
    return strides[::-1]


def run(case: Case, step: int, target: Target, device: str) -> None:
    """One call, to its end."""
    inputs = FAMILIES[case.op].materialize(case, step, "cpu")
    call = Call(inputs, target, Bare(device), bool(case.config.get("out")))
    wait(device)
    call.bare()
    wait(device)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(folder: Path) -> int:
    spec = read_spec(folder)
    cases: list[Case] = spec["cases"]
    planned = sum(len(case.steps) for case in cases)
    done, error = 0, ""
    try:
        bound = {name: bind(name) for name in dict.fromkeys(targets_of(cases, spec["target"]))}
        for name, case in zip(targets_of(cases, spec["target"]), cases, strict=True):
            for step in range(len(case.steps)):
                run(case, step, bound[name], spec["device"])
                done += 1
    except Exception as raised:  # noqa: BLE001 - the parent tells it; a fault of the device comes as one of these
        error = f"{type(raised).__name__}: {raised}".strip()[:1000]
    write_result(folder, Result(spec["token"], done, planned, error))
    if error:
        os._exit(0)  # the context may be broken, and the interpreter's end would hang on it
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
