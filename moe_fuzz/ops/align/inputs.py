"""The tensors of an align case: ids by the generator, faults laid, a map of experts. Worker side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from moe_fuzz import generator
from moe_fuzz.case import Case
from moe_fuzz.faults import FAULTS, Canvas
from moe_fuzz.faults.align import IdsCanvas, keys
from moe_fuzz.ops.inputs import Inputs, Lie, Result
from moe_fuzz.reference.align import align_shapes

_STALE = 62  # the stream of rows that no step of the case has had
_CHUNK = 1 << 22  # keys that are drawn at once


@dataclass
class AlignInputs(Inputs):
    """block_size, num_experts; ids [T, k] int32 or int64, expert_map [G] int32."""

    fluid: ClassVar[tuple[str, ...]] = ("ids",)

    @property
    def results(self) -> dict[str, Result]:
        """As the contract has them. A target may give more room than that, see `fits`."""
        names = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", "inverse")
        return dict(zip(names, ((shape, torch.int32) for shape in self.shapes), strict=True))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The least shapes that any ids can need."""
        return align_shapes(self.plain["ids"].shape, int(self.options["block_size"]), int(self.options["num_experts"]))

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Callers of serving libraries are generous with room for sorted ids; what is in it, is judged."""
        least = self.results[name][0]
        if name in ("sorted_token_ids", "expert_ids"):
            return len(shape) == 1 and shape[0] >= least[0]
        return shape == least

    def blank(self) -> Self:
        """What a server captures on: every row names the experts that follow on those of the row before."""
        ids, count = self.plain["ids"], len(self.plain.get("expert_map", ())) or int(self.options["num_experts"])
        return self.replace(ids=(torch.arange(ids.numel(), device=ids.device) % count).to(ids.dtype).view(ids.shape))


def materialize(case: Case, step_index: int, device: torch.device | str = "cpu") -> AlignInputs:
    """The inputs of one step of a case, a function of the case alone; the same bits on every device."""
    config, step = case.config, case.steps[step_index]
    rows = list(step.rows)
    expert_map, num_experts = _map(case, device)
    inputs = AlignInputs({"block_size": int(config["block_size"]), "num_experts": num_experts})
    canvas = IdsCanvas("ids", _fresh(case, rows, case.stream(step_index), device), rows,
                       range(int(config["top_k"])), case.seed, experts=case.experts,
                       block=int(config["block_size"]))  # fmt: skip
    laid = [fault for fault in step.faults if fault.tensor == "ids"]
    for fault in laid:
        positions = fault.rows.positions(step.rows) if fault.rows else list(range(len(rows)))
        if fault.name == "stale_rows":
            stream = _STALE if fault.stream is None else fault.stream
            canvas.values[positions] = _fresh(case, [rows[p] for p in positions], stream, device)
        elif canvas.values.numel():
            FAULTS[fault.name].lay(canvas, positions)
    column_stride = max(1, len(rows) + canvas.stride_gap) if canvas.transposed else 0
    inputs.plain["ids"] = canvas.values
    inputs.lies["ids"] = Lie(0 if canvas.transposed else canvas.stride_gap, canvas.offset, column_stride)
    if expert_map is not None:
        inputs.plain["expert_map"] = expert_map
        table = Canvas("expert_map", expert_map[None], [0], list(case.experts), case.seed)
        for fault in step.faults:
            if fault.tensor == "expert_map":  # only its layout can be a fault
                FAULTS[fault.name].lay(table, [0])
                inputs.lies["expert_map"] = Lie(0, 0, 1 + table.stride_gap)
    return inputs


def elements(case: Case, step_index: int) -> int:
    """Microseconds of a host, fitted: a key is drawn for each expert of a row, and each result is judged whole."""
    tokens, count = case.steps[step_index].tokens, len(case.experts)
    slots = tokens * int(case.config["top_k"])
    return tokens * count // 64 + min(slots, count) * int(case.config["block_size"]) // 16 + slots // 3


def _fresh(case: Case, rows: list[int], stream: int, device: torch.device | str) -> torch.Tensor:
    """Ids [R, k] of these row labels before any fault: k distinct experts, those with the largest keys.

    A key hangs on the labels of its row and its expert. So a row goes on naming the same experts when others, which it
    did not name, are taken away.
    """
    top_k = int(case.config["top_k"])
    dtype = getattr(torch, str(case.config["ids_dtype"]))
    at_once = max(1, _CHUNK // len(case.experts))
    parts = [
        keys(case.seed, "ids", rows[first : first + at_once], case.experts, stream, device)
        .topk(top_k, dim=1).indices.to(dtype)
        for first in range(0, len(rows), at_once)
    ]  # fmt: skip
    return torch.cat(parts) if parts else torch.empty((0, top_k), dtype=dtype, device=device)


def _map(case: Case, device: torch.device | str) -> tuple[torch.Tensor | None, int]:
    """The map of experts, int32 [G], and for how many experts blocks are made.

    shard: those of one rank of several, in ascending order, which number from 0; the others are at -1, and blocks are
        made for all of them, as vLLM does. local: the same in any order, and blocks are made for the rank's own.
    permuted: all of them, in any order.
    replicas: in any order as well, to fewer experts, each of which has several ids: a quarter, a half or three quarters
        of them, or a single one.
    spares: each id has an expert of its own, in any order, and there are more experts than ids: one, a quarter or as
        many again, as where a server keeps some for the replicas of tomorrow. An id that is an expert's number need not
        be one of the map's.
    """
    kind, count = str(case.config["expert_map"]), len(case.experts)
    if kind == "none":
        return None, count
    labels = list(case.experts)
    order = keys(case.seed, "expert_map", [0], case.experts, device=device)[0]  # [G]
    if kind == "replicas":
        quarters = 1 + int(generator.choice(case.seed, "expert_map/experts", [0], [0], 4))
        num_experts = -(-count * quarters // 4) if quarters < 4 else 1
        return (order.argsort(stable=True).argsort(stable=True) % num_experts).int(), num_experts
    if kind == "spares":
        extra = (1, -(-count // 4), count)[int(generator.choice(case.seed, "expert_map/experts", [0], [0], 3))]
        places = torch.arange(count, device=device) * (count + extra) // count  # ascending, up to the last but `extra`
        turn = int(generator.choice(case.seed, "expert_map/turn", [0], [0], count + extra))
        return ((places[order.argsort(stable=True).argsort(stable=True)] + turn) % (count + extra)).int(), count + extra
    if kind == "permuted":
        return order.argsort(stable=True).argsort(stable=True).int(), count
    ranks = (2, 4, 8, 16)[int(generator.choice(case.seed, "expert_map/ranks", [0], [0], 4))]
    here = generator.choice(case.seed, "expert_map/rank", [0], labels, ranks, device=device)[0] == 0
    here[0] |= not here.any()  # a rank has one at least
    among = order.masked_fill(~here, torch.iinfo(torch.int64).max) if kind == "local" else (~here).long()
    numbers = among.argsort(stable=True).argsort(stable=True)
    found = numbers.masked_fill(~here, -1).int()
    return found, int(here.sum()) if kind == "local" else count

