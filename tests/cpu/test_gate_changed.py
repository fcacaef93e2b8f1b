"""From changed files to targets: git, imports, globs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import moe_fuzz
from moe_fuzz import config
from moe_fuzz.campaign.gate.changed import affected, changed_files
from moe_fuzz.campaign.gate.imports import ImportGraph
from moe_fuzz.errors import EnvironmentProblem, UsageError
from moe_fuzz.ops import OPS, get_space
from moe_fuzz.targets import registry

ROOT = Path(moe_fuzz.__file__).parents[1]
BUILTIN = tuple(f"{op}@builtin" for op in OPS)


def write(root: Path, **files: str) -> None:
    """`pack_in` stands for pack/in.py, and `pack_` for pack/__init__.py."""
    for name, text in files.items():
        file = name.replace("_", "/")
        path = root / (f"{file}__init__.py" if file.endswith("/") else f"{file}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def git(root: Path, *words: str) -> None:
    who = ("-c", "user.name=me", "-c", "user.email=me@here", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repo"
    write(root, a="1", b="1", c="1", folder_d="1")
    git(root.parent, "init", "-q", "-b", "main", str(root))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    return root


# ---- git ------------------------------------------------------------------------------------------------------------


def test_what_changed_since_a_branch_left(repository: Path) -> None:
    git(repository, "checkout", "-qb", "mine")
    (repository / "a.py").write_text("2")
    git(repository, "commit", "-qam", "mine")
    git(repository, "checkout", "-q", "main")
    (repository / "c.py").write_text("theirs")  # what others did meanwhile is not mine
    git(repository, "commit", "-qam", "theirs")
    git(repository, "checkout", "-q", "mine")
    (repository / "b.py").write_text("not committed")
    (repository / "folder" / "new with ü.py").write_text("untracked")
    (repository / ".gitignore").write_text("*.log\n")
    (repository / "x.log").write_text("ignored")
    root, files = changed_files("main", repository / "folder")
    assert root == repository
    assert files == (".gitignore", "a.py", "b.py", "folder/new with ü.py")
    (repository / "folder" / "d.py").unlink()
    assert "folder/d.py" in changed_files("main", repository)[1]


def test_git_that_cannot_answer(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="git knows no revision 'nowhere'") as error:
        changed_files("nowhere", repository)
    assert "fetch-depth: 0" in error.value.hint
    with pytest.raises(UsageError, match="git knows no revision"):
        changed_files("--output=x", repository)
    with pytest.raises(EnvironmentProblem, match="not a git repository"):
        changed_files("main", tmp_path)


@pytest.mark.parametrize(
    "moved_to", ["", "kernels/scores.py", "kernels/scoring/__init__.py", "kernels/deep/scoring.py"]
)
def test_a_module_that_is_deleted_or_renamed_touches_what_imports_it(repository: Path, moved_to: str) -> None:
    """Also where the importing file was forgotten, which is when a gate has something to say."""
    write(repository, kernels_="", kernels_router="from .scoring import scores\ndef topk(): scores()",
          kernels_scoring="def scores(): 1", kernels_other="1")  # fmt: skip
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "kernels")
    scoring = repository / "kernels" / "scoring.py"
    if moved_to:
        (repository / moved_to).parent.mkdir(exist_ok=True)
        (repository / moved_to).write_text(scoring.read_text())
    scoring.unlink()
    root, files = changed_files("HEAD", repository)
    target = "topk_softmax@kernels.router:topk"
    assert affected((target,), root, files, {}).targets == (target,)
    scoring.write_text("def scores(): 1")
    (repository / "kernels" / "other.py").unlink()
    assert "kernels/other.py" in affected((target,), *changed_files("HEAD", repository), {}).unmapped


def test_a_submodule_stands_for_all_below_it(repository: Path, tmp_path: Path) -> None:
    """Of which git names the gitlink alone."""
    write(tmp_path / "upstream", serving_router="from serving.scoring import f\ndef topk(): f()", serving_scoring="1")
    upstream = tmp_path / "upstream"
    git(upstream.parent, "init", "-q", "-b", "main", str(upstream))
    git(upstream, "add", "-A")
    git(upstream, "commit", "-qm", "first")
    sub = ("-c", "protocol.file.allow=always", "submodule")
    git(repository, *sub, "add", "-q", str(upstream), "src")
    git(repository, "config", "-f", ".gitmodules", "submodule.src.ignore", "all")
    git(repository, "commit", "-qam", "submodule")
    (repository / "src/serving/scoring.py").write_text("2")
    git(repository / "src", "commit", "-qam", "second")
    git(repository, "add", "-f", "src")
    git(repository, "commit", "-qm", "bumped")
    target, other = "topk_softmax@serving.router:topk", "topk_softmax@a:topk"
    root, found = changed_files("HEAD~1", repository)
    assert found == ("src/",)
    change = affected((target, other), root, found, {})
    assert (change.targets, change.reasons, change.unmapped) == ((target,), {target: "src/"}, ())
    for glob, touches in (("src/csrc/*.cu", True), ("**/*.cu", True), ("s*/x", True), ("folder/**", False)):
        assert affected((other,), root, found, {glob: (other,)}).targets == ((other,) if touches else ()), glob
    assert affected((other,), root, found, {}, for_all=(root / "src/known.toml",)).targets == (other,)
    git(repository, "rm", "-qf", "src")
    write(repository, router="from serving.router import topk")
    assert affected(("topk_softmax@router:topk",), *changed_files("HEAD", repository), {}).targets
    (repository / "router.py").write_text("import b\ndef topk(): 1")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "no submodule")
    assert changed_files("HEAD", repository)[1] == ()


def test_the_packages_around_a_target_run_too(repository: Path) -> None:
    write(repository, pack_="import pack.far", pack_far="1", pack_in_="1", pack_in_router="def topk(): 1")
    target = "topk_softmax@pack.in.router:topk"
    for file, touched in (("pack/__init__.py", True), ("pack/in/__init__.py", True), ("pack/far.py", False)):
        assert bool(affected((target,), repository, (file,), {}).targets) == touched, file
    (repository / "pack/in/__init__.py").unlink()
    assert affected((target,), repository, ("pack/in/__init__.py",), {}).targets == (target,)


# ---- imports --------------------------------------------------------------------------------------------------------


def files(root: Path, location: str) -> set[str]:
    return {path.relative_to(root).as_posix() for path in ImportGraph(root).files(location)}


def test_a_file_is_made_of_what_it_imports(tmp_path: Path) -> None:
    write(
        tmp_path,
        pack_="", pack_first="from . import third\nfrom .fourth import name", pack_second="import nowhere",
        pack_third="", pack_fourth="from .first import cycle", pack_late="", pack_unused="", other="import my",
    )  # fmt: skip
    (tmp_path / "my.py").write_text(
        "import os, torch\nfrom pack import first\nimport pack.second as s\n"
        "def topk():\n    from pack.late import x\n    return first, s\n"
    )
    assert files(tmp_path, f"{tmp_path}/my.py:topk") == {
        "my.py", "pack/__init__.py", "pack/first.py", "pack/second.py", "pack/third.py", "pack/fourth.py",
        "pack/late.py",
    }  # fmt: skip
    assert files(tmp_path, "my:topk()") == files(tmp_path, f"{tmp_path}/my.py:topk")
    assert files(tmp_path, "torch:topk") == set()
    assert files(tmp_path, "/elsewhere/my.py:topk") == set()


def test_of_a_module_that_hands_out_several_only_what_the_name_needs(tmp_path: Path) -> None:
    write(
        tmp_path,
        hub="from k import one, two\nfrom hub2 import three\nhelp = one.f\ndef a():\n    return help()\n"
        "b = two.g\ntry:\n    import fast as quick\nexcept ImportError:\n    import slow as quick\nc = quick.run\n",
        k_="", k_one="import shared", k_two="import shared", shared="", fast="", slow="",
        hub2="import k.one\nfrom k.two import three\nother = k.one", src_lib_="from lib import deep",
        src_lib_deep="",
    )  # fmt: skip
    assert files(tmp_path, "hub:a") == {"hub.py", "k/__init__.py", "k/one.py", "shared.py"}
    assert files(tmp_path, "hub:b") == {"hub.py", "k/__init__.py", "k/two.py", "shared.py"}
    assert files(tmp_path, "hub:c") == {"hub.py", "fast.py", "slow.py"}
    assert files(tmp_path, "hub:three") == {"hub.py", "hub2.py", "k/__init__.py", "k/two.py", "shared.py"}
    (tmp_path / "hub3.py").write_text("from hub import *\nimport hub2\n")
    assert files(tmp_path, "hub3:a") >= {"hub3.py", "hub.py", "hub2.py", "k/one.py", "k/two.py"}
    assert files(tmp_path, "lib:deep") == {"src/lib/__init__.py", "src/lib/deep.py"}
    (tmp_path / "k" / "one.py").write_text("def broken(:")
    assert files(tmp_path, "hub:a") == {"hub.py", "k/__init__.py", "k/one.py"}


@pytest.mark.parametrize(
    "runs",
    [
        "patches.apply()", "x = patches.apply()", "x: int = patches.apply()", "if patches.on(): pass",
        "@patches.wrap\ndef other(): 1", "def f(x=patches.make()): 1", "class A(patches.Base): 1",
        "with patches.on(): pass", "for x in patches.all(): pass", "assert patches.on()", "patches.of.x = 1",
        "try:\n    patches.apply()\nexcept ValueError: pass", "def f():\n    patches.apply()\nf()",
        "class A:\n    x = patches.apply()", "def keep(f): return f()\n@keep\ndef f(): patches.apply()",
        "x = []\nx += patches.all()", "match patches.on():\n    case _: pass", "del patches.x",
    ],
)  # fmt: skip
def test_what_a_module_runs_at_import_may_change_its_target(tmp_path: Path, runs: str) -> None:
    write(tmp_path, serving_="", serving_patches="from serving import deep", serving_deep="", serving_hub="")
    router = tmp_path / "serving/router.py"
    router.write_text(f"from serving import patches\ndef topk(): 1\n{runs}\n")
    needed = {"serving/__init__.py", "serving/router.py", "serving/patches.py", "serving/deep.py"}
    assert files(tmp_path, "serving.router:topk") == needed
    (tmp_path / "serving/hub.py").write_text("from serving.router import topk")  # and what hands it on
    assert files(tmp_path, "serving.hub:topk") == needed | {"serving/hub.py"}


@pytest.mark.parametrize(
    "runs",
    [
        "x = patches.topk", "def f(): patches.apply()", "if __name__ == '__main__': patches.apply()",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING: patches.on()", "y = declares(a=patches.f())(patches.topk)",
        "@declares(a=1)\ndef f(): return patches.topk()", "import torch\n@torch.compile\ndef f(): patches.topk()",
    ],
)  # fmt: skip
def test_what_gives_another_name_its_meaning_does_not(tmp_path: Path, runs: str) -> None:
    write(tmp_path, patches="", router=f"import patches\ndef topk(): 1\n{runs}\n")
    assert files(tmp_path, "router:topk") == {"router.py"}


@pytest.mark.parametrize("runs", ["import core\ncore.topk = 1", "from core import f\nf()", "def broken(:"])
@pytest.mark.parametrize("how", ["from pack import patches", "import pack.patches", "import pack.between"])
@pytest.mark.parametrize("where", ["router", "pack_"])
def test_what_is_imported_for_what_it_does(tmp_path: Path, runs: str, how: str, where: str) -> None:
    """Also two imports away, and from the package around the target."""
    write(tmp_path, pack_="", pack_router="def topk(): 1", core="", pack_patches=runs,
          pack_between="from . import patches")  # fmt: skip
    (tmp_path / "pack" / ("router.py" if where == "router" else "__init__.py")).write_text(f"{how}\ndef topk(): 1")
    made_of = files(tmp_path, "pack.router:topk")
    assert "pack/patches.py" in made_of
    assert ("core.py" in made_of) == ("core" in runs)


def test_what_the_packages_around_a_target_run_may_change_it(tmp_path: Path) -> None:
    write(tmp_path, pack_="from pack import patches\nhandle = patches.apply()", pack_patches="import pack.deep",
          pack_in_router="def topk(): 1", pack_deep="")  # fmt: skip
    needed = {"pack/in/router.py", "pack/__init__.py", "pack/patches.py", "pack/deep.py"}
    assert files(tmp_path, "pack.in.router:topk") == needed


def test_modules_that_are_loaded_by_name_or_hand_over_everything(tmp_path: Path) -> None:
    write(tmp_path, a="", b="", star="", pack_="",
          router="import importlib\nfrom star import *\nimportlib.import_module('a')\n__import__('b')\ndef topk(): 1")
    assert files(tmp_path, "router:topk") == {"router.py", "a.py", "b.py", "star.py"}


def test_names_that_modules_hand_to_each_other(tmp_path: Path) -> None:
    write(tmp_path, a="from b import topk", b="from a import topk")
    assert files(tmp_path, "a:topk") == {"a.py", "b.py"}


# ---- our own kernels, and the table ---------------------------------------------------------------------------------


def touched(*changed: str, table: dict[str, tuple[str, ...]] | None = None) -> set[str]:
    return {target.partition("@")[0] for target in affected(BUILTIN, ROOT, changed, table or {}).targets}


def test_our_kernels_by_what_they_import() -> None:
    assert touched("kernels/align.py") >= {"align"}
    assert touched("kernels/nvfp4.py") & {"align", "topk_softmax", "moe_layer"} == set()
    assert touched("kernels/routing.py") >= {"topk_softmax", "topk_sigmoid", "moe_layer"}
    assert "nvfp4_quantize" not in touched("kernels/routing.py")
    assert touched("moe_fuzz/targets/builtin.py") == set(OPS)
    assert touched("README.md", "tests/cpu/test_gate.py") == set()


def test_our_own_table_covers_what_is_no_kernel() -> None:
    table = dict(config.load(ROOT, {}).paths)
    assert table
    for file in ("moe_fuzz/execute/runner.py", "moe_fuzz/fence/cpu.py", "moe_fuzz/strategies.py", "constraints.txt"):
        assert (ROOT / file).exists()
        assert touched(file, table=table) == set(OPS), file
    assert touched("docs/design.md", "moe_fuzz/report/text.py", table=table) == set()
    for op in OPS:  # its reference and its checks are the oracle
        family = get_space(op).family
        assert op in touched(f"moe_fuzz/checks/{family}/family.py", table=table)
        assert op in touched(f"moe_fuzz/ops/{family}/space.py", table=table)


def test_globs(tmp_path: Path) -> None:
    names = ("topk_softmax@vllm", "topk_softmax@vllm.fused_topk", "align@vllm", "align@torch")
    table = {
        "csrc/moe/topk*.cu": ("topk_softmax@vllm",), "csrc/**/align/*.cu": ("align",), "vllm/**": ("vllm",),
        "cmake/*.cmake": ("*",), "docs/**": (),
    }  # fmt: skip

    def of(*changed: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        change = affected(names, tmp_path, changed, table)
        return change.targets, change.unmapped

    assert of("csrc/moe/topk_softmax_kernels.cu") == (names[:1], ())
    assert of("csrc/moe/deep/topk.cu") == ((), ("csrc/moe/deep/topk.cu",))
    assert of("csrc/align/a.cu") == of("csrc/x/y/align/a.cu") == (names[2:], ())
    assert of("vllm/a/b.py") == (names[:3], ())
    assert of("cmake/x.cmake") == (names, ())
    assert of("docs/a.md", "README.md") == ((), ("README.md",))
    change = affected(names, tmp_path, ("sub/csrc/moe/topk.cu",), table, tmp_path / "sub")
    assert change.targets == names[:1]
    assert change.reasons == {"topk_softmax@vllm": "sub/csrc/moe/topk.cu"}


def test_known_targets_can_be_asked_for() -> None:
    assert affected([target.name for target in registry.known()], ROOT, ("LICENSE",), {}).targets == ()
