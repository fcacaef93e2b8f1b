"""All-reduces of torch and of serving libraries as targets: across ranks that have a process each. Worker side.

Multicast memory is never asked for: it is switched off before the first rendezvous.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.targets import extension
from moe_fuzz.targets.sources import VLLM

Fused = Callable[..., tuple[Tensor, Tensor]]
AllReduce = Callable[[Tensor, Any], Tensor]  # x [T, H], group -> the sum, fresh memory

#: Two ranks: with more, each addition of theirs is rounded to the dtype of x, which no bound of ours allows for.
_CAPABILITIES = Capabilities(launches=(), processes=("cuda",), max_processes=2, strided=False, devices=("cuda",))
_CLAUSES = {
    "ranks": "tensor-parallel ranks go on from what each has: a difference is another model on each",
    "written": "what is left unwritten is the next layer's input",
    "crash": "no caller survives an access outside the tensors it passed",
    "fence": "no caller survives an access outside the tensors it passed",
    "canary": "no caller survives an access outside the tensors it passed",
}
_VLLM = replace(VLLM, namespace="_C", patterns=("_C_stable_libtorch*.so", "_C.abi3.so", "_C*.so"))
_LEAST = 1 << 16  # bytes of a buffer; above it powers of two, so that few are made
_kept: dict[Any, Any] = {}  # of this process: making them is collective, and no case takes them back


def _buffer(group: Any, name: str, size: int) -> tuple[Tensor, Any]:
    """(uint8 of at least `size` bytes in symmetric memory, its handle), zero at first, the same at each call."""
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symm_mem

    size = max(_LEAST, 1 << (size - 1).bit_length())
    key = (name, group.number, size)
    if key not in _kept:
        os.environ |= {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}
        memory = symm_mem.empty(size, dtype=torch.uint8, device=group.device).zero_()
        _kept[key] = (memory, symm_mem.rendezvous(memory, group.process_group.group_name))
        torch.cuda.synchronize(group.device)
        dist.barrier(group.process_group)  # nobody writes before everybody has zeroed his own
    return _kept[key]


def _staged(x: Tensor, group: Any) -> tuple[Tensor, str]:
    """x in symmetric memory, flat, with zeros up to a multiple of what the operators take: 16 bytes a rank."""
    unit = 16 * group.world // x.element_size()
    padded = -(-x.numel() // unit) * unit
    buffer, _ = _buffer(group, "staged", max(group.capacity, x.numel() * x.element_size()) + 16 * group.world)
    flat = buffer[: padded * x.element_size()].view(x.dtype)
    flat[: x.numel()].copy_(x.reshape(-1))
    flat[x.numel() :].zero_()
    return flat, group.process_group.group_name


def _symm_mem_one_shot(x: Tensor, group: Any) -> Tensor:
    flat, name = _staged(x, group)
    return torch.ops.symm_mem.one_shot_all_reduce(flat, "sum", name)[: x.numel()].view(x.shape)


def _symm_mem_two_shot(x: Tensor, group: Any) -> Tensor:
    flat, name = _staged(x, group)
    torch.ops.symm_mem.two_shot_all_reduce_(flat, "sum", name)
    return flat[: x.numel()].view(x.shape).clone()


def _nccl(x: Tensor, group: Any) -> Tensor:
    import torch.distributed as dist

    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group.process_group)
    return total


def _unfused(
    all_reduce: AllReduce, x: Tensor, residual: Tensor | None, gamma: Tensor, eps: float, *, group: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [T, H] -> normed, residual_out [T, H]: an all-reduce that is written out, then PyTorch."""
    total = all_reduce(x, group) if x.numel() else x.clone()
    if residual is not None:
        total = (total.float() + residual.float()).to(x.dtype)
    value = total.float()
    normed = value * torch.rsqrt(value.square().mean(dim=-1, keepdim=True) + eps) * gamma.float()
    return normed.to(x.dtype), total


def _of_torch(all_reduce: AllReduce, what: str, capabilities: Capabilities = _CAPABILITIES) -> Fused:
    contract = Contract(deterministic=True, rounds=("sum", "residual"))
    promise = declares(contract, capabilities, _CLAUSES, origin=f"torch {torch.__version__}, {what}")
    return promise(partial(_unfused, all_reduce))


def symm_mem_one_shot() -> Fused:
    """`symm_mem::one_shot_all_reduce`, then the norm in PyTorch."""
    return _of_torch(_symm_mem_one_shot, "symm_mem::one_shot_all_reduce",
                     replace(_CAPABILITIES, dtypes=("float32", "bfloat16")))  # fmt: skip


def symm_mem_two_shot() -> Fused:
    """`symm_mem::two_shot_all_reduce_`, then the norm in PyTorch."""
    return _of_torch(_symm_mem_two_shot, "symm_mem::two_shot_all_reduce_",
                     replace(_CAPABILITIES, dtypes=("float32", "bfloat16")))  # fmt: skip


def nccl() -> Fused:
    """`torch.distributed.all_reduce`, then the norm in PyTorch."""
    return _of_torch(_nccl, "torch.distributed.all_reduce")


@dataclass
class VllmAllReduce:
    """vLLM's custom all-reduce as its Python class sets it up, with memory from torch."""

    operators: Any  # torch.ops._C_custom_ar

    def made(self, group: Any) -> tuple[int, int, int]:
        """(the handle of its C++ object, this rank's buffer, its bytes)."""
        size = max(_LEAST, 1 << (group.capacity - 1).bit_length())
        key = ("vllm", group.number, size)
        if key not in _kept:
            import torch.distributed as dist

            # signals, and behind them what the second step of two reads
            meta, meta_handle = _buffer(group, "vllm signals", self.operators.meta_size() + size)
            buffer, handle = _buffer(group, "vllm buffer", size)
            ranks = torch.empty(8 << 20, dtype=torch.uint8, device=group.device)
            made = self.operators.init_custom_ar(list(meta_handle.buffer_ptrs), ranks, group.rank, True)
            self.operators.register_buffer(made, list(handle.buffer_ptrs))
            torch.cuda.synchronize(group.device)
            dist.barrier(group.process_group)
            _kept[key] = (made, buffer.data_ptr(), buffer.numel(), meta, ranks)
        return _kept[key][:3]

    def __call__(self, x: Tensor, group: Any) -> Tensor:
        total = torch.empty_like(x, memory_format=torch.contiguous_format)
        made, buffer, size = self.made(group)
        self.operators.all_reduce(made, x, total, buffer, size)
        return total


def vllm() -> Fused:
    """`_C_custom_ar::all_reduce`, then `_C::fused_add_rms_norm`, as vLLM's layers do it. Raises EnvironmentProblem."""
    library = extension.load(_VLLM)
    fused_add, norm = library.operator("fused_add_rms_norm"), library.operator("rms_norm")
    custom = replace(_VLLM, namespace="_C_custom_ar")
    operators = extension.load(custom)
    for name in ("init_custom_ar", "register_buffer", "meta_size", "all_reduce"):
        operators.operator(name)
    all_reduce = VllmAllReduce(torch.ops._C_custom_ar)

    @declares(
        Contract(deterministic=True, rounds=("sum", "residual", "normed")),
        replace(_CAPABILITIES, gamma_dtypes=("dtype",), min_multiple_h=8, dtypes=("bfloat16", "float16")),
        _CLAUSES,
        {"error @ T=0": "callers pad an idle rank to a token; a batch of none does not reach this operator"},
        library.origin(str(fused_add._schema)),
    )
    def allreduce_rmsnorm(
        x: Tensor, residual: Tensor | None, gamma: Tensor, eps: float, *, group: Any
    ) -> tuple[Tensor, Tensor]:
        if not x.numel():
            return x.clone(), x.clone()
        total = all_reduce(x, group)
        if residual is None:
            normed = torch.empty_like(total)
            norm(normed, total, gamma, eps)
            return normed, total
        kept = residual.clone()
        fused_add(total, kept, gamma, eps)  # both in place
        return total, kept

    return allreduce_rmsnorm


def flashinfer() -> Fused:
    """`flashinfer.comm.allreduce_fusion` over a workspace of the backend trtllm: `auto` may choose multicast."""
    place = "flashinfer.comm:"
    make, version = extension.function("flashinfer", (f"{place}create_allreduce_fusion_workspace",))
    fusion, _ = extension.function("flashinfer", (f"{place}allreduce_fusion",))
    patterns, _ = extension.function("flashinfer", (f"{place}AllReduceFusionPattern",))

    def workspace(x: Tensor, group: Any) -> Any:
        width = x.shape[1]
        rows = max(1, -(-group.capacity // (width * x.element_size())))
        key = ("flashinfer", group.number, rows, width, x.dtype)
        if key not in _kept:
            group.process_group.group_name  # noqa: B018 - its workspace asks torch.distributed, which must be set up
            _kept[key] = make(backend="trtllm", world_size=group.world, rank=group.rank, max_token_num=rows,
                              hidden_dim=width, dtype=x.dtype)  # fmt: skip
        return _kept[key]

    @declares(
        Contract(deterministic=True, rounds=("sum", "residual")),
        # -0 marks what has not come yet (flashinfer#3304)
        replace(_CAPABILITIES, gamma_dtypes=("dtype",), min_multiple_h=8, dtypes=("bfloat16", "float16"),
                residual=(True,), jit=True),
        _CLAUSES,
        {"error @ T=0": "callers pad an idle rank to a token; a batch of none does not reach this operator"},
        f"flashinfer-python {version}, allreduce_fusion, backend trtllm, fp32_acc",
    )  # fmt: skip
    def allreduce_rmsnorm(
        x: Tensor, residual: Tensor | None, gamma: Tensor, eps: float, *, group: Any
    ) -> tuple[Tensor, Tensor]:
        if not x.numel():
            return x.clone(), x.clone()
        normed, total = torch.empty_like(x), torch.empty_like(x)
        fusion(input=x, workspace=workspace(x, group), pattern=patterns.kARResidualRMSNorm, residual_in=residual,
               residual_out=total, norm_out=normed, rms_gamma=gamma, rms_eps=eps, fp32_acc=True)  # fmt: skip
        return normed, total

    return allreduce_rmsnorm
