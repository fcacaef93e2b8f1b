"""Which way is taken at which size, as data: {world, arch, links} -> caps in bytes of one rank's [T, H], and by the
width of its rows where that matters.

`moe-fuzz bench allreduce_rmsnorm --calibrate` measures a table for the machine at hand; MOE_FUZZ_ALLREDUCE_TABLE names
such a file, and its entries go before these. Free of torch.
"""

from __future__ import annotations

import functools
import json
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: "split" is two shots, too: several blocks share a row's columns, where there are fewer rows than multiprocessors.
BACKENDS = ("one_shot", "split", "two_shot")
TABLE_VARIABLE = "MOE_FUZZ_ALLREDUCE_TABLE"
#: Stands for no cap.
ALWAYS = 1 << 40
#: The bytes up to which, inclusive, the first of two ways is taken. Of several, which ascend: above the first the other
#: way is taken, above the second the first one again, and so on.
Bounds = int | tuple[int, ...]


@dataclass(frozen=True)
class Caps:
    """What is fastest up to how many bytes, inclusive."""

    one_shot: int  # above it, two shots
    #: An all-reduce of its own, then the norm, is faster above these bytes: by the all-reduce that is active. What
    #: matters is the fast one: with NVLink multicast, 256 KiB at eight ranks instead of 512 (vllm#44079).
    fused: Mapping[str, Bounds] = field(default_factory=dict)
    source: str = ""  # where the figures are from
    narrower: tuple[tuple[int, Caps], ...] = ()  # (bytes of a row, ascending; the caps for rows of up to so many)
    split: int = 0  # above one_shot and up to here, two shots of split rows

    def backend(self, message: int) -> str:
        """One of BACKENDS, for a message of so many bytes."""
        return "one_shot" if message <= self.one_shot else "split" if message <= self.split else "two_shot"

    def of(self, row: int | None) -> Caps:
        """Those for rows of so many bytes; None: for rows of any width."""
        return next((caps for width, caps in self.narrower if row is not None and row <= width), self)


Key = tuple[int, str, str]  # world, arch, links

CAPS: Mapping[Key, Caps] = {
    # At two ranks both ways send as many bytes, and one shot waits once.
    (2, "sm90", "nvlink"): Caps(ALWAYS, {"nccl": ALWAYS, "symm_mem": ALWAYS, "multimem": 64 << 20},
                                "measured up to 8 MB on 2 x NVIDIA H200, 2026-11-21; multimem: vLLM's cap of 64 MB"),
    # By the width of rows: two shots win from 768 KB on at H 2048, and not below 1 MB at 7168.
    (4, "sm90", "nvlink"): Caps(1022 << 10, {"nccl": ALWAYS, "symm_mem": 770 << 10, "multimem": 2 << 20},
                                "measured on 4 x NVIDIA H200, 2026-11-21; multimem: vLLM's cap of 2 MB",
                                ((5792, Caps(512 << 10, {"nccl": ALWAYS, "symm_mem": ALWAYS, "multimem": 2 << 20})),
                                 (10836, Caps(512 << 10, {"nccl": ALWAYS, "symm_mem": (512 << 10, 1 << 20),
                                                          "multimem": 2 << 20})))),
    (8, "sm90", "nvlink"): Caps(256 << 10, {"nccl": ALWAYS, "symm_mem": ALWAYS, "multimem": 256 << 10},
                                "one_shot: vLLM's custom all-reduce at eight ranks; fused: measured in vllm#44079"),
}  # fmt: skip


def caps_of(world: int, arch: str, links: str) -> Caps:
    """The measured table's entry, else the one here, else what the bytes say: a second wait costs about as much as
    sending 512 KiB."""
    found = _measured(os.environ.get(TABLE_VARIABLE, "")).get((world, arch, links)) or CAPS.get((world, arch, links))
    if found is not None:
        return found
    if arch == "cpu":  # an interpreter's, of small messages: nothing is fast, and all ways are to be run
        return Caps(1 << 10, source="so that all ways are taken", split=2 << 10)
    return Caps(ALWAYS if world <= 2 else (1 << 20) // (world - 2), source="nothing measured: by the bytes sent")


def choose(world: int, arch: str, links: str, message: int, row: int | None = None) -> str:
    """One of BACKENDS, for a message of so many bytes in rows of so many."""
    return "one_shot" if world == 1 else caps_of(world, arch, links).of(row).backend(message)


def fuses(world: int, arch: str, links: str, message: int, unfused: str, row: int | None = None) -> bool:
    """Whether the fused call is the faster one where `unfused` is the active all-reduce: "nccl", "symm_mem",
    "multimem" or another that was measured. Without a figure: yes, up to any size.

    A multimem all-reduce is never taken here: it is what a caller may have, who then says so.
    """
    return within(caps_of(world, arch, links).of(row).fused.get(unfused, ALWAYS), message)


def within(bounds: Bounds, message: int) -> bool:
    """Whether the first of two ways is taken."""
    return bisect_left(bounds if isinstance(bounds, tuple) else (bounds,), message) % 2 == 0


def to_json(table: Mapping[Key, Caps]) -> str:
    entries = [{"world": w, "arch": a, "links": n, **entry(caps)} for (w, a, n), caps in sorted(table.items())]
    return json.dumps({"entries": entries}, indent=1) + "\n"


def entry(caps: Caps) -> dict[str, Any]:
    """Caps as they stand in a file."""
    fused = {name: list(bounds) if isinstance(bounds, tuple) else bounds for name, bounds in caps.fused.items()}
    narrower = [{"row": row, **entry(other)} for row, other in caps.narrower]
    return {"one_shot": caps.one_shot, **({"split": caps.split} if caps.split else {}), "fused": fused,
            "source": caps.source, **({"narrower": narrower} if narrower else {})}  # fmt: skip


def from_json(text: str) -> dict[Key, Caps]:
    """ValueError for what is no table."""
    try:
        entries: list[dict[str, Any]] = json.loads(text)["entries"]
        return {(int(e["world"]), str(e["arch"]), str(e["links"])): _caps(e) for e in entries}
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise ValueError(f"not a dispatch table: {problem!r}. `moe-fuzz bench allreduce_rmsnorm --calibrate` writes "
                         "one") from problem  # fmt: skip


def _caps(found: Mapping[str, Any]) -> Caps:
    narrower = [(int(one["row"]), _caps(one)) for one in found.get("narrower", [])]
    if [row for row, _ in narrower] != sorted({row for row, _ in narrower}):
        raise ValueError("the widths of rows do not ascend")
    return Caps(int(found["one_shot"]), {str(k): _bounds(v) for k, v in found["fused"].items()},
                str(found.get("source", "")), tuple(narrower), int(found.get("split", 0)))  # fmt: skip


def _bounds(found: Any) -> Bounds:
    if not isinstance(found, list):
        return int(found)
    bounds = tuple(int(one) for one in found)
    if list(bounds) != sorted(set(bounds)):
        raise ValueError(f"the bounds {found} do not ascend")
    return bounds


@functools.cache
def _measured(path: str) -> Mapping[Key, Caps]:
    return from_json(Path(path).read_text()) if path else {}
