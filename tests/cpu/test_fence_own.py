"""Memory that a target allocates itself through torch."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from moe_fuzz.fence import FenceOptions, cpu, open_arena, unwritten
from moe_fuzz.fence.mapping import PAGE


def is_fenced(tensor: torch.Tensor) -> bool:
    return not tensor.untyped_storage().resizable()


def is_flush(tensor: torch.Tensor) -> bool:
    storage = tensor.untyped_storage()
    return (-storage.data_ptr() - storage.nbytes()) % PAGE < 16


UNINITIALIZED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "empty": lambda x: torch.empty(4, 5),
    "empty_int": lambda x: torch.empty(4, 5, dtype=torch.int32),
    "empty_like": lambda x: torch.empty_like(x),
    "empty_like_other": lambda x: torch.empty_like(x, dtype=torch.int64),
    "new_empty": lambda x: x.new_empty((3, 3)),
    "empty_strided": lambda x: torch.empty_strided((3, 4), (8, 1)),
    "new_empty_strided": lambda x: x.new_empty_strided((3, 4), (1, 3)),
    "channels_last": lambda x: torch.empty(2, 3, 4, 5, memory_format=torch.channels_last),
    "scalar": lambda x: torch.empty(()),
}
INITIALIZED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": lambda x: torch.zeros(4, 5),
    "ones": lambda x: torch.ones(7, dtype=torch.int16),
    "full": lambda x: torch.full((4, 5), 2.5),
    "zeros_like": lambda x: torch.zeros_like(x),
    "full_like": lambda x: torch.full_like(x, 3),
    "new_zeros": lambda x: x.new_zeros(5),
    "new_full": lambda x: x.new_full((5,), 9),
    "arange": lambda x: torch.arange(3, 30, 2),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.t().contiguous(),
    "to": lambda x: x.to(torch.bfloat16),
}


@pytest.mark.parametrize("make", UNINITIALIZED.values(), ids=UNINITIALIZED.keys())
def test_uninitialized_memory_is_fenced_and_poisoned(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.rand(4, 6)
    ordinary = make(x)
    with open_arena("cpu") as arena:
        with arena.own():
            fenced = make(x)
        assert is_fenced(fenced)
        assert is_flush(fenced)
        assert (fenced.shape, fenced.stride(), fenced.dtype) == (ordinary.shape, ordinary.stride(), ordinary.dtype)
        assert unwritten(fenced).all()
        assert arena.check() == []


@pytest.mark.parametrize("make", INITIALIZED.values(), ids=INITIALIZED.keys())
def test_initialized_memory_is_fenced_and_keeps_its_values(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.rand(4, 6)
    ordinary = make(x)
    with open_arena("cpu") as arena:
        with arena.own():
            fenced = make(x)
        assert is_fenced(fenced)
        assert is_flush(fenced)
        assert (fenced.stride(), fenced.dtype) == (ordinary.stride(), ordinary.dtype)
        assert torch.equal(fenced, ordinary)
        assert arena.check() == []


def test_the_rest_is_left_alone() -> None:
    x = torch.rand(4, 6)
    with open_arena("cpu") as arena, arena.own():
        assert not is_fenced(x + 1)
        assert not is_fenced(torch.empty(0, 5))
        assert torch.empty(3, device="meta").is_meta
        assert torch.eye(3).to_sparse().is_sparse
        values, indices = torch.topk(x, 2, out=(torch.empty(0), torch.empty(0, dtype=torch.int64)))
        assert torch.equal(values, x.gather(1, indices))
        target = torch.empty(24)
        assert torch.zeros(24, out=target) is target
        assert not target.any()
        with pytest.raises(RuntimeError, match="negative dimension"):
            torch.empty(-1)


def test_requires_grad_and_autograd() -> None:
    with open_arena("cpu") as arena, arena.own():
        leaf = torch.ones(4, requires_grad=True)
        assert leaf.is_leaf
        assert leaf.requires_grad
        (leaf.clone() * 3).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.tolist() == [3.0] * 4


def test_default_dtype_is_honoured() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with open_arena("cpu") as arena, arena.own():
            assert torch.empty(3).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_fenced_tensor_can_be_resized() -> None:
    with open_arena("cpu") as arena, arena.own():
        tensor = torch.arange(4)
        tensor.resize_(100)
        assert tensor[:4].tolist() == [0, 1, 2, 3]
        assert torch.empty(3).resize_as_(tensor).shape == (100,)


def test_the_names_follow_the_calls() -> None:
    with open_arena("cpu") as arena:
        with arena.own():
            tensors = [torch.empty(3), torch.zeros(3), torch.empty(3)]
        for i in (0, 2):
            ctypes.memset(tensors[i].data_ptr() + tensors[i].nbytes, 0, 1)
        assert [v.symptom for v in arena.check()] == ["own:right", "own:right"]


def test_the_budget_of_an_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.CpuArena, "own_bytes", 2 * PAGE)
    with open_arena("cpu") as arena:
        with arena.own():
            first, second, third = torch.empty(200), torch.empty(PAGE), torch.empty(20)
        assert [is_fenced(t) for t in (first, second, third)] == [True, False, True]
        assert arena.unfenced == 1


def test_off_by_option_and_after_the_block() -> None:
    with open_arena("cpu", FenceOptions(own="off")) as arena, arena.own():
        assert not is_fenced(torch.empty(3))
    with open_arena("cpu") as arena:
        with arena.own():
            assert is_fenced(torch.empty(3))
        assert not is_fenced(torch.empty(3))


def test_dynamo_is_not_loaded_for_it() -> None:
    program = """if True:
        import sys, torch
        from moe_fuzz.fence import open_arena, unwritten
        with open_arena("cpu") as arena, arena.own():
            assert unwritten(torch.empty(3)).all()
        sys.exit("torch._dynamo" in sys.modules)"""
    assert subprocess.run([sys.executable, "-P", "-c", program], check=False).returncode == 0


def test_a_compiled_target_runs_compiled() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x.clone() + 1, backend=backend)
    x = torch.rand(5)
    for _ in range(2):  # the first call loads Dynamo under the mode
        with open_arena("cpu") as arena, arena.own():
            assert torch.equal(compiled(x), x + 1)
            assert is_fenced(torch.empty(3))
    assert len(graphs) == 1
