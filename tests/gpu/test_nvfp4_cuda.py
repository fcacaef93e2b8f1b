"""nvfp4_quantize compiled: the reference's bytes, one launch, captured, beyond 2^31; campaigns' cases in every mode."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_fuzz import strategies
from moe_fuzz.kernels.nvfp4 import nvfp4_quantize
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.reference.nvfp4 import E4M3
from moe_fuzz.reference.nvfp4 import nvfp4_quantize as reference
from moe_fuzz.verdict import Verdict
from moe_fuzz.worker.pool import Pool
from tests.gpu.telling import all_pass

pytestmark = [pytest.mark.gpu, pytest.mark.compiled]

SPACE = get_space("nvfp4_quantize")
OPTIONS = RunOptions(deadline=20.0, first_deadline=120.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = pytest.mark.parametrize("layout", ["linear", "swizzled"])


def data(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Of many magnitudes, a row each; zeros, NaN and Inf among them."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draw) * torch.randint(-20, 8, (rows, 1), generator=draw).float().exp2()
    if rows > 3:
        x[0, 3], x[1, 5], x[2, :16], x[3, 7] = torch.nan, torch.inf, 0.0, -torch.inf
    return x.to(dtype)


def same(got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> bool:
    pairs = zip(got, expected, strict=True)
    return all(torch.equal(one.cpu().view(torch.uint8), other.view(torch.uint8)) for one, other in pairs)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_of_the_host(dtype: torch.dtype, layout: str) -> None:
    shapes = ((0, 64), (1, 16), (3, 48), (127, 80), (128, 64), (129, 208), (300, 16), (33, 7168), (1000, 2880))
    for rows, columns in shapes:
        x = data(rows, columns, dtype)
        for number in (1.0, 37.3, 2.0**-120, 2.0**127, 2688 / 4, 0.0, float("inf"), float("nan")):
            scale = torch.tensor([number])
            got = nvfp4_quantize(x.cuda(), scale.cuda(), layout)
            assert same(got, reference(x, scale, layout)), (rows, columns, number)


@LAYOUTS
def test_a_scale_for_each_expert_and_strides(layout: str) -> None:
    x, scales = data(500, 192, torch.bfloat16), torch.tensor([1.0, 99.0, 0.0, 7.0, 30.0, 1e-3])
    ids = torch.arange(500) % 9 - 1
    expected = reference(x, scales, layout, expert_ids=ids)
    for wanted in (torch.int32, torch.int64):
        got = nvfp4_quantize(x.cuda(), scales.cuda(), layout, expert_ids=ids.to(wanted).cuda())
        assert same(got, expected)
    wide = torch.zeros(500, 300, dtype=torch.bfloat16)
    wide[:, 5:197] = x
    assert same(nvfp4_quantize(wide.cuda()[:, 5:197], scales[1:2].cuda(), layout), reference(x, scales[1:2], layout))
    turned = x.cuda().T.contiguous().T
    assert same(nvfp4_quantize(turned, scales[1:2].cuda(), layout), reference(x, scales[1:2], layout))


def test_every_tie() -> None:
    middle = (E4M3[1:] + E4M3[:-1]) / 2
    x = torch.zeros(3 * 126, 16)
    x[:, 5] = torch.cat([middle, torch.nextafter(middle, middle - 1), torch.nextafter(middle, middle + 1)])
    for number in range(1, 300):
        scale = torch.tensor([float(number)])
        moved = x * (6 / scale)
        assert same(nvfp4_quantize(moved.cuda(), scale.cuda()), reference(moved, scale)), number
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    blocks = torch.cat([torch.full((1,), 6.0), ties, -ties, torch.tensor([-0.0])]).repeat(126, 1) * E4M3[1:, None]
    for number in range(1, 300):
        scale = torch.tensor([float(number)])
        moved = blocks / scale
        assert same(nvfp4_quantize(moved.cuda(), scale.cuda()), reference(moved, scale)), number


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_with_silu(dtype: torch.dtype) -> None:
    up = data(200, 256, dtype, seed=4).nan_to_num(0.0, 0.0, 0.0)
    x = torch.cat([torch.full_like(up, 32.0), up], dim=1)  # silu(32) is 32 in float32
    scale = torch.tensor([11.0])
    assert same(nvfp4_quantize(x.cuda(), scale.cuda(), activation="silu"), reference(x, scale, activation="silu"))
    x = torch.randn(400, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = nvfp4_quantize(x.cuda(), scale.cuda(), activation="silu")
    expected = reference(x, scale, activation="silu")
    differ = (got[0].cpu() != expected[0]).float().mean()
    assert differ < 0.01


@LAYOUTS
def test_it_is_one_launch_that_can_be_captured(layout: str) -> None:
    x, scale = data(130, 208, torch.bfloat16).cuda(), torch.tensor([50.0], device="cuda")
    out = nvfp4_quantize(x, scale, layout)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        nvfp4_quantize(x, scale, layout)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nvfp4_quantize(x, scale, layout, out=out)
    for seed in (1, 2, 3):
        fresh = data(130, 208, torch.bfloat16, seed)
        x.copy_(fresh)
        for part in out:
            part.view(torch.uint8).fill_(0xA5)
        graph.replay()
        assert same(out, reference(fresh, scale.cpu(), layout))


def test_beyond_2_to_the_31_elements() -> None:
    rows, columns = (1 << 20) + 3, 4096  # 2^32 elements, 2^31 bytes of codes
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of free GPU memory")
    x = torch.zeros((rows, columns), dtype=torch.bfloat16, device="cuda")
    tail = data(5, columns, torch.bfloat16)
    x[-5:] = tail.cuda()
    scale = torch.tensor([100.0])
    codes, scales = nvfp4_quantize(x, scale.cuda())
    expected = reference(tail, scale)
    assert same((codes[-5:], scales[-5:]), expected)
    assert not codes[:-5].any()


# ---- through the fuzzer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["nvfp4_quantize@builtin", "nvfp4_quantize@torch"])
def test_ours_pass_in_every_mode(pool: Pool, target: str) -> None:
    cases = list(itertools.islice(strategies.grid(SPACE, pool.describe(target), "cuda", seed=9), 96))
    with pool.lease(target) as worker:
        verdicts: list[Verdict] = list(worker.run(cases, target, OPTIONS))
    all_pass(cases, verdicts)
    assert {case.mode for case in cases} == {"eager", "graph", "piecewise"}
    assert sum(verdict.parity for verdict in verdicts) > 30
