"""Which files of a repository a target is made of: read off the imports, without importing anything.

Where a target lies is known by name (`moe_fuzz.targets.builtin:align`, `kernels/my.py:topk`). In the module that only
hands it out, what counts is what its name is made of, and what the module runs while it is imported; from there on,
whole files and all they import, inside functions too. Of what else is imported on the way, packages among it, counts
what does something to others as it is imported. What lies outside the repository is left alone: a change cannot touch
it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from moe_fuzz.campaign.gate.import_time import effects, imports_run, loaded_by_name, names_in


class ImportGraph:
    """Of the Python files below `root`. `paths`: where absolute imports are looked up, besides root and root/src.
    `gone`: files and folders that a change took away; what still imports one is touched by that."""

    def __init__(self, root: Path, paths: tuple[Path, ...] = (), gone: frozenset[Path] = frozenset()) -> None:
        self._gone = gone
        self._root = root.resolve()
        self._paths = (*paths, self._root, self._root / "src")
        self._direct: dict[Path, frozenset[Path]] = {}
        self._does: dict[tuple[Path, bool], list[ast.AST]] = {}
        self._runs: dict[Path, frozenset[Path]] = {}

    def files(self, location: str) -> frozenset[Path]:
        """The files below root, resolved, that the target at `module:attribute` or `file.py:attribute` is made of;
        none where it lies outside."""
        place, _, attribute = location.removesuffix("()").rpartition(":")
        start = Path(place) if place.endswith(".py") else self._module(place)
        if start is None or not self._inside(start.resolve()):
            return frozenset()
        sliced: set[tuple[Path, str]] = set()
        line = list(self._slice(start, attribute.split(".")[0], sliced))
        found = {path for path, _ in sliced}
        whole: set[Path] = set()
        passed: set[Path] = set()  # asked what they run
        while line or (line := list(self._beside(found, whole, passed))):
            path = line.pop()
            resolved = path.resolve()
            if resolved not in whole and self._inside(resolved):
                whole.add(resolved)
                line += self._imports(path)
        return frozenset(found | whole | set(self._packages(found | whole)))

    def _packages(self, files: set[Path]) -> Iterator[Path]:
        """The `__init__.py` that run before these files do."""
        for folder in {folder for file in files for folder in file.parents if self._inside(folder)}:
            file = folder / "__init__.py"
            if file.is_file() or _went(file, self._gone):
                yield file.resolve()

    def _inside(self, path: Path) -> bool:
        return path.is_relative_to(self._root)

    def _beside(self, found: set[Path], whole: set[Path], passed: set[Path]) -> Iterator[Path]:
        """What else runs as these are imported, and does something to others or cannot run. All that it imports
        would be most of a project."""
        around = set(self._packages(found | whole))
        waiting = [*found, *around]
        while waiting:
            path = waiting.pop()
            if path in passed or path in whole or not self._inside(path):
                continue
            passed.add(path)
            if _went(path, self._gone) or _broken(path):
                yield path
                continue
            if path not in found:
                does = self._effects(path, path in around)
                if does:
                    found.add(path)
                    yield from self._needs(path, does, [], "", set())
            waiting += self._run_by(path)

    def _effects(self, path: Path, thorough: bool) -> list[ast.AST]:
        if (path, thorough) not in self._does:
            self._does[path, thorough] = list(effects(_tree(path), thorough, self._ours(path)))
        return self._does[path, thorough]

    def _run_by(self, path: Path) -> frozenset[Path]:
        """The files that run because this one does."""
        if path not in self._runs:
            run = {file.resolve() for node in imports_run(_tree(path)) for file in self._of(path, node)}
            self._runs[path] = frozenset({*run, *self._packages(run)})
        return self._runs[path]

    def _slice(self, path: Path, attribute: str, sliced: set[tuple[Path, str]]) -> Iterator[Path]:
        """The files that one name of a module needs, and what the module runs; a name that it imports is followed to
        where it is defined."""
        if (path.resolve(), attribute) in sliced:
            return
        sliced.add((path.resolve(), attribute))
        tree = _tree(path)
        bound = _bound(path)
        if attribute not in bound:  # by `import *`, or by a function of the module
            yield from self._imports(path)
        for node in imports_run(tree):
            # One that gives no name to use is there for what it does, or for whatever it brings.
            if any(alias.name == "*" for alias in node.names) or (
                isinstance(node, ast.Import) and not _used(tree).intersection(_names_bound(node))
            ):
                yield from self._of(path, node)
        yield from self._needs(path, self._effects(path, True), [attribute], attribute, sliced)

    def _needs(
        self, path: Path, does: list[ast.AST], names: list[str], attribute: str, sliced: set[tuple[Path, str]]
    ) -> Iterator[Path]:
        """The files that code of a module and names in it need. attribute: the one that it hands out."""
        bound = _bound(path)
        waiting, seen = list(names), set()
        for node in does:
            waiting += names_in(node)
            yield from self._imported_in(path, node)
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            for statement in bound.get(name, ()):
                if isinstance(statement, ast.ImportFrom):
                    yield from self._import_from(path, statement, name, name == attribute, sliced)
                elif isinstance(statement, ast.Import):
                    yield from self._plain_import(statement)
                else:
                    waiting += names_in(statement)
                    yield from self._imported_in(path, statement)

    def _imported_in(self, path: Path, node: ast.AST) -> Iterator[Path]:
        """What a function imports when it is called."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom | ast.Import):
                yield from self._of(path, inner)
        for name in loaded_by_name(node):
            module = self._module(name)
            if module is not None:
                yield module

    def _ours(self, path: Path) -> Callable[[str], bool]:
        """Whether a name of a module is, or may be, something of the repository; `_cached = lru_cache(64)` is not."""
        bound = _bound(path)

        def ours(name: str, above: tuple[str, ...] = ()) -> bool:
            for statement in bound.get(name, ()) if name not in above else ():
                if isinstance(statement, ast.Import | ast.ImportFrom):
                    if any(self._inside(file.resolve()) for file in self._of(path, statement)):
                        return True
                elif isinstance(statement, ast.Assign | ast.AnnAssign):
                    if any(ours(one, (*above, name)) for one in names_in(statement)):
                        return True
                else:
                    return True
            return False

        return ours

    def _import_from(
        self, path: Path, statement: ast.ImportFrom, name: str, handed_out: bool, sliced: set[tuple[Path, str]]
    ) -> Iterator[Path]:
        for alias in statement.names:
            if (alias.asname or alias.name) != name:
                continue
            source = self._source(path, statement)
            module = self._module(f"{source}.{alias.name}") if source else None
            if module is not None:
                yield module
            elif source and (holder := self._module(source)) is not None:
                if handed_out and self._inside(holder.resolve()):
                    yield from self._slice(holder, alias.name, sliced)
                else:
                    yield holder

    def _imports(self, path: Path) -> frozenset[Path]:
        if _went(path, self._gone):
            return frozenset()
        if path not in self._direct:
            nodes = _imported(path, path.stat().st_mtime_ns)
            self._direct[path] = frozenset(file for node in nodes for file in self._of(path, node))
        return self._direct[path]

    def _of(self, path: Path, node: ast.Import | ast.ImportFrom) -> Iterator[Path]:
        if isinstance(node, ast.Import):
            yield from self._plain_import(node)
            return
        source = self._source(path, node)
        for alias in node.names:
            for module in (self._module(f"{source}.{alias.name}"), self._module(source)):
                if module is not None:
                    yield module
                    break

    def _plain_import(self, node: ast.Import) -> Iterator[Path]:
        for alias in node.names:
            module = self._module(alias.name)
            if module is not None:
                yield module

    def _source(self, path: Path, node: ast.ImportFrom) -> str:
        """The absolute name of the module that is imported from; a file's neighbours are found by its own path."""
        if not node.level:
            return node.module or ""
        package = path.parent
        for _ in range(node.level - 1):
            package = package.parent
        for base in self._paths:
            if package.is_relative_to(base) and package != base:
                return ".".join([*package.relative_to(base).parts, *([node.module] if node.module else [])])
        return node.module or ""

    def _module(self, name: str) -> Path | None:
        return _find(name, self._paths, self._gone) if name else None


@cache
def _find(name: str, paths: tuple[Path, ...], gone: frozenset[Path]) -> Path | None:
    relative = Path(*name.split("."))
    files = [file for base in paths for file in (base / relative.with_suffix(".py"), base / relative / "__init__.py")]
    there = next((file for file in files if file.is_file()), None)
    return there or next((file for file in files if _went(file, gone)), None)


def _went(file: Path, gone: frozenset[Path]) -> bool:
    return file in gone or not gone.isdisjoint(file.parents)


def _tree(path: Path) -> ast.Module:
    try:
        return _parsed(path, path.stat().st_mtime_ns) or ast.Module([], [])
    except OSError:
        return ast.Module([], [])


def _broken(path: Path) -> bool:
    """Whether it cannot be imported, whatever it says."""
    try:
        return _parsed(path, path.stat().st_mtime_ns) is None
    except OSError:
        return True


@cache
def _parsed(path: Path, _changed: int) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # it cannot be imported either, and then its target says so


def _bound(path: Path) -> dict[str, list[ast.stmt]]:
    """The statements at the top of a module that give each name its meaning."""
    bound: dict[str, list[ast.stmt]] = {}
    for statement in _tree(path).body:
        for name in _names_bound(statement):
            bound.setdefault(name, []).append(statement)
    return bound


def _used(tree: ast.Module) -> frozenset[str]:
    return frozenset(names_in(tree))


@cache
def _imported(path: Path, _changed: int) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """All import statements of a file."""
    tree = _parsed(path, _changed)
    return tuple(node for node in (ast.walk(tree) if tree else ()) if isinstance(node, ast.ImportFrom | ast.Import))


def _names_bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top of a module gives a meaning; those inside an `if` or `try` too."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield statement.name
        case ast.Import():
            yield from ((alias.asname or alias.name.partition(".")[0]) for alias in statement.names)
        case ast.ImportFrom():
            yield from ((alias.asname or alias.name) for alias in statement.names)
        case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
        case _:
            for node in ast.iter_child_nodes(statement):
                if isinstance(node, ast.stmt):
                    yield from _names_bound(node)
