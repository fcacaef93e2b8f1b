"""One rank of allreduce_rmsnorm, as test_allreduce_ranks_cuda.py starts it: `rank_program.py SCENE`."""

from __future__ import annotations

import json
import os
import random
import sys
import time

import torch
import torch.distributed as dist

from moe_fuzz.kernels.allreduce_rmsnorm import RankGroup, RankTimeout, allreduce_rmsnorm
from moe_fuzz.reference.allreduce_rmsnorm import allreduce_rmsnorm as reference

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
BACKENDS = ("one_shot", "split", "two_shot")


def drawn(tokens: int, hidden: int, dtype: torch.dtype, seed: int):
    """x of all ranks, residual, gamma: the same on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def halves(*shape: int) -> torch.Tensor:
        return (torch.randint(-8, 9, shape, generator=generator) / 2).to(dtype).cuda()

    return halves(WORLD, tokens, hidden), halves(tokens, hidden), halves(hidden)


def wrong(total: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return (total != (x.float().sum(0) + residual.float()).to(x.dtype)).sum()


def same_on_all(*tensors: torch.Tensor) -> bool:
    """A weighted sum of all bytes, in integers."""
    flat = [t.contiguous().view(torch.uint8).flatten().long() for t in tensors]
    digest = torch.stack([(b * (torch.arange(len(b), device="cuda") % 8191 + 1)).sum() for b in flat])
    digests = [torch.empty_like(digest) for _ in range(WORLD)]
    dist.all_gather(digests, digest)
    return all(torch.equal(d, digest) for d in digests)


def settled(group: RankGroup) -> bool:
    """No signal is left once all ranks have finished."""
    group.check()
    dist.barrier()
    return not any(pad.any().item() for pad in group.signals)


def shapes() -> dict[str, object]:
    group, bad, count = RankGroup(capacity=1 << 20), [], 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens, hidden in ((0, 64), (1, 1), (1, 2048), (3, 130), (64, 2048), (70, 7168), (300, 2880), (5, 24)):
            for backend in BACKENDS:
                x, residual, gamma = drawn(tokens, hidden, dtype, hidden)
                normed, total = allreduce_rmsnorm(x[RANK], residual, gamma, group=group, backend=backend)
                want = reference(x, residual, gamma)
                close = torch.allclose(normed, want[0], rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)
                count += 1
                if wrong(total, x, residual).item() or not close or not same_on_all(normed, total):
                    bad.append([str(dtype), tokens, hidden, backend])
    return {"bad": bad, "calls": count, "settled": settled(group)}


def loop() -> dict[str, object]:
    """1,000 calls back to back, of two groups on two streams, ranks delayed at random, sizes and backends alternating;
    what the buffer of a peer is reused for must not reach a slow reader. Rows are split in 4 parts, in 2 or not."""
    groups = [RankGroup(capacity=4 << 20) for _ in range(2)]
    streams, sizes = [torch.cuda.Stream() for _ in groups], [1, 64, 600, 130, 3, 300]
    sets = {tokens: [drawn(tokens, 2048, torch.bfloat16, seed) for seed in range(3)] for tokens in sizes}
    count = torch.zeros((2,), dtype=torch.int64, device="cuda")
    delays = random.Random(RANK)
    torch.cuda.synchronize()
    for number in range(1000):
        x, residual, gamma = sets[sizes[number % 6]][number % 3]
        for index, (group, stream) in enumerate(zip(groups, streams, strict=True)):
            with torch.cuda.stream(stream):
                if delays.random() < 0.1:
                    torch.cuda._sleep(delays.randrange(200_000))
                _, total = allreduce_rmsnorm(x[RANK], residual, gamma, group=group, backend=BACKENDS[number // 3 % 3])
                count[index] += wrong(total, x, residual)
    return {"wrong": count.tolist(), "settled": all(settled(group) for group in groups)}


def graph() -> dict[str, object]:
    group = RankGroup(capacity=1 << 20)
    x, residual, gamma = drawn(40, 2048, torch.bfloat16, 0)
    for backend in BACKENDS:
        allreduce_rmsnorm(x[RANK], residual, gamma, group=group, backend=backend)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = [allreduce_rmsnorm(x[RANK], residual, gamma, group=group, backend=name)[1]
                   for name in BACKENDS]  # fmt: skip
    count = 0
    for seed in range(50):
        new = drawn(40, 2048, torch.bfloat16, seed)
        x.copy_(new[0])
        residual.copy_(new[1])
        captured.replay()
        count += sum(wrong(total, x, residual).item() for total in results)
    return {"wrong": count, "settled": settled(group)}


def late() -> dict[str, object]:
    """Rank 1 enters two seconds late: it is waited for. Then it does not come at all: it is named."""
    group = RankGroup(capacity=1 << 20, timeout_s=20)
    x, residual, gamma = drawn(8, 1024, torch.bfloat16, 0)
    allreduce_rmsnorm(x[RANK], residual, gamma, group=group)
    group.check()
    if RANK == 1:
        time.sleep(2)
    _, total = allreduce_rmsnorm(x[RANK], residual, gamma, group=group)
    group.check()
    result: dict[str, object] = {"wrong": wrong(total, x, residual).item(), "named": None}
    group.timeout_s = 1.0
    began = time.monotonic()
    if RANK != 1:
        normed, _ = allreduce_rmsnorm(x[RANK], residual, gamma, group=group)
        try:
            group.check()
        except RankTimeout as caught:
            result |= {"named": caught.peer, "nan": normed.isnan().all().item(), "seconds": time.monotonic() - began}
    dist.barrier()
    again = RankGroup(capacity=1 << 20)
    _, total = allreduce_rmsnorm(x[RANK], residual, gamma, group=again)
    return result | {"again": wrong(total, x, residual).item(), "settled": settled(again)}


if __name__ == "__main__":
    torch.cuda.set_device(RANK)
    dist.init_process_group("nccl", init_method=os.environ["INIT_METHOD"], rank=RANK, world_size=WORLD,
                            device_id=torch.device("cuda", RANK))  # fmt: skip
    answer = {"shapes": shapes, "loop": loop, "graph": graph, "late": late}[sys.argv[1]]()
    answers: list[dict[str, object] | None] = [None] * WORLD
    dist.all_gather_object(answers, answer)
    print(json.dumps(answers))
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # what a group gives back at exit may wait for peers that are gone
