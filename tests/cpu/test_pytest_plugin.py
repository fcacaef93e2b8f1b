"""`@fuzz`: what it refuses, what a failing test says, and a campaign on a router of one's own from end to end."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moe_fuzz import fuzz
from moe_fuzz.errors import UsageError
from moe_fuzz.fuzz import target_name

ROUTERS = '''
import torch
from moe_fuzz import fuzz


def good(logits, top_k, renormalize=False):
    """Finite above: NaN as -inf, +inf as the largest number."""
    x = torch.nan_to_num(logits.float(), nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf)
    ids = x.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    top = x.amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (x - top).exp()
    chosen = weights.gather(1, ids)
    total = (chosen if renormalize else weights).sum(1, keepdim=True)
    return chosen / torch.where(total > 0, total, torch.ones_like(total)), ids.int()


def bad(logits, top_k, renormalize=False):
    """Takes the best expert k times."""
    weights, ids = good(logits, top_k, renormalize)
    return weights, ids[:, :1].expand(-1, top_k).contiguous()
'''


def load(path: Path, text: str) -> ModuleType:
    path.write_text(textwrap.dedent(text))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_in(
    folder: Path, *arguments: str, timeout: float = 120, device: str = "cpu"
) -> subprocess.CompletedProcess[str]:
    """Runs pytest on the folder as another project's developer would: a process of its own, none of our conftest."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment["TMPDIR"] = str(folder)  # a failed @fuzz test leaves its findings there
    environment["MOE_FUZZ_DEVICE"] = device
    plugin = () if "moe_fuzz" in _entry_points() else ("-p", "moe_fuzz.pytest_plugin")
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", *plugin, "--rootdir", str(folder)]
    command += arguments
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


def _entry_points() -> set[str]:
    from importlib.metadata import entry_points

    return {entry.name for entry in entry_points(group="pytest11")}


# ---- the name of the target ------------------------------------------------------------------------------------------


def test_target_names_file_and_factory(tmp_path: Path) -> None:
    module = load(tmp_path / "test_mine.py", """
        from moe_fuzz import fuzz

        @fuzz("topk_softmax", max_cases=5)
        def test_router():
            return "the router"
    """)
    factory = module.test_router.__wrapped__
    assert factory() == "the router"
    assert target_name("topk_softmax", factory) == f"topk_softmax@{tmp_path / 'test_mine.py'}:test_router()"


def test_a_test_ends_after_a_minute_unless_it_says_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In Triton's interpreter hundreds of cases may take a quarter of an hour, in silence."""
    from moe_fuzz.campaign import engine

    asked: list[tuple[int | None, float | None]] = []

    class Ended(Exception):
        pass

    def campaign(settings: engine.Settings, *_: object, **__: object) -> None:
        asked.append((settings.cases, settings.seconds))
        raise Ended

    monkeypatch.setattr(engine, "Campaign", campaign)
    module = load(tmp_path / "test_mine.py", """
        from moe_fuzz import fuzz

        @fuzz("topk_softmax", max_cases=5)
        def test_router():
            return None

        @fuzz("topk_softmax", max_seconds=None)
        def test_patient():
            return None
    """)
    for test in (module.test_router, module.test_patient):
        with pytest.raises(Ended):
            test()
    assert asked == [(5, 60.0), (200, None)]


CAPTURES = """
def outer():
    k = 3
    def f(): return k
    return f
f = outer()
"""
NESTED = """
def outer():
    def f(): return 1
    return f
f = outer()
"""
DECORATED = """
import functools
def other(g): return functools.wraps(g)(lambda: g())
@other
def f(): pass
"""


@pytest.mark.parametrize(
    ("text", "reason", "way_out"),
    [
        ("def f(tmp_path): pass", "takes tmp_path: fixtures live in the pytest process", "inside the function"),
        ("def f(*, k=3): pass", "takes k", "inside the function"),
        (CAPTURES, "inside outer, and uses its variables k", "top level"),
        (NESTED, "inside outer: the worker", "top level"),
        ("class T:\n  def f(self): pass\nf = T.f", "method of T", "function at the top level"),
        ("f = lambda: 1", "lambda", "with `def`"),
        ("async def f(): pass", "coroutine", "plain function"),
        ("def f(): yield", "generator", "plain function"),
        ("def f(): pass\nused = f\ndef f(): return 2", "not what test_x.py holds under that name", "name of its own"),
        ("import functools\nf = functools.partial(int)", "takes a function, not functools.partial", "`def`"),
        ("import functools\n@functools.cache\ndef f(): pass", "takes a function, not <functools._lru_cache", "`def`"),
        (DECORATED, "another decorator below @fuzz", "directly above"),
    ],
)
def test_refuses_what_a_worker_cannot_import(tmp_path: Path, text: str, reason: str, way_out: str) -> None:
    module = load(tmp_path / "test_x.py", text)
    with pytest.raises(UsageError, match=re.escape(reason)) as caught:
        target_name("topk_softmax", getattr(module, "used", None) or module.f)
    assert way_out in caught.value.hint


def test_refuses_what_was_typed_into_a_prompt() -> None:
    space: dict[str, Any] = {}
    exec(compile("def f(): pass", "<stdin>", "exec"), space)
    with pytest.raises(UsageError, match=r"defined in <stdin>, which is no file"):
        target_name("topk_softmax", space["f"])


def test_refuses_to_be_used_without_an_op() -> None:
    with pytest.raises(UsageError, match="needs the name of an op"):
        fuzz(test_refuses_to_be_used_without_an_op)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("decorator", "reason"),
    [
        ('fuzz("topk_sofmax")', "did you mean 'topk_softmax'"),
        ('fuzz("topk_softmax", checks=["nonsense"])', "has no check 'nonsense'"),
    ],
)
def test_wrong_arguments_fail_the_test_with_a_hint(tmp_path: Path, decorator: str, reason: str) -> None:
    module = load(tmp_path / "test_x.py", f"from moe_fuzz import fuzz\n@{decorator}\ndef test_router(): return int\n")
    with pytest.raises(pytest.fail.Exception) as caught:
        module.test_router()
    assert reason in str(caught.value)


# ---- the plugin ------------------------------------------------------------------------------------------------------


def test_plugin_imports_nothing_heavy() -> None:
    """It is loaded into every pytest run of every project on the machine."""
    code = (
        "import pytest, sys; before = set(sys.modules); import moe_fuzz.pytest_plugin;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["moe_fuzz"]


#: A campaign that needs no worker: two findings for `bad`, nothing run for `none`, clean otherwise.
STUB = """
import sys
from types import SimpleNamespace as Namespace

def campaign(op, target, *_):
    findings = ()
    if "bad" in target:
        make = lambda n, s: Namespace(id=f"id{n}", check="ids", message="row 0 names an expert twice",
                                      label=f"topk_softmax T={n}", replay=f"moe-fuzz replay mfz1:{n}", sequence=s)
        findings = (make(1, ()), make(2, ("an earlier case",)))
    code = 3 if "none" in target else 1 if findings else 0
    return Namespace(new=findings[:1], known=findings[1:], cases=7, exit_code=code, interrupted=False,
                     reason="every case was rejected")

sys.modules["moe_fuzz.fuzz"]._campaign = campaign  # the module: moe_fuzz.fuzz is the function
"""

TESTS = """
from moe_fuzz import fuzz

@fuzz("topk_softmax")
def test_good(): return int

@fuzz("topk_softmax")
def test_bad(): return int

@fuzz("topk_softmax")
def test_none(): return int

@fuzz("topk_softmax")
def test_fixture(tmp_path): return int

class TestMethods:
    @fuzz("topk_softmax")
    def test_method(self): return int
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "xdist"])
def test_what_a_failing_test_says(tmp_path: Path, workers: tuple[str, ...]) -> None:
    (tmp_path / "conftest.py").write_text(STUB)
    (tmp_path / "test_mine.py").write_text(TESTS)
    done = pytest_in(tmp_path, *workers)
    text = done.stdout
    assert done.returncode == 1, text + done.stderr
    assert "4 failed, 1 passed" in text
    assert f"topk_softmax@{tmp_path}/test_mine.py:test_bad(): 2 findings in 7 cases" in text
    assert "1. ids: row 0 names an expert twice\n   minimal input: topk_softmax T=1\n" in text
    assert "\n   replay: moe-fuzz replay mfz1:1\n" in text
    assert "test_none(): every case was rejected" in text
    assert "takes tmp_path: fixtures live in the pytest process" in text
    assert "test_method is a method of TestMethods" in text
    summary = text.partition("moe-fuzz: replay these findings")[2]
    lines = r"test_mine\.py::test_bad\n  moe-fuzz replay mfz1:1\n  moe-fuzz replay mfz1:2\n"
    assert re.search(lines, summary), summary
    for noise in ("fuzz.py:", "During handling", "entries are hidden"):
        assert noise not in text, "nothing of our inner workings belongs into another project's report"


def test_passing_tests_get_no_section(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text("def test_it(): assert True\n")
    done = pytest_in(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "moe-fuzz" not in done.stdout.partition("\n\n")[2]


def test_closing_without_a_pool_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["moe_fuzz.fuzz"]
    session = module._Session()
    monkeypatch.setattr(module, "_session", session)
    module.close()
    closed: list[Callable[..., object]] = []

    class Pool:
        def __exit__(self, *_: object) -> None:
            closed.append(self.__exit__)

    session._pool = Pool()
    module.close()
    module.close()
    assert len(closed) == 1


# ---- end to end ------------------------------------------------------------------------------------------------------


def test_a_router_of_ones_own(tmp_path: Path) -> None:
    """The workers import the file, the good router passes, the bad one fails, and its replay line fails again.

    On the CPU, wherever it runs: each try of a reduction is a fresh worker, which on a GPU would wait for its slot.
    """
    tests = """
@fuzz("topk_softmax", max_cases=20)
def test_good(): return good

@fuzz("topk_softmax", max_cases=20, checks=["ids"])
def test_bad(): return bad
"""
    (tmp_path / "test_mine.py").write_text(ROUTERS + tests)
    done = pytest_in(tmp_path)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "1. ids: row 0 names an expert twice" in done.stdout
    line = done.stdout.partition("moe-fuzz: replay these findings")[2].split("moe-fuzz ", 1)[1].splitlines()[0]
    command = [sys.executable, "-P", "-m", "moe_fuzz.cli.main", *line.split(), "--device", "cpu"]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1, again.stdout + again.stderr
