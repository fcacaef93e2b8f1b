"""Finds a provider's code on this machine: its installed package, else its extension library alone. Worker side.

Libraries are loaded here, after the worker was forked, and stay for the life of the process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.options import LIB_VARIABLES
from moe_fuzz.targets.sources import Source, installed, version

_MISSING = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")
_MOST_NEEDS = 8


@dataclass(frozen=True)
class Library:
    """Loaded library files, and what is known of where they are from."""

    source: Source
    files: tuple[Path, ...]
    version: str  # of the installed package; empty for files alone, which do not tell theirs

    def origin(self, schema: str) -> str:
        """For a person: package and version, or file, size and hash; then the schema that was bound."""
        files = ", ".join(str(file) if self.version else identity(file) for file in self.files)
        return f"{f'{self.source.package} {self.version}, ' if self.version else ''}{files}; {schema}"

    @property
    def named(self) -> dict[str, str]:
        """The variable that could name another library -> the files, joined as in PATH."""
        return {LIB_VARIABLES[self.source.provider]: os.pathsep.join(map(str, self.files))}

    def holds(self, name: str) -> bool:
        """Whether an operator of this name is registered."""
        return hasattr(getattr(torch.ops, self.source.namespace), name)

    def operator(self, name: str) -> Any:
        """The overload `torch.ops.NAMESPACE.NAME.default`. EnvironmentProblem if the library has none."""
        space = getattr(torch.ops, self.source.namespace)
        if not self.holds(name):
            files = ", ".join(map(str, self.files))
            raise EnvironmentProblem(
                f"{files} registers no operator {self.source.namespace}::{name}",
                "another release has it (docs/targets.md), or another of the package's libraries",
            )
        return getattr(space, name).default


def identity(file: Path) -> str:
    """`/path/lib.so (45.7 MB, sha256 0123456789ab)`: a lone library does not say its version."""
    data = file.read_bytes()
    return f"{file} ({len(data) / 1e6:.1f} MB, sha256 {hashlib.sha256(data).hexdigest()[:12]})"


@functools.cache
def load(source: Source) -> Library:
    """Loads the provider's library. EnvironmentProblem, with the way out, if there is none or it does not load."""
    release, files = _installed(source)
    if not files:
        release, files = "", _named(source)
    for file in files:
        _load_file(file)
    return Library(source, tuple(files), release)


def _installed(source: Source) -> tuple[str, list[Path]]:
    """Version and library of the installed package; nothing where it is not installed."""
    if not installed(source.package):
        return "", []
    spec = importlib.util.find_spec(source.package)
    folders = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    patterns = [pattern.format(sm=_architecture()) for pattern in source.patterns]
    found = next((f for folder in folders for pattern in patterns for f in sorted(folder.glob(pattern))), None)
    if found is None:
        raise EnvironmentProblem(
            f"the installed package {source.package} has no library {' or '.join(patterns)}",
            "it is built for another machine, or newer than this version of moe-fuzz",
        )
    return version(source.distributions) or "of unknown version", [found]


def _architecture() -> str:
    """`sm90` on Hopper, else `sm100`: the two folders of sgl_kernel, which chooses by the same rule."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    return "sm90" if hopper else "sm100"


def _named(source: Source) -> list[Path]:
    variable = LIB_VARIABLES[source.provider]
    names = [name for name in os.environ.get(variable, "").split(os.pathsep) if name]
    if not names:
        raise EnvironmentProblem(
            f"{source.provider} is not here: no package {source.package}, and {variable} is not set",
            f"pip install {source.distributions[0]}, or point {variable}, or lib in "
            f"[tool.moe-fuzz.providers.{source.provider}], to its extension library",
        )
    for name in names:
        if not Path(name).is_file():
            raise EnvironmentProblem(f"{variable} names {name}, and there is no such file",
                                     f"several files are joined with {os.pathsep!r}")  # fmt: skip
    return [Path(name).resolve() for name in names]


def _load_file(file: Path) -> None:
    """A library, or a Python file that registers the operators itself."""
    try:
        if file.suffix == ".py":
            _run(file)
        else:
            _load_with_needs(file)
    except Exception as error:
        cause = error.__cause__ or error
        raise EnvironmentProblem(
            f"{file} does not load with torch {torch.__version__}: {type(cause).__name__}: {cause}",
            "a release needs the torch and CUDA it was built for: name an interpreter that has them with python in "
            "[tool.moe-fuzz.providers.NAME]",
        ) from error


def _load_with_needs(file: Path) -> None:
    """Loads a library, and before it the CUDA libraries it needs and the loader does not find.

    They lie in packages beside torch, which loads its own from there; the rest a library's Python package would load.
    """
    for _ in range(_MOST_NEEDS):
        try:
            torch.ops.load_library(str(file))
            return
        except OSError as error:
            missing = _MISSING.search(str(error.__cause__ or error))
            found = missing and next((p for folder in _cuda_folders() for p in folder.glob(missing[1])), None)
            if not found:
                raise
            ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(file))


def _cuda_folders() -> list[Path]:
    return [*sorted((Path(torch.__file__).parents[1] / "nvidia").glob("*/lib")), Path("/usr/local/cuda/lib64")]


def _run(file: Path) -> None:
    name = f"moe_fuzz_operators_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def function(package: str, places: Sequence[str]) -> tuple[Any, str]:
    """(function, version) from the first of `module:attribute` that the installed package has."""
    for place in places:
        module, _, attribute = place.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
                raise EnvironmentProblem(f"{module} cannot be imported: {error}",
                                         f"install the whole of {package}, with what it needs") from error  # fmt: skip
            continue
        except Exception as error:
            raise EnvironmentProblem(f"{module} cannot be imported: {type(error).__name__}: {error}",
                                     f"install the whole of {package}, with what it needs") from error  # fmt: skip
        if found is not None:
            return found, version([package]) or "of unknown version"
    raise EnvironmentProblem(
        f"no package here has {' or '.join(places)}",
        f"pip install {package}; its extension library alone does not hold this function",
    )


def devices(operator: Any) -> tuple[str, ...]:
    """The devices that a kernel is registered for."""
    name = operator._schema.name
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    return tuple(device for device, key in keys.items() if has(name, key))
