"""From changed files to the targets that have to be gated: by what targets import, and by a table of globs.

    [tool.moe-fuzz.paths]
    "csrc/moe/topk*.cu" = ["topk_softmax@vllm", "topk_sigmoid@vllm"]
    "vllm/model_executor/layers/fused_moe/**" = ["vllm"]
    "cmake/**" = ["*"]
    "docs/**" = []

A glob stands for paths from the file's folder on; `*` and `?` stay inside a folder, `**` does not. What a table says of
a path holds for it, beside what is imported.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moe_fuzz.campaign.gate.imports import ImportGraph
from moe_fuzz.errors import EnvironmentProblem, UsageError
from moe_fuzz.targets import registry

ALL = "*"
_GIT_SECONDS = 60.0
_GITLINK = "160000"  # the mode of a submodule


@dataclass(frozen=True)
class Change:
    """`targets` need a gate; `reasons` says of each the first file that it needs one for. `files` are all that changed,
    `unmapped` those that touch no target."""

    targets: tuple[str, ...]
    reasons: Mapping[str, str]
    files: tuple[str, ...]
    unmapped: tuple[str, ...]


def changed_files(revision: str, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """The root of the repository around `folder`, and the files, as paths from there, that differ between the working
    tree and where its history left that of `revision`; new ones that git does not ignore too. A submodule is one path
    that ends in a slash: of the files below it git says nothing.

    Raises UsageError for a revision that git does not know, EnvironmentProblem where there is no git or no repository.
    """
    root = Path(_git(folder, "rev-parse", "--show-toplevel").strip())
    try:
        _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except EnvironmentProblem:
        hint = "in CI, check out with the whole history (actions/checkout: fetch-depth: 0), or fetch that revision"
        raise UsageError(f"--changed-from: git knows no revision {revision!r}", hint) from None
    try:
        base = _git(root, "merge-base", "--end-of-options", revision, "HEAD").strip()
    except EnvironmentProblem:
        base = revision  # no common history: all that differs
    raw = _git(root, "diff", "--raw", "--no-renames", "--ignore-submodules=none", "-z", base, "--").split("\0")
    differ = [f"{name}/" if _GITLINK in said.split()[:2] else name
              for said, name in zip(raw[::2], raw[1::2], strict=False)]  # fmt: skip
    new = _git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    return root, tuple(sorted({name for name in (*differ, *new) if name}))


def affected(targets: Sequence[str], root: Path, files: Sequence[str], table: Mapping[str, Sequence[str]],
             table_root: Path | None = None, for_all: Sequence[Path] = ()) -> Change:  # fmt: skip
    """Which of `targets` the changed files touch. table: glob -> targets, ops, providers, or `*`; its globs stand for
    paths from `table_root` on. for_all: files that every target depends on, as the ledger. A folder among the files, as
    a submodule, stands for all that lies below it."""
    gone = frozenset(path for file in files if not (path := root.resolve() / file).exists())
    graph = ImportGraph(root, _own_paths(root), gone)
    reasons: dict[str, str] = {}
    mapped: set[str] = set()
    made_of = {name: graph.files(registry.locate(name)) for name in targets}
    everybody = {path.resolve() for path in for_all}
    for file in files:
        path = (root / file).resolve()
        folder = _is_folder(root, file)
        if path in everybody or (folder and any(one.is_relative_to(path) for one in everybody)):
            mapped.add(file)
            reasons = {**dict.fromkeys(targets, file), **reasons}
        for name, parts in made_of.items():
            if path in parts or (folder and any(part.is_relative_to(path) for part in parts)):
                reasons.setdefault(name, file)
                mapped.add(file)
    base = (table_root or root).resolve()
    for file in files:
        path = root.resolve() / file
        inside = path.relative_to(base).as_posix() if path.is_relative_to(base) else None
        for glob, meant in table.items():
            if inside is None:
                continue
            if _pattern(glob).fullmatch(inside) or (_is_folder(root, file) and _may_lie_below(inside, glob)):
                mapped.add(file)
                for name in targets:
                    if any(_means(word, name) for word in meant):
                        reasons.setdefault(name, file)
    touched = tuple(name for name in targets if name in reasons)
    return Change(touched, reasons, tuple(files), tuple(file for file in files if file not in mapped))


def _means(word: str, target: str) -> bool:
    op, _, source = target.partition("@")
    return word in (ALL, target, op, source, source.partition(".")[0])


def _own_paths(root: Path) -> tuple[Path, ...]:
    """Where this very package lies, if that is inside the repository: a checkout of ours, installed from elsewhere."""
    package = Path(__file__).parents[3]
    return (package,) if package.resolve().is_relative_to(root.resolve()) else ()


def _is_folder(root: Path, file: str) -> bool:
    return file.endswith("/") or (root / file).is_dir()


def _may_lie_below(folder: str, glob: str) -> bool:
    """Whether a glob may stand for files of this folder, going by what comes before its first wildcard."""
    literal = re.split(r"[*?]", glob, maxsplit=1)[0]
    return literal.startswith(f"{folder}/") or f"{folder}/".startswith(literal)


@cache
def _pattern(glob: str) -> re.Pattern[str]:
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    words = re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", glob)
    return re.compile("".join(parts.get(word, re.escape(word)) for word in words), re.DOTALL)


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=_GIT_SECONDS,
                              check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"git cannot be run: {error}", "--changed-from asks git what changed") from error
    if done.returncode:
        said = (done.stderr.strip() or f"git {arguments[0]} failed").splitlines()[0]
        raise EnvironmentProblem(f"git in {folder}: {said}", "--changed-from needs a git repository")
    return done.stdout
