"""Starts a program once for each rank, one GPU a process, and ends all of them together. Free of torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import moe_fuzz
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.worker.gpus import gpus
from moe_fuzz.worker.leases import default_directory
from moe_fuzz.worker.turns import turn

_PROGRAM = """
import importlib, sys
sys.path.insert(0, {root!r})
sys.exit(importlib.import_module({module!r}).main(sys.argv[1:]))
"""


def run_ranks(program: str | Path, world: int, arguments: Sequence[str], seconds: float) -> str:
    """What rank 0 wrote to its standard output. Raises EnvironmentProblem where a rank failed or time ran out: no rank
    outlives the others.

    program: a module with `main(arguments) -> exit code`, or a file. It finds RANK, WORLD_SIZE and INIT_METHOD (of
    torch.distributed) in its environment; NVLink multicast is switched off there.

    Each rank takes one of the first `world` GPUs; the time runs from where no worker is busy there, nor will be.
    """
    root = str(Path(moe_fuzz.__file__).parents[1])
    what = [str(program)] if isinstance(program, Path) else ["-c", _PROGRAM.format(root=root, module=program)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"WORLD_SIZE": str(world), "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0",
                    "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}  # fmt: skip
    alone = turn(default_directory(), [gpu.uuid for gpu in gpus()[:world]])
    with alone, tempfile.TemporaryDirectory(prefix="moe-fuzz-ranks-") as folder:
        meeting, outputs = Path(folder) / "store", [Path(folder) / f"out{rank}" for rank in range(world)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(world):
                with outputs[rank].open("wb") as out:
                    processes.append(subprocess.Popen(
                        [sys.executable, "-P", *what, *arguments], stdout=out, start_new_session=True,
                        env=environment | {"RANK": str(rank), "INIT_METHOD": f"file://{meeting}"},
                    ))  # fmt: skip
            _wait(processes, seconds)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return outputs[0].read_text()


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                raise EnvironmentProblem(f"rank {rank} of {len(codes)} ended with {code}", "its messages are above")
        if None not in codes:
            return
        if time.monotonic() > end:
            late = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
            raise EnvironmentProblem(f"ranks {late} of {len(codes)} were still busy after {seconds:g} s",
                                     "one of them hangs: NCCL_DEBUG=INFO tells more")  # fmt: skip
        time.sleep(0.02)
