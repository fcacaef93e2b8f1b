"""The parent's side is free of torch at run time too, names do not collide, and conftest reads the machine right."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from moe_fuzz.worker import gpus

ROOT = Path(__file__).resolve().parents[2]

#: Imports the modules named on its command line with all that lies below them, and prints what must not be loaded.
WALK = """
import importlib, pkgutil, sys

def walk(name):
    head, star, tail = name.partition(".*.")
    if star:
        folders = [m.name for m in pkgutil.iter_modules(importlib.import_module(head).__path__) if m.ispkg]
        assert folders, name
        return [n for folder in folders for n in walk(f"{head}.{folder}.{tail}")]
    module = importlib.import_module(name)
    below = pkgutil.walk_packages(getattr(module, "__path__", []), name + ".")
    return [name, *(m.name for m in below if not m.name.endswith("__main__"))]

names = [n for argument in sys.argv[1:] for n in walk(argument)]
for name in names:
    importlib.import_module(name)
print(len(names), *sorted({"torch", "triton", "numpy"} & set(sys.modules)))
"""


def contract(name: str) -> dict[str, list[str]]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return next(c for c in contracts if c["id"] == name)


def python(*arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-P", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_parents_side_loads_no_torch(tmp_path: Path) -> None:
    """import-linter reads the sources; this also sees what the packages that we import bring along."""
    count, *loaded = python("-c", WALK, *contract("torch-free")["source_modules"], cwd=tmp_path).split()
    assert loaded == []
    assert int(count) > 20


def test_every_module_has_a_layer() -> None:
    """A module that stands in no layer may import anything, so there must be none."""
    layered = {name.strip(" ()") for layer in contract("layers")["layers"] for name in layer.split(":")}
    unnamed = []
    for file in (ROOT / "moe_fuzz").rglob("*.py"):
        parts = file.relative_to(ROOT / "moe_fuzz").with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(".".join(parts[:n]) in layered for n in range(1, len(parts) + 1)):
            unnamed.append(".".join(parts))
    # The roots of packages whose modules stand in different layers; they hold nothing that could pull one up.
    assert sorted(unnamed) == ["", "_version", "ops", "ops.align", "ops.allreduce", "ops.experts", "ops.layer",
                               "ops.nvfp4", "ops.routing"]  # fmt: skip


def test_linter_follows_the_symlinks() -> None:
    """Else the kernels would be outside the graph, and no contract could say anything about them."""
    grimp = pytest.importorskip("grimp", reason="needs the extra `dev`: pip install -e '.[dev]'")
    graph = grimp.build_graph("moe_fuzz", include_external_packages=True)
    assert "triton" in graph.find_modules_directly_imported_by("moe_fuzz.kernels.routing")
    assert "torch" in graph.find_modules_directly_imported_by("moe_fuzz.reference.routing")


def test_kernels_is_not_ours_under_pytest() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not Path(spec.origin or "").resolve().is_relative_to(ROOT)


@pytest.mark.skipif("PYTHONPATH" in os.environ, reason="PYTHONPATH may put the repository's root on every path")
def test_kernels_is_not_ours_in_a_child_process() -> None:
    """Started as workers are, with `python -P`, in the very directory that holds our `kernels/`."""
    origin = python("-c", "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else '')")
    assert not origin or not Path(origin).resolve().is_relative_to(ROOT)


@pytest.fixture
def conftest(pytestconfig: pytest.Config) -> ModuleType:
    plugin = pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py"))
    assert isinstance(plugin, ModuleType)
    return plugin


def test_auto_workers(conftest: ModuleType, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setattr(conftest, "GPUS", 0)
    assert conftest.pytest_xdist_auto_num_workers(pytestconfig) == len(os.sched_getaffinity(0))
    monkeypatch.setattr(conftest, "GPUS", 8)
    cards = tuple(gpus.Gpu("H200", 140 << 30, free << 30, f"GPU-{free}") for free in (13, 140, 1))
    monkeypatch.setattr(conftest, "gpus", lambda: cards)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(40)))
    assert conftest.gpu_count() == 3
    assert conftest.pytest_xdist_auto_num_workers(pytestconfig) == 2 + gpus.MAX_SLOTS + 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert conftest.pytest_xdist_auto_num_workers(pytestconfig) == 8


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.6.0", "2.5.0", False), ("3.6.0+git1", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.5.0", True)],
)
def test_a_broken_interpreter_is_a_reason(conftest: ModuleType, triton: str, numpy: str, works: bool) -> None:
    reason = conftest.interpreter_problem(triton, numpy)
    assert (reason == "") == works
    assert works or (triton in reason and numpy in reason)
