"""Scripts run in an environment that has everything but moe-fuzz, by one process that imports torch once; and
torch with one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PYTHON = (sys.executable, "-S", "-P")
Batch = Callable[..., list[tuple[int, str]]]

#: Runs the scripts it is told, one after another, so that torch is imported once. A line each way:
#: [[script, argument…], …] in, [[exit code, what it printed], …] out.
DRIVER = """
import contextlib, io, json, runpy, sys
import torch, torch._dynamo, triton, triton.language
import triton.experimental.gluon  # the first launch of a process would, in each fork anew
torch.set_num_threads(1)
for line in sys.stdin:
    answers = []
    for words in json.loads(line):
        sys.argv, out, code = words, io.StringIO(), None
        try:
            with contextlib.redirect_stdout(out):
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
        answers.append([code, out.getvalue()])
    print(json.dumps([answers, "moe_fuzz" in sys.modules]), flush=True)
"""


@pytest.fixture(scope="session")
def without_us(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables under which everything is installed but moe-fuzz."""
    import torch

    folder = tmp_path_factory.mktemp("site-packages")
    for origin in {Path(module.__file__).parents[1] for module in (torch, pytest, sys.modules["numpy"])}:
        for entry in origin.iterdir():
            if not entry.name.startswith(("moe_fuzz", "__editable__", "__pycache__")):
                (folder / entry.name).symlink_to(entry)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST", "MOE_FUZZ"))}
    return kept | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@contextmanager
def driving(folder: Path, environment: Mapping[str, str]) -> Iterator[Batch]:
    """Runs scripts, each a list of words, in `folder` and an environment without moe-fuzz: exit codes and outputs."""
    with subprocess.Popen(
        [*PYTHON, "-c", DRIVER], cwd=folder, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as driver:  # fmt: skip

        def run(*scripts: Sequence[str | Path]) -> list[tuple[int, str]]:
            assert driver.stdin is not None
            assert driver.stdout is not None
            driver.stdin.write(json.dumps([[str(word) for word in words] for words in scripts]) + "\n")
            driver.stdin.flush()
            answers, ours = json.loads(driver.stdout.readline())
            assert not ours
            return [(code, said) for code, said in answers]

        yield run
        assert driver.stdin is not None
        driver.stdin.close()


@pytest.fixture(scope="session")
def batch(without_us: dict[str, str], elsewhere: Path) -> Iterator[Batch]:
    with driving(elsewhere, without_us | {"CUDA_VISIBLE_DEVICES": ""}) as run:  # these scripts are of the CPU
        yield run


@pytest.fixture(scope="session")
def batch_with_us(without_us: dict[str, str], elsewhere: Path) -> Iterator[Batch]:
    """The same for scripts whose target imports moe_fuzz: it can be found, and the script must not import it."""
    found = os.pathsep.join([without_us["PYTHONPATH"], str(Path(__file__).resolve().parents[2])])
    with driving(elsewhere, without_us | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": found}) as run:
        yield run


@pytest.fixture(scope="module")
def runner() -> Any:
    """A worker's runner, in this process."""
    from moe_fuzz.execute.runner import Runner

    return Runner("cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch as a worker has it: threads that wait for each other cost more than they give."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
