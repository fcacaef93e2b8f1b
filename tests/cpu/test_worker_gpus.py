"""GPUs without one: who is asked, what CUDA_VISIBLE_DEVICES leaves, how many workers fit, and who gets which slot."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moe_fuzz.case import Case, Step
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.labels import Labels
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.worker import gpus
from moe_fuzz.worker.gpus import Gpu
from moe_fuzz.worker.leases import Leases, default_directory
from moe_fuzz.worker.pool import Pool

GIB = 1 << 30
RUNNER = f"{Path(__file__).parent / 'worker_runner.py'}:Runner"
CARDS = tuple(Gpu("H200", 140 * GIB, 139 * GIB, f"GPU-{letter}000") for letter in "abcd")


def small(uuid: str, slots: int = 1) -> Gpu:
    return Gpu("small", slots * gpus.SLOT_BYTES, slots * gpus.SLOT_BYTES, uuid)


# ---- which there are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (None, "abcd"), ("0,1", "ab"), ("3, 1", "db"), ("", ""), ("-1", ""), ("2,-1,3", "c"), ("0,9,1", "a"),
        ("GPU-c,GPU-a000", "ca"), ("0,0", "a"), ("x", ""),
    ],
)  # fmt: skip
def test_visible_devices(wanted: str | None, names: str) -> None:
    found = gpus.visible(CARDS, {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted})
    assert [gpu.uuid[4] for gpu in found] == list(names)


def test_visible_parts_and_uuids_that_nobody_knows() -> None:
    (part,) = gpus.visible(CARDS, {"CUDA_VISIBLE_DEVICES": "MIG-77"})
    assert (part.uuid, part.slots, part.budget) == ("MIG-77", 1, None)
    plain = (Gpu("unknown", uuid="0"), Gpu("unknown", uuid="1"))
    assert [g.uuid for g in gpus.visible(plain, {"CUDA_VISIBLE_DEVICES": "GPU-x,GPU-y,GPU-z"})] == ["GPU-x", "GPU-y"]


def test_slots_by_memory() -> None:
    assert (CARDS[0].slots, CARDS[0].room) == (gpus.MAX_SLOTS, gpus.MAX_SLOTS)
    assert Gpu("H200", 140 * GIB, 20 * GIB).room == 3  # somebody else uses it; its slots keep their numbers
    assert Gpu("8 GB", 8 * GIB, 1 * GIB).room == 1
    assert Gpu("unknown").slots == 1
    for card in (CARDS[0], Gpu("24 GB", 24 * GIB)):
        assert card.budget is not None
        assert card.memory is not None
        assert 5 * GIB <= card.budget <= card.memory / card.slots


def test_default_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12))
    assert gpus.default_workers(CARDS) == 12
    assert gpus.default_workers([small("a", 2), small("b")]) == 3
    assert gpus.default_workers([]) == 1


SMI = {
    "two": ("echo 'NVIDIA H200, 143771, 143000, GPU-1'; echo 'NVIDIA H200, [N/A], [N/A], GPU-2'", 2),
    "none": ("echo 'NVIDIA-SMI has failed' >&2; exit 9", 0),
}


@pytest.mark.parametrize("answer", SMI)
def test_nvidia_smi_is_asked_where_nvml_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str) -> None:
    program, count = SMI[answer]
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpus, "_by_nvml", lambda: None)
    monkeypatch.setattr(gpus, "_DEV", tmp_path)
    monkeypatch.setattr(gpus, "_PROC", tmp_path / "proc")
    found = gpus.find()
    assert len(found) == count
    assert not count or found == (
        Gpu("NVIDIA H200", 143771 << 20, 143000 << 20, "GPU-1"), Gpu("NVIDIA H200", None, None, "GPU-2"),
    )  # fmt: skip


def test_the_drivers_files_are_the_last_resort(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpus, "_by_nvml", lambda: None)
    monkeypatch.setattr(gpus, "_by_smi", lambda: None)
    monkeypatch.setattr(gpus, "_DEV", tmp_path)
    monkeypatch.setattr(gpus, "_PROC", tmp_path / "proc")
    assert gpus.find() == ()
    for name in ("nvidia0", "nvidiactl"):
        (tmp_path / name).touch()
    assert gpus.find() == (Gpu("unknown model", uuid="0"),)
    for minor in (0, 1):  # the second is the host's, not given to this container
        (tmp_path / "proc" / str(minor)).mkdir(parents=True)
        text = f"Model: \t\t NVIDIA H200\nGPU UUID: \t GPU-{minor}f\nDevice Minor: \t {minor}\n"
        (tmp_path / "proc" / str(minor) / "information").write_text(text)
    assert gpus.find() == (Gpu("NVIDIA H200", uuid="GPU-0f"),)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 13.3.0\n",
         "580.95.05"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13\n", "470.57.02"),
        ("nothing\n", ""),
        (None, ""),
    ],
)  # fmt: skip
def test_the_version_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, version: str
) -> None:
    monkeypatch.setattr(gpus, "_DRIVER", tmp_path / "version")
    if text is not None:
        (tmp_path / "version").write_text(text)
    assert gpus.driver_version() == version


# ---- who gets which -------------------------------------------------------------------------------------------------


def test_workers_are_spread_over_the_gpus(tmp_path: Path) -> None:
    leases = Leases([small("GPU-a", 3), small("GPU-b", 2)], tmp_path)
    taken = [leases.take() for _ in range(5)]
    assert [lease.gpu.uuid[-1] for lease in taken] == list("ababa")
    assert len(list(tmp_path.glob("*.lock"))) == 5
    extra = leases.take()  # more workers than slots: shared, and not waited for
    assert extra.lock is None
    assert taken[0].environment == {
        "CUDA_VISIBLE_DEVICES": "GPU-a", "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "MOE_FUZZ_GPU_MEMORY": str(small("GPU-a", 3).budget),
    }  # fmt: skip
    leases.close()


def test_two_programs_share_a_gpu_and_a_third_waits(tmp_path: Path) -> None:
    card = [small("GPU-a", 2)]
    one, two, three = Leases(card, tmp_path), Leases(card, tmp_path), Leases(card, tmp_path, patience=0.1)
    first, second = one.take(), two.take()
    assert first.lock
    assert second.lock
    assert one.take().lock is None
    with pytest.raises(EnvironmentProblem, match="all 2 GPU slots") as caught:
        three.take()
    assert str(tmp_path) in caught.value.message
    got: list[str] = []
    patient = Leases(card, tmp_path)
    thread = threading.Thread(target=lambda: got.append(patient.take().gpu.uuid))
    thread.start()
    thread.join(0.4)
    assert got == []
    second.release()
    second.release()
    thread.join(10)
    assert got == ["GPU-a"]
    one.close()
    patient.close()


def test_whoever_shares_a_slot_inherits_it(tmp_path: Path) -> None:
    ours, others = Leases([small("GPU-a")], tmp_path), Leases([small("GPU-a")], tmp_path, patience=0.0)
    owner, guest = ours.take(), ours.take()
    owner.release()
    with pytest.raises(EnvironmentProblem):
        others.take()
    guest.release()
    assert others.take().lock


def test_a_dead_program_holds_no_slot(tmp_path: Path) -> None:
    program = f"""if True:
        import os, signal
        from pathlib import Path
        from moe_fuzz.worker.leases import Leases
        from moe_fuzz.worker.gpus import Gpu
        Leases([Gpu("small", uuid="GPU-a")], Path({str(tmp_path)!r})).take()
        os.kill(os.getpid(), signal.SIGKILL)"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert Leases([Gpu("small", uuid="GPU-a")], tmp_path, patience=0.0).take().lock


def test_a_closed_pool_waits_no_longer(tmp_path: Path) -> None:
    holder, waiter = Leases([small("a")], tmp_path), Leases([small("a")], tmp_path)
    holder.take()
    raised: list[str] = []

    def wait() -> None:
        try:
            waiter.take()
        except EnvironmentProblem as error:
            raised.append(error.message)

    thread = threading.Thread(target=wait)
    thread.start()
    waiter.close()
    thread.join(10)
    assert raised == ["the pool was closed while it waited for a GPU"]


def test_the_directory_of_leases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_directory() == tmp_path / "moe-fuzz" / "gpus"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert default_directory() == tmp_path / f"moe-fuzz-{os.getuid()}" / "gpus"
    with pytest.raises(EnvironmentProblem, match="no GPU"):
        Leases([], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="cannot be made"):
        Leases(CARDS, tmp_path / "file")


# ---- what a worker sees of it ---------------------------------------------------------------------------------------


def case(do: str) -> Case:
    return Case("toy", {"do": do}, (Step(Labels.range(1)),), 0)


def surroundings(worker, own: str = "torch") -> list[str]:
    options = RunOptions(deadline=20.0, fence=FenceOptions(own=own))
    return worker.run([case("variables")], "toy@here", options)[0].detail.split()


def test_a_worker_gets_its_gpu_before_its_runner_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a fake GPU: the runner of these tests touches none."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Pool(3, "cuda", runner=RUNNER, gpus=[small("GPU-a", 2), small("GPU-b", 1)]) as pool:
        with pool.lease() as one, pool.lease() as two, pool.lease() as three, pool.fresh() as four:
            seen = [surroundings(worker)[0] for worker in (one, two, three, four)]
            assert seen[:3] == ["GPU-a", "GPU-b", "GPU-a"]
            assert seen[3] in ("GPU-a", "GPU-b")
            one.restart()
            assert surroundings(one)[0] == "GPU-a"  # the place keeps its slot
        with pool.fresh({"CUDA_LAUNCH_BLOCKING": "1"}) as blocking, pool.fresh() as plain:
            assert surroundings(blocking)[1:] == ["1", "-"]
            assert surroundings(plain)[1:] == ["-", "-"]
            pid = plain.pid
            assert surroundings(plain, "all")[1:] == ["-", "all"]  # another allocator needs another process
            assert plain.pid != pid
            pid = plain.pid
            plain.describe("toy@here", 20.0)
            assert plain.pid == pid  # to describe, any will do
            assert surroundings(plain, "off")[1:] == ["-", "-"]


def test_a_pool_that_rests_leaves_its_place_to_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    card = [small("GPU-a", 1)]
    with Pool(1, "cuda", runner=RUNNER, gpus=card) as pool:
        for _ in range(2):
            with pool.lease() as worker:
                assert surroundings(worker)[0] == "GPU-a"
                pid = worker.pid
                pool.rest()  # not those that are leased
                assert worker.pid == pid
            pool.rest()
            assert worker.pid is None
            with Pool(1, "cuda", runner=RUNNER, gpus=card) as other, other.lease() as second:
                assert surroundings(second)[0] == "GPU-a"
        assert pool.stats.to_json()["zygotes"] == 1


def test_a_pool_beside_another_shares_its_slots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The one slot there is, is taken: a pool of its own would wait for it, and in vain."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Pool(1, "cuda", runner=RUNNER, gpus=[small("GPU-a", 1)]) as pool, pool.lease() as one:
        assert surroundings(one)[0] == "GPU-a"
        with Pool(1, "cuda", runner=RUNNER, beside=pool) as other, other.lease() as two:
            assert surroundings(two)[0] == "GPU-a"
        assert surroundings(one)[0] == "GPU-a"  # the other one's end took nothing away
        with pool.fresh() as three:
            assert surroundings(three)[0] == "GPU-a"
