"""What a target was when a campaign began: one that was cut does not go on over code that is another since."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_fuzz.campaign.gate.imports import ImportGraph
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import UsageError
from moe_fuzz.targets import registry

_PROJECT = (".git", "pyproject.toml", "setup.py")
_INSTALLED = frozenset({"site-packages", "dist-packages"})


def releases(info: TargetInfo, versions: Mapping[str, Any]) -> str:
    """What is known by a version: where the target was found, and the packages it runs with."""
    return f"{info.origin} {json.dumps(versions, sort_keys=True, default=str)}"


def edited_since(target: str, moment: float) -> Path | None:
    """A file that the target is made of and that was written after `moment`, in seconds since the epoch. None where
    there is none, and where its code is installed: that changes with its version."""
    try:
        location = registry.locate(target)
    except UsageError:  # it has no code of its own to ask
        return None
    root = _root(location.rpartition(":")[0])
    if root is None or _INSTALLED.intersection(root.parts):
        return None
    for file in sorted(ImportGraph(root).files(location)):
        try:
            if file.stat().st_mtime > moment:
                return file
        except FileNotFoundError:  # gone since it was listed
            return file
    return None


def _root(place: str) -> Path | None:
    """The project around a file, or the folder in which a package lies."""
    if place.endswith(".py"):
        file = Path(place).resolve()
        return next((f for f in file.parents if any((f / name).exists() for name in _PROJECT)), file.parent)
    try:
        spec = importlib.util.find_spec(place.partition(".")[0])
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin:
        return None
    file = Path(spec.origin).resolve()
    return file.parents[1] if file.name == "__init__.py" else file.parent
