"""Marlin's order of weights and its scales, read as the kernel's threads read them; and a layer of its calls."""

from __future__ import annotations

import math
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz.contract import TargetInfo
from moe_fuzz.execute import clock
from moe_fuzz.kernels.align import align
from moe_fuzz.reference.experts_nvfp4 import experts_nvfp4 as reference
from moe_fuzz.reference.nvfp4 import E2M1, E4M3
from moe_fuzz.targets import vllm_marlin
from moe_fuzz.targets.marlin_layout import MarlinWeights, marlin_weights
from moe_fuzz.targets.schema import BoundCall, bind_operator

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def draw(experts: int, rows: int, columns: int, low: int, high: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(low, high, (experts, rows, columns // 16), dtype=torch.uint8, generator=generator)
    return codes, scales, 2.0 ** torch.randint(-9, 2, (experts,), generator=generator).float()


def bits(number: int, dtype: torch.dtype) -> float:
    return float(torch.tensor([number], dtype=torch.int32).to(torch.int16).view(dtype))


def seen(weights: MarlinWeights, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """float64 [R, C]: what the threads of one warp multiply, by the instruction's fragments and the kernel's masks.

    A thread's operand of mma.m16n8k16 is columns 2 (lane % 4) + {0, 1, 8, 9} of row lane / 4. Of a word, shifted left
    by 8 and then as it is, the two halves' highest nibbles are the second pair of columns, the next ones the first.
    """
    exponent = 14 if dtype == torch.float16 else 126
    codes, scales = weights.codes[expert], weights.scales[expert].view(torch.uint8)
    found = torch.full((scales.shape[1], 16 * codes.shape[0]), math.nan, dtype=torch.float64)
    for tile_k in range(codes.shape[0]):
        for tile_n in range(scales.shape[1] // 64):
            for lane in range(32):
                at = scales[tile_k, 64 * tile_n + lane // 4 * 8 :][:8].tolist()
                factors = [fragment(at[4 * half + i], dtype) for half in (0, 1) for i in (0, 2, 1, 3)]
                for j in range(4):
                    word = int(codes[tile_k, 128 * tile_n + 4 * lane + j]) & 0xFFFFFFFF
                    for block, quant in enumerate((word << 8 & 0xFFFFFFFF, word)):
                        row = 64 * tile_n + 16 * j + 8 * block + lane // 4
                        for second, shifted in ((8, quant), (0, quant << 4 & 0xFFFFFFFF)):
                            for odd in (0, 1):
                                code = shifted >> 16 * odd + 12 & 15
                                value = float(E2M1[code & 7]) * (-1 if code & 8 else 1) * 2.0**-exponent
                                column = 16 * tile_k + 2 * (lane % 4) + second + odd
                                assert math.isnan(found[row, column])
                                found[row, column] = value * factors[2 * j + block]
    return found * float(weights.globals[expert].double())


def fragment(byte: int, dtype: torch.dtype) -> float:
    """A scale as the kernel's shifts make it, out of eight bits that stand in the upper half of 16."""
    if dtype == torch.float16:
        return bits(byte << 8 >> 1, dtype)
    return bits((byte << 8 & 0x8000) >> 1 | (byte << 8 & 0x7F00) >> 4, dtype)


@DTYPES
@pytest.mark.parametrize(("low", "high"), [(0x30, 0x40), (8, 0x7F), (0, 16)])
def test_threads_see_the_weights(dtype: torch.dtype, low: int, high: int) -> None:
    codes, scales, alpha = draw(2, 128, 64, low, high)
    scales[0, :3, :2] = 0
    made = marlin_weights(codes, scales, alpha, dtype)
    assert made.codes.shape == (2, 4, 256)
    assert made.scales.shape == (2, 4, 128)
    assert not made.problem
    code = torch.stack([codes & 15, codes >> 4], dim=3).flatten(2).long()
    values = torch.cat([E2M1, -E2M1]).double()[code] * E4M3.double()[scales.long()].repeat_interleave(16, dim=2)
    for expert in range(2):
        assert torch.equal(seen(made, expert, dtype), values[expert] * float(alpha[expert]))


def test_what_the_format_does_not_hold_is_told() -> None:
    codes, scales, alpha = draw(1, 64, 32, 0x30, 0x40)
    for bytes_, problem in (((1, 0x6F), False), ((1, 0x7E), True), ((0x7F, 0x7F), True), ((0xB0, 0x30), True)):
        scales[0, 5, 0], scales[0, 6, 1] = bytes_
        assert bool(marlin_weights(codes, scales, alpha, torch.bfloat16).problem) == problem, bytes_
    scales[0, 5, 0], scales[0, 6, 1] = 1, 0x7E
    assert not marlin_weights(codes, scales, alpha, torch.float16).problem


def plainly(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Codes [C/16, 2 R] int32 and scale bytes [C/16, R] of one expert nibble by nibble and byte by byte, and the power
    of two by which its scales were multiplied."""
    rows, half = codes.shape
    nibbles = torch.stack([codes & 15, codes >> 4], dim=2).reshape(rows, 2 * half).long()
    word, nibble = torch.meshgrid(torch.arange(rows * half // 4), torch.arange(8), indexing="ij")
    tile, lane, j = word // 128, word % 128 // 4, word % 4
    b, c, odd = nibble % 4 // 2, nibble % 2, nibble // 4
    tile_k, tile_n = tile // (rows // 64), tile % (rows // 64)
    value = nibbles[64 * tile_n + 16 * j + 8 * b + lane // 4, 16 * tile_k + 8 * c + 2 * (lane % 4) + odd]
    words = (value << 4 * nibble).sum(dim=1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int().view(half // 8, 2 * rows)
    wide = (E4M3.float()[scales.long() % 0x7F] * 2**7).half().view(torch.int16) >> 7  # 5 bits of exponent: none is lost
    wide = torch.where((scales == 0) | (scales > 0x7E), 0, wide)
    least = int(wide[wide > 0].min()) >> 3 if (wide > 0).any() else 31
    shift = 0 if dtype == torch.float16 else max(16 - least, 0)
    moved = torch.where(wide > 0, wide + 8 * shift, 0).to(torch.uint8)
    at = [64 * (i // 64) + i % 64 // 8 + 8 * (i % 8 // 4 * 4 + (0, 2, 1, 3)[i % 4]) for i in range(rows)]
    return words, moved[at].t(), shift


@DTYPES
@pytest.mark.parametrize(("experts", "rows", "columns"), [(1, 64, 64), (3, 64, 128), (7, 128, 128), (33, 128, 64),
                                                          (2, 320, 448), (192, 64, 64), (512, 64, 64)])  # fmt: skip
def test_experts_together_are_each_alone(experts: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    for low, high in ((0, 0x100), (0, 0x7F), (0x30, 0x40), (0, 1), (0, 8), (0x7F, 0x100)):
        codes, scales, alpha = draw(experts, rows, columns, low, high, seed=rows)
        made = marlin_weights(codes, scales.view(torch.float8_e4m3fn), alpha, dtype)
        for expert in {0, experts // 2, experts - 1}:
            words, bytes_, shift = plainly(codes[expert], scales[expert], dtype)
            assert torch.equal(made.codes[expert], words)
            assert torch.equal(made.scales[expert].view(torch.uint8), bytes_), (low, high)
            bias = 14 - 7 if dtype == torch.float16 else 126 - 7
            assert float(made.globals[expert]) == float(alpha[expert]) * 2.0 ** (bias - shift)


def test_what_is_promised_of_findings() -> None:
    info = TargetInfo("experts_nvfp4@vllm", "experts_nvfp4", "vllm", clauses=vllm_marlin._CLAUSES,
                      unpromised=vllm_marlin._UNPROMISED)  # fmt: skip
    assert info.classify("finite", "infinite", {"dtype=float16", "fault:ladder"})[0] == "contract"
    assert info.classify("finite", "nan", {"fault:extreme_weights"}) == (
        "robustness", vllm_marlin._UNPROMISED["finite @ fault:extreme_weights"])  # fmt: skip
    assert info.classify("finite", "nonfinite-lost")[0] == "robustness"
    assert info.classify("bound", "off") == ("robustness", vllm_marlin._UNPROMISED["bound"])


# ---- the layer ------------------------------------------------------------------------------------------------------

_FIRST = ("(Tensor! a, Tensor? c_or_none,Tensor! b_q_weight, Tensor? b_bias_or_none,Tensor! b_scales, "
          "Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none,")  # fmt: skip
_SECOND = ("Tensor! workspace,Tensor sorted_token_ids,Tensor! expert_ids, Tensor! num_tokens_past_padded,"
           "Tensor! topk_weights, int moe_block_size, int top_k, bool mul_topk_weights, int b_type_id,int size_m, "
           "int size_n, int size_k,")  # fmt: skip
_THIRD = ("bool use_atomic_add,bool use_fp32_reduce, bool is_zp_float,int thread_k, int thread_n, int blocks_per_sm) "
          "-> Tensor")  # fmt: skip
#: As the libraries of these releases register it.
SCHEMAS = {
    "vllm 0.20.0 and 0.24.0": f"{_FIRST}Tensor? g_idx_or_none, Tensor? perm_or_none, {_SECOND}bool is_k_full, {_THIRD}",
    "vllm 0.33.0": f"{_FIRST} {_SECOND} {_THIRD}",
}


def multiply(**given: Any) -> torch.Tensor:
    """The operator, by what its threads see: sums times the global scale, stored in the dtype. With weights it is the
    sums that are stored, and then multiplied by weight * global scale, rounded to the dtype."""
    a, c, top_k = given["a"], given["c_or_none"], given["top_k"]
    assert (given["size_m"], given["size_n"], given["size_k"]) == (a.shape[0], c.shape[1], a.shape[1])
    assert given["b_type_id"] == 562949953487106
    block, slots = given["moe_block_size"], a.shape[0] * top_k
    factors, weighted = given["global_scale"], given["mul_topk_weights"]
    weights = MarlinWeights(given["b_q_weight"], given["b_scales"], torch.ones_like(factors), torch.tensor(False))
    for nth in range(int(given["num_tokens_past_padded"]) // block):
        expert = int(given["expert_ids"][nth])
        matrix = seen(weights, expert, a.dtype)
        for slot in given["sorted_token_ids"][nth * block : (nth + 1) * block].tolist():
            if slot < slots:
                sums = matrix @ a[slot // top_k].double()
                c[slot] = (sums if weighted else sums * factors[expert].double()).to(a.dtype)
                if weighted:
                    c[slot] *= (given["topk_weights"].flatten()[slot] * factors[expert]).to(a.dtype)
    return c


@pytest.mark.parametrize("release", SCHEMAS)
def test_it_binds_by_the_schema(release: str) -> None:
    library = torch.library.Library(f"marlin_{len(release)}", "DEF")
    library.define(f"moe_wna16_marlin_gemm{SCHEMAS[release]}")
    operator = getattr(torch.ops, f"marlin_{len(release)}").moe_wna16_marlin_gemm.default
    call = bind_operator(operator, vllm_marlin._NAMES, vllm_marlin._REQUIRED)
    assert [name for name, _ in call.plan] == [a.name for a in operator._schema.arguments]


def layer_of(function: Any = multiply) -> vllm_marlin.Layer:
    operator = type("Operator", (), {"__call__": staticmethod(function)})()
    names = {role: name for name, role in vllm_marlin._NAMES.items() if isinstance(role, str)}
    names["padded"] = "num_tokens_past_padded"
    plan = [(names[role], role) for role in vllm_marlin._REQUIRED] + [
        (name, name) for name in ("top_k", "mul_topk_weights")
    ]
    plan += [("b_type_id", vllm_marlin._NAMES["b_type_id"])]
    layer = vllm_marlin.Layer(BoundCall(operator, "", tuple(plan), ""), lambda ids, block, experts, expert_map: align(
        ids, block, experts if expert_map is None else 2, expert_map=expert_map)[:3])  # fmt: skip
    layer._locks[torch.device("cpu")] = torch.zeros(1, dtype=torch.int32)
    return layer


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_a_layer_is_the_references(activation: str) -> None:
    layer = layer_of()
    generator = torch.Generator().manual_seed(1)
    rows = 64 if activation == "relu2" else 128
    (w13, s13, a13), (w2, s2, a2) = draw(2, rows, 128, 0x20, 0x30), draw(2, 128, 64, 0x20, 0x30, seed=1)
    x = torch.randn(3, 128, generator=generator).bfloat16()
    weights = torch.rand(3, 2, generator=generator)
    ready = vllm_marlin.prepared((w13, s13, a13), (w2, s2, a2), x.dtype)
    for expert_map in (None, torch.tensor([1, -1, 0], dtype=torch.int32)):
        ids = torch.tensor([[0, 1], [1, 0], [1, 1]] if expert_map is None else [[0, 1], [2, 0], [1, 1]]).int()
        found = layer.run(x, *ready, weights, ids, expert_map, activation, False, None)
        expected = reference(x, w13, w2, weights, ids, s13, s2, a13, a2, activation=activation, expert_map=expert_map)
        scale = expected.double().abs().amax(dim=1, keepdim=True)
        assert scale.max() > 1e-3
        assert ((found.double() - expected.double()).abs() <= 2**-6 * scale).all()


@pytest.mark.interpreter
@pytest.mark.parametrize(("activation", "value"), [("relu2", math.nan), ("relu2", math.inf), ("silu", math.nan)])
def test_a_layer_loses_no_nan(activation: str, value: float) -> None:
    """One in x, or in either global scale: nothing between the kernel's products hides it."""
    layer, dtype = layer_of(), torch.bfloat16
    w13, w2 = draw(2, 64 if activation == "relu2" else 128, 64, 0x20, 0x30), draw(2, 64, 64, 0x20, 0x30, seed=1)
    weights, ids = torch.full((2, 1), 0.5), torch.tensor([[0], [1]]).int()
    for place in ("x", "w13", "w2"):
        x = torch.ones(2, 64, dtype=dtype)
        given = {"x": x[1], "w13": w13[2].clone(), "w2": w2[2].clone()}
        given[place][1] = value
        ready = vllm_marlin.prepared((*w13[:2], given["w13"]), (*w2[:2], given["w2"]), dtype)
        assert ready[1].globals[1].isfinite() == (place != "w2")
        y = layer.run(x, *ready, weights, ids, None, activation, False, None)
        whole = place == "w2" or math.isnan(value)  # else relu2 and silu make 0 of some
        assert y[0].isfinite().all()
        assert not (y[1].isfinite().any() if whole else y[1].isfinite().all())


def test_weights_written_behind_torchs_back_are_read() -> None:
    """Fences fill tensors through another address, and no version tells: `relabel` met the weights of the call before.
    """
    first, other = draw(1, 64, 32, 0x30, 0x40), draw(1, 64, 32, 0x30, 0x40, seed=1)
    vllm_marlin.prepared(first, first, torch.bfloat16)
    versions = [t._version for t in first]
    for tensor, value in zip(first, other, strict=True):
        tensor.numpy()[...] = value.numpy()
    assert [t._version for t in first] == versions
    for made in vllm_marlin.prepared(first, first, torch.bfloat16):
        expected = marlin_weights(*other, torch.bfloat16)
        assert torch.equal(made.codes, expected.codes)
        assert torch.equal(made.scales.view(torch.uint8), expected.scales.view(torch.uint8))
        assert torch.equal(made.globals, expected.globals)


def test_a_server_makes_weights_ready_once_and_anew_where_they_change() -> None:
    prepare = vllm_marlin.Prepared()
    first, other = draw(1, 64, 32, 0x30, 0x40), draw(1, 64, 32, 0x30, 0x40)
    ready = prepare(first, other, torch.bfloat16)
    assert prepare(first, other, torch.bfloat16) is ready
    assert prepare(first, other, torch.float16) is not ready
    other[1][0, 0, 0] = 0x7F
    with pytest.raises(ValueError, match="16 powers of two"):
        prepare(first, other, torch.bfloat16)


@pytest.mark.interpreter
def test_the_drivers_compilation_of_a_dtype_does_not_count() -> None:
    """It happens in the first launch, while the clock stands still: and in no later one."""
    told: list[str] = []

    def launched(**given: Any) -> torch.Tensor:
        told.append("launch")
        return multiply(**given)

    layer = layer_of(launched)
    w13, w2 = draw(1, 64, 64, 0x20, 0x30), draw(1, 64, 64, 0x20, 0x30)
    weights, ids = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    with clock.heard(lambda event: told.append(" ".join(f"{what} {why}" for what, why in event.items()))):
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float16):
            ready = vllm_marlin.prepared(w13, w2, dtype)
            layer.run(torch.ones(1, 64, dtype=dtype), *ready, weights, ids, None, "relu2", False, None)
    first, rest = ["still compile", "launch", "goes compile", "launch"], ["launch", "launch"]
    assert told == [*first, *rest, *first]
