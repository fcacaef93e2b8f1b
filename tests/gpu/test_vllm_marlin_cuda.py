"""vLLM's Marlin kernel for NVFP4 on a GPU: bound, given weights in its order, and right.

Needs MOE_FUZZ_VLLM_LIB, or the package.
"""

from __future__ import annotations

import os

import pytest
import torch

from moe_fuzz.bench.layer_child import make_sets, verify
from moe_fuzz.bench.layer_weights import make_weights
from moe_fuzz.bench.layers import OP_NVFP4
from moe_fuzz.bench.points import Point
from moe_fuzz.options import LIB_VARIABLES
from moe_fuzz.targets import sources
from moe_fuzz.targets.bind import Target, bind_at

pytestmark = [pytest.mark.gpu, pytest.mark.compiled]


@pytest.fixture(scope="module")
def marlin() -> Target:
    if not (os.environ.get(LIB_VARIABLES["vllm"]) or sources.installed("vllm")):
        pytest.skip(f"vllm is not installed, and {LIB_VARIABLES['vllm']} is not set")
    return bind_at(OP_NVFP4, "vllm", "moe_fuzz.targets.vllm_marlin:experts_nvfp4()")


def point(tokens: int, hidden: int, inter: int, **more: object) -> Point:
    config = {"experts": 16, "local": 16, "top_k": 4, "hidden": hidden, "inter": inter, "activation": "silu",
              "gate_layout": "first", "bias": False, **more}  # fmt: skip
    return Point(OP_NVFP4, "small", tokens, config)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize(("hidden", "inter"), [(128, 64), (256, 192), (1024, 448)])
def test_it_is_right(marlin: Target, hidden: int, inter: int, activation: str) -> None:
    for tokens, local in ((1, 16), (3, 16), (40, 8), (300, 16)):
        given = make_sets(at := point(tokens, hidden, inter, activation=activation, local=local), make_weights(at))
        for arguments in given[:2]:
            assert verify(marlin, arguments) < 2**-6, at


def test_scales_of_every_size(marlin: Target) -> None:
    at = point(20, 256, 128)
    for low, high, dtype in ((1, 0x40, torch.bfloat16), (8, 0x7F, torch.bfloat16), (0, 0x7F, torch.float16)):
        weights = make_weights(at)
        for name in ("w13_scales", "w2_scales"):
            weights[name].copy_(torch.randint(low, high, weights[name].shape, dtype=torch.uint8, device="cuda"))
            scale = 2.0 ** -((high >> 3) - 7)  # so that numbers stay in range
            weights[f"{name.partition('_')[0]}_alpha"].mul_(scale)
        (arguments, *_) = make_sets(at, weights)
        arguments |= {"x": arguments["x"].to(dtype), "out": arguments["out"].to(dtype)}
        arguments["weights"] = arguments["weights"].float()
        assert verify(marlin, arguments) < 2**-6, (low, high, dtype)


def test_a_graph_replays_other_tokens(marlin: Target) -> None:
    at = point(9, 256, 128)
    first, second, *_ = make_sets(at, make_weights(at))
    given = {name: value for name, value in first.items() if name != "decoded"}
    before = marlin(given).double().clone()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        marlin(given)
    for name in ("x", "weights", "ids"):
        given[name].copy_(second[name])
    for name in ("w13", "w2", "w13_scales", "w2_scales", "w13_alpha", "w2_alpha"):  # other experts, as `relabel` does
        given[name].copy_(given[name].roll(1, 0))
    graph.replay()
    replayed = given["out"].clone()
    eager = marlin({**given, "out": torch.empty_like(replayed)}).double()
    assert eager.norm() > 0
    assert (eager - before).norm() > 0.1 * eager.norm()
    assert (replayed.double() - eager).norm() < 2**-7 * eager.norm()  # nothing promises the same bits
