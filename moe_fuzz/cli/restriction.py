"""`run --ops --mode --preset --faults --only`: read, held against what the targets' ops have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

from moe_fuzz import config
from moe_fuzz.case import ALL_MODES
from moe_fuzz.cli import params
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import EnvironmentProblem, UsageError
from moe_fuzz.ops import OPS, get_space
from moe_fuzz.restriction import NO_FAULT, Restriction, spelled

F = TypeVar("F", bound=Callable[..., Any])


def options(command: F) -> F:
    """The options. Each may be given several times, and each time with several names."""
    several = (
        ("ops", "--ops", "OP,…", "Targets of these ops only."),
        ("mode", "--mode", "MODE,…", f"Cases of these modes only: {', '.join(ALL_MODES)}."),
        ("preset", "--preset", "NAME,…", "Configs of these models only; `moe-fuzz list presets`."),
        ("faults", "--faults", "NAME,…", f"No faults but these; {NO_FAULT}: cases without faults."),
    )
    for key, flag, metavar, text in reversed(several):
        command = params.option(
            key, flag, type=params.NAMES, multiple=True, metavar=metavar, help=text, callback=_joined
        )(command)
    return params.option(
        "only", "--only", type=params.ASSIGNMENTS, multiple=True, metavar="FIELD=VALUE,…",
        help="Configs with these values only, e.g. bias=false,top_k=2,4; `moe-fuzz show CASE` names the fields.",
        callback=lambda _ctx, _param, value: tuple(pair for pairs in value for pair in pairs) or None,
    )(command)  # fmt: skip


def _joined(_ctx: click.Context, _param: click.Parameter, value: Iterable[Sequence[str]]) -> tuple[str, ...] | None:
    return tuple(dict.fromkeys(name for names in value for name in names)) or None


def only_ops(names: Sequence[str], ops: tuple[str, ...] | None) -> tuple[str, ...]:
    """The targets of these ops. UsageError for an op that does not exist, EnvironmentProblem if no target is left."""
    if ops is None:
        return tuple(names)
    _check("op", ops, OPS)
    left = tuple(name for name in names if name.partition("@")[0] in ops)
    if not left:
        raise EnvironmentProblem(f"there is nothing to run: no target asked for is one of {', '.join(ops)}",
                                 "`moe-fuzz list targets` shows which op a target is of")  # fmt: skip
    return left


def restriction(
    modes: tuple[str, ...] | None, presets: tuple[str, ...] | None, faults: tuple[str, ...] | None,
    only: tuple[tuple[str, tuple[str, ...]], ...] | None, targets: Sequence[str],
) -> Restriction:  # fmt: skip
    """UsageError for a name that none of the targets' ops knows."""
    spaces = [get_space(op) for op in dict.fromkeys(name.partition("@")[0] for name in targets)]
    _check("mode", modes, ALL_MODES)
    _check("preset", presets, [name for space in spaces for name in space.presets])
    _check("fault", faults, [NO_FAULT, *(name for space in spaces for name in space.faults)])
    if faults is not None and NO_FAULT in faults and len(faults) > 1:
        raise UsageError(f"--faults {','.join(faults)}: {NO_FAULT} stands alone", "leave it out, or the others")
    # What is drawn and is no field of a config has a name of several words.
    axes = [axis for space in spaces for axis in space.axes(TargetInfo("", space.op, "")) if axis.name.isidentifier()]
    for field, values in only or ():
        _check("field", [field], [axis.name for axis in axes])
        known = [value for axis in axes if axis.name == field for value in axis.values]
        # What a target has to declare before it is given it: whether one does, its worker says.
        known += [value for space in spaces for value in space.fields.get(field, ())]
        _check(f"{field} value", values, [spelled(value) for value in known])
    return Restriction(modes, presets, faults, only)


def _check(what: str, asked: Iterable[str] | None, known: Sequence[str]) -> None:
    names = list(dict.fromkeys(sorted(known)))
    for name in asked or ():
        if name not in names:
            raise UsageError(f"there is no {what} {name!r}{config.did_you_mean(name, names)}",
                             f"the {what}s are {', '.join(names)}")  # fmt: skip
