"""Which way is taken at which size, as data: {world, arch, links} -> caps in bytes of one rank's [T, H].

`moe-fuzz bench allreduce_rmsnorm --calibrate` measures a table for the machine at hand; MOE_FUZZ_ALLREDUCE_TABLE names
such a file, and its entries go before these. Free of torch.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BACKENDS = ("one_shot", "two_shot")
TABLE_VARIABLE = "MOE_FUZZ_ALLREDUCE_TABLE"
#: Stands for no cap.
ALWAYS = 1 << 40


@dataclass(frozen=True)
class Caps:
    """What is fastest up to how many bytes, inclusive."""

    one_shot: int  # above it, two shots
    #: An all-reduce of its own, then the norm, is faster above these bytes: by the all-reduce that is active. What
    #: matters is the fast one: with NVLink multicast, 256 KiB at eight ranks instead of 512 (vllm#44079).
    fused: Mapping[str, int] = field(default_factory=dict)
    source: str = ""  # where the figures are from


Key = tuple[int, str, str]  # world, arch, links

CAPS: Mapping[Key, Caps] = {
    # At two ranks both ways send as many bytes, and one shot waits once.
    (2, "sm90", "nvlink"): Caps(ALWAYS, {"nccl": ALWAYS, "symm_mem": ALWAYS, "multimem": 64 << 20},
                                "measured up to 8 MB on 2 x NVIDIA H200, 2026-11-21; multimem: vLLM's cap of 64 MB"),
    # One cap for all sizes of rows is a compromise: two shots win from 768 KB on at H 2048, not below 1 MB at 7168.
    (4, "sm90", "nvlink"): Caps(1022 << 10, {"nccl": ALWAYS, "symm_mem": 770 << 10, "multimem": 2 << 20},
                                "measured on 4 x NVIDIA H200, 2026-11-21; multimem: vLLM's cap of 2 MB"),
    (8, "sm90", "nvlink"): Caps(256 << 10, {"nccl": ALWAYS, "symm_mem": ALWAYS, "multimem": 256 << 10},
                                "one_shot: vLLM's custom all-reduce at eight ranks; fused: measured in vllm#44079"),
}  # fmt: skip


def caps_of(world: int, arch: str, links: str) -> Caps:
    """The measured table's entry, else the one here, else what the bytes say: a second wait costs about as much as
    sending 512 KiB."""
    found = _measured(os.environ.get(TABLE_VARIABLE, "")).get((world, arch, links)) or CAPS.get((world, arch, links))
    if found is not None:
        return found
    return Caps(ALWAYS if world <= 2 else (1 << 20) // (world - 2), source="nothing measured: by the bytes sent")


def choose(world: int, arch: str, links: str, message: int) -> str:
    """One of BACKENDS, for a message of so many bytes."""
    return "one_shot" if world == 1 or message <= caps_of(world, arch, links).one_shot else "two_shot"


def fuses(world: int, arch: str, links: str, message: int, unfused: str) -> bool:
    """Whether the fused call is the faster one where `unfused` is the active all-reduce: "nccl", "symm_mem",
    "multimem" or another that was measured. Without a figure: yes, up to any size.

    A multimem all-reduce is never taken here: it is what a caller may have, who then says so.
    """
    return message <= caps_of(world, arch, links).fused.get(unfused, ALWAYS)


def to_json(table: Mapping[Key, Caps]) -> str:
    entries = [{"world": w, "arch": a, "links": n, **asdict(caps)} for (w, a, n), caps in sorted(table.items())]
    return json.dumps({"entries": entries}, indent=1) + "\n"


def from_json(text: str) -> dict[Key, Caps]:
    """ValueError for what is no table."""
    try:
        entries: list[dict[str, Any]] = json.loads(text)["entries"]
        return {
            (int(e["world"]), str(e["arch"]), str(e["links"])): Caps(
                int(e["one_shot"]), {str(k): int(v) for k, v in e["fused"].items()}, str(e.get("source", "")))
            for e in entries
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise ValueError(f"not a dispatch table: {problem!r}. `moe-fuzz bench allreduce_rmsnorm --calibrate` writes "
                         "one") from problem  # fmt: skip


@functools.cache
def _measured(path: str) -> Mapping[Key, Caps]:
    return from_json(Path(path).read_text()) if path else {}
