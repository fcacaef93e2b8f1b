"""A space: what the cases of an op may be. Free of torch; one instance per op, found by `moe_fuzz.ops.get_space`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from moe_fuzz.case import ALL_MODES, Case, Scalar
from moe_fuzz.contract import TargetInfo
from moe_fuzz.labels import Labels


@dataclass(frozen=True)
class FaultPlace:
    """A fault that may be laid on a tensor: on chosen rows, or on the tensor as a whole."""

    fault: str
    tensor: str
    on_rows: bool
    needs: str = ""  # the config flag without which the tensor does not exist
    max_rows: int | None = None  # it is laid into no step of more rows
    modes: tuple[str, ...] = ALL_MODES  # it is laid into no case of another mode
    often: int = 1  # drawn as if it were so many of its tensor's: one name for what has many forms


@dataclass(frozen=True)
class Axis:
    """One choice of a config, with the values of the dictionary, the simplest first."""

    name: str
    values: Sequence[Scalar]
    often: Sequence[Scalar] = ()  # of these values, drawn once more for each mention: kernels have a path for them
    between: Callable[[int], bool] | None = None  # of a size: whether the target takes a number between two of these


_MORE = {True: 3, False: 10}  # interpreted: seconds are soon many there


@dataclass(frozen=True)
class Means:
    """Where a case runs, and how much it may cost."""

    device: str
    interpreted: bool = True  # of a CPU: kernels of Triton's, a hundred times as slow as operators are
    times: int = 1  # the ordinary budget

    @classmethod
    def of(cls, info: TargetInfo, device: str) -> Means:
        return cls(device, info.triton)

    @property
    def more(self) -> Means:
        """For the rare case that is large. On a GPU the ordinary budget has room for all that the dictionary holds."""
        return self if self.device != "cpu" else replace(self, times=_MORE[self.interpreted])

    def budget(self, interpreted: float, host: float) -> float:
        """Seconds on a CPU: of these two, for a target that is interpreted, and for any other."""
        return self.times * (interpreted if self.interpreted else host)


class Space(Protocol):
    """The contract's shapes and dtypes as data: what to draw, what is valid, what is simpler, what it costs."""

    @property
    def op(self) -> str: ...
    @property
    def family(self) -> str: ...  # of ops that share inputs and checks: see moe_fuzz.checks.family
    @property
    def description(self) -> str: ...
    @property
    def checks(self) -> Mapping[str, str]: ...  # name -> one line
    @property
    def faults(self) -> Mapping[str, str]: ...  # name -> one line
    @property
    def places(self) -> tuple[FaultPlace, ...]: ...
    @property
    def tensors(self) -> Mapping[str, str]: ...  # name -> "input" | "output"
    @property
    def fields(self) -> Mapping[str, tuple[Scalar, ...]]: ...  # of a config -> its values, for a target that takes all
    @property
    def sizes(self) -> tuple[str, ...]: ...  # the config fields that are sizes
    @property
    def presets(self) -> Mapping[str, Mapping[str, Scalar]]: ...  # model -> the part of a config it fixes

    # A space may also have `tails`: what a layer before may leave in the rows of a static buffer that are no tokens, in
    # the places of moe_fuzz.sequences.TAILS. And `crowded`: the config, changed into one on whose slots larger means
    # than the ordinary ones are well spent (ops/experts/space.py). And `roomy`: the config with smaller sizes, where
    # these means afford no row of it; and `seams`: of token counts, those behind which a result of this config lies
    # otherwise (ops/nvfp4/space.py); and `seamed`: the config, changed into one of which so many are cheap. And
    # `sometimes`: faults for a config, of which one case in a few has one beside its own; and `beside`: of faults, the
    # one that most often lies beside it, without which it would show nothing. And
    # `launches`: how many calls of the target one of this config is, where that is more than one.

    def axes(self, info: TargetInfo) -> tuple[Axis, ...]:
        """The axes of a config inside the target's capabilities; `experts` holds counts."""
        ...

    def tokens(self, config: Mapping[str, Scalar], means: Means) -> tuple[int, ...]:
        """The token counts of the dictionary that a case of this config can afford, the simplest first."""
        ...

    def modes(self, info: TargetInfo) -> tuple[str, ...]:
        """The modes in which the target can be run: see moe_fuzz.case.ALL_MODES."""
        ...

    def affordable(self, case: Case, means: Means) -> bool:
        """Whether the case may be drawn, by its cost."""
        ...

    def complete(self, config: Mapping[str, Scalar], info: TargetInfo) -> dict[str, Scalar]:
        """Repairs what was drawn axis by axis (k above E, a scale the target does not take) into a valid config."""
        ...

    def places_for(self, config: Mapping[str, Scalar], info: TargetInfo) -> tuple[FaultPlace, ...]:
        """The faults that can be laid into a case of this config for this target."""
        ...

    def validate(self, case: Case) -> None:
        """Raises CaseError unless the case is one of this op's."""
        ...

    def refusal(self, case: Case, info: TargetInfo) -> str:
        """Why the case lies outside the target's capabilities; empty if it lies inside."""
        ...

    def features(self, case: Case) -> frozenset[str]:
        """The classes the case belongs to: what a finding may need, never raw shapes."""
        ...

    def simplify(self, case: Case) -> Iterator[Case]:
        """Valid and strictly simpler cases, the most ambitious first."""
        ...

    def sharpen(self, case: Case) -> Iterator[Case]:
        """Cases as simple, which may go on failing where this one no longer would: fenced on the other side."""
        ...

    def label_axes(self, case: Case) -> Mapping[str, Labels]:
        """The axes of the config whose elements have labels and can be taken away one by one: `experts`."""
        ...

    def keep(self, case: Case, axis: str, labels: Labels) -> Case:
        """The case with these labels only on the axis, and what depends on their number cut down to it."""
        ...

    def cost(self, case: Case, means: Means) -> float:
        """Estimated seconds in a worker."""
        ...

    def label(self, case: Case) -> str:
        """One line for a person."""
        ...
