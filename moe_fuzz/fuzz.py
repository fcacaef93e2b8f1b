"""`@fuzz`: a campaign on a kernel of your own, as a pytest test.

    from moe_fuzz import fuzz

    @fuzz("topk_softmax", max_cases=500)
    def test_my_router():
        return my_router            # same signature as the op

The decorated function is a *factory*. It is not called in the pytest process but in a worker process, which imports
the test file and calls it there to get the implementation. So the name of the target is
`topk_softmax@/path/test_file.py:test_my_router()`, where the final `()` means "call it to get the implementation".
Replaying a finding needs no pytest.

This module is loaded with the pytest plugin into every pytest run of a machine that has moe-fuzz installed, and by
`import moe_fuzz` in general. Therefore it imports nothing at the top but the error classes.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, NoReturn

from moe_fuzz.errors import EXIT_CLEAN, MoeFuzzError, UsageError

if TYPE_CHECKING:
    from moe_fuzz.campaign.events import Summary
    from moe_fuzz.worker.pool import Pool


def fuzz(
    op: str,
    *,
    max_cases: int = 200,
    seed: int = 0,
    checks: Sequence[str] | None = None,
    max_seconds: float | None = 60.0,
) -> Callable[[Callable[[], Any]], Callable[..., None]]:
    """Makes a pytest test of a factory that returns an implementation of `op`.

    `max_cases` and `max_seconds` are the budget, whichever ends first; the same `seed` draws the same cases. Where
    there is a time, cases are left out that Triton's interpreter would take seconds for; without one (None) all are
    run, however long that takes. `checks` limits the checks to those named (`moe-fuzz list checks`). The test fails on
    confirmed findings, each with its minimal input and the line that replays it, and when nothing ran. It also fails,
    with the reason, where a worker process could not import the factory; see `target_name`.
    """
    if not isinstance(op, str):
        hint = 'write @fuzz("topk_softmax"); `moe-fuzz list ops` names the ops'
        raise UsageError("@fuzz needs the name of an op", hint)

    def decorate(factory: Callable[[], Any]) -> Callable[..., None]:
        @functools.wraps(factory)
        def test(*_self: object, **_fixtures: object) -> None:
            try:
                target = target_name(op, factory)
                with _state_folder(target) as folder:
                    _judge(target, folder, _campaign(op, target, max_cases, seed, checks, max_seconds, folder))
            except MoeFuzzError as error:
                _fail("\nhint: ".join(filter(None, (error.message, error.hint))))

        # Without this pytest would look through __wrapped__ and take the factory's parameters for fixtures; what is
        # wrong with parameters is better said by target_name.
        test.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
        return test

    return decorate


def target_name(op: str, factory: Callable[..., Any]) -> str:
    """`OP@/abs/path/file.py:NAME()`, or UsageError with the reason why a worker process could not find the factory."""
    if not isinstance(factory, FunctionType):
        raise UsageError(f"@fuzz takes a function, not {factory!r}", "write a `def` at the top level of the test file")
    name, code = factory.__name__, factory.__code__
    parameters = list(inspect.signature(factory).parameters)
    if hasattr(factory, "__wrapped__"):  # the worker unwraps the test all the way, and would lose that decorator
        raise UsageError(f"{name} has another decorator below @fuzz", "put @fuzz directly above the `def`")
    if "<lambda>" in name:
        raise UsageError("@fuzz cannot find a lambda by name in the worker", "define the factory with `def`")
    if "<locals>" in factory.__qualname__:
        outer = factory.__qualname__.split(".<locals>")[0]
        captured = f", and uses its variables {', '.join(code.co_freevars)}" if code.co_freevars else ""
        raise UsageError(
            f"{name} is defined inside {outer}{captured}: the worker imports the file, where it cannot be reached",
            "move it to the top level of the test file",
        )
    if "." in factory.__qualname__:
        raise UsageError(
            f"{name} is a method of {factory.__qualname__.rpartition('.')[0]}: the worker calls it without an instance",
            "make it a function at the top level of the test file",
        )
    if parameters:
        raise UsageError(
            f"{name} takes {', '.join(parameters)}: fixtures live in the pytest process, the worker calls {name}()",
            "build what it needs inside the function, or at the top level of the test file",
        )
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise UsageError(f"{name} is a generator or a coroutine", "make it a plain function that returns the router")
    path = Path(code.co_filename)
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(
            f"{name} was defined in {code.co_filename}, which is no file that a worker could import",
            "save it in a .py file",
        )
    found = factory.__globals__.get(name)
    if not callable(found) or inspect.unwrap(found) is not factory:
        raise UsageError(
            f"{name} is not what {path.name} holds under that name: the worker would call something else",
            "give the decorated function a name of its own in the file",
        )
    return f"{op}@{path.resolve()}:{name}()"


# ---- the campaign ----------------------------------------------------------------------------------------------------


def _campaign(
    op: str,
    target: str,
    max_cases: int,
    seed: int,
    checks: Sequence[str] | None,
    max_seconds: float | None,
    folder: Path,
) -> Summary:
    """Runs it on the pool of this process. What it imports here is free of torch; only the workers are not."""
    from moe_fuzz.campaign.engine import Campaign, Settings
    from moe_fuzz.campaign.repro import renderer
    from moe_fuzz.campaign.state import StateDir
    from moe_fuzz.ops import get_space

    space = get_space(op)
    unknown = [check for check in checks or () if check not in space.checks]
    if unknown:
        raise UsageError(f"{op} has no check {unknown[0]!r}", f"its checks are {', '.join(space.checks)}")
    settings = Settings(
        targets=(target,),
        cases=max_cases,
        seconds=max_seconds,
        seed=seed,
        checks=None if checks is None else tuple(checks),
        device=_session.device,
        workers=1,
    )
    pool = _session.pool()
    return Campaign(settings, pool, StateDir(folder), _nobody_listens, render_repro=renderer(pool)).run()


def _nobody_listens(_event: object) -> None:
    """A test that passes says nothing; one that fails says it all at the end, from the summary."""


class _Session:
    """What the `@fuzz` tests of one process share: a worker pool, made by the first of them and kept warm."""

    def __init__(self) -> None:
        self._pool: Pool | None = None

    @functools.cached_property
    def device(self) -> str:
        from moe_fuzz import config
        from moe_fuzz.cli.params import pick_device

        found = config.load(Path.cwd(), os.environ)
        return pick_device(os.environ.get(config.env_name("device")) or found.values.get("device") or "auto")

    def pool(self) -> Pool:
        if self._pool is None:
            from moe_fuzz.worker.pool import Pool

            self._pool = Pool(1, self.device).__enter__()
            atexit.register(self.close)  # where there is no pytest session to end
        return self._pool

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            atexit.unregister(self.close)
            pool.__exit__(None, None, None)


_session = _Session()


@contextmanager
def _state_folder(target: str) -> Iterator[Path]:
    """Where the test's campaign keeps its findings: a folder of its own, so that tests can run side by side.

    It lies in the state directory if the environment or pyproject.toml names one. Else it is a temporary folder, which
    stays if there is a finding in it.
    """
    from moe_fuzz import config

    name = f"{target.rpartition(':')[2].removesuffix('()')}-{hashlib.sha256(target.encode()).hexdigest()[:8]}"
    found = config.load(Path.cwd(), os.environ)
    chosen = os.environ.get(config.env_name("state-dir")) or found.values.get("state_dir")
    if chosen is not None:
        yield Path(chosen) / "pytest" / name
        return
    folder = Path(tempfile.mkdtemp(prefix=f"moe-fuzz-{name}-"))
    try:
        yield folder
    finally:
        if not any(folder.glob("findings/*")):
            shutil.rmtree(folder, ignore_errors=True)


def close() -> None:
    """Ends the workers of this process's `@fuzz` tests, if there are any. The next such test starts new ones."""
    _session.close()


# ---- what the test says ----------------------------------------------------------------------------------------------


def _judge(target: str, folder: Path, summary: Summary) -> None:
    if summary.interrupted:
        raise KeyboardInterrupt
    findings = (*summary.new, *summary.known)  # a finding that an earlier run kept is no reason to pass
    if findings:
        replays = [finding.replay for finding in findings]
        lines = [f"{target}: {len(findings)} finding{'s' if len(findings) > 1 else ''} in {summary.cases} cases"]
        for number, (finding, replay) in enumerate(zip(findings, replays, strict=True), 1):
            lines += ["", f"{number}. {finding.check}: {finding.message}"]
            lines += [f"   minimal input: {finding.label}", f"   replay: {replay}"]
            lines += [f"   report: {folder / 'findings' / finding.id / 'report.md'}"]
        _fail("\n".join(lines), replays)
    if summary.exit_code != EXIT_CLEAN:
        _fail(f"{target}: {summary.reason or 'the campaign did not run'}")


def _fail(message: str, replays: Sequence[str] = ()) -> NoReturn:
    """Fails the running test. The replay lines travel with the exception to the plugin, which lists them at the end."""
    import pytest

    failure = pytest.fail.Exception(message, pytrace=False)
    failure.moe_fuzz_replays = tuple(replays)  # type: ignore[attr-defined]
    raise failure from None
