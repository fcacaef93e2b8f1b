"""The all-reduces of torch and of serving libraries as targets, with stand-ins for what needs GPUs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.reference.allreduce_rmsnorm import allreduce_rmsnorm as reference
from moe_fuzz.targets import library_allreduce as library
from moe_fuzz.targets.bind import bind

WORLD = 2


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Rank 1 of two, in whose symmetric memory an operator finds what rank 0 has as well."""
    memory: dict[str, torch.Tensor] = {}

    def buffer(group, name, size):
        return memory.setdefault(name, torch.full((size,), 7, dtype=torch.uint8)), SimpleNamespace(buffer_ptrs=[1, 2])

    monkeypatch.setattr(library, "_buffer", buffer)
    group = SimpleNamespace(world=WORLD, rank=1, device=torch.device("cpu"), capacity=1 << 16, number=0,
                            process_group=SimpleNamespace(group_name="tp"))  # fmt: skip
    return SimpleNamespace(group=group, memory=memory)


def drawn(tokens: int = 3, hidden: int = 5):
    x = torch.randint(-8, 9, (WORLD, tokens, hidden), generator=torch.Generator().manual_seed(0)).bfloat16() / 2
    return x, x.sum(0), torch.arange(hidden).bfloat16()


def other(x: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """What rank 0 has staged: its x, and zeros behind it."""
    whole = torch.zeros_like(flat)
    whole[: x[0].numel()] = x[0].flatten()
    return whole


@pytest.mark.parametrize("name", ["one_shot", "two_shot"])
def test_rows_of_any_size_are_staged_to_whole_vectors_of_every_rank(name, ranks, monkeypatch):
    x, residual, gamma = drawn()
    seen = []

    def one_shot(flat, op, group):
        seen.append((flat.numel(), flat[x[1].numel() :].any().item(), op, group))
        return flat + other(x, flat)

    operators = SimpleNamespace(
        one_shot_all_reduce=one_shot, two_shot_all_reduce_=lambda flat, *given: flat.copy_(one_shot(flat, *given))
    )
    monkeypatch.setattr(torch.ops, "symm_mem", operators, raising=False)
    call = getattr(library, f"symm_mem_{name}")()
    normed, total = call(x[1], residual, gamma, 1e-6, group=ranks.group)
    want = reference(x, residual, gamma, rounds=("sum", "residual"))
    assert torch.equal(total, want[1])
    torch.testing.assert_close(normed, want[0], rtol=2**-7, atol=0)
    assert seen == [(16, False, "sum", "tp")]
    staged = ranks.memory["staged"].clone()
    total.zero_()
    assert torch.equal(ranks.memory["staged"], staged)  # what is given back is not the shared memory


def test_no_rows_reach_no_all_reduce(ranks):
    x, residual, gamma = drawn(0)
    for call in (library.symm_mem_one_shot(), library.nccl()):
        normed, total = call(x[1], residual, gamma, 1e-6, group=ranks.group)
        assert normed.shape == total.shape == (0, 5)


def test_vllm_sets_its_all_reduce_up_once_and_norms_with_its_own_operator(ranks, monkeypatch, tmp_path: Path):
    x, residual, gamma = drawn(2, 8)
    calls: list[tuple[object, ...]] = []

    def all_reduce(made, inp, out, buffer, size):
        calls.append(("all_reduce", made, buffer == ranks.memory["vllm buffer"].data_ptr(), size))
        out.copy_(inp + x[0])

    def fused_add_rms_norm(normed, kept, weight, eps):
        result, total = reference(normed[None], kept, weight, eps)
        normed.copy_(result)
        kept.copy_(total)

    custom = SimpleNamespace(
        meta_size=lambda: 100, all_reduce=all_reduce,
        init_custom_ar=lambda pointers, data, rank, full: calls.append(("init", pointers, rank, full)) or 42,
        register_buffer=lambda made, pointers: calls.append(("register", made, pointers)),
    )  # fmt: skip
    fused_add_rms_norm._schema = "fused_add_rms_norm(Tensor! input, …)"  # type: ignore[attr-defined]
    found = {"fused_add_rms_norm": fused_add_rms_norm, "rms_norm": lambda out, inp, weight, eps: out.copy_(
        reference(inp[None], None, weight, eps)[0])}  # fmt: skip
    loaded = SimpleNamespace(operator=lambda name: found.get(name) or getattr(custom, name), origin=lambda text: text)
    monkeypatch.setattr(library.extension, "load", lambda source: loaded)
    monkeypatch.setattr(torch.ops, "_C_custom_ar", custom, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.distributed, "barrier", lambda group: None)
    monkeypatch.setattr(library, "_kept", {})
    target = library.vllm()
    for held in (residual, None):
        normed, total = target(x[1], held, gamma, 1e-6, group=ranks.group)
        want = reference(x, held, gamma)
        assert torch.equal(total, want[1])
        torch.testing.assert_close(normed, want[0], rtol=2**-7, atol=0)
    assert calls == [("init", [1, 2], 1, True), ("register", 42, [1, 2]), *[("all_reduce", 42, True, 1 << 16)] * 2]


def test_flashinfer_is_given_a_workspace_without_multicast(ranks, monkeypatch):
    x, residual, gamma = drawn(2, 8)
    made: list[dict[str, object]] = []

    def allreduce_fusion(
        *, input, workspace, pattern, residual_in, residual_out, norm_out, rms_gamma, rms_eps, fp32_acc
    ):
        assert (workspace, pattern, fp32_acc) == ("workspace", 1, True)
        result = reference(torch.stack([x[0], input]), residual_in, rms_gamma, rms_eps)
        norm_out.copy_(result[0])
        residual_out.copy_(result[1])

    comm = ModuleType("flashinfer.comm")
    comm.allreduce_fusion = allreduce_fusion  # type: ignore[attr-defined]
    comm.AllReduceFusionPattern = SimpleNamespace(kARResidualRMSNorm=1)  # type: ignore[attr-defined]
    comm.create_allreduce_fusion_workspace = (  # type: ignore[attr-defined]
        lambda **given: made.append(given) or "workspace")
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.comm", comm)
    monkeypatch.setattr(library, "_kept", {})
    target = library.flashinfer()
    for _ in range(2):
        normed, total = target(x[1], residual, gamma, 1e-6, group=ranks.group)
        for got, want in zip((normed, total), reference(x, residual, gamma), strict=True):
            assert torch.equal(got, want)
    assert made == [{"backend": "trtllm", "world_size": 2, "rank": 1, "max_token_num": 4096, "hidden_dim": 8,
                     "dtype": torch.bfloat16}]  # fmt: skip


def test_what_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setitem(sys.modules, "flashinfer.comm", None)
    with pytest.raises(EnvironmentProblem, match="flashinfer"):
        library.flashinfer()


@pytest.mark.parametrize("name", ["nccl", "one_shot", "two_shot"])
def test_they_run_across_processes_on_gpus_alone(name):
    info = bind(f"allreduce_rmsnorm@torch.{name}").info
    assert info.capabilities.devices == info.capabilities.processes == ("cuda",)
    assert info.capabilities.launches == ()
    assert info.contract.rounds == ("sum", "residual")
