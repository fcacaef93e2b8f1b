"""What the machine has, found without torch and without touching CUDA."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from moe_fuzz.worker.gpus import Gpu, driver_version, gpus

__all__ = ["Gpu", "architecture", "driver_version", "free_space", "gpus", "human", "memory_available"]


def memory_available() -> int | None:
    """Bytes that new processes can take without swapping; None where the kernel does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def architecture(device: str) -> str:
    """`cpu`, or of the first GPU what its compute capability is called, `sm90`; empty where nobody can be asked."""
    if device == "cpu":
        return "cpu"
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30.0, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.match(r"\s*(\d+)\.(\d+)", done.stdout)
    return f"sm{found[1]}{found[2]}" if found else ""


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
