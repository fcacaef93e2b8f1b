"""What holds of any right plan: how much of it there is, that every slot is in it once, and with its own expert.

The order of the slots inside an expert is nobody's to ask, unless the target declares it (`stable`).
"""

from __future__ import annotations

import torch

from moe_fuzz.checks import check, outputs
from moe_fuzz.checks.align.observation import AlignObservation
from moe_fuzz.checks.coordinates import first, row_text
from moe_fuzz.verdict import Violation

_FAMILY = "align"


@check(_FAMILY, "structure")
def structure(seen: AlignObservation) -> list[Violation]:
    """int32, and room for what any ids of this shape can need: sizes that hang on the ids would wait for the device."""
    found = []
    for name, (least, dtype) in seen.inputs.results.items():
        tensor = getattr(seen.outputs, name)
        if tensor is None:
            continue
        room = {"sorted_token_ids": seen.used, "expert_ids": seen.blocks}.get(name, 0)
        if not seen.inputs.fits(name, tuple(tensor.shape)) or (room and tensor.shape[0] < room):
            at_least = "at least " if name in ("sorted_token_ids", "expert_ids") else ""
            wanted = (max(least[0], room),) if at_least else least
            found.append(outputs.wrong(name, "shape", f"{at_least}{wanted}", tuple(tensor.shape)))
        elif tensor.dtype != dtype:
            found.append(outputs.wrong(name, "dtype", dtype, tensor.dtype))
    return found


@check(_FAMILY, "written")
def written(seen: AlignObservation) -> list[Violation]:
    """No element still holds the poison it had before the call (flashinfer#3011)."""
    return outputs.never_written(seen.unwritten)


@check(_FAMILY, "count", parity=True)
def count(seen: AlignObservation) -> list[Violation]:
    """num_tokens_post_padded: whole blocks for the kept slots of each expert, and nothing else (vllm#21079)."""
    got = int(seen.outputs.num_tokens_post_padded)
    if got == seen.used or seen.unwritten["num_tokens_post_padded"].any():
        return []
    dropped = seen.slots - int(seen.kept.sum())
    made = f"{seen.slots - dropped} kept and {dropped} dropped slots make {seen.blocks} blocks of {seen.block_size}"
    message = f"{made}: num_tokens_post_padded is {got}, not {seen.used}"
    symptom = "too many" if got > seen.used else "too few"
    return [Violation("count", symptom, message, "num_tokens_post_padded", (0,), str(seen.used), str(got),
                      allowed=(seen.used, seen.used))]  # fmt: skip


@check(_FAMILY, "slots", parity=True)
def slots(seen: AlignObservation) -> list[Violation]:
    """Every kept slot stands in the part in use once, and no dropped one does. (With blocks of dropped slots, these
    stand there at most once.)"""
    times = torch.bincount(seen.placed, minlength=seen.slots)
    among_experts = torch.bincount(seen.placed[seen.places >= seen.leading * seen.block_size], minlength=seen.slots)
    stray = ~seen.kept & ((times > 1) | (among_experts > 0))
    for symptom, wrong, expected in (
        ("lost", seen.kept & (times == 0), "once"),
        ("twice", seen.kept & (times > 1), "once"),
        ("dropped", stray, "nowhere" if not seen.leading else "once, in the first blocks"),
    ):
        if wrong.any():
            slot = first(wrong)[0]
            token, k = seen.where(slot)
            what = f"slot {slot} (token {token}, k {k}), id {int(seen.ids[token, k])},"
            how = {"lost": "stands nowhere", "twice": f"stands {int(times[slot])} times",
                   "dropped": "is of no expert here, and stands in a block all the same"}[symptom]  # fmt: skip
            where = (seen.placed == slot).nonzero().flatten()
            got = row_text(seen.places[where]) if len(where) else "nowhere"
            return [Violation("slots", symptom, f"{what} {how}", "sorted_token_ids",
                              (int(seen.places[where[-1]]),) if len(where) else (), expected, got)]  # fmt: skip
    return []


@check(_FAMILY, "experts", parity=True)
def experts(seen: AlignObservation) -> list[Violation]:
    """Each block is of the expert that expert_ids names: its slots are all that expert's, and every expert has as many
    blocks as its slots take."""
    owner = seen.owner
    first_real = torch.arange(seen.blocks, device=owner.device) >= seen.leading
    outside = torch.where(first_real, (owner < 0) | (owner >= seen.experts), owner != -1)
    outside &= ~seen.unwritten["expert_ids"][: seen.blocks]
    if outside.any():
        block = first(outside)[0]
        expected = f"in [0, {seen.experts})" if block >= seen.leading else "-1, for the dropped slots"
        message = f"block {block} of {seen.blocks} in use is of no expert"
        return [Violation("experts", "range", message, "expert_ids", (block,), expected, str(int(owner[block])))]
    foreign = seen.kept[seen.placed] & (seen.expert[seen.placed] != owner[seen.places // seen.block_size])
    if foreign.any():
        at = first(foreign)[0]
        slot, place = int(seen.placed[at]), int(seen.places[at])
        block = place // seen.block_size
        message = f"block {block} holds slot {slot}, which is of expert {int(seen.expert[slot])}"
        return [Violation("experts", "foreign", message, "expert_ids", (block,), str(int(seen.expert[slot])),
                          str(int(owner[block])))]  # fmt: skip
    real = owner[(owner >= 0) & (owner < seen.experts)]
    blocks = torch.bincount(real, minlength=seen.experts)
    if (blocks != seen.blocks_of).any() and len(real) == seen.blocks - seen.leading:
        expert = first(blocks != seen.blocks_of)[0]
        message = f"expert {expert} has another number of blocks than its slots take"
        return [Violation("experts", "blocks", message, "expert_ids", (), str(int(seen.blocks_of[expert])),
                          str(int(blocks[expert])))]  # fmt: skip
    return []


@check(_FAMILY, "fill", parity=True)
def fill(seen: AlignObservation) -> list[Violation]:
    """What holds no slot holds N: consumers mask it off as `id < N`, and load it otherwise (aiter#2644)."""
    wrong = seen.sorted != seen.slots
    wrong[seen.places] = False
    wrong &= ~seen.unwritten["sorted_token_ids"]
    if not wrong.any():
        return []
    place = first(wrong)[0]
    inside = place < seen.used
    message = f"entry {place} of sorted_token_ids, " + ("the padding of a block" if inside else "past those in use")
    return [Violation("fill", "padding" if inside else "end", message + ", is not N", "sorted_token_ids", (place,),
                      str(seen.slots), str(int(seen.sorted[place])),
                      allowed=(seen.slots, seen.slots))]  # fmt: skip


@check(_FAMILY, "tail", parity=True)
def tail(seen: AlignObservation) -> list[Violation]:
    """expert_ids is -1 past the blocks in use: 0 is an expert, and its weights are there (vllm#35161)."""
    if seen.info.contract.tail != "minus_one":
        return []
    end = seen.outputs.expert_ids[seen.blocks :]
    wrong = (end != -1) & ~seen.unwritten["expert_ids"][seen.blocks :]
    if not wrong.any():
        return []
    at = first(wrong)[0]
    block = seen.blocks + at
    message = f"block {block} is past the {seen.blocks} in use, and names an expert"
    return [Violation("tail", "expert", message, "expert_ids", (block,), "-1", str(int(end[at])), allowed=(-1, -1))]


@check(_FAMILY, "inverse", parity=True)
def inverse(seen: AlignObservation) -> list[Violation]:
    """inverse[slot] is where sorted_token_ids holds the slot, and -1 where it was dropped."""
    if seen.outputs.inverse is None:
        return []
    got = seen.outputs.inverse.flatten().long()
    judged = ~seen.unwritten["inverse"].flatten()
    marked = judged & ~seen.kept & (got != -1)
    outside = judged & seen.kept & ((got < 0) | (got >= seen.used))
    at = got.clamp(0, max(0, len(seen.sorted) - 1))
    number = torch.arange(seen.slots, device=got.device)
    other = judged & seen.kept & ~outside
    other &= seen.sorted[at] != number if len(seen.sorted) else other
    for symptom, wrong in (("dropped", marked), ("range", outside), ("other", other)):
        if wrong.any():
            slot = first(wrong)[0]
            token, k = seen.where(slot)
            where = (seen.placed == slot).nonzero().flatten()
            expected = "-1" if symptom == "dropped" else row_text(seen.places[where]) if len(where) else "a place"
            message = f"inverse of slot {slot} (token {token}, k {k}) is not where the slot stands"
            if symptom == "dropped":
                message = f"inverse of slot {slot} (token {token}, k {k}), which is dropped, is a place"
            return [Violation("inverse", symptom, message, "inverse", (token, k), expected, str(int(got[slot])))]
    return []


@check(_FAMILY, "order")
def order(seen: AlignObservation) -> list[Violation]:
    """The blocks in use stand in ascending order of expert, where the target declares it."""
    if not seen.info.contract.ordered or seen.unwritten["expert_ids"][: seen.blocks].any():
        return []
    blocks = ((seen.owner >= 0) & (seen.owner < seen.experts)).nonzero().flatten()  # what others are, `experts` says
    owner = seen.owner[blocks]
    wrong = owner[1:] < owner[:-1]
    if not wrong.any():
        return []
    at = first(wrong)[0]
    block, before = int(blocks[at + 1]), int(blocks[at])
    which = "the block before it" if before == block - 1 else f"block {before}"
    message = f"block {block} is of a lower expert than {which}"
    return [Violation("order", "descending", message, "expert_ids", (block,), f"at least {int(owner[at])}",
                      str(int(owner[at + 1])))]  # fmt: skip


@check(_FAMILY, "stable")
def stable(seen: AlignObservation) -> list[Violation]:
    """The slots of an expert ascend, where the target declares it."""
    if not seen.info.contract.stable:
        return []
    by_expert = seen.expert[seen.placed].argsort(stable=True)
    held = seen.placed[by_expert]
    wrong = (held[1:] < held[:-1]) & (seen.expert[held[1:]] == seen.expert[held[:-1]])
    if not wrong.any():
        return []
    at = first(wrong)[0]
    place = int(seen.places[by_expert[at + 1]])
    message = f"slot {int(held[at + 1])} of expert {int(seen.expert[held[at]])} stands after a later one"
    return [Violation("stable", "descending", message, "sorted_token_ids", (place,), f"above {int(held[at])}",
                      str(int(held[at + 1])))]  # fmt: skip
