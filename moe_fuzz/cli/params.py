"""The types of option values, and the options that several commands share. Each option names its variable."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from moe_fuzz import config, written
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.options import FENCED_DEVICES, OWN, ProviderOptions

F = TypeVar("F", bound=Callable[..., Any])
MIN_MEMORY, MAX_MEMORY = 1 << 30, 4 << 30  # bytes; what a worker gets unless told
MAX_WORKERS = 1024


class Parsed(click.ParamType):
    """A value read by one of the configuration's own parsers, so that flag, variable and file speak one language."""

    def __init__(self, name: str, parse: Callable[[Any], Any], done: type | tuple[type, ...]) -> None:
        self.name = name
        self._parse = parse
        self._done = done

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, self._done):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _words(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else list(value)
    names = tuple(item.strip() for item in items if item.strip())
    if not names:
        raise ValueError("names nothing: write names with commas in between")
    return names


def _assignments(value: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`bias=false,out=true,false`: a word with `=` begins another field."""
    found: list[tuple[str, list[str]]] = []
    for word in _words(value):
        field, equals, first = word.partition("=")
        if equals and field.strip():
            found.append((field.strip(), [first]))
        elif found and not equals:
            found[-1][1].append(word)
        else:
            raise ValueError(f"{value!r} is not FIELD=VALUE, e.g. bias=false")
    return tuple((field, _words(values)) for field, values in found)


DURATION = Parsed("duration", written.parse_duration, float)
SIZE = Parsed("size", written.parse_size, int)
REPORT = Parsed("kind=path", written.parse_report, ())
NAMES = Parsed("name,name…", _words, ())
ASSIGNMENTS = Parsed("field=value,…", _assignments, ())


def option(key: str, *flags: str, **settings: Any) -> Callable[[F], F]:
    """A click option for a key of the configuration, with its variable."""
    settings.setdefault("envvar", config.env_name(key))
    return click.option(*flags, show_envvar=True, **settings)


state_dir = option(
    "state-dir",
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=config.DEFAULT_STATE_DIR,
    show_default=True,
    help="Where findings, corpus and statistics are kept.",
)
device = option(
    "device",
    "--device",
    type=click.Choice(config.DEVICES),
    default="auto",
    show_default=True,
    help="auto: cuda where there is a GPU, else cpu, where Triton kernels run in its interpreter.",
)
workers = option(
    "workers",
    "--workers",
    type=click.IntRange(1, MAX_WORKERS),
    metavar="N",
    help="Worker processes, spread over the GPUs. [default: as many as there are cores, and GPU memory for]",
)
deadline = option(
    "deadline",
    "--deadline",
    type=DURATION,
    default=10.0,
    metavar="SECONDS",
    show_default=True,
    help="After this long a case counts as a hang.",
)
memory = option(
    "memory",
    "--memory",
    type=SIZE,
    metavar="SIZE",
    help="Memory limit of a worker, e.g. 8GiB. [default: on a CPU its share, 4GiB at most]",
)
fence = option(
    "fence",
    "--fence",
    type=click.Choice(OWN),
    default=None,
    help="Of the memory a target allocates itself: torch fences what it asks torch for in Python, all what it "
    "allocates in C++ too (CUDA, slower). [default: torch]",
)
target_op = click.option("--op", metavar="OP", help="The op of a file.py:function or package.module:function target.")


def pick_device(wanted: str) -> str:
    """`cpu` or `cuda`, for `auto` by what the machine has."""
    from moe_fuzz.cli.machine import gpus

    if wanted == "auto":
        return "cuda" if "cuda" in FENCED_DEVICES and gpus() else "cpu"
    if wanted not in FENCED_DEVICES:
        raise EnvironmentProblem(
            f"this version runs nothing on {wanted}: it has no memory fences there yet",
            f"--device {FENCED_DEVICES[0]} runs the same kernels in Triton's interpreter",
        )
    return wanted


def pick_fence(wanted: str | None, device: str) -> tuple[str, tuple[str, ...]]:
    """FenceOptions.own, and notes for a person: on a CPU nobody stands between a target's C++ and its memory."""
    if (wanted, device) == ("all", "cpu"):
        return "torch", ("fence all: on a CPU, memory that a target allocates in C++ stays unfenced",)
    return wanted or "torch", ()


def pick_providers() -> Mapping[str, ProviderOptions]:
    """The interpreters and variables that the configuration gives to providers."""
    context = click.get_current_context(silent=True)
    found = (context.obj or {}).get("config") if context else None
    return found.providers if isinstance(found, config.Config) else {}


def pick_workers(wanted: int | None, device: str) -> int:
    """How many workers: as asked, else one a core that this process may use, and on GPUs no more than have room."""
    from moe_fuzz.worker.gpus import default_workers, gpus

    if wanted is not None:
        return wanted
    return default_workers(gpus()) if device == "cuda" else max(1, len(os.sched_getaffinity(0)))


def pick_memory(wanted: int | None, device: str, workers: int) -> int | None:
    """Bytes a worker may have: as asked, else its share of what is free, so that a target that eats memory takes only
    its worker down. None on a GPU, where the driver maps address ranges that such a limit would count."""
    from moe_fuzz.cli.machine import memory_available

    available = memory_available()
    if wanted is not None or device != "cpu" or available is None:
        return wanted
    return max(MIN_MEMORY, min(MAX_MEMORY, available * 4 // 5 // (workers + 1)))  # one more: the one that confirms
