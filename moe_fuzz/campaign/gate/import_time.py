"""What a module runs while it is imported, read off its text: which imports, and which code that may change others."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator

_LOADERS = ("import_module", "__import__")


def imports_run(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that run with the module; those inside functions do not."""
    for node in _run(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def effects(tree: ast.Module, thorough: bool, ours: Callable[[str], bool]) -> Iterator[ast.AST]:
    """The code that runs with the module and may do more than give a name its meaning: calls, assignments to what is
    another's, conditions. What `moe_fuzz.declares` only declares is none.

    thorough: also what gives a name its meaning by a call; without it, what is there for its effect alone.
    ours: whether a name is something of the repository, so that a decorator of this name may run what it decorates.
    """
    for node in _run(tree.body):
        match node:
            case ast.Import() | ast.ImportFrom():
                pass
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield from _of_definition(node, thorough, ours)
            case ast.Expr():
                if not isinstance(node.value, ast.Constant):
                    yield node
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                if _of_others(node) or (thorough and (isinstance(node, ast.AugAssign) or _calls(node.value))):
                    yield node
            case ast.Delete():
                if not all(isinstance(target, ast.Name) for target in node.targets):
                    yield node
            case ast.withitem() | ast.Raise() | ast.Assert():
                yield node
            case ast.expr():
                if thorough:
                    yield node
            case _:
                pass


def names_in(node: ast.AST) -> Iterator[str]:
    return (one.id for one in ast.walk(node) if isinstance(one, ast.Name))


def loaded_by_name(node: ast.AST) -> Iterator[str]:
    """The modules that `importlib.import_module("a.b")` and `__import__("a.b")` name."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and _last_name(call.func) in _LOADERS and call.args:
            first = call.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def _run(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Statements without others inside, definitions, and the heads of what is run through: conditions, `with` items."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node
            case ast.ClassDef():
                yield node
                yield from _run(node.body)
            case ast.If() if _never(node.test):
                yield from _run(node.orelse)
            case ast.stmt() | ast.ExceptHandler() | ast.match_case() if _holds_statements(node):
                yield from _run(ast.iter_child_nodes(node))
            case _:
                yield node


def _holds_statements(node: ast.AST) -> bool:
    return any(isinstance(one, ast.stmt | ast.ExceptHandler | ast.match_case) for one in ast.iter_child_nodes(node))


def _of_others(node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> bool:
    """Whether it gives a value to an attribute or an element of something."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(isinstance(one, ast.Attribute | ast.Subscript) for each in targets for one in ast.walk(each))


def _never(test: ast.expr) -> bool:
    """Of a condition that no import meets: `TYPE_CHECKING`, `__name__ == "__main__"`."""
    if isinstance(test, ast.Compare) and isinstance(test.left, ast.Name) and test.left.id == "__name__":
        return isinstance(test.ops[0], ast.Eq)
    return _last_name(test) == "TYPE_CHECKING"


def _of_definition(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, thorough: bool, ours: Callable[[str], bool]
) -> Iterator[ast.AST]:
    decorators = [one for one in node.decorator_list if not _declares(one)]
    if any(ours(name) for one in decorators for name in names_in(_called(one))):
        yield node  # who knows whether it is called at once
        return
    if not thorough:
        return
    yield from decorators
    if isinstance(node, ast.ClassDef):  # which may ask for its subclasses, or have a metaclass
        yield from node.bases
        yield from node.keywords
    else:
        yield from (one for one in (*node.args.defaults, *node.args.kw_defaults) if one is not None and _calls(one))


def _calls(node: ast.AST | None) -> bool:
    return node is not None and not _declares(node) and any(isinstance(one, ast.Call) for one in ast.walk(node))


def _declares(node: ast.AST) -> bool:
    """`declares(…)`, and `declares(…)(function)`: another target of the module, which is gated on its own account."""
    while isinstance(node, ast.Call):
        node = node.func
        if _last_name(node) == "declares":
            return True
    return False


def _called(node: ast.AST) -> ast.AST:
    """Of `f(…)(…)` what is called first."""
    while isinstance(node, ast.Call):
        node = node.func
    return node


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
