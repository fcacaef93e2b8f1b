from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_fuzz.cli import doctor, machine, probes
from moe_fuzz.cli.doctor import FAIL, OK, WARN
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.worker.gpus import MAX_SLOTS

GOOD = {"python": "3.11.7", "torch": "2.13.0", "triton": "3.7.1", "numpy": "2.4.6", "cuda_build": "13.0"}


def states(lines: object) -> list[str]:
    return [line.state for line in lines]  # type: ignore[attr-defined]


def test_versions() -> None:
    assert states(doctor.judge_versions(GOOD, "")) == [OK, OK, OK]
    assert states(doctor.judge_versions({}, "no answer")) == [FAIL]
    broken = {key: value for key, value in GOOD.items() if key != "triton"} | {"triton_error": "ImportError: x"}
    assert states(doctor.judge_versions(broken, "")) == [OK, FAIL, OK]


@pytest.mark.parametrize(
    ("triton", "numpy", "trapped"),
    [("3.6.0", "2.4.0", True), ("3.6.0+git", "2.10.1", True), ("3.6.0", "2.3.5", False), ("3.7.0", "2.4.0", False),
     ("3.10.0", "2.4.0", False)],
)  # fmt: skip
def test_the_trap_of_triton_and_numpy(triton: str, numpy: str, trapped: bool) -> None:
    lines = list(doctor.judge_versions(GOOD | {"triton": triton, "numpy": numpy}, ""))
    assert (lines[-1].state == FAIL) == trapped
    assert not trapped or "numpy<2.4" in lines[-1].hint
    lines = list(doctor.judge_versions(GOOD | {"triton": triton, "numpy": numpy, "gpus": ["H200"]}, ""))
    assert (lines[-1].state == WARN) == trapped  # nothing is interpreted there, unless asked for


def test_gpu() -> None:
    card = (machine.Gpu("H200", 140 << 30),)
    (line,) = doctor.judge_gpu(card, GOOD | {"gpus": ["H200"]}, "580.95.05")
    assert (line.state, line.text) == (OK, "1: H200, 140.0 GiB, driver 580.95.05")
    (line,) = doctor.judge_gpu(card, GOOD | {"gpus": ["H200"]}, "")
    assert line.text == "1: H200, 140.0 GiB"
    (line,) = doctor.judge_gpu(card, GOOD | {"cuda_build": None}, "")
    assert (line.state, "built without CUDA" in line.text) == (WARN, True)
    (line,) = doctor.judge_gpu((), GOOD, "")
    assert line.state == WARN


def test_workers() -> None:
    assert doctor.judge_workers(4, "cpu", None, 64 << 30).state == OK
    line = doctor.judge_workers(4, "cpu", None, 2 << 30)
    assert (line.state, line.hint) == (WARN, "--workers 2")


def test_fence() -> None:
    assert doctor.judge_fence(probes.Answer(said="SIGSEGV")).state == OK
    assert doctor.judge_fence(probes.Answer(problem="survived")).state == FAIL


def test_slots() -> None:
    full, busy = machine.Gpu("a", 140 << 30, 139 << 30), machine.Gpu("b", 140 << 30, 13 << 30)
    unknown = machine.Gpu("c")
    lines = list(doctor.judge_slots((full, busy, unknown)))
    assert states(lines) == [OK, WARN, WARN]
    assert f"room for {MAX_SLOTS} of {MAX_SLOTS} workers" in lines[0].text
    assert f"room for 2 of {MAX_SLOTS} workers, 13.0 GiB free" in lines[1].text
    assert "nvidia-ml-py" in lines[2].hint


def test_cuda() -> None:
    good, bad = probes.Answer(said="illegal-access"), probes.Answer(problem="nothing happened")
    assert states(doctor.judge_cuda(good, good, good, "/usr/bin/compute-sanitizer")) == [OK] * 4
    assert states(doctor.judge_cuda(bad, bad, bad, None)) == [FAIL, FAIL, WARN, WARN]


@pytest.mark.parametrize(
    ("program", "triton", "fence"),
    [
        ("print('compiled inside lost illegal-access')", "", ""),
        ("print('compiled inside outside')", "", "nothing happened"),
        ("print('compiled'); raise RuntimeError('not supported')", "", "before it had read inside"),
        ("import os; print('compiled inside', flush=True); os.abort()", "", "SIGABRT, after"),
        ("raise ImportError('no torch')", "no torch", "not tried"),
        ("import time; time.sleep(60)", "no answer", "no answer"),
    ],
)  # fmt: skip
def test_the_probe_of_a_gpu(monkeypatch: pytest.MonkeyPatch, program: str, triton: str, fence: str) -> None:
    monkeypatch.setattr(probes, "_CUDA", program.replace("{", "{{").replace("}", "}}"))
    monkeypatch.setattr(probes, "_ALLOCATOR", program)
    seconds = 0.5 if "sleep" in program else 60.0
    compiled, fenced = probes.cuda(timeout=seconds)
    assert triton in compiled.problem
    assert bool(triton) == bool(compiled.problem)
    assert fence in fenced.problem
    assert bool(fence) == bool(fenced.problem)
    assert probes.allocator(timeout=seconds).problem


def test_the_probe_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_ALLOCATOR", "print('sum 3.0 True')")
    assert probes.allocator().said == "replaced"


def test_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.judge_state(tmp_path / "new" / "er").state == OK
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    assert doctor.judge_state(tmp_path / "file").state == FAIL
    monkeypatch.setattr(machine, "free_space", lambda path: 1 << 20)
    assert doctor.judge_state(tmp_path).state == WARN


def test_targets() -> None:
    def describe(name: str) -> object:
        if name == "a@b":
            raise EnvironmentProblem("not installed", "pip install b")
        return type("Info", (), {"origin": "here"})()

    lines = list(doctor.judge_targets(["a@b", "c@d"], describe))
    assert [(line.state, line.hint) for line in lines] == [(WARN, "pip install b"), (OK, "")]
    assert states(doctor.judge_targets(["a@b"], describe)) == [WARN, FAIL]


def test_the_guard_page_of_this_machine() -> None:
    assert probes.guard().said == "SIGSEGV"


def test_the_versions_of_this_machine() -> None:
    found, problem = probes.versions()
    assert not problem
    assert {"python", "torch", "triton", "numpy"} <= set(found)


@pytest.mark.parametrize("python", ["/no/such/python", "/bin/false"])
def test_an_interpreter_that_is_none(python: str) -> None:
    assert probes.versions(python)[1]
    assert probes.guard(python).problem


def test_the_exit_code(call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "versions", lambda: (GOOD, ""))
    monkeypatch.setattr(probes, "guard", lambda: probes.Answer(said="SIGSEGV"))
    monkeypatch.setattr(doctor, "_targets", lambda device: iter([doctor.Line(OK, "target", "x")]))
    assert call("doctor", "--device", "cpu").code == 0
    monkeypatch.setattr(probes, "backends", lambda: probes.Answer(said="experts_nvfp4: backend large from 1"))
    monkeypatch.setattr(probes, "guard", lambda: probes.Answer(problem="survived"))
    ran = call("doctor", "--device", "cpu")
    assert ran.code == 3
    assert "FAIL  fence       survived" in ran.out


def test_a_broken_configuration_is_a_line(call: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probes, "versions", lambda: (GOOD, ""))
    monkeypatch.setattr(doctor, "_targets", lambda device: iter(()))
    (tmp_path / "pyproject.toml").write_text("[tool.moe-fuzz]\ntimme = 3\n")
    ran = call("doctor")
    assert ran.code == 3
    assert "did you mean time?" in ran.out


def test_the_rule_of_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_FUZZ_EXPERTS_NVFP4_BACKEND", raising=False)
    line = doctor.judge_backends(probes.backends())
    assert line.state == OK
    assert line.text.startswith("experts_nvfp4: backend large from ")
    monkeypatch.setenv("MOE_FUZZ_EXPERTS_NVFP4_BACKEND", "cutlass")
    line = doctor.judge_backends(probes.backends())
    assert line.state == FAIL
    assert "forced by MOE_FUZZ_EXPERTS_NVFP4_BACKEND, which does not exist: small, large, scaled do" in line.text
    monkeypatch.setenv("MOE_FUZZ_EXPERTS_NVFP4_BACKEND", "scaled")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    line = doctor.judge_backends(probes.backends())
    assert (line.state, line.text.rpartition(", ")[2]) == (FAIL, "which needs sm_100")
    assert doctor.judge_backends(probes.backends(python="/nowhere")).state == FAIL
