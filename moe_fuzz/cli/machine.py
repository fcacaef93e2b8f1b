"""What the machine has, found without torch and without touching CUDA."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PROC = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int | None = None  # bytes; None where only the kernel driver could be asked


@cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs this process may use: what NVML or the driver sees, as far as CUDA_VISIBLE_DEVICES leaves it."""
    found = _by_nvml()
    if found is None:
        found = _by_proc()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    named = [part for part in visible.split(",") if part.strip()]
    if "-1" in named:  # CUDA takes the list up to the first invalid entry
        named = named[: named.index("-1")]
    return found[: len(named)]


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
        return tuple(
            Gpu(_text(pynvml.nvmlDeviceGetName(handle)), int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
            for handle in handles
        )
    finally:
        pynvml.nvmlShutdown()


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _by_proc() -> tuple[Gpu, ...]:
    found = []
    for file in sorted(_PROC.glob("*/information")):
        text = file.read_text(encoding="utf-8")
        model = re.search(r"^Model:\s*(.+)$", text, re.MULTILINE)
        minor = re.search(r"^Device Minor:\s*(\d+)", text, re.MULTILINE)
        if minor and not Path(f"/dev/nvidia{minor[1]}").exists():
            continue  # the host's, not given to this container
        found.append(Gpu(model[1].strip() if model else "unknown model"))
    return tuple(found)


def memory_available() -> int | None:
    """Bytes that new processes can take without swapping; None where the kernel does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def free_space(path: Path) -> int:
    """Bytes free where `path` is, or would be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def human(size: float) -> str:
    """`3.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
