"""The tensors of an `experts_nvfp4` case. Worker side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache

import torch

from moe_fuzz import generator
from moe_fuzz.case import Case, Scalar
from moe_fuzz.faults import FAULTS, Canvas
from moe_fuzz.faults.nvfp4 import BlockCanvas, ScaleCanvas
from moe_fuzz.mirror import answers, on_host, uploaded
from moe_fuzz.ops.experts import blocks, recipes
from moe_fuzz.ops.experts.fp4 import CALIBRATIONS, FACTORS, NAN_BLOCKS, SCALES, SIGNED_BLOCKS
from moe_fuzz.ops.experts.inputs import ExpertsInputs, filled, some_experts
from moe_fuzz.reference.nvfp4 import BLOCK, E2M1, E4M3


@dataclass
class Fp4Inputs(ExpertsInputs):
    """As `ExpertsInputs`, with w13, w2 uint8 [E, R, C/2]; beyond them w13_scales, w2_scales uint8, w13_alpha, w2_alpha
    float32 [E] and, where activations are quantized, x_global and h_global float32 [1]; scale_layout, activations."""

    _decoded: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # of all copies

    @property
    def inter(self) -> int:
        return 2 * self.plain["w2"].shape[2]

    @classmethod
    def canvas(cls, x: torch.Tensor, rows: Sequence[int], seed: int, fixed: Mapping[str, torch.Tensor]) -> Canvas:
        scale = fixed.get("x_global")
        each = torch.ones(1, device=x.device) if scale is None else scale.float().reshape(1)
        return BlockCanvas("x", x, rows, range(x.shape[1]), seed, scales=each.expand(len(rows)))

    @property
    def quantizes(self) -> bool:
        return self.options["activations"] == "nvfp4"

    @property
    def has_factors(self) -> bool:
        return True

    @property
    def finite_weights(self) -> bool:
        names = ("w13", "w2")
        if not all(bool(on_host(self.plain[f"{name}_alpha"]).isfinite().all()) for name in names):
            return False
        return super().finite_weights and all(answers([self._numbers(name) for name in names]))

    def _numbers(self, name: str) -> torch.Tensor:
        """Whether no scale of w13 or w2 is NaN."""
        return (self.linear_scales(name) % 128 < 127).all()

    def matrix(self, name: str, experts: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        codes, scales = self.plain[name], self.plain[f"{name}_scales"]
        known = self._decoded.get(name)
        if known is None or known[0] is not codes or known[1] is not scales:
            known = codes, scales, decoded(codes, self.linear_scales(name))
            self._decoded[name] = known
        return known[2][experts].double()

    def linear_scales(self, name: str) -> torch.Tensor:
        """uint8 [E, R, C/16]: the scales of w13 or w2, wherever they lie."""
        codes, scales = self.plain[name], self.plain[f"{name}_scales"]
        if self.options["scale_layout"] == "linear":
            return scales
        return linear(scales, codes.shape[1], 2 * codes.shape[2] // BLOCK)

    def factor(self, name: str, experts: torch.Tensor) -> torch.Tensor | None:
        return self.plain[f"{name}_alpha"][experts].double()[:, None, None]


def materialize(case: Case, step_index: int, device: torch.device | str = "cpu") -> Fp4Inputs:
    """The inputs of one step of a case, a function of the case alone; the same bits on every device."""
    fixed = dict(_fixed(case.seed, tuple(case.config.items()), str(device)))
    for fault in case.steps[step_index].faults:
        name = fault.tensor
        if fault.name == SIGNED_BLOCKS:
            fixed |= _with_signs(case, name.removesuffix("_scales"), fixed)
        elif name in SCALES:
            fixed[name] = _with_scales(case, fault.name, name, fixed[name], fixed[name.removesuffix("_scales")])
        elif name in (*FACTORS, *CALIBRATIONS) and name in fixed:
            fixed[name] = _with_factors(case, fault.name, name, fixed[name])
    return filled(Fp4Inputs, case, step_index, device, fixed)


def _with_scales(case: Case, fault: str, name: str, table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The table of scales with a fault in it: in its padding, or in blocks."""
    rows, blocks = codes.shape[1], 2 * codes.shape[2] // BLOCK
    if fault == NAN_BLOCKS:
        labels = recipes.shard(case)[0]
        word = generator.words(case.seed, f"{name}/{fault}", labels, range(rows), device=codes.device)  # [E, R]
        # Of a row in four, one block; or of one row alone: a gate's, or one that a gate multiplies. A NaN in both is a
        # NaN of what they make, whatever becomes of either.
        alone = generator.choice(case.seed, f"{name}/{fault}/alone", labels, [0], 2 * rows, device=codes.device)
        row = torch.arange(rows, device=codes.device)
        broken = torch.where(alone < rows, row == alone, word % 4 == 0)
        some = some_experts(case, name, fault, codes.device)[:, None] & broken
        there = torch.arange(blocks, device=codes.device) == ((word >> 8) % blocks)[..., None]
        hit = there & some[..., None]
        hit = hit if case.config["scale_layout"] == "linear" else swizzled(hit.byte()) > 0
    elif case.config["scale_layout"] == "swizzled":
        hit = swizzled(table.new_ones((len(table), rows, blocks))) == 0
    else:
        return table
    canvas = ScaleCanvas(name, table.flatten(1), range(len(table)), range(table[0].numel()), case.seed,
                         hit=hit.flatten(1))  # fmt: skip
    FAULTS[fault].lay(canvas, range(len(table)))
    return canvas.values.view(table.shape)


def _with_signs(case: Case, name: str, fixed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """w13 or w2 with scales below 0: of half of the blocks, and the global scales of half of the experts. Codes make up
    for both, so that all weights are what they were."""
    codes, table, alpha = (fixed[part] for part in (name, f"{name}_scales", f"{name}_alpha"))
    rows, blocks, labels, what = codes.shape[1], 2 * codes.shape[2] // BLOCK, recipes.shard(case)[0], f"{name}/signs"
    word = generator.words(case.seed, what, labels, range(rows), device=codes.device)  # [E, R]
    negative = (word[..., None] >> torch.arange(blocks, device=codes.device) % 24) % 2 == 1  # [E, R, B]
    below = generator.choice(case.seed, f"{what}/alpha", labels, [0], 2, device=codes.device)[:, 0] == 1  # [E]
    hit = negative if case.config["scale_layout"] == "linear" else swizzled(negative.byte()) > 0
    canvas = ScaleCanvas(f"{name}_scales", table.flatten(1), range(len(table)), range(table[0].numel()), case.seed,
                         hit=hit.flatten(1))  # fmt: skip
    FAULTS[SIGNED_BLOCKS].lay(canvas, range(len(table)))
    turned = (negative ^ below[:, None, None]).repeat_interleave(BLOCK // 2, dim=2)
    return {name: torch.where(turned, codes ^ 0x88, codes), f"{name}_scales": canvas.values.view(table.shape),
            f"{name}_alpha": torch.where(below, -alpha, alpha)}  # fmt: skip


def _with_factors(case: Case, fault: str, name: str, factors: torch.Tensor) -> torch.Tensor:
    """Global scales with a fault: of activations, the one there is; of weights, those of some experts."""
    scales = Canvas(name, on_host(factors).clone()[:, None], range(len(factors)), [0], case.seed)
    everywhere = torch.ones(len(factors), dtype=torch.bool)
    hit = some_experts(case, name, fault, scales.device) if name in FACTORS else everywhere
    FAULTS[fault].lay(scales, hit.nonzero().flatten().tolist())
    return uploaded(scales.values[:, 0].contiguous(), factors.device)


@lru_cache(maxsize=1)  # as in inputs.py
def _fixed(seed: int, config: tuple[tuple[str, Scalar], ...], device: str) -> dict[str, torch.Tensor]:
    case = Case("experts_nvfp4", dict(config), (), seed)
    labels, expert_map = recipes.shard(case)
    found = blocks.projections(case, labels, device)
    if case.config["scale_layout"] == "swizzled":
        found |= {name: swizzled(found[name]) for name in SCALES}
    if case.config["activations"] == "nvfp4":
        found |= blocks.global_scales(case, device)
    if expert_map is not None:
        found["expert_map"] = uploaded(expert_map, device)
    return found


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    """uint8 [E, R, B] -> [E, R to whole 128, B to whole 4], padded with zeros: `swizzle` of each."""
    rows, columns = scales.shape[1:]
    padded = torch.nn.functional.pad(scales, (0, -columns % 4, 0, -rows % 128))
    tiles = padded.unflatten(2, (-1, 4)).unflatten(1, (-1, 4, 32)).transpose(2, 4)  # [E, Rt, Bt, 32, 4, 4]
    return tiles.reshape(padded.shape)


def linear(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[E, rows, columns] of swizzled tables."""
    count, padded_rows, padded_columns = scales.shape
    tiles = scales.view(count, padded_rows // 128, padded_columns // 4, 32, 4, 4).transpose(2, 4)
    return tiles.reshape(scales.shape)[:, :rows, :columns].contiguous()


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What codes stand for, and bytes of scales."""
    nan = torch.tensor([torch.nan])
    return torch.cat([E2M1, -E2M1]).to(device), torch.cat([E4M3, nan, -E4M3, nan]).to(device)


def decoded(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [E, R, C]: E2M1 times E4M3, exact, without any global scale. Scales are linear."""
    code = torch.stack([codes & 15, codes >> 4], dim=3).flatten(2).long()
    of_codes, of_bytes = _tables(codes.device)
    values = of_codes[code].unflatten(2, (-1, BLOCK))
    of_scales = of_bytes[scales.long()]  # [E, R, B]
    return (values * of_scales[..., None]).flatten(2)
