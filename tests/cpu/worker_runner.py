"""A runner whose cases misbehave on command: `config["do"]` says how. Loaded by the worker, never by the tests."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import EnvironmentProblem, UsageError
from moe_fuzz.execute import clock, compiling
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import CRASH, OOM, PASS, VIOLATION, Verdict, Violation


class Runner:
    def __init__(self, device: str) -> None:
        self.device = device
        self.ran = 0

    def describe(self, target: str) -> TargetInfo:
        if target == "toy@absent":
            raise EnvironmentProblem("not installed", "pip install it")
        if target == "toy@nonsense":
            raise UsageError("no such thing", "did you mean toy@here?")
        if target == "toy@deadly":
            ctypes.string_at(0)
        if target == "toy@slow":
            time.sleep(60)
        return TargetInfo(target, "toy", "here", origin=f"{self.device} {os.environ.get('TRITON_INTERPRET')}")

    def exhibit(self, case: Case, target: str) -> dict[str, Any]:
        return {"seed": case.seed}

    def run(self, case: Case, target: str, options: RunOptions) -> Verdict:
        self.ran += 1
        said = getattr(self, "do_" + str(case.config["do"]))(case)
        if said is not None:
            return Verdict(PASS, detail=said)
        if case.config["do"] == "violation":
            return Verdict(VIOLATION, (Violation("ids", "duplicate", "twice"),))
        if case.config["do"] == "told_oom":
            return Verdict(OOM, detail="said so")
        if case.config["do"] == "told_spent":
            return Verdict(VIOLATION, (Violation("capture", "RuntimeError", "not while capturing"),), spent=True)
        if case.config["do"] == "told_crash":
            return Verdict(CRASH, (Violation("crash", "illegal-access", "the context is lost"),))
        return Verdict(PASS, detail=f"{os.getpid()} {self.ran} {torch.get_num_threads()}", budget=float(case.seed))

    def do_pass(self, case: Case) -> None: ...
    def do_violation(self, case: Case) -> None: ...
    def do_told_oom(self, case: Case) -> None: ...
    def do_told_spent(self, case: Case) -> None: ...
    def do_told_crash(self, case: Case) -> None: ...

    def do_segfault(self, case: Case) -> None:
        ctypes.string_at(0)

    def do_fork_and_go_on(self, case: Case) -> None:
        os.fork()  # both give verdicts from now on

    def do_abort(self, case: Case) -> None:
        os.abort()

    def do_spin(self, case: Case) -> None:
        while True:
            pass

    def do_compile(self, case: Case) -> None:
        """As a first call does: host code, a compiler and what it calls, another on a thread beside, host code."""
        time.sleep(0.1)
        with clock.stopped("compile"), clock.stopped("load"):
            thread = threading.Thread(target=self._compile_beside)
            thread.start()
            time.sleep(0.5)
        thread.join()
        time.sleep(0.1)

    def _compile_beside(self) -> None:
        with clock.stopped("compile"):
            time.sleep(0.8)

    def do_compile_for_ever(self, case: Case) -> None:
        with clock.stopped("compile"):
            time.sleep(60)

    def do_judge_for_ever(self, case: Case) -> None:
        with clock.judging():
            time.sleep(60)

    def do_judge_for_ever_the_first_of_a_config(self, case: Case) -> None:
        with clock.stopped("compile"), clock.judging():
            time.sleep(60)

    def do_spin_when_called_by_the_judge(self, case: Case) -> None:
        with clock.judging():
            time.sleep(0.6)
            with clock.calling():
                while True:
                    pass

    def do_spin_after_compiling(self, case: Case) -> None:
        with clock.stopped("compile"):
            time.sleep(0.6)
        while True:
            pass

    def do_die_compiling(self, case: Case) -> None:
        with clock.stopped("compile"):
            time.sleep(0.6)
            ctypes.string_at(0)

    def do_load(self, case: Case) -> None:
        """As an import or a library does that no hook of ours sees: a second of reading, and thinking in between."""
        with open(torch.__path__[0] + "/version.py", "rb", buffering=0) as file:
            for _ in range(30):
                file.seek(0)
                while file.read(1 << 16):
                    pass
                with open(ctypes.__file__, "rb") as other:
                    other.read()
                time.sleep(0.05)

    def do_wait_for_a_compiler(self, case: Case) -> None:
        compiling.watch_compilers()
        subprocess.run(["sleep", "1.2"], check=True)

    def do_hold_the_gil(self, case: Case) -> None:
        re.match(r"(a+)+$", "a" * 40 + "b")

    def do_hog(self, case: Case) -> None:
        held = []
        while True:
            held.append(torch.ones(64 << 20, dtype=torch.uint8))

    def do_hog_in_c(self, case: Case) -> None:
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        while True:
            address = libc.malloc(ctypes.c_size_t(64 << 20))
            ctypes.memset(address, 1, 64 << 20)  # a null pointer, when there is no more

    def do_exit(self, case: Case) -> None:
        os._exit(case.seed)

    def do_sys_exit(self, case: Case) -> None:
        sys.exit(5)

    def do_killed(self, case: Case) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def do_raise(self, case: Case) -> None:
        raise RuntimeError("a fault of the harness")

    def do_chatter(self, case: Case) -> None:
        print("x" * (3 << 20))
        os.write(1, b'{"verdict": 0}\n' * 1000)
        os.write(2, bytes(range(256)) * 100)

    def do_close_stdout(self, case: Case) -> None:
        os.close(1)
        sys.stdout.close()

    def do_grandchild(self, case: Case) -> None:
        subprocess.Popen(["sleep", "300"])
        ctypes.string_at(0)

    def do_runaway_grandchild(self, case: Case) -> None:
        """Leaves a process in a session of its own, which holds the worker's socket open."""
        pid = os.fork()
        if pid == 0:
            os.setsid()
            time.sleep(300)
            os._exit(0)
        Path(str(case.config["marker"])).write_text(str(pid))
        time.sleep(0.05)
        os._exit(6)

    def do_kill_zygote(self, case: Case) -> None:
        """Kills the process it was forked from: each time, or once where a file is to remember it."""
        marker = Path(str(case.config["marker"])) if "marker" in case.config else None
        if marker is not None and marker.exists():
            return
        if marker is not None:
            marker.touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(300)

    def do_fault_with_own_handler(self, case: Case) -> None:
        faulthandler.enable()  # as serving libraries do: the traceback goes to stderr
        ctypes.string_at(0)

    def do_terminate(self, case: Case) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def do_bad_alloc(self, case: Case) -> None:
        os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
        os.abort()

    def do_abort_of_cuda(self, case: Case) -> None:
        os.write(2, b"terminate called: 'c10::AcceleratorError'\n  what():  CUDA error: misaligned address\n")
        os.abort()

    def do_write_to_socket(self, case: Case) -> None:
        os.write(_socket(), b"Hello, world!\n")

    def do_close_socket(self, case: Case) -> None:
        os.close(_socket())

    def do_flood(self, case: Case) -> None:
        while True:
            os.write(1, b"x" * (1 << 20))

    def do_surroundings(self, case: Case) -> str:
        return f"{os.getsid(0) == os.getpid()} {os.readlink('/proc/self/fd/0')} {len(os.listdir('/proc/self/fd'))}"

    def do_variables(self, case: Case) -> str:
        names = ("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "MOE_FUZZ_ALLOCATOR", "TOY_VARIABLE")
        return " ".join(os.environ.get(name, "-") for name in names[: 3 + ("toy_variable" in case.config)])

    def do_nap(self, case: Case) -> None:
        time.sleep(0.2)


def _socket() -> int:
    """The worker's socket, as a target finds it that uses descriptors it does not own."""
    for name in os.listdir("/proc/self/fd"):
        if os.path.islink(f"/proc/self/fd/{name}") and os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
            return int(name)
    raise AssertionError("a worker has a socket")
