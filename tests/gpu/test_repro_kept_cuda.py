"""repro.py on a GPU, of kept cases: all ranks of an all-reduce in one process, in phases and in one launch, and graphs
of any op."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moe_fuzz.campaign.repro import render
from moe_fuzz.worker.pool import Pool
from tests.cpu.conftest import Batch, driving, elsewhere, without_us  # noqa: F401 - fixtures
from tests.cpu.repro_cases import ROOT, exhibit_of, finding_of, write
from tests.cpu.test_repro_kept import GRAPHS, RANKS, failing, sound
from tests.gpu.test_repro_cuda import GPU, Runner

#: What was found on a CPU, and is a matter of roundings that are others on a GPU.
ROUNDED_ALIKE = ("two_stages_by_other_arithmetic",)
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(scope="module")
def runner(cuda_pool: Pool) -> Runner:
    return Runner(cuda_pool)


@pytest.fixture(scope="module")
def batch(without_us: dict[str, str], elsewhere: Path) -> Iterator[Batch]:  # noqa: F811
    compiled = {name: value for name, value in without_us.items() if name != "TRITON_INTERPRET"}
    found = os.pathsep.join([without_us["PYTHONPATH"], str(ROOT)])
    with driving(elsewhere, compiled | {"PYTHONPATH": found}) as run:
        yield run


@pytest.mark.parametrize("names", [RANKS, GRAPHS], ids=["ranks", "graphs"])
def test_a_kept_case_shows_without_moe_fuzz_and_a_sound_kernel_passes(
    runner: Runner, tmp_path: Path, batch: Batch, names: tuple[str, ...]
) -> None:
    runs, wrong = [], []
    shown = [name for name in names if name not in ROUNDED_ALIKE]
    for name in shown:
        case, verdict = failing(runner, name)
        assert verdict.violations, name
        script = write(tmp_path, name, render(finding_of(case, verdict), exhibit_of(runner, case) | GPU))
        runs += [[script], [script, sound(case)]]
    answers = batch(*runs)
    for name, (code, said), (code_of_sound, said_of_sound) in zip(shown, answers[::2], answers[1::2], strict=True):
        if (code, said[:5]) != (1, "BUG: "):
            wrong.append(f"{name}: {code} {said}")
        if code_of_sound != 0:
            wrong.append(f"{name}, sound: {code_of_sound} {said_of_sound}")
    assert not wrong, "\n".join(wrong)


def test_all_ranks_in_one_launch(runner: Runner, tmp_path: Path, batch: Batch) -> None:
    """The barriers are real ones there: a sound kernel passes the script of a finding of another."""
    case, verdict = failing(runner, "mean_times_ranks")
    single = replace(case, config={**case.config, "launches": "single"})
    target = "allreduce_rmsnorm@builtin"
    text = render(finding_of(single, verdict), exhibit_of(runner, single, target) | GPU)
    script = write(tmp_path, "single", text)
    ((code, said),) = batch([script])
    assert code == 0, said
