"""The clock of a case: what compiles and loads does not count, what spins does. And who is told of compilers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_fuzz.execute import clock
from moe_fuzz.worker.clock import CaseClock, Reading


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    at = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: at[0])
    return at


def test_each_kind_of_time_has_its_allowance(now: list[float]) -> None:
    case = CaseClock(own=3.0, still=60.0)
    now[0] += 1
    case.stand("compile")
    assert (case.until, case.limit, case.still) == (now[0] + 60, 60.0, "compile")
    now[0] += 50
    case.stand("")
    assert (case.until, case.limit, case.expired) == (now[0] + 2, 3.0, False)
    case.stand("compile")
    assert case.until == now[0] + 10
    case.stand("")
    now[0] += 2
    assert case.expired
    assert case.seconds == 53
    case.restart()
    assert (case.until, case.expired) == (now[0] + 3, False)


def test_a_process_that_reads_is_not_hanging_yet(now: list[float]) -> None:
    case = CaseClock(own=3.0, still=10.0)
    for _ in range(39):
        now[0] += 0.25
        case.look(reads=True)
        assert not case.expired
    now[0] += 0.25
    case.look(reads=True)
    assert case.expired


def test_a_kernel_that_goes_on_is_slow_and_one_that_stays_hangs(now: list[float]) -> None:
    case = CaseClock(own=3.0, still=60.0)
    for _ in range(2):
        now[0] += 2.5
        case.look(reads=False)
        case.go_on()
        assert (case.expired, case.slow, case.still, case.limit) == (False, False, "", 3.0)
    now[0] += 3
    case.look(reads=False)
    assert (case.expired, case.slow, case.still) == (True, False, "")  # it has stayed in a program
    case.restart()
    for _ in range(3):
        now[0] += 2
        case.go_on()
    assert (case.expired, case.slow, case.still, case.limit) == (False, True, "interpret", 6.0)
    case.restart()
    assert not case.slow
    case.stand("compile")
    now[0] += 50
    case.go_on()  # a kernel that another thread runs meanwhile
    assert not case.slow


def test_reading_is_seen_from_outside() -> None:
    program = """if True:
        import sys
        for line in sys.stdin:
            if line == "read\\n":
                open(sys.executable, "rb").read(1 << 20)
            print(flush=True)
    """
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        reading = Reading(process.pid)
        answers = []
        for line in (b"start\n", b"idle\n", b"read\n", b"idle\n"):
            process.stdin.write(line)
            process.stdin.flush()
            process.stdout.readline()
            answers.append(reading.grew())
        process.stdin.close()
    assert answers == [False, False, True, False]
    assert not Reading(2**22 + 5).grew()


def test_blocks_nest_and_overlap_and_nothing_is_told_afterwards() -> None:
    told: list[dict[str, str]] = []
    inside, leave = threading.Event(), threading.Event()

    def beside() -> None:
        with clock.stopped("compile"):
            inside.set()
            leave.wait(10)

    with clock.heard(told.append):
        with clock.stopped("load"), clock.stopped("compile"):
            thread = threading.Thread(target=beside)
            thread.start()
            assert inside.wait(10)
        assert told == [{"still": "load"}]
    with clock.heard(told.append):  # the thread compiles from one case into the next
        assert told[1:] == [{"still": "compile"}]
    leave.set()
    thread.join(10)
    with clock.stopped("load"):
        assert len(told) == 2
    with clock.heard(told.append), pytest.raises(ZeroDivisionError), clock.stopped("load"):
        raise ZeroDivisionError
    assert told[2:] == [{"still": "load"}, {"goes": "load"}]


def test_the_time_of_our_own_judgement_is_not_the_targets() -> None:
    told: list[dict[str, str]] = []
    stood = clock.stood()
    with clock.heard(told.append):
        with clock.calling():  # nobody judges: the clock goes anyway
            pass
        assert told == []
        with clock.judging():
            with clock.calling():
                assert told == [{"still": "judge"}, {"goes": "judge"}]
                with clock.calling(), clock.stopped("compile"):  # a call within a call
                    pass
                assert told[2:] == [{"still": "compile"}, {"goes": "compile"}]
            assert told[4:] == [{"still": "judge"}]
            time.sleep(0.01)
        assert told[5:] == [{"goes": "judge"}]
        told.clear()
        with clock.stopped("compile"), clock.judging(), clock.calling():  # what compiles unseen goes on to
            pass
        again = {"still": "judge"}, {"still": "compile"}  # and is not to blame for what we do meanwhile
        assert told == [{"still": "compile"}, *again, *again, {"goes": "compile"}]
        told.clear()
        with clock.judging():
            with clock.judging():
                pass
            with clock.calling():
                assert told == [{"still": "judge"}, {"goes": "judge"}]
    assert clock.stood() - stood < 0.01, "what is judged is not compiled"


def test_whoever_compiles_beside_our_judgement_does_not_stop_the_clock_of_a_call() -> None:
    told: list[dict[str, str]] = []
    begin, inside, leave = threading.Event(), threading.Event(), threading.Event()

    def beside() -> None:
        begin.wait(10)
        with clock.stopped("compile"):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=beside)
    thread.start()
    with clock.heard(told.append), clock.judging():
        begin.set()
        assert inside.wait(10)
        assert told == [{"still": "judge"}]
        with clock.calling():  # a hang of this call is one of compiling, and no judgement that takes too long
            assert told[1:] == [{"still": "compile"}]
            leave.set()
            thread.join(10)
            assert told[2:] == [{"goes": "compile"}]
    assert told[3:] == [{"still": "judge"}, {"goes": "judge"}]


HOOKS = """
import contextlib, subprocess, threading, torch, triton
from moe_fuzz.execute import clock
from moe_fuzz.execute.compiling import watch_compilers, watch_dynamo
watch_compilers()
watch_compilers()
told = []

def heard(what):
    told.clear()
    what()
    assert told[::2] == [{"still": "compile"}] * (len(told) // 2), told
    assert told[1::2] == [{"goes": "compile"}] * (len(told) // 2), told
    print(bool(told), end=" ")

def beside():
    thread = threading.Thread(target=lambda: subprocess.run(["true"], check=True))
    thread.start()
    thread.join()

def compile_nonsense():
    with contextlib.suppress(Exception):
        triton.compiler.compile(None)

def ask_for_handles(module):
    kernel = object.__new__(triton.compiler.compiler.CompiledKernel)
    kernel.module = module
    with contextlib.suppress(Exception):  # there is no device to load it to
        kernel._init_handles()

with clock.heard(told.append):
    heard(lambda: ask_for_handles(None))
    heard(lambda: ask_for_handles(1))  # as at every launch but the first
    heard(lambda: subprocess.run(["true"], check=True))
    heard(beside)
    heard(compile_nonsense)
    compiled = torch.compile(lambda x: x + 1, backend=lambda graph, inputs: graph.forward)
    watch_dynamo()
    heard(lambda: compiled(torch.ones(3)))
    heard(lambda: compiled(torch.ones(3)))
"""


def test_who_compiles_is_heard() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", HOOKS], capture_output=True, text=True, check=False,
                          env={**os.environ, "TRITON_INTERPRET": "1"})  # fmt: skip
    assert done.stdout.split() == ["True", "False", "True", "False", "True", "True", "False"], done.stderr


KERNEL = """
import triton
from moe_fuzz.execute.compiling import watch_compilers
watch_compilers()

@triton.jit
def kernel(x):
    pass

class Driver:
    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
kernel.create_binder()
mark = "__moe_fuzz_clock__"
print(hasattr(kernel.compile, mark), hasattr(triton.compiler.CompiledKernel._init_handles, mark))
"""


def test_a_kernel_takes_the_compiler_from_where_the_hook_stands(tmp_path: Path) -> None:
    file = tmp_path / "kernel.py"
    file.write_text(KERNEL)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-P", str(file)], capture_output=True, text=True, check=False,
                          env=environment)  # fmt: skip
    assert done.stdout.split() == ["True", "True"], done.stderr
