"""One call of a target: its tensors laid into an arena, the call itself, and what came back.

The eager mode makes a new call for each relation, and for each step but those whose case says that they refill the
tensors of one before. The graph modes keep one a bucket: its tensors are the static buffers, filled anew before each
replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_fuzz.execute.call import guarded
from moe_fuzz.fence import Arena
from moe_fuzz.ops.inputs import Inputs, Result
from moe_fuzz.targets.bind import Target
from moe_fuzz.verdict import Violation

Results = tuple["torch.Tensor | None", ...]  # in the order of the op's results; None for one that the target has not


_SEVERAL = (tuple, list)


class BadResult(Exception):
    """What a target returned is no result at all: the violation it is."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(violation.message)
        self.violation = violation


class Call:
    """A call that is ready to be made. Its tensors live in the arena."""

    def __init__(self, inputs: Inputs, target: Target, arena: Arena, with_out: bool) -> None:
        """with_out: the results go into buffers of ours."""
        capabilities = target.info.capabilities
        self.target, self.arena = target, arena
        self.results = inputs.results
        #: Those that the target gives, which come in the op's order.
        self.given = {name: one for name, one in self.results.items() if name not in capabilities.absent}
        self.fluid = inputs.fluid
        self.plain = dict(inputs.plain)  # what they hold
        self.out: tuple[torch.Tensor, ...] = ()
        self.shared: dict[str, torch.Tensor] = {}  # tensors that a result takes the place of
        replaced = inputs.in_place if with_out else {}
        with arena.gathering():
            self.tensors = inputs.place(arena, capabilities, without=replaced.values())
            if with_out:
                self.out = tuple(
                    arena.tensor(name, shape, dtype, "output", max(dtype.itemsize, capabilities.alignment))
                    for name, (shape, dtype) in self.given.items()
                )
        for result, buffer in zip(self.given, self.out, strict=bool(self.out)):
            if result in replaced:
                self.shared[replaced[result]] = buffer
        self._fill_shared()
        self.tensors |= self.shared
        self.device = self.first.device
        self.arguments: dict[str, Any] = inputs.options | self.tensors
        if with_out:
            self.arguments["out"] = self.out if len(self.results) > 1 else self.out[0]

    @property
    def first(self) -> torch.Tensor:
        """The first of the tensors that change from step to step."""
        return self.tensors[self.fluid[0]]

    def refill(self, inputs: Inputs) -> None:
        """Other inputs of the same shapes into the same tensors. What is there already, and read-only, stays."""
        with self.arena.gathering():
            for name, tensor in self.tensors.items():
                value = inputs.plain[name]
                if name in self.shared:  # it is filled where results are poisoned: before each call
                    self.plain[name] = value
                elif self.plain[name] is not value or not self.arena.options.is_readonly(name):
                    self.arena.fill(tensor, value)
                    # A target may keep what it knows of a tensor until that is written, and on CUDA another was.
                    torch.autograd.graph.increment_version(tensor)
                    self.plain[name] = value

    def poison(self) -> None:
        """Makes the buffers of ours look as if nothing had been written; those that a call reads hold what it is to
        find there."""
        shared = {buffer.data_ptr() for buffer in self.shared.values()}
        self.arena.poison([buffer for buffer in self.out if buffer.data_ptr() not in shared])
        self._fill_shared()

    def _fill_shared(self) -> None:
        for name, buffer in self.shared.items():
            self.arena.fill(buffer, self.plain[name].expand(buffer.shape).contiguous())
            torch.autograd.graph.increment_version(buffer)

    def bare(self, first: torch.Tensor | None = None) -> Any:
        """Calls the target and returns what it returns. Nothing is guarded, nothing waits for the device.

        first: in the place of the tensor of that name.
        """
        return self.target(self.arguments if first is None else {**self.arguments, self.fluid[0]: first})

    def run(self) -> Any:
        """Calls the target with its inputs read-only and its own memory fenced. Raises TargetError, DeviceLost.

        On CUDA the device may not be done with it yet.
        """
        self.arena.protect()
        try:
            with self.arena.own():
                return guarded(self.bare, self.device.type)
        finally:
            self.arena.unprotect()

    def fetched(self, device: torch.device) -> Results:
        """Calls the target, and fetches the results to `device`: see `fetch`. Also raises BadResult."""
        return fetch(self.unpacked(self.run()), device)

    def unpacked(self, result: Any) -> Results:
        """The results out of what the target returned. Raises BadResult if it is not those, or not the buffers that
        were given."""
        results = self.given
        alone = len(self.results) == 1
        several = isinstance(result, _SEVERAL)
        got = (result,) if alone and not several else tuple(result) if several else ()
        if len(got) < len(results) or not _fit(got, results):
            names = ", ".join(results)
            what = {1: f"a tensor {names}", 2: f"a pair of tensors ({names})"}.get(len(results), f"tensors ({names})")
            none = ", but None: what was written into `out` is returned, too" if result is None and self.out else ""
            raise BadResult(Violation(
                "structure", "result", f"the result is not {what}{none}", expected=names if alone else f"({names})",
                got=type(result).__name__ + (f" of {len(result)}" if several else ""),
            ))  # fmt: skip
        device = self.device
        for name, tensor in zip(results, got, strict=False):
            if tensor.device != device:
                message = f"{name} is on the wrong device: {tensor.device}, and should be on {self.device}"
                raise BadResult(
                    Violation("structure", f"{name}:device", message, name, (), str(self.device), str(tensor.device))
                )
        for at, (name, given, tensor) in enumerate(zip(results, self.out, got, strict=False) if self.out else ()):
            if given.numel() and not _same_memory(given, tensor):
                raise BadResult(Violation(
                    "structure", f"{name}:out", f"{name} did not come back in the buffer `out` that was given", name,
                    (), "the tensor out" if alone else f"the tensor out[{at}]", "another tensor",
                ))  # fmt: skip
        if len(results) == len(self.results):
            return got[: len(results)]
        by_name = dict(zip(results, got, strict=False))
        return tuple(by_name.get(name) for name in self.results)


def fetch(results: Results, device: torch.device) -> Results:
    """The results, copied to the bit to where they are judged: a target may use its own buffers again, and checks call
    it again. From CUDA to the host they are there when the device has been waited for."""
    there = next(tensor.device for tensor in results if tensor is not None)
    if device.type == there.type:
        return tuple(None if tensor is None else tensor.detach().clone() for tensor in results)
    from moe_fuzz.fence import cuda_regions  # kernels of Triton, which a host has no use for

    given = [tensor for tensor in results if tensor is not None]
    small = [cuda_regions.is_small(tensor) for tensor in given]
    copies = iter(cuda_regions.fetched([tensor for tensor, is_small in zip(given, small, strict=True) if is_small]))
    moved = iter([next(copies) if is_small else cuda_regions.to_host(tensor.detach())
                  for tensor, is_small in zip(given, small, strict=True)])  # fmt: skip
    return tuple(None if tensor is None else next(moved) for tensor in results)


def check_shapes(inputs: Inputs, results: Results) -> None:
    """Raises BadResult for results that have not the shapes which their inputs ask for: relations compare row by
    row."""
    for (name, (shape, _)), tensor in zip(inputs.results.items(), results, strict=True):
        if tensor is not None and not inputs.fits(name, tuple(tensor.shape)):
            message = f"{name} has the wrong shape: {tuple(tensor.shape)}, and should be {shape}"
            raise BadResult(
                Violation("structure", f"{name}:shape", message, name, (), str(shape), str(tuple(tensor.shape)))
            )


def _fit(got: tuple[Any, ...], results: Mapping[str, Result]) -> bool:
    """Whether these are tensors, each of as many dimensions as its result."""
    for one, (shape, _) in zip(got, results.values(), strict=False):
        if not isinstance(one, torch.Tensor) or one.dim() != len(shape):
            return False
    return True


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
