"""`experts_nvfp4`: the reference against that of bf16, the kernels against exact answers, in the interpreter."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz.kernels.experts_nvfp4 import BACKENDS, blocks, choose_backend, devices, formats, rule, workspace_bytes
from moe_fuzz.kernels.experts_nvfp4.blocks import (
    DEEP,
    EVERY_PLAN,
    FEW,
    LARGE_FROM,
    NARROW,
    PLANS,
    SCALED,
    VARIABLE,
    WIDE,
    Plan,
    Tile,
    choose,
    tile_of,
)
from moe_fuzz.reference.experts_bf16 import experts_bf16 as reference_bf16
from moe_fuzz.reference.experts_nvfp4 import values
from moe_fuzz.reference.nvfp4 import E2M1, E4M3, pack
from tests.cpu.experts_layers import assert_near, drop_slots, shards, soiled, strided
from tests.cpu.nvfp4_layers import integers, layer_of, quantized, randoms, sources

# numpy mentions the NaN and the infinity that some tests are about
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

ALL = pytest.mark.parametrize(
    "backend",
    [pytest.param("small", marks=pytest.mark.interpreter), pytest.param("large", marks=pytest.mark.interpreter), None],
    ids=["small", "large", "reference"],
)
EACH = pytest.mark.parametrize("backend", BACKENDS)
TILES = Plan(0, Tile(16, 128, 128, 2, 4, 1), Tile(16, 64, 128, 1, 4, 1))  # several tiles of small sizes


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


@ALL
def test_a_large_alpha_is_no_infinity(backend):
    """What decoded weights are short of is 256, which times such an alpha is more than float32 has."""
    layer = integers(3, 1, 1, 32, 32, activation="relu2")
    tiny = replace(layer, x=layer.x * 2.0**-126, w13_alpha=layer.w13_alpha * 2.0**124, w2_alpha=layer.w2_alpha / 8)
    assert tiny.run(None).isfinite().all()
    assert torch.equal(tiny.run(backend), tiny.run(None))
    assert not replace(tiny, x=torch.zeros_like(layer.x)).run(backend).any()


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
    ("tokens", "top_k", "experts", "hidden", "inter"),
    [(1, 1, 1, 16, 16), (1, 4, 8, 32, 48), (5, 2, 3, 272, 80), (3, 7, 1, 48, 144), (23, 2, 1, 128, 16)],
)
def test_exact_in_small_tiles(tokens, top_k, experts, hidden, inter):
    """Sizes that are no multiple of a block, several blocks of one expert, several tiles and steps."""
    layer = integers(tokens, top_k, experts, hidden, inter, biased=True, seed=tokens)
    if experts == 1:
        layer.ids[:] = 0  # more slots than a block holds: 2 of them, and 3
    chosen = layer if tokens == 1 else layer.swizzled()
    assert torch.equal(chosen.run("small", plan=TILES), layer.run(None))


@ALL
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(4, 2, 3), (30, 3, 4)])
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
    drop_slots(clean)
    expected = clean.run(None)
    assert not expected[2].any()
    dirty = soiled(clean)
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
    whole, expected = sources(tokens, 3, 6, 16)
    total = torch.zeros(tokens, 16)
    for here, expert_map in shards():
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
    layer, packed = strided(randoms(1), view)
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
    assert devices() == ("cpu", "cuda")
    monkeypatch.setenv(VARIABLE, SCALED)
    monkeypatch.setattr(blocks, "scales", lambda: False)
    assert devices() == ()
    assert rule().endswith(", which needs sm_100")
    monkeypatch.delenv(VARIABLE)
    assert choose_backend(8, 128, True, None, (10, 0)) == "small"  # never unasked
    assert choose_backend(8, 128, True, SCALED, (10, 0)) == SCALED
    with pytest.raises(ValueError, match="'scaled' needs sm_100; possible here: small"):
        choose_backend(8, 128, True, SCALED, (9, 0))
    with pytest.raises(ValueError, match="'scaled' needs quantized activations; possible here: small, large"):
        choose_backend(8, 128, False, SCALED, (10, 0))


def test_the_table_has_a_plan_for_everything():
    assert [FEW, *(plan.up_to for plan in PLANS)] == sorted({FEW, *(plan.up_to for plan in PLANS)})
    sizes = (128, (1536, 2048), (2048, 768), 132)
    assert choose(1 << 20, 128, *sizes) is PLANS[-1]
    assert choose(FEW * 128 + 1, 128, *sizes) is PLANS[0]
    for slots in (1, 128, 129, FEW * 128):
        plan = choose(slots, 128, *sizes)
        assert plan.up_to == FEW
        assert any(plan.gate_up == one.gate_up for one in EVERY_PLAN)


def test_tiles_of_few_slots_an_expert():
    assert tile_of(4096, 384, 50, 132) == WIDE  # 1,600 tiles, short rows
    assert tile_of(4096, 384, 8, 132) == NARROW  # 256: as many multiprocessors would have one as two
    assert tile_of(1536, 2048, 125, 132) == WIDE  # 1,500 tiles
    assert tile_of(1536, 2048, 50, 132) == NARROW  # 600
    assert tile_of(768, 4096, 50, 132) == DEEP
    assert tile_of(1024, 2688, 22, 132) == DEEP  # 352 tiles of 64 rows: all run at once
    assert tile_of(2688, 1024, 22, 132) == NARROW  # 924
    assert tile_of(768, 4096 + 128, 50, 132) == NARROW  # its last step would be half empty
    few = choose(64, 128, 128, (1536, 2048), (2048, 768), 132)
    assert (few.gate_up, few.down) == (NARROW, WIDE)
    # Of 64 slots on 256 experts 7 or 8 go to the 32 that are here: too few tiles of 128 rows.
    one_of_eight = choose(64, 256, 32, (4096, 2048), (7168, 2048), 132)
    assert (one_of_eight.gate_up, one_of_eight.down) == (NARROW, NARROW)


def test_the_table_refuses_what_cannot_run():
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
