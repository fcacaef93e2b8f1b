"""`experts_nvfp4` on a GPU: every code under every scale, every plan against exact answers, graphs, offsets past 2^31.

Each check runs in a process of its own, which is this file as a script: side by side they compile on many cores, where
one process would compile for more than a minute.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from moe_fuzz.kernels.experts_nvfp4.blocks import EVERY_PLAN

CHECKS: dict[str, Callable[[], None]] = {}
_NAMES = ("x", "w13", "w2", "weights", "ids", "w13_scales", "w2_scales", "w13_alpha", "w2_alpha")


def on_device(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def integers(tokens: int, top_k: int, experts: int, hidden: int, inter: int, **options: Any) -> dict[str, Any]:
    """As in tests/cpu/test_experts_nvfp4.py: sums whose bits do not depend on their order."""
    import torch

    from moe_fuzz.reference.nvfp4 import swizzle

    generator = torch.Generator("cuda").manual_seed(tokens)
    dtype = options.get("dtype", torch.bfloat16)

    def draw(low: int, high: int, *shape: int, sparse: float = 1.0) -> torch.Tensor:
        values = torch.randint(low, high + 1, shape, generator=generator, device="cuda", dtype=torch.int8)
        return values * (torch.rand(shape, generator=generator, device="cuda") < sparse)

    def encode(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-2 to 2 and 32, which stands alone in its row: codes under scales of 1/2, 1 and 2, and of 16 for 32."""
        shift = torch.randint(-1, 2, (*wanted.shape[:2], wanted.shape[2] // 16), generator=generator, device="cuda")
        shift = torch.where(wanted.view(*shape_of(wanted)).amax(3) == 32, 4, shift)
        scaled = wanted.view(*shape_of(wanted)).float() / 2.0 ** shift[..., None]
        table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device="cuda")
        code = (torch.searchsorted(table, scaled.abs().contiguous()) + 8 * (scaled < 0)).byte()
        assert torch.equal(table[code.long() % 8], scaled.abs())
        code = code.flatten(2)
        scales = ((shift + 7) * 8).byte()
        return code[..., ::2] | code[..., 1::2] << 4, scales

    def shape_of(wanted: torch.Tensor) -> tuple[int, ...]:
        return (*wanted.shape[:2], wanted.shape[2] // 16, 16)

    x = draw(-1, 1, tokens, hidden).to(dtype)
    x[:, 0] = 1
    w13 = draw(-1, 1, experts, inter * 2, hidden, sparse=min(1.0, 12 / hidden))
    w13[:, :inter] = 0
    w13[:, :inter, 0] = 32
    w2 = draw(-2, 2, experts, hidden, inter, sparse=min(1.0, 200 / inter))
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator, device="cuda", dtype=torch.int32)
    (codes13, scales13), (codes2, scales2) = encode(w13), encode(w2)
    made = (x, codes13, codes2, 2.0 ** draw(-1, 1, tokens, top_k).float(), ids, scales13, scales2,
            torch.ones(experts, device="cuda"), torch.ones(experts, device="cuda"))  # fmt: skip
    found: dict[str, Any] = dict(zip(_NAMES, made, strict=True))
    if options.get("swizzled"):
        found["scale_layout"] = "swizzled"
        for name in ("w13_scales", "w2_scales"):
            tables = [swizzle(table) for table in found[name]]
            padding = [swizzle(torch.ones_like(table)) == 0 for table in found[name]]
            found[name] = torch.stack([table.masked_fill(p, 0x7F) for table, p in zip(tables, padding, strict=True)])
    return found


def agree(arguments: dict[str, Any], about: tuple[Any, ...], **options: Any) -> None:
    import torch

    from moe_fuzz.kernels.experts_nvfp4 import experts_nvfp4
    from moe_fuzz.reference.experts_nvfp4 import experts_nvfp4 as reference

    expected = reference(**arguments)
    for _ in range(3):
        got = experts_nvfp4(**arguments, **options)
        assert torch.equal(got, expected), (about, int((got != expected).sum()), "of", got.numel())


@on_device
def every_code_under_every_scale() -> None:
    """Token t sees code t, column r scale r, as in tests/cpu: what machine code makes of all 16 and 256."""
    import torch

    from moe_fuzz.kernels.experts_nvfp4 import experts_nvfp4
    from moe_fuzz.reference.experts_nvfp4 import experts_nvfp4 as reference

    for dtype in (torch.bfloat16, torch.float16):
        x = torch.zeros(16, 256, dtype=dtype, device="cuda")
        x[:, :16], x[:, 16] = torch.eye(16), 1
        w13 = torch.zeros(1, 32, 128, dtype=torch.uint8, device="cuda")
        w13[:, :16, 8] = 0x07  # 6 in column 16
        for row in range(16):
            w13[0, 16 + row, row // 2] = 0x02 << 4 * (row % 2)  # 1 in column `row`
        scales13 = torch.full((1, 32, 16), 0x38, dtype=torch.uint8, device="cuda")
        scales13[:, :16] = 0x68  # 6 * 64 = 384: silu is the identity there
        code = torch.arange(16, dtype=torch.uint8, device="cuda")
        w2 = (code[::2] | code[1::2] << 4).expand(1, 256, 8).contiguous()
        scales2 = torch.arange(256, dtype=torch.uint8, device="cuda").view(1, 256, 1)
        ones = torch.ones(1, device="cuda")
        arguments = (x, w13, w2, torch.full((16, 1), 2.0**-7, device="cuda"),
                     torch.zeros(16, 1, dtype=torch.int32, device="cuda"), scales13, scales2, ones, ones)  # fmt: skip
        expected = reference(*arguments)
        assert expected[:, 0x7F].isnan().all()
        assert expected[:, :0x7F].isfinite().all()
        assert expected[:, :0x7F].unique().numel() > 400
        for backend in ("small", "large"):
            got = experts_nvfp4(*arguments, backend=backend)
            assert torch.equal(got.isnan(), expected.isnan()), (dtype, backend)
            wrong = (got.nan_to_num() != expected.nan_to_num()).nonzero().tolist()
            assert not wrong, (dtype, backend, len(wrong), wrong[:5])


def a_plan_is_exact_on_integers(nth: int) -> None:
    import torch

    # Sizes that no block divides, sizes that all divide; slots grouped by the programs in the first plans, which serve
    # few slots, and by `align`. Every combination is a binary, and compiling is what takes the time.
    few = ((1, 8, 17, 256, 512), (41, 3, 5, 208, 80)) if nth < 2 else ()
    for tokens, top_k, experts, hidden, inter in (*few, (333, 2, 3, 528, 272), (700, 8, 60, 256, 256)):
        for dtype in (torch.bfloat16, torch.float16) if tokens == 333 and nth == 0 else (torch.bfloat16,):
            for swizzled in (False, True) if tokens == 333 else (False,):
                arguments = integers(tokens, top_k, experts, hidden, inter, dtype=dtype, swizzled=swizzled)
                agree(arguments, (nth, tokens, dtype, swizzled), plan=EVERY_PLAN[nth], backend="small")


for number in range(len(EVERY_PLAN)):  # each by itself: they share no binary
    CHECKS[f"plan_{number}_is_exact_on_integers"] = functools.partial(a_plan_is_exact_on_integers, number)


@on_device
def large_is_exact_on_integers() -> None:
    for swizzled in (False, True):
        agree(integers(333, 2, 3, 528, 272, swizzled=swizzled), ("large", swizzled), backend="large")
    agree(integers(41, 3, 5, 208, 80), ("large",), backend="large")


@on_device
def activations_layouts_and_biases_agree() -> None:
    import torch

    from moe_fuzz.kernels.experts_nvfp4 import experts_nvfp4
    from moe_fuzz.reference.experts_nvfp4 import experts_nvfp4 as reference

    for tokens in (5, 500):
        given = integers(tokens, 4, 8, 160, 96)
        for name in ("w13", "w2"):
            given[name] = torch.randint(0, 256, given[name].shape, dtype=torch.uint8, device="cuda")
            scales = given[f"{name}_scales"]
            given[f"{name}_scales"] = torch.randint(0x18, 0x38, scales.shape, dtype=torch.uint8, device="cuda")
            given[f"{name}_alpha"] = torch.rand(8, device="cuda") / 4
        b13, b2 = torch.randn(8, 192, device="cuda").bfloat16(), torch.randn(8, 160, device="cuda")
        for activation, layout in (
            ("silu", "up_first"), ("gelu", "first"), ("swiglu_oai", "interleaved"), ("relu2", "first"),
        ):  # fmt: skip
            for on_input in (False, True):
                rows = 96 if activation == "relu2" else 192
                options: dict[str, Any] = {
                    **given, "activation": activation, "gate_layout": layout, "apply_weight_on_input": on_input,
                    "w13": given["w13"][:, :rows].contiguous(),
                    "w13_scales": given["w13_scales"][:, :rows].contiguous(), "b13": b13[:, :rows], "b2": b2,
                }  # fmt: skip
                expected = reference(**options).double()
                largest = expected.abs().amax(1, keepdim=True).clamp(min=1e-30)
                for backend in ("small", "large"):
                    # as in test_experts_cuda.py: a store may round the other way, at a slot and at y
                    far = (experts_nvfp4(**options, backend=backend).double() - expected).abs() / largest
                    where = (activation, layout, on_input, tokens, backend, far.max().item())
                    assert (far <= 2 * 2**-7).all(), where


@on_device
def quantized_activations_agree() -> None:
    import torch

    from moe_fuzz.kernels.experts_nvfp4 import experts_nvfp4
    from moe_fuzz.reference.experts_nvfp4 import experts_nvfp4 as reference

    for tokens in (9, 300):
        given = integers(tokens, 2, 5, 272, 144)
        grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device="cuda")
        x = grid[torch.randint(0, 8, given["x"].shape, device="cuda")] * torch.randint(0, 2, given["x"].shape,
                                                                                        device="cuda")  # fmt: skip
        x[:, ::16] = 6  # the largest of each block: the grid survives under a global scale of 1
        x[:, 0] = 1
        x[:, 1] = 6
        given |= {"x": x.bfloat16(), "activations": "nvfp4", "x_global": torch.ones(1, device="cuda"),
                  "h_global": torch.full((1,), 2.0, device="cuda")}  # fmt: skip
        expected, got = reference(**given), experts_nvfp4(**given)
        assert torch.equal(got, expected), (tokens, int((got != expected).sum()))


@on_device
def dropped_slots_count_for_nothing() -> None:
    import torch

    from moe_fuzz.kernels.experts_nvfp4 import experts_nvfp4, workspace_bytes

    for tokens, backend in ((8, "small"), (600, "small"), (600, "large")):
        given = integers(tokens, 8, 12, 128, 64)
        ids = given["ids"]
        dropped = (ids < 0) | (ids >= 12)
        ids[1], dropped[1] = -1, True
        expected = experts_nvfp4(**{**given, "weights": given["weights"].masked_fill(dropped, 0)}, backend=backend)
        given["x"][1] = math.nan
        size = workspace_bytes(tokens, 8, 128, 64, 12, backend=backend)
        given["workspace"] = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
        given["out"] = torch.full_like(given["x"], math.nan)
        got = experts_nvfp4(**{**given, "weights": given["weights"].masked_fill(dropped, math.nan)}, backend=backend)
        assert torch.equal(got, expected), (tokens, backend)
        assert not got[1].any()


@on_device
def a_graph_replays_other_inputs_without_a_sync() -> None:
    import torch

    from moe_fuzz.kernels.experts_nvfp4 import experts_nvfp4

    for tokens in (4, 300):
        given = integers(tokens, 4, 10, 256, 128)
        out = torch.empty_like(given["x"])
        experts_nvfp4(**given, out=out)  # compiles
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            experts_nvfp4(**given, out=out)
        for seed in range(4):
            new = integers(tokens + seed, 4, 10, 256, 128)
            for name in ("x", "weights", "ids"):
                given[name].copy_(new[name][:tokens])
            if seed == 3:
                given["ids"].fill_(-1)
            for _ in range(5):
                graph.replay()
            got = out.clone()
            torch.cuda.set_sync_debug_mode("error")
            eager = experts_nvfp4(**given)
            torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(got, eager), (tokens, seed)


@on_device
def a_call_launches_what_it_must() -> None:
    """The slots are grouped in two launches at most, of which `small` needs the first anyway; nothing is filled, where
    vllm#31837 took three fills a product."""
    import torch

    from moe_fuzz.kernels.experts_nvfp4 import experts_nvfp4, workspace_bytes

    for tokens, backend, activations, count in (
        (1, "small", "as_given", 4), (16, "small", "as_given", 4), (17, "small", "as_given", 5),
        (900, "small", "nvfp4", 6), (1, "large", "as_given", 4), (5, "large", "as_given", 5),
        (900, "large", "as_given", 6),
    ):  # fmt: skip
        given = integers(tokens, 8, 60, 256, 128)
        if activations == "nvfp4":
            given |= {"x_global": torch.ones(1, device="cuda"), "h_global": torch.ones(1, device="cuda")}
        size = workspace_bytes(tokens, 8, 256, 128, 60, backend=backend, activations=activations)
        given |= {"workspace": torch.empty(size, dtype=torch.uint8, device="cuda"), "activations": activations,
                  "backend": backend, "out": torch.empty_like(given["x"])}  # fmt: skip
        experts_nvfp4(**given)  # compiles
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            experts_nvfp4(**given)
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        assert len(names) == count, (tokens, backend, activations, names)
        assert not [name for name in names if "fill" in name.lower() or name.startswith("Mem")], names


@on_device
def weights_past_2_to_31_bytes() -> None:
    import torch

    from moe_fuzz.kernels.experts_nvfp4 import experts_nvfp4
    from moe_fuzz.reference.experts_nvfp4 import experts_nvfp4 as reference

    experts, inter, hidden = 17, 8192, 16384  # 2.1 GiB of codes of w13, and more than 2^31 of them in int64 after 2^31
    for tokens in (3, 200):
        given = integers(tokens, 2, 1, hidden, inter)
        wide = {name: torch.zeros((experts, *given[name].shape[1:]), dtype=given[name].dtype, device="cuda")
                for name in _NAMES[1:3] + _NAMES[5:]}  # fmt: skip
        for name, tensor in wide.items():
            tensor[-1] = given[name][0]
        assert wide["w13"].numel() > 2**31
        ids = torch.where(given["ids"] == 0, experts - 1, -1).int()
        got = experts_nvfp4(**{**given, **wide, "ids": ids}, backend="small")
        assert torch.equal(got, reference(**given)), tokens


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_device(name: str) -> None:
    command = [sys.executable, "-P", __file__, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    import torch

    for chosen in sys.argv[1:] or CHECKS:
        torch.manual_seed(0)
        CHECKS[chosen]()
