"""A provider's workers may run in another interpreter: another version, other packages, variables of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moe_fuzz
from moe_fuzz.case import Case, Step
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.labels import Labels
from moe_fuzz.options import ProviderOptions, RunOptions
from moe_fuzz.worker.pool import Pool
from moe_fuzz.worker.protocol import provider_of

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = RunOptions(deadline=20.0)

#: What a worker runs here: it tells where it is. It needs no torch, so stubs do for an interpreter that has none.
RUNNER = '''
import os, platform, sys
from moe_fuzz.contract import TargetInfo
from moe_fuzz.verdict import PASS, Verdict

class Runner:
    def __init__(self, device):
        self.ran = 0

    def describe(self, target):
        return TargetInfo(target, "toy", target.partition("@")[2], origin=platform.python_version())

    def run(self, case, target, options):
        import numpy
        self.ran += 1
        loaded = [n for n in ("filelock", "hypothesis", "pytest", "click", "rich", "jinja2") if n in sys.modules]
        where = f"{platform.python_version()} {os.getpid()} {os.environ.get('TOY', '-')} {numpy.__file__} {loaded}"
        return Verdict(PASS, detail=where)
'''


@pytest.fixture
def stubs(tmp_path: Path) -> Callable[[str], str]:
    """Makes a directory that holds torch, triton and numpy of a version, and nothing in them."""

    def make(version: str) -> str:
        place = tmp_path / f"packages-{version}"
        place.mkdir()
        for name in ("torch", "triton", "numpy"):
            (place / name).mkdir()
            (place / name / "__init__.py").write_text(f"__version__ = {version!r}\n")
        return str(place)

    return make


@pytest.fixture
def runner(tmp_path: Path) -> str:
    (tmp_path / "toy_runner.py").write_text(RUNNER)
    return f"{tmp_path / 'toy_runner.py'}:Runner"


def case() -> Case:
    return Case("toy", {"do": "tell"}, (Step(Labels.range(1)),), 0)


def tell(worker, provider: str) -> list[str]:
    return worker.run([case()], f"toy@{provider}", OPTIONS)[0].detail.split(maxsplit=4)


def test_the_provider_of_a_target() -> None:
    names = {"x@vllm": "vllm", "x@planted.nan_argmax": "planted", "x@/a.b/c.py:f()": "user", "x@a.b:f": "user"}
    assert {name: provider_of(name) for name in names} == names


def test_each_provider_has_its_packages_and_variables(stubs: Callable[[str], str], runner: str) -> None:
    providers = {
        "old": ProviderOptions(None, {"PYTHONPATH": stubs("1.0"), "TOY": "one"}),
        "new": ProviderOptions(None, {"PYTHONPATH": stubs("2.0"), "TOY": "two"}),
    }
    with Pool(2, "cpu", runner=runner, providers=providers) as pool:
        assert pool.stats.zygotes == 1  # the others when they are needed
        assert pool.versions("toy@old")["torch"] == "1.0"
        assert pool.versions("toy@new")["torch"] == "2.0"
        assert pool.environment["torch"] not in ("1.0", "2.0")
        with pool.lease("toy@old") as one, pool.lease("toy@new") as two:
            told = {"old": tell(one, "old"), "new": tell(two, "new")}
            assert [told[name][2] for name in ("old", "new")] == ["one", "two"]
            assert all(f"packages-{v}" in told[n][3] for n, v in (("old", "1.0"), ("new", "2.0")))
        for name in ("old", "new", "old"):  # of the idle workers, the one that stands ready
            with pool.lease(f"toy@{name}") as worker:
                assert tell(worker, name)[1] == told[name][1]
        with pool.lease() as worker:  # a worker changes sides where it must
            assert tell(worker, "here")[2] == "-"
        assert pool.stats.zygotes == 3


def test_a_provider_whose_interpreter_cannot_serve_harms_no_other(tmp_path: Path, runner: str) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "empty" / "numpy.py"
    broken.write_text("raise ModuleNotFoundError(\"No module named 'numpy'\")")
    providers = {
        "absent": ProviderOptions("/no/such/python"),
        "bare": ProviderOptions(sys.executable, {"PYTHONPATH": str(tmp_path / "empty")}),
    }
    with Pool(1, "cpu", runner=runner, providers=providers) as pool:
        with pytest.raises(EnvironmentProblem, match="/no/such/python cannot be started"):
            pool.describe("toy@absent")
        for _ in range(2):
            with pytest.raises(EnvironmentProblem) as caught:
                pool.describe("toy@bare")
        assert caught.value.hint in (f"install numpy for {sys.executable}", caught.value.hint)
        assert pool.describe("toy@here").name == "toy@here"


def test_an_installed_moe_fuzz_is_lent_to_an_interpreter_that_has_none(
    stubs: Callable[[str], str], runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"  # what else lies there is for our interpreter, and must not come along
    (site / "torch").mkdir(parents=True)
    (site / "torch" / "__init__.py").write_text("raise ImportError('the wrong torch')")
    (site / "moe_fuzz").symlink_to(ROOT / "moe_fuzz")
    monkeypatch.setattr(moe_fuzz, "__file__", str(site / "moe_fuzz" / "__init__.py"))
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    providers = {"theirs": ProviderOptions(str(python), {"PYTHONPATH": stubs("3.0")})}
    with Pool(1, "cpu", runner=runner, providers=providers, log_dir=tmp_path / "logs") as pool:
        assert pool.versions("toy@theirs")["torch"] == "3.0"
        assert pool._living("theirs").info()["moe_fuzz"] == str(tmp_path / "logs" / "lent" / "moe_fuzz")
        with pool.lease() as worker:
            assert "packages-3.0" in tell(worker, "theirs")[3]


PYENV = Path("~/.pyenv/versions").expanduser()
OTHERS = [
    (path, version)
    for version in ("3.10", "3.12", "3.13")
    if f"{sys.version_info[0]}.{sys.version_info[1]}" != version
    for path in (f"/usr/bin/python{version}", *PYENV.glob(f"{version}.*/bin/python"))
    if os.access(path, os.X_OK)
]


@pytest.mark.skipif(not OTHERS, reason="this machine has no other Python than the tests' own")
@pytest.mark.parametrize(("python", "version"), OTHERS, ids=[version for _, version in OTHERS])
def test_workers_of_another_python(python: str, version: str, stubs: Callable[[str], str], runner: str) -> None:
    """All that stands between parent and runner, in that version, without a package of the parent's."""
    providers = {"theirs": ProviderOptions(python, {"PYTHONPATH": stubs("9.0")})}
    with Pool(1, "cpu", runner=runner, providers=providers) as pool, pool.lease() as worker:
        told = tell(worker, "theirs")
        assert told[0].startswith(version + ".")
        assert told[4] == "[]"
        assert worker.describe("toy@theirs", 20.0).origin == told[0]
    files = [str(path) for path in (ROOT / "moe_fuzz").rglob("*.py")]
    check = "import ast, sys\nfor name in sys.argv[1:]: ast.parse(open(name, encoding='utf-8').read(), name)"
    assert subprocess.run([python, "-c", check, *files], capture_output=True, check=False).stderr == b""


def test_the_workers_side_loads_no_package_of_the_parents() -> None:
    """Serving images have torch, triton and numpy; nobody installs hypothesis there for us."""
    program = """if True:
        import importlib, pkgutil, sys
        import moe_fuzz.worker.zygote, moe_fuzz.execute.runner
        for room in ("execute", "checks", "fence", "targets", "planted", "kernels", "reference", "ops"):
            package = importlib.import_module("moe_fuzz." + room)
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
        parents = ("filelock", "hypothesis", "pytest", "click", "rich", "jinja2", "xdist")
        print([name for name in parents if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False,
                          env={**os.environ, "TRITON_INTERPRET": "1"})  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr
