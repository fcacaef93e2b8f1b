"""The GPUs of this machine, found without torch and without a CUDA context, and how many workers fit on one.

Asked in this order: NVML (the package nvidia-ml-py, extra `gpu`), `nvidia-smi`, and the driver's files in /proc and
/dev, which know of no memory. The same numbers decide how many workers a campaign has, how many processes `pytest -n
auto` starts, and which slots there are to be leased (leases.py).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: Device memory that a worker is given to live on: a context, fences in use and idle, what the target allocates.
SLOT_BYTES = 6 << 30
#: A GPU. Among several processes each wait for the device costs a switch of contexts, 140 us on an H200 whatever was
#: launched before it, and so they share 7,000 waits a second: 1 worker ran 188 cases/s, 8 ran 751, 16 ran 849.
MAX_SLOTS = 8
_SHARE = 0.9  # of the memory of a GPU goes to workers; the rest is the driver's, and what contexts cost

_PROC = Path("/proc/driver/nvidia/gpus")
_DRIVER = Path("/proc/driver/nvidia/version")
_DEV = Path("/dev")
_SMI_SECONDS = 30.0


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int | None = None  # bytes; None where only the kernel driver could be asked
    free: int | None = None  # bytes, when it was asked
    uuid: str = ""  # as CUDA_VISIBLE_DEVICES takes it; an index where there is nothing better

    @property
    def slots(self) -> int:
        """How many workers the GPU has room for while nobody uses it: the same number for every process that asks."""
        return 1 if self.memory is None else max(1, min(MAX_SLOTS, self.memory // SLOT_BYTES))

    @property
    def room(self) -> int:
        """How many of its slots the memory that is free now is enough for."""
        return self.slots if self.free is None else max(1, min(self.slots, self.free // SLOT_BYTES))

    @property
    def budget(self) -> int | None:
        """Bytes of device memory for the worker in one slot; None where the memory is not known."""
        return None if self.memory is None else int(self.memory * _SHARE) // self.slots


@cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that this process may use, in the order of CUDA_VISIBLE_DEVICES."""
    return visible(find(), os.environ)


def find() -> tuple[Gpu, ...]:
    """All GPUs of the machine, in the order of PCI_BUS_ID."""
    for ask in (_by_nvml, _by_smi):
        found = ask()
        if found is not None:
            return found
    return _by_files()


def visible(found: Sequence[Gpu], environment: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES names: by index, or by a uuid or the beginning of one. As CUDA does, it ends at
    the first entry that names nothing."""
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return tuple(found)
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.startswith("MIG-") and found:
            gpu: Gpu | None = Gpu(f"a part of {found[0].name}", uuid=entry)
        elif entry.startswith("GPU-"):
            gpu = next((g for g in found if g.uuid.startswith(entry)), None)
            if gpu is None and len(chosen) < len(found) and not any(g.uuid.startswith("GPU-") for g in found):
                gpu = Gpu(found[len(chosen)].name, uuid=entry)  # uuids are not known here: believe it
        else:
            gpu = found[int(entry)] if entry.isdecimal() and int(entry) < len(found) else None
        if gpu is None or gpu in chosen:
            break
        chosen.append(gpu)
    return tuple(chosen)


def default_workers(found: Sequence[Gpu]) -> int:
    """One a slot that there is room for, and no more than cores: each keeps one busy."""
    return max(1, min(len(os.sched_getaffinity(0)), sum(gpu.room for gpu in found)))


def driver_version() -> str:
    """The version of the driver in the kernel, as `580.95.05`; empty where it does not say."""
    try:
        text = _DRIVER.read_text(encoding="utf-8")
    except OSError:
        return ""
    said = re.search(r"\b\d+\.\d+[.\d]*\b", text)
    return said[0] if said else ""


def _by_nvml() -> tuple[Gpu, ...] | None:
    """None where nvidia-ml-py is not installed or finds no driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        memory = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        return tuple(
            Gpu(_text(pynvml.nvmlDeviceGetName(h)), int(m.total), int(m.free), _text(pynvml.nvmlDeviceGetUUID(h)))
            for h, m in zip(handles, memory, strict=True)
        )
    except pynvml.NVMLError:  # such as where a device does not tell of its memory
        return None
    finally:
        pynvml.nvmlShutdown()


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _by_smi() -> tuple[Gpu, ...] | None:
    """None where there is no `nvidia-smi`, or it fails."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,uuid", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    if not all(len(row) == 4 for row in rows):
        return None
    return tuple(Gpu(name, _mib(total), _mib(free), uuid) for name, total, free, uuid in rows)


def _mib(text: str) -> int | None:
    return int(text) << 20 if text.isdecimal() else None  # `[N/A]` on a GPU that shares the host's memory


def _by_files() -> tuple[Gpu, ...]:
    found: list[Gpu] = []
    for file in sorted(_PROC.glob("*/information")):
        text = file.read_text(encoding="utf-8")
        model = re.search(r"^Model:\s*(.+)$", text, re.MULTILINE)
        minor = re.search(r"^Device Minor:\s*(\d+)", text, re.MULTILINE)
        uuid = re.search(r"^GPU UUID:\s*(GPU-[0-9a-f-]+)\s*$", text, re.MULTILINE)
        if minor and not (_DEV / f"nvidia{minor[1]}").exists():
            continue  # the host's, not given to this container
        name = model[1].strip() if model else "unknown model"
        found.append(Gpu(name, uuid=uuid[1] if uuid else str(len(found))))
    if found:
        return tuple(found)
    present = sorted(_DEV.glob("nvidia[0-9]*"))
    return tuple(Gpu("unknown model", uuid=str(number)) for number in range(len(present)))
