"""A CUDA graph as a host can have one: what a call asks torch and Triton for, to be done again without the host's code.

A graph keeps of a call what was launched, with the addresses and the numbers it was launched with; what the host
computed or decided is not looked at again. So is it with a tape: the operations of torch, and the launches of kernels
that Triton's interpreter runs, over the same memory, in the same order.

A script of a finding has what stands below the imports, with a `poison` of its own (campaign/repro).

Not everything that a host does can be taped. A target that reads its tensors otherwise (numpy, a library of its own),
or whose shapes hang on what they hold, has a tape that is not its call. `whole` says whether it is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from moe_fuzz.fence import canary

#: What copies a tensor to the host, or waits for it: a GPU refuses that while it captures. Operations of torch, and
#: functions of its Python side that a tensor of a host hands itself over with, without any operation.
_READS = {
    torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal, torch.ops.aten.is_nonzero,
    torch.ops.aten.masked_select, torch.ops.aten.unique_dim, torch.ops.aten._unique2,
    torch.ops.aten.unique_consecutive, torch.ops.aten.bincount, torch.ops.aten.allclose,
}  # fmt: skip
#: Who asks for a number wherever a tensor is. Others do so on a host alone, to check what a GPU takes on trust.
_ASKS = {
    torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__,
    torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.__format__, torch.Tensor.__repr__,
    torch.Tensor.__contains__, torch.arange, torch.is_nonzero,
}  # fmt: skip
_HANDS_OVER = {torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist, torch.Tensor.cpu,
               torch.Tensor.__dlpack__}  # fmt: skip
#: What makes memory and writes nothing there.
_EMPTY = {
    torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.empty_permuted,
    torch.ops.aten.new_empty, torch.ops.aten.new_empty_strided,
}  # fmt: skip
_MOST = 1 << 28  # bytes that a call may make: a tape keeps all of it, also to know it again
_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_RESIZES = {torch.ops.aten.set_, torch.ops.aten.resize_, torch.ops.aten.resize_as_}


_under_way: list[Tape] = []


def recording() -> bool:
    """Whether a call is being taped."""
    return bool(_under_way)


def answer_who_asks() -> None:
    """`torch.cuda.is_current_stream_capturing` has an answer on a host, where it is an error without CUDA."""
    torch.cuda.is_current_stream_capturing = recording


class NotWhole(Exception):
    """A replay came to what was not so when it was taped."""


class Tape:
    """`record` a call, then `replay`."""

    def __init__(self, inputs: Iterable[torch.Tensor]) -> None:
        """inputs: what is on the device before the call, where a read of it is an error, as on a GPU."""
        self.whole = True
        self.refused: RuntimeError | None = None  # what was raised, in the words of CUDA and ours
        self.by: Any = None  # the function of torch that is under way
        self._entries: list[Callable[[], None]] = []
        self._made: list[torch.Tensor] = []
        self._room = _MOST
        self._device = {_memory(tensor) for tensor in inputs}

    def record(self, call: Callable[[], Any]) -> Any:
        """What the call returns. Raises what it raises, and `refused`."""
        _under_way.append(self)
        try:
            operations = _OperationsBesideDynamo if "torch._dynamo" in sys.modules else _Operations
            with _Functions(self), operations(self), _launches(self), _compiled(self):
                return call()
        finally:
            _under_way.pop()

    def replay(self) -> None:
        """Raises what an operation raises, and NotWhole."""
        for entry in self._entries:
            entry()

    def does_it_again(self, results: Iterable[torch.Tensor | None]) -> bool:
        """Whether a replay leaves the call's results, to the bit. Else something wrote that is not on the tape."""
        given = [result for result in results if result is not None]
        pairs = [(tensor, tensor.clone()) for tensor in (*given, *self._made)]
        for tensor, _ in pairs:
            canary.poison(tensor)
        try:
            self.replay()
            same = not any(unequal(one, was).any() for one, was in pairs[: len(given)])
        except (NotWhole, RuntimeError):  # the call had none
            same = False
        for one, was in () if same else pairs:
            one.copy_(was)  # the target may have kept it
        return same

    def poison(self) -> None:
        """All that the call allocated looks as if nobody had written there: other graphs have the same memory."""
        for tensor in self._made:
            canary.poison(tensor)

    # ---- while it is recorded ---------------------------------------------------------------------------------------

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Does an operation of torch, and keeps it."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func.overloadpacket in _READS or _by_mask(func, args):
            self.read(given, str(func.overloadpacket))
        if func.overloadpacket in _RESIZES:
            self.whole = False
        result = func(*args, **kwargs)
        if self._room < 0:
            return result
        before = {_memory(tensor) for tensor in given}
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        fresh = [at for at, tensor in enumerate(results) if _memory(tensor) not in before]
        self._made += (results[at] for at in fresh)
        self._room -= sum(results[at].untyped_storage().nbytes() for at in fresh)
        if self._room < 0:
            self.whole = False
            self._made.clear()
            self._entries.clear()
            return result
        if before & self._device:
            self._device |= {_memory(tensor) for tensor in results}
            if not results or func.namespace != "aten":  # it writes somewhere, and need not say where
                self._device |= self._ours(given)
        # In inference mode `to` and `reshape` come whole, and may be either.
        if (fresh or not func.is_view) and func.overloadpacket not in _EMPTY:
            self._entries.append(lambda: _again(func, args, kwargs, results, fresh))
        return result

    def read(self, tensors: Iterable[torch.Tensor], by: str) -> None:
        """The host looks at these."""
        if self._room < 0 or not any(_memory(tensor) in self._device for tensor in tensors):
            return  # made on the host, of numbers that the host had
        if by == str(torch.ops.aten._local_scalar_dense) and self.by not in _ASKS:
            self.whole = False
            return
        said = f"operation not permitted when stream is capturing: the host reads a tensor by {by}"
        self.refused = RuntimeError(said)
        raise self.refused

    def _ours(self, tensors: Iterable[torch.Tensor]) -> set[int]:
        """Those that the call made. Of others, one may stand for two: a GPU has a table, and the host its own."""
        made = {_memory(tensor) for tensor in self._made}
        return made & {_memory(tensor) for tensor in tensors}

    def launch(self, executor: Any, launch: Callable[..., None], args: Any, kwargs: Any) -> None:
        """Launches a kernel, and keeps that."""
        leaves = [getattr(leaf, "base", leaf) for leaf in tree_leaves((args, kwargs))]  # of a descriptor its tensor
        self._device |= self._ours(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        grid = executor.grid

        def kept(arguments: Any) -> Any:
            executor.grid = grid(arguments)  # a number of the host's, of the launch for good
            return executor.grid

        executor.grid = kept if callable(grid) else grid
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            launch(executor, *args, **kwargs)
        if self._room >= 0:
            self._entries.append(lambda: launch(executor, *args, **kwargs))


class _Operations(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as the fence's: else torch imports Dynamo at the first operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._tape.operation(func, args, kwargs or {})


class _OperationsBesideDynamo(_Operations):
    """Keeps Dynamo, once the target has loaded it, from compiling the tape."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Functions(TorchFunctionMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _IS_CUDA:
            return True
        if func in _HANDS_OVER:
            self._tape.read([arg for arg in args[:1] if isinstance(arg, torch.Tensor)], func.__name__)
        outer, self._tape.by = self._tape.by, func
        try:
            return func(*args, **kwargs)
        finally:
            self._tape.by = outer


@contextlib.contextmanager
def _launches(tape: Tape) -> Iterator[None]:
    """Whatever Triton's interpreter launches is the tape's."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:  # the target has no kernels of Triton's
        yield
        return
    executor: Any = interpreter.GridExecutor
    launch = executor.__call__
    executor.__call__ = lambda self, *args, **kwargs: tape.launch(self, launch, args, kwargs)
    try:
        yield
    finally:
        executor.__call__ = launch


@contextlib.contextmanager
def _compiled(tape: Tape) -> Iterator[None]:
    """What Dynamo has compiled runs as it was written while it is taped, and may have other bits when it is called."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    begin = getattr(dynamo, "_maybe_set_eval_frame", None)
    if begin is None:
        yield
        return

    def seen(callback: Any) -> Any:
        tape.whole = tape.whole and callback in (None, False)
        return begin(callback)

    dynamo._maybe_set_eval_frame = seen
    try:
        yield
    finally:
        dynamo._maybe_set_eval_frame = begin


def _again(func: Any, args: Any, kwargs: Any, results: list[torch.Tensor], fresh: list[int]) -> None:
    """Does an operation again; what it makes anew goes to where it was made first."""
    now = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
    for at in fresh:
        if now[at].shape != results[at].shape or now[at].dtype != results[at].dtype:
            raise NotWhole
        results[at].copy_(now[at])


def unequal(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """bool, of the tensors' shape: where their bits differ."""
    if one.is_complex():
        return unequal(torch.view_as_real(one), torch.view_as_real(other)).any(-1)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.detach().view(bits) != other.detach().view(bits)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _by_mask(func: Any, args: Any) -> bool:
    """Whether an index is a mask, which hides a `nonzero`."""
    masks = (torch.bool, torch.uint8)
    return func.overloadpacket is torch.ops.aten.index and any(
        index is not None and index.dtype in masks for index in args[1]
    )
