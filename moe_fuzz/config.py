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

    [tool.moe-fuzz.gate]                                 # of `moe-fuzz gate` alone
    profile = "quick"
    ledger = "ci/known-findings.toml"

    [tool.moe-fuzz.paths]                                # what `gate --changed-from` makes of a changed file
    "csrc/moe/topk*.cu" = ["topk_softmax@vllm"]
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_fuzz.config_tables import GATE_KEYS, TABLE, read_gate, read_paths, read_providers
from moe_fuzz.config_values import choice, count, did_you_mean, reports, text, texts
from moe_fuzz.errors import UsageError
from moe_fuzz.options import EXPERTS_NVFP4_BACKEND, EXPERTS_NVFP4_BACKENDS, LIB_VARIABLES, OWN, ProviderOptions
from moe_fuzz.written import parse_duration, parse_report, parse_size

__all__ = ["KEYS", "PROFILES", "Config", "Profile", "did_you_mean", "env_name", "load"]

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


#: Every key of the table, and what reads its value. The variable of `minimize-time` is `MOE_FUZZ_MINIMIZE_TIME`.
KEYS: Mapping[str, Callable[[Any], Any]] = {
    "targets": texts,
    "time": parse_duration,
    "cases": count(1),
    "seed": count(0),
    "workers": count(1),
    "device": choice(*DEVICES),
    "state-dir": text,
    "profile": choice(*PROFILES),
    "deadline": parse_duration,
    "memory": parse_size,
    "checks": texts,
    "ops": texts,
    "mode": texts,
    "preset": texts,
    "faults": texts,
    "only": texts,
    "fence": choice(*OWN),
    "report": reports,
    "minimize-time": parse_duration,
}


_TABLES = ("providers", "gate", "paths")
_NO_MARKS = str.maketrans("", "", "-_. ")  # moe_fuzz, moefuzz and MoE-Fuzz are all meant to be moe-fuzz


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
    gate: Mapping[str, Any] = field(default_factory=dict)  # as `values`, for gates alone
    paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # glob -> what files like that touch


def load(start: Path, environment: Mapping[str, str]) -> Config:
    """The configuration that holds in the directory `start`. Raises UsageError for whatever is wrong with it."""
    check_environment(environment)
    for folder in (start, *start.parents):
        table = _read_table(folder / "pyproject.toml")
        if table is not None:
            return _validate(table, folder / "pyproject.toml", environment)
    return Config()


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises UsageError for a `MOE_FUZZ_*` variable that means nothing, or names a backend that is none."""
    keys = (*KEYS, *(f"gate-{key}" for key in GATE_KEYS if key != "targets"))
    known = [*(env_name(key) for key in keys), *LIB_VARIABLES.values(), EXPERTS_NVFP4_BACKEND, ENV_PREFIX + "DEBUG"]
    for name in sorted(environment):
        if name.startswith(ENV_PREFIX) and name not in known:
            raise UsageError(
                f"unknown environment variable {name}{did_you_mean(name, known)}",
                f"unset it; the variables are {', '.join(known)}",
            )
    backend = environment.get(EXPERTS_NVFP4_BACKEND)
    if backend and backend not in EXPERTS_NVFP4_BACKENDS:
        raise UsageError(
            f"{EXPERTS_NVFP4_BACKEND} names no backend: {backend}{did_you_mean(backend, EXPERTS_NVFP4_BACKENDS)}",
            f"unset it; the backends are {', '.join(EXPERTS_NVFP4_BACKENDS)}",
        )


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
    except RecursionError as error:
        raise UsageError(f"{path} is nested deeper than can be read", "correct the file") from error
    tool = data.get("tool", {})
    for name in tool if isinstance(tool, dict) else ():
        if name != "moe-fuzz" and name.lower().translate(_NO_MARKS) == "moefuzz":
            raise UsageError(f"{path}: unknown table [tool.{name}]", f"the table is called [{TABLE}]")
    table = tool.get("moe-fuzz") if isinstance(tool, dict) else None
    if table is not None and not isinstance(table, dict):
        raise UsageError(f"{path}: tool.moe-fuzz must be a table, not {table!r}", f"write [{TABLE}]")
    return table


def _validate(table: Mapping[str, Any], path: Path, environment: Mapping[str, str]) -> Config:
    values: dict[str, Any] = {}
    providers = read_providers(table.get("providers", {}), path, environment)
    gate = read_gate(table.get("gate", {}), path)
    paths = read_paths(table.get("paths", {}), path)
    for key, value in table.items():
        if key in _TABLES:
            continue
        if key not in KEYS:
            # an underscore for a hyphen is the commonest slip, and difflib finds it as well
            raise UsageError(
                f"{path}: unknown key {key!r} in [{TABLE}]{did_you_mean(key, [*KEYS, *_TABLES])}",
                f"the keys are {', '.join(KEYS)}, and the tables [{TABLE}.providers.NAME], "
                f"[{TABLE}.gate], [{TABLE}.paths]",
            )
        try:
            values[key.replace("-", "_")] = KEYS[key](value)
        except ValueError as error:
            raise UsageError(f"{path}: [{TABLE}] {key}: {error}") from error
    return Config(_absolute(values, path.parent), path, providers, _absolute(gate, path.parent), paths)


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
