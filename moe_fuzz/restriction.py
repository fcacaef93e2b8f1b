"""What a campaign's cases are cut down to: some modes, some models, some faults, some values. Free of torch.

A restricted space draws nothing else, so generation, which draws axis by axis, and the grid, which covers pairs, spend
no case outside. Of the presets, which fix several axes at once, one is an axis of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moe_fuzz.case import MODES, Case, Scalar
from moe_fuzz.contract import TargetInfo
from moe_fuzz.ops.space import Axis, FaultPlace

NO_FAULT = "none"  # in place of a fault's name: cases without faults
_PRESET = "preset"
_FEW = 12  # values that a refusal names


@dataclass(frozen=True)
class Restriction:
    """None: everything."""

    modes: tuple[str, ...] | None = None
    presets: tuple[str, ...] | None = None  # configs of these models alone, with any flags that a model leaves open
    faults: tuple[str, ...] | None = None  # no other faults than these; NO_FAULT: none at all
    values: tuple[tuple[str, tuple[str, ...]], ...] | None = None  # field of a config -> its values, as `spelled`

    def __bool__(self) -> bool:
        return any(part is not None for part in vars(self).values())

    def lines(self) -> tuple[str, ...]:
        """For a campaign's header."""
        parts = (("modes", self.modes), ("presets", self.presets), ("faults", self.faults))
        named = tuple(f"only these {name}: {', '.join(part)}" for name, part in parts if part is not None)
        return named + tuple(f"only {name}={','.join(values)}" for name, values in self.values or ())

    def to_json(self) -> dict[str, Any]:
        names = {"modes": self.modes, "presets": self.presets, "faults": self.faults}
        data: dict[str, Any] = {name: None if part is None else sorted(part) for name, part in names.items()}
        values = self.values and [[field, sorted(taken)] for field, taken in sorted(self.values)]
        return data | ({"values": values} if values else {})

    def refusal(self, space: Any, info: TargetInfo) -> str:
        """Why nothing is left for this target; empty if something is."""
        restricted = RestrictedSpace(space, self)
        if self.modes is not None and not restricted.modes(info):
            return f"{info.name} cannot be run in mode {_or(self.modes)}"
        if self.presets is not None and not restricted.fitting(info):
            return f"{info.name} takes no config of {_or(self.presets)}"
        for axis in restricted.axes(info):
            if not axis.values:
                asked = _or(dict(self.values or ()).get(axis.name, ()))
                taken = next((one.values for one in space.axes(info) if one.name == axis.name), ())
                instead = f", but {_or(map(spelled, taken))}" if 0 < len(taken) <= _FEW else ""
                here = f" (here it is {info.narrowed})" if info.narrowed else ""
                return f"{info.name} takes no {axis.name}={asked}{instead}{here}"
        if self.faults is not None and NO_FAULT not in self.faults and not restricted.can_be_laid(info):
            return f"{info.name} takes cases with no fault {_or(self.faults)}"
        return ""

    def allows(self, case: Case) -> bool:
        """Whether a case has none but these modes, faults and values."""
        return (
            (self.modes is None or case.mode in self.modes)
            and (self.faults is None or set(case.fault_names) <= set(self.faults))
            and all(spelled(_drawn(case, field)) in values for field, values in self.values or ())
        )


class RestrictedSpace:
    """A space (ops/space.py) of which only a part can be drawn; all else is as in the space itself."""

    def __init__(self, space: Any, restriction: Restriction) -> None:
        self._space = space
        self._only = restriction

    def __getattr__(self, name: str) -> Any:
        return getattr(self._space, name)

    @property
    def presets(self) -> Mapping[str, Mapping[str, Scalar]]:
        only = self._only.presets
        return {name: fixed for name, fixed in self._space.presets.items() if only is None or name in only}

    @property
    def places(self) -> tuple[FaultPlace, ...]:
        return tuple(self._left(self._space.places))

    def places_for(self, config: Mapping[str, Scalar], info: TargetInfo) -> tuple[FaultPlace, ...]:
        return tuple(self._left(self._space.places_for(config, info)))

    def can_be_laid(self, info: TargetInfo) -> tuple[FaultPlace, ...]:
        """The faults that some case of this target can have: one with every tensor that it takes."""
        last = {axis.name: axis.values[-1] for axis in self._space.axes(info)}
        modes = set(self.modes(info))
        return tuple(
            place
            for place in self.places_for(self._space.complete(last, info), info)
            if not modes.isdisjoint(place.modes)
        )

    def modes(self, info: TargetInfo) -> tuple[str, ...]:
        asked = getattr(self._space, "modes", None)
        modes: tuple[str, ...] = asked(info) if asked else MODES[:1]
        return tuple(mode for mode in modes if self._only.modes is None or mode in self._only.modes)

    def fitting(self, info: TargetInfo) -> dict[str, Mapping[str, Scalar]]:
        """Of the presets, those that lie inside the target's capabilities."""
        allowed = {axis.name: axis.values for axis in self._space.axes(info)}
        allowed |= {name: [v for v in allowed.get(name, ()) if spelled(v) in values]
                    for name, values in self._only.values or ()}  # fmt: skip
        return {
            name: fixed
            for name, fixed in self.presets.items()
            if all(value in allowed.get(field, ()) for field, value in fixed.items())
        }

    def axes(self, info: TargetInfo) -> tuple[Axis, ...]:
        """With presets, these are an axis, and what all of them fix is no longer one worth covering."""
        values = dict(self._only.values or ())
        axes = tuple(
            replace(axis, between=None,
                    **{kind: tuple(value for value in getattr(axis, kind) if spelled(value) in values[axis.name])
                       for kind in ("values", "often")})
            if axis.name in values
            else axis
            for axis in self._space.axes(info)
        )
        if self._only.presets is None:
            return axes
        models = self.fitting(info)
        fixed = set.intersection(*(set(model) for model in models.values()))
        first = next(iter(models.values()))
        left = (Axis(axis.name, (first[axis.name],)) if axis.name in fixed else axis for axis in axes)
        return (*left, Axis(_PRESET, tuple(models)))

    def complete(self, config: Mapping[str, Scalar], info: TargetInfo) -> dict[str, Scalar]:
        chosen = dict(config)
        model = chosen.pop(_PRESET, None)
        whole: dict[str, Scalar] = self._space.complete(chosen | dict(self.presets[str(model)] if model else {}), info)
        return whole

    def _left(self, places: Iterable[FaultPlace]) -> Iterator[FaultPlace]:
        faults, modes = self._only.faults, self._only.modes
        return (
            place
            for place in places
            if (faults is None or place.fault in faults) and (modes is None or not set(modes).isdisjoint(place.modes))
        )


def spelled(value: Scalar) -> str:
    """A value as the command line has it: `true`, `8`, `bfloat16`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _drawn(case: Case, field: str) -> Scalar:
    """What the axis of this name had: of experts, how many."""
    return len(case.experts) if field == "experts" else case.config[field]


def _or(names: Iterable[str]) -> str:
    return " or ".join(names)
