"""Targets that this machine has no place for: told, and left out where a word stood for more than them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign.plan import not_here
from moe_fuzz.contract import Capabilities, TargetInfo
from moe_fuzz.ops import get_space

NCCL, ALIGN = "allreduce_rmsnorm@torch.nccl", "align@torch"


@pytest.mark.parametrize("command", ["run", "gate"])
def test_what_runs_on_gpus_alone_is_left_out_on_a_cpu(command: str, call: Callable) -> None:
    alone = call(command, NCCL, "--device", "cpu", "--cases", "40", "--state-dir", "alone")
    assert alone.code == 3
    assert "it runs on cuda, and this is a campaign on cpu" in alone.out
    beside = call(command, NCCL, ALIGN, "--device", "cpu", "--cases", "40", "--state-dir", "beside")
    assert beside.code == 0, beside.err + beside.out
    assert "it runs on cuda, and this is a campaign on cpu" in beside.out
    assert ALIGN in beside.out


def test_ranks_with_a_process_each_need_two_devices() -> None:
    space = get_space("allreduce_rmsnorm")
    can = Capabilities(launches=(), processes=("cuda",), max_processes=2, devices=("cuda",))
    info = TargetInfo("allreduce_rmsnorm@x", "allreduce_rmsnorm", "x", capabilities=can)
    assert not_here(space, info, "cuda") is None
    assert "runs on cuda" in str(not_here(space, info, "cpu"))
    single = replace(info, capabilities=replace(can, max_processes=1))  # as the pool says it of one GPU
    assert "not two here" in str(not_here(space, single, "cuda"))
    assert len(list(itertools.islice(strategies.grid(space, info, "cuda", seed=1), 5))) == 5
