"""The tables below `[tool.moe-fuzz]`: how a provider's workers are started, how a gate runs, what a path touches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_fuzz.config_values import choice, count, did_you_mean, flag, strings, text, texts
from moe_fuzz.errors import UsageError
from moe_fuzz.ops import OPS
from moe_fuzz.options import LIB_VARIABLES, ProviderOptions
from moe_fuzz.targets import registry
from moe_fuzz.written import parse_duration, parse_size

TABLE = "tool.moe-fuzz"

GATE_PROFILES = ("quick", "default", "deep")  # what is in them, the gate knows

#: The keys of `[tool.moe-fuzz.gate]`. The variable of `base-python` is `MOE_FUZZ_GATE_BASE_PYTHON`.
GATE_KEYS: Mapping[str, Callable[[Any], Any]] = {
    "targets": texts,
    "profile": choice(*GATE_PROFILES),
    "time": parse_duration,
    "cases": count(1),
    "seed": count(0),
    "ledger": text,
    "corpus": texts,
    "strict": flag,
    "base-python": text,
    "base-path": text,
    "gpu-memory": parse_size,
}


def read_gate(table: Any, path: Path) -> dict[str, Any]:
    """The values by parameter name, paths absolute."""
    where = f"{path}: [{TABLE}.gate]"
    if not isinstance(table, dict):
        raise UsageError(f"{where} must be a table, not {table!r}")
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in GATE_KEYS:
            raise UsageError(f"{where}: unknown key {key!r}{did_you_mean(key, GATE_KEYS)}",
                             f"the keys are {', '.join(GATE_KEYS)}")  # fmt: skip
        try:
            values[key.replace("-", "_")] = GATE_KEYS[key](value)
        except ValueError as error:
            raise UsageError(f"{where} {key}: {error}") from error
    if "ledger" in values:
        values["ledger"] = str(path.parent / Path(values["ledger"]).expanduser())
    if "corpus" in values:
        values["corpus"] = [str(path.parent / Path(folder).expanduser()) for folder in values["corpus"]]
    if os.sep in values.get("base_python", ""):
        values["base_python"] = str(path.parent / Path(values["base_python"]).expanduser())
    if "base_path" in values:
        parts = values["base_path"].split(os.pathsep)
        values["base_path"] = os.pathsep.join(str(path.parent / Path(part).expanduser()) for part in parts)
    return values


def read_paths(table: Any, path: Path) -> dict[str, tuple[str, ...]]:
    """glob -> targets, ops, providers, or `*` for all: see campaign/gate/changed.py."""
    where = f"{path}: [{TABLE}.paths]"
    if not isinstance(table, dict):
        raise UsageError(f"{where} must be a table, not {table!r}")
    known = {"*", *OPS, *(name for one in registry.known() for name in (one.name, one.provider))} if table else set()
    found = {}
    for glob, value in table.items():
        try:
            words = texts(value)
        except ValueError as error:
            hint = 'write like "csrc/moe/**" = ["topk_softmax@vllm"]'
            raise UsageError(f"{where} {glob!r}: {error}", hint) from error
        for word in words:
            if word not in known and ":" not in word:
                raise UsageError(f"{where} {glob!r}: there is no target, op or provider {word!r}"
                                 f"{did_you_mean(word, known)}", "`moe-fuzz list targets` shows all")  # fmt: skip
        found[glob] = tuple(words)
    return found


#: The keys of `[tool.moe-fuzz.providers.NAME]`.
PROVIDER_KEYS: Mapping[str, Callable[[Any], Any]] = {"python": text, "lib": texts, "env": strings}


def read_providers(tables: Any, path: Path, environment: Mapping[str, str]) -> dict[str, ProviderOptions]:
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
