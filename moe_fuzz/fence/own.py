"""Fences for memory that a target allocates itself through torch.

A dispatch mode lets torch make the tensor as always, so dtype defaults, `memory_format` and every error stay torch's
own, and then moves it: what `torch.empty` and its kin gave is replaced by fenced, poisoned memory of the same geometry;
what `zeros`, `full`, `arange`, `clone` (so `contiguous`) and `to` gave is copied there. Other operations, and
whatever is not a plain strided tensor on the arena's device, keep the memory they have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Gives poisoned memory with the geometry of a tensor, or None where there is none to give.
Fence = Callable[[torch.Tensor], torch.Tensor | None]

_aten = torch.ops.aten


def _overloads(*packets: Any) -> frozenset[Any]:
    """The overloads that return new memory: all but the `out=` ones."""
    overloads = (getattr(packet, name) for packet in packets for name in packet.overloads())
    return frozenset(overload for overload in overloads if not overload._schema.is_mutable)


_UNINITIALIZED = _overloads(
    _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.empty_permuted, _aten.new_empty, _aten.new_empty_strided
)
_INITIALIZED = _overloads(
    _aten.zeros, _aten.zeros_like, _aten.new_zeros, _aten.ones, _aten.ones_like, _aten.new_ones, _aten.full,
    _aten.full_like, _aten.new_full, _aten.arange, _aten.clone, _aten._to_copy,
)  # fmt: skip
_NEW, _COPIED, _RESIZED = range(3)
#: What becomes of the memory that an operation makes or takes. One look-up: an overload's hash is computed in Python.
_CONCERNED = (
    dict.fromkeys(_UNINITIALIZED, _NEW)
    | dict.fromkeys(_INITIALIZED, _COPIED)
    | dict.fromkeys((_aten.resize_.default, _aten.resize_as_.default), _RESIZED)
)


class _OwnMemory(TorchDispatchMode):
    def __init__(self, fence: Fence, device: str) -> None:
        super().__init__()
        self._fence, self._device = fence, device

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else `torch.compile` would quietly run a compiled target eagerly

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports Dynamo at the first operation: a second, and 800 modules, in every worker

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        concerned = _CONCERNED.get(func)
        if concerned == _RESIZED:
            _unfence(args[0])
        result = func(*args, **(kwargs or {}))
        if (
            concerned is None or concerned == _RESIZED or not self._movable(result)
            or (kwargs and kwargs.get("pin_memory"))
        ):  # fmt: skip
            return result
        fenced = self._fence(result)
        if fenced is None:
            return result
        return fenced.copy_(result) if concerned == _COPIED else fenced

    def _movable(self, result: Any) -> bool:
        return (
            type(result) is torch.Tensor
            and result.device.type == self._device
            and result.layout is torch.strided
            and not result.is_quantized
            and not result.is_conj()
            and not result.is_neg()
            and result.numel() > 0  # a tensor without elements stays resizable, as `out=` arguments want it
        )


class _OwnMemoryBesideDynamo(_OwnMemory):
    """Keeps Dynamo, once the target has loaded it, from compiling the fence."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


def own_memory(fence: Fence, device: str) -> TorchDispatchMode:
    """The mode that takes this thread's memory on `device` from `fence`. It may be entered again and again."""
    return _kind()(fence, device)


def suits(mode: TorchDispatchMode) -> bool:
    """Whether `own_memory` would make such a mode now: the target may have loaded Dynamo since."""
    return type(mode) is _kind()


def _kind() -> type[_OwnMemory]:
    return _OwnMemoryBesideDynamo if "torch._dynamo" in sys.modules else _OwnMemory



def _unfence(tensor: torch.Tensor) -> None:
    """Moves a tensor that torch is about to resize to ordinary memory: fenced storage cannot grow."""
    if not tensor.untyped_storage().resizable():
        storage = tensor.untyped_storage().clone()
        tensor.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
