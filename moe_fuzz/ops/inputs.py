"""The arguments of one call of an op: its tensors, where they will lie in memory, its plain arguments. Worker side.

A family of ops extends `Inputs` in ops/<family>/inputs.py and makes them there: `materialize(case, step_index, device)`
is a function of the case alone, with the same bits on every device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch

from moe_fuzz.contract import Capabilities
from moe_fuzz.fence import Arena

_INTEGERS: Mapping[int, torch.dtype] = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_VECTOR = 16  # bytes of the widest load
Result = tuple[tuple[int, ...], torch.dtype]  # shape and dtype


@dataclass(frozen=True)
class Lie:
    """Where a tensor's elements lie; all numbers in elements."""

    gap: int = 0  # between the end of a row and the start of the next
    offset: int = 0  # before the first element
    #: not 0: columns are packed, not rows, and a row's elements stand this far apart; so do those of a vector
    column_stride: int = 0

    def strides(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of a vector, of a matrix, or of several matrices one after another."""
        if len(shape) == 1:
            return (max(1, self.column_stride),)
        *several, rows, columns = shape
        inner = (1, self.column_stride) if self.column_stride else (columns + self.gap, 1)
        return (max(rows * inner[0], columns * inner[1]), *inner) if several else inner


_PACKED = Lie()


@dataclass
class Inputs(ABC):
    """Arguments of one call. `plain` holds the tensors in ordinary memory, before they are fenced.

    Nobody writes into them once they are made: a call may find the same tensor where an earlier one has put it.
    """

    options: dict[str, Any]  # the op's plain arguments, by name
    plain: dict[str, torch.Tensor] = field(default_factory=dict)  # its tensors, by name; those it has not are not there
    lies: dict[str, Lie] = field(default_factory=dict)  # of the tensors that are not packed
    #: Results that take a tensor's place, where the case gives buffers: the target reads and writes the same memory.
    in_place: dict[str, str] = field(default_factory=dict, kw_only=True)

    #: The tensors that change from replay to replay of a graph. All others are weights. The first has a row a token.
    fluid: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def results(self) -> dict[str, Result]:
        """What a call returns, in order; `out` buffers are made like that."""

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the result of this name may have this shape."""
        return shape == self.results[name][0]

    @property
    def tokens(self) -> int:
        return self.plain[self.fluid[0]].shape[0]

    @property
    def elements(self) -> int:
        return sum(tensor.numel() for tensor in self.plain.values())

    @property
    def device(self) -> torch.device:
        """Where `plain` is, and where the outputs are judged."""
        return self.plain[self.fluid[0]].device

    def replace(self, **tensors: torch.Tensor) -> Self:
        """The same call with other tensors."""
        return replace(self, plain={**self.plain, **tensors})

    def refills(self, other: Inputs) -> bool:
        """Whether these can be put into the tensors of another call, as a server fills its buffers anew: they have the
        same shapes, lie alike, and differ in nothing but what changes from step to step. Weights stay as they are: a
        target may keep what it has made of them."""
        return (
            self.options == other.options and self.lies == other.lies and list(self.plain) == list(other.plain)
            and all(_of_a_shape(one, other.plain[name]) for name, one in self.plain.items())
            # Now both have as many tokens, and so are on one device, which hangs on the size of a step.
            and all(name in self.fluid or _same(one, other.plain[name]) for name, one in self.plain.items())
        )  # fmt: skip

    def blank(self) -> Self:
        """What a server captures a graph on: zeros, and every row a token. The weights are there."""
        return self.replace(**{name: torch.zeros_like(self.plain[name]) for name in self.fluid if name in self.plain})

    def place(
        self, arena: Arena, capabilities: Capabilities, without: Collection[str] = ()
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Lays the tensors into the arena, flush against its guards, but for those named in `without`. Weights that lie
        there already stay as they are, unless a target may have written into them."""
        placed = {}
        for name, plain in self.plain.items():
            if name in without:
                continue
            if name in self.fluid or not arena.options.is_readonly(name):
                placed[name] = self._place(name, plain, arena, capabilities)
                continue
            there = arena.weights.get(name)
            if there is None or there[0] is not plain:
                there = arena.weights[name] = (plain, self._place(name, plain, arena, capabilities))
            placed[name] = there[1]
        return placed

    def _place(self, name: str, plain: torch.Tensor, arena: Arena, capabilities: Capabilities) -> torch.Tensor:
        lie = self.lies.get(name, _PACKED)
        # An offset misaligns the first element of a storage that is itself aligned: flush right, chance may undo it.
        alignment = _VECTOR if lie.offset else capabilities.alignment
        return arena.filled(
            name,
            plain,
            alignment=max(alignment, plain.element_size()),
            strides=lie.strides(plain.shape) if lie.gap or lie.column_stride else None,
            offset=lie.offset,
        )


def _of_a_shape(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or torch.equal(element_bits(one), element_bits(other))


def element_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of the same size, so that NaN equals NaN and -0 differs from +0."""
    bits = _INTEGERS[tensor.element_size()]
    return tensor.contiguous() if tensor.dtype == bits else tensor.contiguous().view(bits)
