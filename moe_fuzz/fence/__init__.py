"""Fenced memory: every tensor a target can see lies flush against memory that faults.

    with open_arena("cpu", FenceOptions(), edge="right") as arena:
        logits = arena.tensor("logits", (256, 128), torch.bfloat16, role="input")
        weights = arena.tensor("weights", (256, 8), torch.float32, role="output")       # comes poisoned
        logits.copy_(…)
        arena.protect()                       # inputs become read-only
        with arena.own():                     # memory the target allocates itself is fenced too
            target(logits, …)
        arena.unprotect()
        violations = arena.check()            # canaries in the bytes that no guard page reaches
        missing = unwritten(weights)          # judge inside the block: what the target allocated lives in the arena

This module and `options` import no torch, so that the parent's side can name `FenceOptions`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING

from moe_fuzz.errors import UsageError
from moe_fuzz.options import FENCED_DEVICES, FenceOptions

if TYPE_CHECKING:
    import torch

    from moe_fuzz.verdict import Violation

__all__ = ["EDGES", "ROLES", "Arena", "FenceOptions", "open_arena", "unwritten"]

EDGES = ("right", "left")
ROLES = ("input", "output")


class Arena(ABC):
    """The fenced tensors of one case. One implementation a device; not for use by two threads at once.

    Each tensor is laid out as

        guard | slack | tensor | slack | guard

    * A hard guard faults the process (CPU: SIGSEGV; CUDA: an illegal access) on any access, or on writes alone with
      `options.access == "write"`. It is at least max(1 MiB, two strides of dimension 0) wide, 256 MiB on CUDA, so that
      an id that is off by one still lands in it.
    * A soft guard (`options.hard`, `options.sides`) is ordinary memory full of canaries, 64 KiB of it, 2 MiB on CUDA,
      with a hard guard behind it: an access survives, a write is named by `check`.
    * `edge` chooses the flush side. On it the slack is what `alignment` asks for and no more: fewer than `alignment`
      bytes right, none left; none at all where the size in bytes is a multiple of `alignment`. On the other side it
      runs to the end of the page.
    * Slack, and the gaps of a strided tensor, hold canaries: NaN in every float type, absurd as an integer.
    """

    options: FenceOptions
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]  # inputs laid once: name -> the value, the tensor it is in
    seconds: float = 0.0  # wall time spent in fence work so far
    unfenced: int = 0  # tensors of the target that got ordinary memory, because the arena's budget was spent

    @abstractmethod
    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        role: str = "input",
        alignment: int = 16,
        strides: Sequence[int] | None = None,
        offset: int = 0,
    ) -> torch.Tensor:
        """A fenced tensor. An output holds poison (see `unwritten`), an input canaries until it is filled.

        alignment: bytes, a power of two up to a page; the storage begins at a multiple of it, and of the element size.
        strides, offset: in elements; None means contiguous. The storage is exactly as long as the last reachable
        element needs, so it is this extent that lies flush; an offset of 1 is how a misaligned tensor is made.
        A tensor without elements has no memory: its data pointer is null, and any access to it faults.
        Raises UsageError for arguments that make no sense, MemoryError when the system gives no more memory.
        """

    @abstractmethod
    def filled(
        self, name: str, value: torch.Tensor, alignment: int = 16, strides: Sequence[int] | None = None, offset: int = 0
    ) -> torch.Tensor:  # fmt: skip
        """A fenced input that holds `value`, a tensor of any device. To write it later, use `fill`: on CUDA it is
        read-only from the beginning."""

    @abstractmethod
    def fill(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Copies `value` into a tensor that `filled` gave."""

    def gathering(self) -> AbstractContextManager[None]:
        """A block at whose end the tensors made and filled in it hold what they are to hold. On CUDA that is one launch
        for all of them; before the end nothing may use them."""
        return nullcontext()

    def poison(self, tensors: Sequence[torch.Tensor]) -> None:
        """Makes outputs of ours look as if nothing had been written."""
        from moe_fuzz.fence import canary  # of torch, without which this file can be imported

        for tensor in tensors:
            canary.poison(tensor)

    @abstractmethod
    def protect(self) -> None:
        """Makes the inputs read-only until `unprotect`, those that `options.readonly` names."""

    @abstractmethod
    def unprotect(self) -> None:
        """Makes the inputs writable again. Must be called before the inputs are filled anew; `close` implies it."""

    @abstractmethod
    def check(self) -> list[Violation]:
        """One Violation(check="canary") for each damaged side of each tensor, the target's own ones included.

        symptom: "NAME:right", "NAME:left", "NAME:gap" (between the elements of a strided tensor); with ":stale" behind
        it for a tensor of an earlier arena that the target kept and has now written around.
        where: (offset in bytes of the first damaged byte from the first byte of the tensor's storage,).
        """

    def look(self, beside: Sequence[Arena] = ()) -> Callable[[], list[Violation]]:
        """What `check` would say here, of this arena and of those beside it. On CUDA the comparison is enqueued, and
        the answer may be asked for when the device has been waited for, which saves a wait of its own."""
        return lambda: [violation for arena in (self, *beside) for violation in arena.check()]

    @abstractmethod
    def own(self) -> AbstractContextManager[object]:
        """Under it, memory that this thread allocates through torch is fenced and poisoned: tensors own0, own1, ….
        They live until the arena closes, or longer where the target keeps them. Does nothing unless `options.own`
        is "torch"; with "all" the worker's allocator has it all fenced already (fence/allocator.py).
        """

    @abstractmethod
    def close(self) -> None:
        """Gives the memory back for reuse. Memory that a living tensor still points to is set aside, valid and fenced,
        until that tensor dies: no other case gets it before. Idempotent."""

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_arena(device: str, options: FenceOptions | None = None, edge: str = "right") -> Arena:
    """An arena on `device` ("cpu" | "cuda"), whose tensors lie flush against the guard on the `edge` side ("right" |
    "left")."""
    if edge not in EDGES:
        raise UsageError(f"fence edge: {edge!r} is not one of {', '.join(EDGES)}")
    if device == "cpu":
        from moe_fuzz.fence.cpu import CpuArena

        return CpuArena(options or FenceOptions(), edge)
    if device == "cuda":
        from moe_fuzz.fence.cuda import CudaArena

        return CudaArena(options or FenceOptions(), edge)
    raise UsageError(f"there are no memory fences for device {device!r}",
                     f"the devices with fences are: {', '.join(FENCED_DEVICES)}")


def unwritten(tensor: torch.Tensor) -> torch.Tensor:
    """A bool mask, of the tensor's shape, of the elements that still hold the poison: bit-exact, on any device."""
    from moe_fuzz.fence import canary

    return canary.unwritten(tensor)
