"""Faults on the ids of a routing decision, [T, k] int32 or int64: who is named, how often, and what names nobody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from moe_fuzz import generator
from moe_fuzz.faults.fault import Canvas, Fault, register
from moe_fuzz.labels import Labels


def keys(
    seed: int, name: str, rows: Sequence[int], experts: Labels, stream: int = 0, device: generator.Device = "cpu"
) -> torch.Tensor:
    """int64 [len(rows), E]: a random key for each row and expert, a function of their labels, which are below 2^31.
    No two of a row are equal, so that no device's sort has a choice."""
    labels = list(experts)
    words = generator.words(seed, name, rows, labels, stream, device)
    return (words << 31) + torch.tensor(labels, device=device)


@dataclass
class IdsCanvas(Canvas):
    """Ids while their faults are laid."""

    experts: Labels = field(default_factory=Labels)  # an id is a position in these
    block: int = 16  # slots of an expert that stand together

    def chosen(self, fault: str) -> torch.Tensor:
        """An expert, int64 [1, 1]. It stays the same when others are taken away."""
        found = keys(self.seed, f"{self.name}/{fault}", [0], self.experts, device=self.device)
        return found.argmax(dim=1, keepdim=True)


class IdsFault(Fault):
    """A kind of fault on ids."""

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        assert isinstance(canvas, IdsCanvas), f"{self.name} is laid on ids, not on {canvas.name}"
        self.lay_ids(canvas, positions)

    def lay_ids(self, canvas: IdsCanvas, positions: Sequence[int]) -> None:
        raise NotImplementedError


@register
class DuplicateExperts(IdsFault):
    """A row names its first experts again: a sort that stops at the first match leaves the second slot unwritten
    (flashinfer#3011)."""

    name = "duplicate_experts"

    def lay_ids(self, canvas: IdsCanvas, positions: Sequence[int]) -> None:
        few = 1 + canvas.choose_rows(positions, max(1, canvas.values.shape[1] // 2), self.name)  # [P, 1]
        slot = torch.arange(canvas.values.shape[1], device=canvas.device)
        canvas.values[positions] = canvas.values[positions].gather(1, slot % few)


@register
class AllToOne(IdsFault):
    """All slots of the rows go to one expert: one count holds them all, and one expert has all blocks."""

    name = "all_to_one"

    def lay_ids(self, canvas: IdsCanvas, positions: Sequence[int]) -> None:
        canvas.values[positions] = canvas.chosen(self.name).to(canvas.values.dtype)


@register
class HotExpert(IdsFault):
    """One slot of each row goes to the same expert, as where a gate has collapsed."""

    name = "hot_expert"

    def lay_ids(self, canvas: IdsCanvas, positions: Sequence[int]) -> None:
        slots = canvas.choose_rows(positions, canvas.values.shape[1], self.name)  # [P, 1]
        hot = canvas.chosen(self.name).to(canvas.values.dtype).expand(len(positions), 1)
        canvas.values[positions] = canvas.values[positions].scatter(1, slots, hot)


_COUNTS = (15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)


@register
class ExactCount(IdsFault):
    """One expert is named by so many rows: as many as whole blocks have, a block's number of 16 to 128 or one that is
    any, or one more or less than these. No other row names it; k distinct experts of a row stay so."""

    name = "exact_count"

    def lay_ids(self, canvas: IdsCanvas, positions: Sequence[int]) -> None:
        # By its label, not as the best of some: or else another would take its place in rows that do not name it.
        label = self._one(canvas, 1 << 13) >> (13, 13, 12, 11, 10, 9, 8, 7, 6)[self._one(canvas, 9, "/few")]
        top_k, experts = canvas.values.shape[1], len(canvas.experts)
        if label not in canvas.experts or top_k >= experts:
            return
        one = Labels.of([label]).positions(canvas.experts)[0]
        block, drawn = canvas.block, self._one(canvas, 200, "/any")
        counts = (*_COUNTS, *(block - 1, block, block + 1, 2 * block) * 2, drawn)
        count = counts[self._one(canvas, len(counts), "/count")]

        ids = canvas.values[positions].long()
        ordered = ids.sort(dim=1).values
        plain = ((ids >= 0) & (ids < experts)).all(dim=1) & (ordered.diff(dim=1) > 0).all(dim=1)  # [P]
        named = (ids == one).any(dim=1)
        wanted = canvas.table(canvas.labels(positions), torch.int64) < count
        slot = canvas.choose_rows(positions, top_k, self.name + "/slot")
        lacking = (plain & wanted & ~named)[:, None] & (torch.arange(top_k, device=canvas.device) == slot)
        ids = torch.where(lacking, one, ids)
        spare = (plain & named & ~wanted).nonzero().flatten()
        if len(spare):  # the next expert that the row does not name
            others = (one + 1 + torch.arange(top_k, device=canvas.device)) % experts
            free = (ids[spare][:, :, None] != others).all(dim=1)  # [S, k]
            instead = others[free.int().argmax(dim=1)][:, None]
            ids[spare] = torch.where(ids[spare] == one, instead, ids[spare])
        canvas.values[positions] = ids.to(canvas.values.dtype)

    def _one(self, canvas: IdsCanvas, count: int, what: str = "") -> int:
        return int(generator.choice(canvas.seed, f"{canvas.name}/{self.name}{what}", [0], [0], count))


@register
class EmptyExperts(IdsFault):
    """The rows name every eighth expert only: most have no slot, and no block."""

    name = "empty_experts"

    def lay_ids(self, canvas: IdsCanvas, positions: Sequence[int]) -> None:
        table = canvas.table([at for at, label in enumerate(canvas.experts) if label % 8 == 3] or [0])
        canvas.values[positions] = table[canvas.choose(positions, len(table), self.name)].to(canvas.values.dtype)


@register
class MinusOneIds(IdsFault):
    """-1 in every slot, as vLLM writes it for padding rows since 0.27 (vllm#48979); its consumers indexed with it
    (vllm#57036, vllm#55231, vllm#42034)."""

    name = "minus_one_ids"

    def lay_ids(self, canvas: IdsCanvas, positions: Sequence[int]) -> None:
        canvas.values[positions] = -1


@register
class NumExpertsIds(IdsFault):
    """The number of experts in every slot: the first id that is none."""

    name = "num_experts_ids"

    def lay_ids(self, canvas: IdsCanvas, positions: Sequence[int]) -> None:
        canvas.values[positions] = len(canvas.experts)


@register
class SentinelIds(IdsFault):
    """In two slots of three an id of no expert, small and large ones of both signs: what an unwritten buffer holds, or
    a router that knows no NaN (sglang#30079)."""

    name = "sentinel_ids"

    def lay_ids(self, canvas: IdsCanvas, positions: Sequence[int]) -> None:
        count, limits = len(canvas.experts), torch.iinfo(torch.int32)
        values = [-1, -2, -count, -count - 1, count, count + 1, 2 * count, limits.max, limits.min, limits.min + 1]
        table = canvas.table(values, torch.int64).to(canvas.values.dtype)
        pick = canvas.choose(positions, len(values) + len(values) // 2, self.name)
        sentinels = table[pick.clamp(max=len(values) - 1)]
        canvas.values[positions] = torch.where(pick < len(values), sentinels, canvas.values[positions])


@register
class WideIds(IdsFault):
    """int64 ids beyond 32 bits whose low 32 bits are an expert's: cut to int32 they pass for it (sglang#29929)."""

    name = "wide_ids"

    def lay_ids(self, canvas: IdsCanvas, positions: Sequence[int]) -> None:
        canvas.values = canvas.values.long()
        shift = canvas.table([1 << 32, -(1 << 32), 1 << 62, -(1 << 63)], torch.int64)
        pick = canvas.choose(positions, 2 * len(shift), self.name)
        wide = canvas.values[positions] + shift[pick.clamp(max=len(shift) - 1)]
        canvas.values[positions] = torch.where(pick < len(shift), wide, canvas.values[positions])
