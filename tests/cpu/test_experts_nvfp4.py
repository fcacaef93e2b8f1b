"""`experts_nvfp4`: the reference against that of bf16, the kernels against exact answers, in the interpreter."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch
from torch import Tensor

from moe_fuzz.kernels.experts_nvfp4 import BACKENDS, choose_backend, experts_nvfp4, formats, rule, workspace_bytes
from moe_fuzz.kernels.experts_nvfp4.blocks import LARGE_FROM, PLANS, SCALED, VARIABLE, Plan, Tile, choose
from moe_fuzz.reference.experts_bf16 import experts_bf16 as reference_bf16
from moe_fuzz.reference.experts_nvfp4 import experts_nvfp4 as reference
from moe_fuzz.reference.experts_nvfp4 import values
from moe_fuzz.reference.nvfp4 import E2M1, E4M3, pack, swizzle

# numpy mentions the NaN and the infinity that some tests are about
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

ALL = pytest.mark.parametrize(
    "backend",
    [pytest.param("small", marks=pytest.mark.interpreter), pytest.param("large", marks=pytest.mark.interpreter), None],
    ids=["small", "large", "reference"],
)
EACH = pytest.mark.parametrize("backend", BACKENDS)
TILES = Plan(0, Tile(16, 128, 128, 2, 4, 1), Tile(16, 64, 128, 1, 4, 1))  # several tiles of small sizes


@dataclass
class Layer:
    """The arguments of a call."""

    x: Tensor
    w13: Tensor
    w2: Tensor
    weights: Tensor
    ids: Tensor
    w13_scales: Tensor
    w2_scales: Tensor
    w13_alpha: Tensor
    w2_alpha: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, backend: str | None, **more: Any) -> Tensor:
        """By a backend of the kernel, or by the reference."""
        operands = (self.x, self.w13, self.w2, self.weights, self.ids, self.w13_scales, self.w2_scales, self.w13_alpha,
                    self.w2_alpha)  # fmt: skip
        options = {**self.options, **more}
        found = experts_nvfp4(*operands, **options, backend=backend) if backend else reference(*operands, **options)
        assert isinstance(found, Tensor)
        return found

    def swizzled(self, padding: int = 0x7F) -> Layer:
        """The same with swizzled scales, whose padding holds this byte."""
        made = []
        for scales in (self.w13_scales, self.w2_scales):
            rows, columns = scales.shape[1:]
            padded = torch.full((len(scales), rows + -rows % 128, columns + -columns % 4), padding, dtype=torch.uint8)
            padded[:, :rows, :columns] = scales
            made.append(torch.stack([swizzle(table) for table in padded]))
        return replace(self, w13_scales=made[0], w2_scales=made[1],
                       options={**self.options, "scale_layout": "swizzled"})  # fmt: skip


def encoded(wanted: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes and scale bytes of values that are powers of two times -2..2 in each block, under scales that differ."""
    blocks = wanted.double().view(*wanted.shape[:2], -1, 16)
    amax = blocks.abs().amax(dim=3)
    shift = torch.randint(-1, 2, amax.shape, generator=generator)
    scale = torch.where(amax > 0, 2.0 ** (torch.log2(amax.clamp(min=2.0**-20)).floor() + shift - 1), 1.0)  # [E, R, B]
    table = torch.cat([E2M1, -E2M1]).double()
    code = (blocks[..., None] / scale[..., None, None] - table).abs().argmin(dim=4)
    byte = (E4M3.double() - scale[..., None]).abs().argmin(dim=3).to(torch.uint8)
    packed = torch.stack([pack(rows.flatten(1).to(torch.uint8)) for rows in code])
    made = torch.stack([values(c, s) for c, s in zip(packed, byte, strict=True)])
    assert torch.equal(made, wanted.double())
    return packed, byte


def layer_of(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, seed: int = 0, **options: Any) -> Layer:
    """A layer of these values, each expert with a global scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    alphas = [2.0 ** torch.randint(-3, 1, (len(w13),), generator=generator).float() for _ in range(2)]
    codes13, scales13 = encoded(w13.double() / alphas[0][:, None, None], generator)
    codes2, scales2 = encoded(w2.double() / alphas[1][:, None, None], generator)
    return Layer(x, codes13, codes2, weights, ids, scales13, scales2, *alphas, options)


def integers(
    tokens: int, top_k: int, experts: int, hidden: int, inter: int, *, activation: str = "silu",
    gate_layout: str = "first", dtype: torch.dtype = torch.bfloat16, biased: bool = False, seed: int = 0,
    **options: Any,
) -> Layer:  # fmt: skip
    """Every sum is an integer times a power of two, so that its bits do not depend on the order of summation.

    The gate is 32 (with weights on the input 16 to 64), where silu and gelu are the identity but for 1e-7.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).double()

    x = draw(-1, 1, tokens, hidden)
    x[:, 0] = 1
    up = draw(-1, 1, experts, inter, hidden) * (torch.rand(experts, inter, hidden, generator=generator) < 3 / hidden)
    gate = torch.zeros(experts, inter, hidden, dtype=torch.float64)
    gate[:, :, 0] = 32
    w13 = {"first": torch.cat([gate, up], 1), "up_first": torch.cat([up, gate], 1),
           "interleaved": torch.stack([gate, up], 2).flatten(1, 2)}[gate_layout]  # fmt: skip
    if activation == "relu2":
        w13 = up
    w2 = draw(-2, 2, experts, hidden, inter)
    if biased:
        b13 = draw(-1, 1, experts, w13.shape[1])
        if activation != "relu2":  # none on the gate
            gates = {"first": slice(0, inter), "up_first": slice(inter, None), "interleaved": slice(0, None, 2)}
            b13[:, gates[gate_layout]] = 0
        options |= {"b13": b13.float(), "b2": draw(-8, 8, experts, hidden).to(dtype)}
    return layer_of(
        x.to(dtype), w13, w2, 2.0 ** draw(-1, 1, tokens, top_k).float(),
        torch.randint(-1, experts + 1, (tokens, top_k), dtype=torch.int32, generator=generator), seed,
        activation=activation, gate_layout=gate_layout, **options,
    )  # fmt: skip


def sources(tokens: int, top_k: int, experts: int, width: int, seed: int = 0) -> tuple[Layer, Tensor]:
    """Experts that move columns about, each its own way, and the answer: every value names where it came from."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(width, generator=generator) for _ in range(experts)])  # [E, H]
    x = torch.arange(tokens * width).reshape(tokens, width) % 61 + 1.0
    x[:, 0] = 1
    w13 = torch.zeros(experts, 2 * width, width)
    w13[:, :width, 0] = 32
    w13[:, width:] = torch.eye(width)
    w2 = torch.nn.functional.one_hot(order, width) / 32.0
    ids = torch.randint(0, experts, (tokens, top_k), generator=generator)
    expected = torch.stack([x[t][order[ids[t]]].sum(0) for t in range(tokens)])
    assert expected.max() <= 256
    layer = layer_of(x.to(torch.bfloat16), w13, w2, torch.ones(tokens, top_k), ids.int(), seed)
    return layer, expected.to(torch.bfloat16)


def randoms(seed: int = 0, activation: str = "silu", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def bytes_(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    rows = 32 if activation == "relu2" else 64
    return Layer(
        torch.randn(7, 48, generator=generator).to(dtype), bytes_(0, 256, 4, rows, 24), bytes_(0, 256, 4, 48, 16),
        torch.randn(7, 3, generator=generator).abs(),
        torch.randint(0, 4, (7, 3), dtype=torch.int32, generator=generator),
        bytes_(0x20, 0x40, 4, rows, 3), bytes_(0x20, 0x40, 4, 48, 2),  # 2^-3 to 1.875
        torch.rand(4, generator=generator) / 8, torch.rand(4, generator=generator) / 4,
        {"activation": activation, **options},
    )  # fmt: skip


def quantized(layer: Layer, x_global: float, h_global: float) -> Layer:
    globals_ = {"x_global": torch.tensor([x_global]), "h_global": torch.tensor([h_global])}
    return replace(layer, options={**layer.options, "activations": "nvfp4", **globals_})


def assert_near(got: Tensor, expected: Tensor, ulps: float) -> None:
    """Within so many steps of the dtype at each row's largest value."""
    step = torch.finfo(expected.dtype).eps * expected.double().abs().amax(dim=1, keepdim=True)
    assert ((got.double() - expected.double()).abs() <= ulps * step).all()


@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_the_reference_is_that_of_bf16_on_the_same_values(activation):
    """Without alphas, every value is one of bfloat16."""
    layer = randoms(activation=activation)
    ones = replace(layer, w13_alpha=torch.ones(4), w2_alpha=torch.ones(4))
    plain = [torch.stack([values(c, s) for c, s in zip(codes, scales, strict=True)]).bfloat16()
             for codes, scales in ((layer.w13, layer.w13_scales), (layer.w2, layer.w2_scales))]  # fmt: skip
    expected = reference_bf16(layer.x, *plain, layer.weights, layer.ids, activation=activation)
    assert torch.equal(ones.run(None), expected)
    assert torch.equal(ones.swizzled().run(None), expected)


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_code_under_every_scale(backend, dtype):
    """Token t sees code t, column r scale r: NaN at 0x7F and 0xFF, negative from 0x80."""
    x = torch.zeros(16, 256, dtype=dtype)
    x[:, :16], x[:, 16] = torch.eye(16), 1
    w13 = torch.zeros(1, 32, 256)
    w13[:, :16, 16] = 32
    w13[:, 16:, :16] = torch.eye(16) / 32
    layer = layer_of(x, w13, torch.zeros(1, 256, 16), torch.ones(16, 1), torch.zeros(16, 1, dtype=torch.int32))
    code = torch.arange(16, dtype=torch.uint8)
    layer = replace(
        layer, w2=pack(code.expand(256, 16))[None], w2_scales=torch.arange(256, dtype=torch.uint8).view(1, 256, 1),
        w2_alpha=torch.ones(1),
    )  # fmt: skip
    got = layer.run(backend)
    scale = torch.cat([E4M3, torch.tensor([math.nan]), -E4M3, torch.tensor([math.nan])])
    expected = (torch.cat([E2M1, -E2M1])[:, None] * scale[None, :]).to(dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.interpreter
@EACH
@pytest.mark.parametrize(
    ("activation", "gate_layout", "biased", "dtype"),
    [("silu", "first", False, torch.bfloat16), ("silu", "interleaved", True, torch.float16),
     ("gelu", "up_first", True, torch.bfloat16), ("relu2", "first", True, torch.bfloat16)],
)  # fmt: skip
def test_exact_on_integers(activation, gate_layout, biased, dtype, backend):
    layer = integers(9, 3, 5, 144, 48, activation=activation, gate_layout=gate_layout, dtype=dtype, biased=biased)
    expected = layer.run(None)
    assert expected.unique().numel() > 50  # it is not an answer of zeros
    assert torch.equal(layer.run(backend), expected)
    on_input = layer.run(None, apply_weight_on_input=True)
    assert torch.equal(layer.swizzled().run(backend, apply_weight_on_input=True), on_input)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "inter", "inline_slots"),
    [(1, 1, 1, 16, 16, 0), (1, 4, 8, 32, 48, 128), (5, 2, 3, 272, 80, 0), (3, 7, 1, 48, 144, 128),
     (23, 2, 1, 128, 16, 0)],
)
def test_exact_in_small_tiles(tokens, top_k, experts, hidden, inter, inline_slots):
    """Sizes that are no multiple of a block, several blocks of one expert, several tiles and steps; slots grouped by
    `align` (0), and by the programs (128)."""
    layer = integers(tokens, top_k, experts, hidden, inter, biased=True, seed=tokens)
    if experts == 1:
        layer.ids[:] = 0  # more slots than a block holds: 2 of them, and 3
    plan = replace(TILES, inline_slots=inline_slots)
    chosen = layer if tokens == 1 else layer.swizzled()
    assert torch.equal(chosen.run("small", plan=plan), layer.run(None))


@ALL
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(4, 2, 3), (30, 3, 4)])  # grouped by the programs; by `align`
def test_every_value_comes_from_its_source(tokens, top_k, experts, backend):
    layer, expected = sources(tokens, top_k, experts, 32)
    got = layer.run(backend)
    assert torch.equal(got, expected), f"tokens {(got != expected).any(1).nonzero().flatten().tolist()}"


@pytest.mark.interpreter
@EACH
@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu_oai", "relu2"])
def test_near_the_reference_on_random_data(activation, backend):
    layer = randoms(activation=activation, dtype=torch.float16 if activation == "gelu" else torch.bfloat16)
    assert_near(layer.run(backend), layer.run(None), 1.0)


@pytest.mark.interpreter
def test_quantized_activations_from_their_sources():
    """x on the grid under scales that are powers of two: exact through both quantizations."""
    layer, _ = sources(9, 2, 4, 48)
    grid = torch.cat([E2M1, -E2M1])
    x = grid[torch.arange(9 * 48).view(9, 48) * 7 % 16] * 2.0 ** (torch.arange(3) - 1).repeat_interleave(16)
    x[:, ::16] = 6 * 2.0 ** (torch.arange(3) - 1)  # the largest of each block
    made = quantized(replace(layer, x=x.bfloat16()), 1.0, 2.0)
    expected = made.run(None)
    assert expected.unique().numel() > 20
    assert torch.equal(made.run("small"), expected)
    assert torch.equal(made.swizzled().run("small"), expected)


@pytest.mark.interpreter
def test_quantized_activations_are_near_the_reference():
    """Where no store of h straddles a step of the quantizer, which these seeds have not."""
    layer = quantized(randoms(3), 448.0, 32.0)
    expected = layer.run(None)
    assert not torch.equal(expected, randoms(3).run(None))
    assert_near(layer.run("small"), expected, 2.0)


@ALL
@pytest.mark.parametrize("tokens", [4, 12])
def test_a_dropped_slot_counts_for_nothing_whatever_it_holds(backend, tokens):
    """Ids on both sides of the range; NaN where only dropped slots would read it, and in the workspace."""
    clean, _ = sources(tokens, 3, 4, 16, seed=3)
    clean.ids[:, 1] = torch.tensor([-1, 4, 2**31 - 1, -(2**31)]).int().repeat(tokens // 4)
    clean.ids[2] = torch.tensor([-1, 4, 7])
    clean.weights[:, 1] = 0.0
    expected = clean.run(None)
    assert not expected[2].any()
    dirty = replace(clean, x=clean.x.clone(), weights=clean.weights.clone())
    dirty.x[2] = math.nan
    dirty.weights[2] = math.nan
    dirty.weights[:, 1] = math.nan
    out = torch.full_like(clean.x, math.nan)
    more: dict[str, Any] = {}
    if backend:
        size = workspace_bytes(tokens, 3, 16, 16, 4, backend=backend)
        more["workspace"] = torch.full((size,), 0xFF, dtype=torch.uint8)
    assert torch.equal(dirty.run(backend, out=out, **more), expected)


@ALL
def test_nan_stays_in_its_row_and_is_not_lost(backend):
    for activation in ("silu", "relu2") if backend == "small" else ("swiglu_oai",):
        case = randoms(activation=activation)
        before = case.run(backend)
        case.x[3, 5] = math.nan
        after = case.run(backend)
        assert after[3].isnan().all()
        assert torch.equal(after[[0, 1, 2, 4, 5, 6]], before[[0, 1, 2, 4, 5, 6]])


@ALL
@pytest.mark.parametrize("tokens", [4])
def test_the_shards_of_ranks_sum_to_the_whole(backend, tokens):
    """Three ranks with 3, 2 and 1 of 6 experts, each in an order of its own."""
    whole, expected = sources(tokens, 3, 6, 16)
    total = torch.zeros(tokens, 16)
    for here in ([4, 0, 2], [5, 1], [3]):
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[torch.tensor(here)] = torch.arange(len(here), dtype=torch.int32)
        names = ("w13", "w2", "w13_scales", "w2_scales", "w13_alpha", "w2_alpha")
        shard = replace(whole, **{name: getattr(whole, name)[here] for name in names})
        total += shard.run(backend, expert_map=expert_map).float()
    assert torch.equal(total.to(torch.bfloat16), expected)


@ALL
def test_no_tokens(backend):
    case, _ = sources(2, 2, 3, 16)
    empty = replace(case, x=case.x[:0], ids=case.ids[:0], weights=case.weights[:0])
    out = torch.empty(0, 16, dtype=torch.bfloat16)
    assert empty.run(backend, out=out) is out
    assert empty.run(backend).shape == (0, 16)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("view", "backend"),
    [("columns", "small"), ("transposed", "small"), ("ids", "small"), ("int64", "small"), ("ids", "large")],
)
def test_any_strides_of_what_is_not_weights(view, backend):
    layer = packed = randoms(1)
    if view == "columns":
        layer = replace(layer, x=layer.x.repeat_interleave(3, dim=1)[:, ::3], weights=layer.weights.t().clone().t())
    elif view == "transposed":
        layer = replace(layer, x=layer.x.t().clone().t())
    elif view == "ids":
        layer = replace(layer, ids=torch.stack([layer.ids, layer.ids - 9], 2)[:, :, 0])
    else:
        layer = replace(layer, ids=layer.ids.long() + (layer.ids == 2) * 2**32)  # out of range, not expert 2
        packed = replace(packed, ids=torch.where(packed.ids == 2, -1, packed.ids))
    assert torch.equal(layer.run(backend), packed.run(backend))


@pytest.mark.interpreter
@EACH
def test_a_workspace_serves_many_calls(backend):
    size = workspace_bytes(30, 3, 32, 32, 4, backend=backend)
    workspace = torch.full((size + 16,), 0x7F, dtype=torch.uint8)
    for tokens in (30, 1, 12):
        case, expected = sources(tokens, 3, 4, 32)
        assert torch.equal(case.run(backend, workspace=workspace), expected)
    with pytest.raises(ValueError, match="workspace must be at least"):
        case.run(backend, workspace=workspace[:1000])
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        case.run(backend, workspace=workspace[8:])


def test_the_choice_of_a_backend(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose_backend(8, 128, False) == "small"
    assert choose_backend(LARGE_FROM * 8, 8, False) == "large"
    assert choose_backend(LARGE_FROM * 8, 8, True) == "small"  # quantized activations
    monkeypatch.setenv(VARIABLE, "large")
    assert choose_backend(8, 128, False) == "large"
    assert choose_backend(8, 128, False, "small") == "small"  # the argument wins
    with pytest.raises(ValueError, match="'large' cannot quantize activations; possible here: small"):
        choose_backend(8, 128, True)
    monkeypatch.setenv(VARIABLE, "cutlass")
    with pytest.raises(ValueError, match="'cutlass' does not exist; possible here: small, large"):
        choose_backend(8, 128, False)
    assert "backend cutlass, forced by" in rule()
    monkeypatch.setenv(VARIABLE, "large")
    assert formats() == ("as_given",)
    monkeypatch.delenv(VARIABLE)
    assert formats() == ("as_given", "nvfp4")
    assert f"backend large from {LARGE_FROM} slots an expert" in rule()
    assert choose_backend(8, 128, True, None, (10, 0)) == "small"  # never unasked
    assert choose_backend(8, 128, True, SCALED, (10, 0)) == SCALED
    with pytest.raises(ValueError, match="'scaled' needs sm_100; possible here: small"):
        choose_backend(8, 128, True, SCALED, (9, 0))
    with pytest.raises(ValueError, match="'scaled' needs quantized activations; possible here: small, large"):
        choose_backend(8, 128, False, SCALED, (10, 0))


def test_the_table_has_a_plan_for_everything():
    assert [plan.up_to for plan in PLANS] == sorted({plan.up_to for plan in PLANS})
    assert choose(1, 8192) is PLANS[0]
    assert choose(1 << 20, 1) is PLANS[-1]
    with pytest.raises(ValueError, match="both products need the same m"):
        replace(TILES, down=replace(TILES.down, m=32))
    with pytest.raises(ValueError, match="d must be a multiple of 128"):
        replace(TILES, down=replace(TILES.down, d=64))


@pytest.mark.parametrize("backend", ["small", None], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w13": torch.zeros(3, 32, 12, dtype=torch.uint8)}, "w13 must be uint8 .*a multiple of 16"),
        ({"w13": torch.zeros(3, 16, 8, dtype=torch.uint8)}, "w13 must be"),
        ({"w2": torch.zeros(3, 16, 8)}, "w2 must be uint8"),
        ({"w13_scales": torch.zeros(3, 32, 2, dtype=torch.uint8)}, "w13_scales must be"),
        ({"w2_scales": torch.zeros(3, 16, 1)}, "w2_scales must be"),
        ({"w2_alpha": torch.zeros(2)}, "w2_alpha must be"),
        ({"w13_alpha": torch.zeros(6)[::2]}, "w13_alpha must be contiguous"),
        ({"x": torch.zeros(2, 16)}, "x must be"),
        ({"weights": torch.zeros(2, 1)}, "weights must be"),
    ],
)
def test_refuses_what_it_cannot_take(backend, change, message):
    case, _ = sources(2, 2, 3, 16)
    with pytest.raises(ValueError, match=message):
        replace(case, **change).run(backend)


@pytest.mark.parametrize("backend", ["small", None], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_layout": "8x4"}, "scale_layout must be one of"),
        ({"scale_layout": "swizzled"}, "w13_scales must be"),
        ({"activations": "fp8"}, "activations must be one of"),
        ({"activations": "nvfp4"}, "x_global must be given"),
        ({"x_global": torch.ones(1)}, "x_global must be given"),
        ({"activation": "swish"}, "activation must be one of"),
    ],
)
def test_refuses_options_it_cannot_take(backend, options, message):
    case, _ = sources(2, 2, 3, 16)
    with pytest.raises(ValueError, match=message):
        case.run(backend, **options)
