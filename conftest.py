"""How the tests run on the machine at hand. pytest loads this file first, in every xdist worker too.

Four things happen here, each before any test module is imported, and two fixtures are made:

1. TRITON_INTERPRET=1 goes into the environment, because Triton decides between compiler and interpreter when a kernel
   is *defined*. It does so with a GPU too: what runs on one runs in processes of its own, which drop the variable, so a
   test does the same thing whichever tests ran before it in its process.
2. An xdist worker gets one OpenMP thread. Otherwise every worker starts as many threads as the machine has cores, and
   N workers fight over them N-fold.
3. The repository root leaves `sys.path`. `python -m pytest` puts it there, and then our top-level `kernels/` would
   answer for Hugging Face's package of that name. Our own code is `moe_fuzz.kernels`, found through the installation.
4. `-n auto` gets an answer, and tests marked `gpu`, `multigpu(n)`, `sanitizer` or `interpreter` are skipped with a
   reason where the machine cannot run them.

5. What a test draws from torch without a generator of its own is the same in every run: other data are a campaign's.

6. `cuda_pool` is one for all tests of a process: importing torch anew takes longer than most of them. Between two files
   it rests, so that what other tests start finds a place on a GPU.

7. What was imported and collected is no garbage, and is not looked through for it.

None of it imports torch: that takes seconds, and a CUDA context in the pytest process would hold memory on a GPU that
belongs to the workers. Nor is any of it in moe_fuzz/pytest_plugin.py, which is loaded into other projects' test runs,
where these decisions are not ours.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import moe_fuzz
from moe_fuzz.worker.gpus import default_workers, gpus
from moe_fuzz.worker.pool import Pool

ROOT = Path(__file__).resolve().parent


def gpu_count() -> int:
    """How many NVIDIA GPUs this process may use."""
    return len(gpus())


def cpu_count() -> int:
    """The cores this process may run on, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def gpu_slots() -> int:
    """How many tests may use the GPUs at once: as many workers as a campaign would have. Each leases its place."""
    return default_workers(gpus())


def interpreter_problem(triton: str, numpy: str) -> str:
    """Why these versions together cannot interpret a kernel; empty if they can. `doctor` says it to users.

    From 2.4 on numpy makes no Python number of an array of one element; up to 3.6 Triton's interpreter wants it to.
    """

    def version(text: str) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"\d+", text)[:2])

    if version(triton) < (3, 7) and version(numpy) >= (2, 4):
        return f"needs Triton's interpreter, which in triton {triton} does not work with numpy {numpy}"
    return ""


GPUS = gpu_count()
INTERPRETER = interpreter_problem(metadata.version("triton"), metadata.version("numpy"))

if "MOE_FUZZ_TESTS_COMPILED" not in os.environ:  # tests/gpu/conftest.py sets it in its child
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
assert moe_fuzz.__path__, "imported above, so that its submodules are found without the root on sys.path"
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: one worker a GPU slot, or a core where there is no GPU."""
    return gpu_slots() if GPUS else cpu_count()


def pytest_configure(config: pytest.Config) -> None:
    """Whoever is done takes tests from others: a file with a minute of tests would be one worker's alone."""
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "worksteal"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch = sys.modules.get("torch")  # a test file that uses it has imported it
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def _cuda_pool() -> Iterator[Pool]:
    with Pool(1, "cuda") as pool:
        yield pool


@pytest.fixture(scope="module")
def cuda_pool(_cuda_pool: Pool) -> Iterator[Pool]:
    """One worker on a GPU. A test that breaks it leaves the next one a fresh one, as a campaign's cases do."""
    yield _cuda_pool
    _cuda_pool.rest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = _why_not(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_not(item: pytest.Item) -> str:
    """The reason why this machine cannot run the test, or the empty string."""
    multi = item.get_closest_marker("multigpu")
    if multi is not None:
        if len(multi.args) != 1 or not isinstance(multi.args[0], int):
            raise pytest.UsageError(f"{item.nodeid}: write the number of GPUs, as in @pytest.mark.multigpu(2)")
        if multi.args[0] > GPUS:
            return f"needs {multi.args[0]} CUDA devices, this machine has {GPUS}"
    if not GPUS and item.get_closest_marker("gpu"):
        return "needs a CUDA device, this machine has none"
    if INTERPRETER and item.get_closest_marker("interpreter"):
        return INTERPRETER
    if item.get_closest_marker("sanitizer"):
        if not GPUS:
            return "needs a CUDA device for compute-sanitizer, this machine has none"
        if shutil.which("compute-sanitizer") is None:
            return "needs compute-sanitizer on the PATH"
    return ""


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported and collected stays to the end: a collection of garbage need not look through it each time.
    Hypothesis collects for each thread that draws for the first time, which is each driver of each campaign."""
    gc.collect()
    gc.freeze()
