"""Configuration: `[tool.moe-fuzz]` of the nearest pyproject.toml, and the names of the `MOE_FUZZ_*` variables.

Flags win over the environment, the environment over the file. An unknown key, a wrong type or a wrong value is an error
that names the place and the way out: a mistyped budget must not silently become the default one.

    [tool.moe-fuzz]
    targets = ["topk_softmax@builtin", "my_kernels.py:my_topk"]
    time = "10m"
    state-dir = "build/moe-fuzz"

    [tool.moe-fuzz.providers.vllm]                       # how the workers that load vLLM are started
    python = "/opt/vllm-0.33/bin/python"                 # an interpreter of its own, with torch, triton and numpy
    lib = ["libs/_moe_C_stable_libtorch.abi3.so"]        # or its extension library alone
    env = { VLLM_MOE_SKIP_PADDING = "1" }
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_fuzz.errors import UsageError
from moe_fuzz.options import LIB_VARIABLES, OWN, ProviderOptions
from moe_fuzz.targets import registry
from moe_fuzz.written import parse_duration, parse_report, parse_size

TABLE = "tool.moe-fuzz"
ENV_PREFIX = "MOE_FUZZ_"
DEVICES = ("auto", "cpu", "cuda")
DEFAULT_STATE_DIR = ".moe-fuzz"


@dataclass(frozen=True)
class Profile:
    """A named budget. `floor` is the number of cases below which a campaign cut by time counts as not having run."""

    name: str
    seconds: float
    minimize_seconds: float
    floor: int
    help: str


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("quick", 60.0, 15.0, 20, "one minute: a look before a commit"),
        Profile("default", 300.0, 30.0, 50, "five minutes"),
        Profile("deep", 3600.0, 120.0, 500, "one hour: nightly, or before a release"),
    )
}


# ---- values ----------------------------------------------------------------------------------------------------------


def _count(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"must be a whole number, not {value!r}")
        if not least <= value < 2**63:
            raise ValueError(f"must be at least {least} and less than 2^63, not {value}")
        return value

    return read


def _choice(*choices: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, not {value!r}" + did_you_mean(str(value), choices))
        return str(value)

    return read


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"must be a list of strings, not {value!r}")
    return value


def _reports(value: Any) -> list[str]:
    for item in _texts(value):
        parse_report(item)
    return list(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"must be a string, not {value!r}")
    return value


#: Every key of the table, and what reads its value. The variable of `minimize-time` is `MOE_FUZZ_MINIMIZE_TIME`.
KEYS: Mapping[str, Callable[[Any], Any]] = {
    "targets": _texts,
    "time": parse_duration,
    "cases": _count(1),
    "seed": _count(0),
    "workers": _count(1),
    "device": _choice(*DEVICES),
    "state-dir": _text,
    "profile": _choice(*PROFILES),
    "deadline": parse_duration,
    "memory": parse_size,
    "checks": _texts,
    "ops": _texts,
    "mode": _texts,
    "preset": _texts,
    "faults": _texts,
    "only": _texts,
    "fence": _choice(*OWN),
    "report": _reports,
    "minimize-time": parse_duration,
}


def env_name(key: str) -> str:
    """The variable that sets a key: `minimize-time` → `MOE_FUZZ_MINIMIZE_TIME`."""
    return ENV_PREFIX + key.upper().replace("-", "_")


# ---- the file and the environment ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What the file says. Keys are parameter names (`state_dir`), values are valid; paths are absolute."""

    values: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    providers: Mapping[str, ProviderOptions] = field(default_factory=dict)  # by the provider's name


def load(start: Path, environment: Mapping[str, str]) -> Config:
    """The configuration that holds in the directory `start`. Raises UsageError for whatever is wrong with it."""
    check_environment(environment)
    for folder in (start, *start.parents):
        table = _read_table(folder / "pyproject.toml")
        if table is not None:
            return _validate(table, folder / "pyproject.toml", environment)
    return Config()


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises UsageError for a `MOE_FUZZ_*` variable that means nothing."""
    known = [*(env_name(key) for key in KEYS), *LIB_VARIABLES.values(), ENV_PREFIX + "DEBUG"]
    for name in sorted(environment):
        if name.startswith(ENV_PREFIX) and name not in known:
            raise UsageError(
                f"unknown environment variable {name}{did_you_mean(name, known)}",
                f"unset it; the variables are {', '.join(known)}",
            )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _read_table(path: Path) -> Mapping[str, Any] | None:
    """The table of one file; None where the file or the table is missing."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}", "correct the file") from error
    tool = data.get("tool", {})
    if isinstance(tool, dict) and "moe_fuzz" in tool:
        raise UsageError(f"{path}: unknown table [tool.moe_fuzz]", f"the table is called [{TABLE}]")
    table = tool.get("moe-fuzz") if isinstance(tool, dict) else None
    if table is not None and not isinstance(table, dict):
        raise UsageError(f"{path}: tool.moe-fuzz must be a table, not {table!r}", f"write [{TABLE}]")
    return table


def _validate(table: Mapping[str, Any], path: Path, environment: Mapping[str, str]) -> Config:
    values: dict[str, Any] = {}
    providers = _providers(table.get("providers", {}), path, environment)
    for key, value in table.items():
        if key == "providers":
            continue
        if key not in KEYS:
            # an underscore for a hyphen is the commonest slip, and difflib finds it as well
            raise UsageError(
                f"{path}: unknown key {key!r} in [{TABLE}]{did_you_mean(key, [*KEYS, 'providers'])}",
                f"the keys are {', '.join(KEYS)}, and the tables [{TABLE}.providers.NAME]",
            )
        try:
            values[key.replace("-", "_")] = KEYS[key](value)
        except ValueError as error:
            raise UsageError(f"{path}: [{TABLE}] {key}: {error}") from error
    return Config(_absolute(values, path.parent), path, providers)


def _strings(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError(f"must be a table of strings, not {value!r}")
    return value


#: The keys of `[tool.moe-fuzz.providers.NAME]`.
PROVIDER_KEYS: Mapping[str, Callable[[Any], Any]] = {"python": _text, "lib": _texts, "env": _strings}


def _providers(tables: Any, path: Path, environment: Mapping[str, str]) -> dict[str, ProviderOptions]:
    """`lib` becomes the variable that the provider's targets read, unless it is set already: it wins over the file."""
    if not isinstance(tables, dict):
        raise UsageError(f"{path}: {TABLE}.providers must be a table", f"write [{TABLE}.providers.NAME]")
    known = {target.provider for target in registry.known()} if tables else set()
    found = {}
    for name, table in tables.items():
        where = f"{path}: [{TABLE}.providers.{name}]"
        if name not in known:
            raise UsageError(f"{where}: there is no provider {name!r}{did_you_mean(name, known)}",
                             f"the providers are {', '.join(sorted(known))}")  # fmt: skip
        if not isinstance(table, dict):
            raise UsageError(f"{where} must be a table, not {table!r}")
        read: dict[str, Any] = {}
        for key, value in table.items():
            if key not in PROVIDER_KEYS or (key == "lib" and name not in LIB_VARIABLES):
                hint = f"the keys are {', '.join(PROVIDER_KEYS)}; lib is for {' and '.join(LIB_VARIABLES)}"
                raise UsageError(f"{where}: unknown key {key!r}{did_you_mean(key, PROVIDER_KEYS)}", hint)
            try:
                read[key] = PROVIDER_KEYS[key](value)
            except ValueError as error:
                raise UsageError(f"{where} {key}: {error}") from error
        env = dict(read.get("env", {}))
        if "lib" in read and LIB_VARIABLES[name] not in environment:
            files = [str(path.parent / Path(file).expanduser()) for file in read["lib"]]
            env[LIB_VARIABLES[name]] = os.pathsep.join(files)
        python = read.get("python")
        if python and os.sep in python:  # a bare name is looked up in PATH
            python = str(path.parent / Path(python).expanduser())
        found[name] = ProviderOptions(python, env)
    return found


def _absolute(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths in the file are meant from the file's folder, wherever in the project the command is called."""
    if "state_dir" in values:
        values["state_dir"] = str(folder / Path(values["state_dir"]).expanduser())
    if "report" in values:
        pairs = [parse_report(item) for item in values["report"]]
        values["report"] = [f"{kind}={folder / path.expanduser()}" if path else kind for kind, path in pairs]
    if "targets" in values:
        values["targets"] = [_absolute_target(target, folder) for target in values["targets"]]
    return values


def _absolute_target(target: str, folder: Path) -> str:
    op, at, source = target.rpartition("@")
    path, colon, function = source.rpartition(":")
    return f"{op}{at}{folder / path}:{function}" if colon and path.endswith(".py") else target
