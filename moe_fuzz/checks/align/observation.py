"""What the checks of align see of one call: ids, the plan that came back, and what any right plan has in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.fence import unwritten
from moe_fuzz.ops.align.inputs import AlignInputs
from moe_fuzz.reference.align import expert_of_slot


@dataclass(frozen=True)
class Outputs:
    """What a target returned, as it was returned."""

    sorted_token_ids: torch.Tensor
    expert_ids: torch.Tensor
    num_tokens_post_padded: torch.Tensor
    inverse: torch.Tensor | None = None


@dataclass(frozen=True)
class AlignObservation:
    """One call under test. All tensors are on one device, that of the inputs; N slots, E experts, B as in the op."""

    case: Case
    step_index: int
    info: TargetInfo
    inputs: AlignInputs
    outputs: Outputs
    call: Callable[[AlignInputs], Outputs]  # runs the target again, in fences; a graph is replayed
    eager: Callable[[AlignInputs], Outputs] | None = None  # runs it without a graph, where `call` is a replay
    budget: dict[str, float] = field(default_factory=dict)  # nothing here is within a bound: all of it is exact

    def with_outputs(self, outputs: Outputs) -> AlignObservation:
        """The same inputs and another answer."""
        other = replace(self, outputs=outputs, budget={})
        for name in ("expert", "kept", "blocks_of", "leading", "blocks"):
            other.__dict__[name] = getattr(self, name)
        return other

    # ---- inputs -----------------------------------------------------------------------------------------------------

    @property
    def ids(self) -> torch.Tensor:
        return self.inputs.plain["ids"]

    @property
    def slots(self) -> int:
        return self.ids.numel()

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]

    @property
    def block_size(self) -> int:
        return int(self.inputs.options["block_size"])

    @property
    def experts(self) -> int:
        return int(self.inputs.options["num_experts"])

    # ---- what any right plan has in common --------------------------------------------------------------------------

    @cached_property
    def expert(self) -> torch.Tensor:
        """int64 [N]: the expert of each slot, or -1 where it is dropped."""
        return expert_of_slot(self.ids, self.experts, self.inputs.plain.get("expert_map")).flatten()

    @cached_property
    def kept(self) -> torch.Tensor:
        """bool [N]"""
        return self.expert >= 0

    @cached_property
    def blocks_of(self) -> torch.Tensor:
        """int64 [E]: how many blocks the slots of each expert take."""
        counts = torch.bincount(self.expert[self.kept], minlength=self.experts)
        return (counts + self.block_size - 1) // self.block_size

    @cached_property
    def leading(self) -> int:
        """Blocks of no expert that stand first: those of the dropped slots, where a target keeps them."""
        if self.info.contract.dropped != "first":
            return 0
        return -(-int((~self.kept).sum()) // self.block_size)

    @cached_property
    def blocks(self) -> int:
        """Blocks in use."""
        return self.leading + int(self.blocks_of.sum())

    @property
    def used(self) -> int:
        """Entries of sorted_token_ids in use."""
        return self.blocks * self.block_size

    # ---- outputs ----------------------------------------------------------------------------------------------------

    @property
    def shaped(self) -> bool:
        """Whether each result has the room that the contract gives it; without it nothing else can be judged."""
        names = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", "inverse")
        found = ((name, getattr(self.outputs, name)) for name in names)
        return (
            all(tensor is None or self.inputs.fits(name, tuple(tensor.shape)) for name, tensor in found)
            and len(self.outputs.sorted_token_ids) >= self.used
            and len(self.outputs.expert_ids) >= self.blocks
        )

    @cached_property
    def sorted(self) -> torch.Tensor:
        """int64 [M]"""
        return self.outputs.sorted_token_ids.long()

    @cached_property
    def places(self) -> torch.Tensor:
        """int64 [P]: the entries in use that hold a slot."""
        held = self.sorted[: self.used]
        return ((held >= 0) & (held < self.slots)).nonzero().flatten()

    @cached_property
    def placed(self) -> torch.Tensor:
        """int64 [P]: the slots they hold."""
        return self.sorted[self.places]

    @cached_property
    def owner(self) -> torch.Tensor:
        """int64 [blocks]: the expert that each block in use is said to be of."""
        return self.outputs.expert_ids[: self.blocks].long()

    @cached_property
    def unwritten(self) -> dict[str, torch.Tensor]:
        """Which elements of each result still hold their poison. The end of expert_ids may, unless it is promised."""
        found = {name: unwritten(tensor) for name, tensor in vars(self.outputs).items() if tensor is not None}
        if self.info.contract.tail != "minus_one":
            found["expert_ids"][self.blocks :] = False
        return found

    def where(self, slot: int) -> tuple[int, int]:
        """(token, k) of a slot."""
        return slot // self.top_k, slot % self.top_k
