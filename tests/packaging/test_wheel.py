"""What people install: a wheel, an sdist, an editable install. None of them takes Hugging Face's `kernels` away.

All run on a copy of the sources and in environments of their own, beside the packages of the environment at hand, so
that nothing big is installed again. Only `test_beside_hugging_faces_kernels` needs a package index.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
#: The last release of Hugging Face's package that is pure Python with few dependencies; the name is what matters here.
HUGGING_FACE = "kernels==0.10.5"
_UNREACHABLE = ("connection", "timed out", "name resolution", "No matching distribution", "Max retries", "ProxyError")


def run(command: Sequence[str | Path], cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a command as a person outside the repository would: without our PYTHONPATH, in another directory."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST", "COV_"))}
    environment |= {"TRITON_INTERPRET": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def new_environment(folder: Path) -> Path:
    """A venv that also sees what is installed here, except for what is installed here as editable. Its python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    inner = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).stdout.strip()
    (Path(inner) / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def pip(python: Path, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "pip", "--python", python, "install", "-q", *arguments], python.parent, check)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is committed, symlinks and all: building in place would leave build/ and *.egg-info behind."""
    copy = tmp_path_factory.mktemp("sources") / "moe-fuzz"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    return copy


@pytest.fixture(scope="module")
def built(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, the wheel built from that sdist, and the wheel built from the sources."""
    pytest.importorskip("build", reason="needs the extra `test`: pip install -e '.[test]'")
    found = {}
    for name, options in (("sdist", ()), ("wheel", ("--wheel",))):
        folder = tmp_path_factory.mktemp(name)
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, *options, sources], folder)
        found |= {f"{name}:{file.suffix}": file for file in folder.iterdir()}
    return {"sdist": found["sdist:.gz"], "wheel from sdist": found["sdist:.whl"], "wheel": found["wheel:.whl"]}


def test_wheel_holds_our_package_and_nothing_beside_it(built: dict[str, Path], sources: Path) -> None:
    names = zipfile.ZipFile(built["wheel"]).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"moe_fuzz"}
    ours = [(sources, "moe_fuzz"), (sources / "moe_fuzz", "kernels"), (sources / "moe_fuzz", "reference")]
    modules = {str(file.relative_to(sources)) for folder, name in ours for file in (folder / name).rglob("*.py")}
    assert "moe_fuzz/kernels/__init__.py" in modules
    assert modules <= set(names)
    assert "moe_fuzz/py.typed" in names
    metadata = {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name}
    assert {"licenses/LICENSE", "entry_points.txt", "top_level.txt"} <= metadata


def test_wheel_from_sdist_is_the_same(built: dict[str, Path]) -> None:
    one, other = zipfile.ZipFile(built["wheel"]), zipfile.ZipFile(built["wheel from sdist"])
    assert sorted(one.namelist()) == sorted(other.namelist())
    for name in one.namelist():
        if not name.endswith("RECORD"):
            assert one.read(name) == other.read(name), name


def test_sdist_holds_files_where_the_sources_have_symlinks(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert members["moe_fuzz/kernels/__init__.py"].isfile()
    assert members["moe_fuzz/reference/__init__.py"].isfile()
    assert not any(name.startswith(("kernels/", "reference/")) for name in members)


def test_wheel_works_where_nothing_else_of_ours_is(built: dict[str, Path], tmp_path: Path) -> None:
    python = new_environment(tmp_path / "env")
    pip(python, "--no-deps", "--no-index", built["wheel from sdist"])
    code = "import moe_fuzz, moe_fuzz.kernels, moe_fuzz.reference; print(moe_fuzz.__file__)"
    where = run([python, "-P", "-c", code], tmp_path).stdout.strip()
    assert Path(where).is_relative_to(tmp_path / "env")
    said = run([python.parent / "moe-fuzz", "--version"], tmp_path).stdout
    assert "moe-fuzz" in said


def test_editable_install_does_not_expose_the_top_level(sources: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "env")
    pip(python, "--no-deps", "--no-build-isolation", "--no-index", "-e", sources)
    code = (
        "import importlib.util, moe_fuzz.kernels as ours; print(ours.__file__);"
        "print([n for n in ('kernels', 'reference', 'tests', 'conftest') if importlib.util.find_spec(n)])"
    )
    for cwd in (tmp_path, sources):
        where, exposed = run([python, "-P", "-c", code], cwd).stdout.splitlines()
        assert Path(where).is_relative_to(sources)
        assert exposed == "[]"


def test_beside_hugging_faces_kernels(built: dict[str, Path], tmp_path: Path) -> None:
    """vLLM and transformers import `kernels`: it must stay Hugging Face's in an environment that has us too."""
    python = new_environment(tmp_path / "env")
    theirs = pip(python, "--retries", "1", "--timeout", "20", HUGGING_FACE, check=False)
    if theirs.returncode and any(word.lower() in theirs.stderr.lower() for word in _UNREACHABLE):
        pytest.skip(f"no package index to get {HUGGING_FACE} from: {theirs.stderr.strip().splitlines()[-1]}")
    assert theirs.returncode == 0, theirs.stderr
    pip(python, "--no-deps", "--no-index", built["wheel"])
    code = (
        "import kernels, moe_fuzz.kernels as ours, importlib.metadata as metadata;"
        "print(kernels.get_kernel.__module__); print(kernels.__file__); print(ours.__file__);"
        "print(*sorted(metadata.packages_distributions()['kernels']))"
    )
    module, their_file, our_file, owners = run([python, "-P", "-c", code], tmp_path).stdout.splitlines()
    assert module.split(".")[0] == "kernels"
    assert Path(their_file).parent.name == "kernels"
    assert Path(their_file).parent.parent.name == "site-packages"
    assert Path(our_file).parts[-3:] == ("moe_fuzz", "kernels", "__init__.py")
    assert owners == "kernels"
