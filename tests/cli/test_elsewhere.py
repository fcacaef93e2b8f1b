"""Targets that this machine has no place for: an error where they were named, and told where a word stood for them."""

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
def test_what_runs_on_gpus_alone_is_told_on_a_cpu_and_missed_where_it_was_named(command: str, call: Callable) -> None:
    told = "it runs on cuda, and this is a campaign on cpu"
    for number, names in enumerate([(NCCL,), (NCCL, ALIGN)]):
        ran = call(command, *names, "--device", "cpu", "--cases", "12", "--state-dir", str(number))
        assert ran.code == 3, ran.err + ran.out
        assert told in ran.out


@pytest.mark.interpreter
def test_a_word_stands_for_what_this_machine_can_run(call: Callable) -> None:
    ran = call("run", "allreduce_rmsnorm", "--device", "cpu", "--cases", "10", "--workers", "1", "--state-dir", "state")
    assert "it runs on cuda, and this is a campaign on cpu" in ran.out
    assert "allreduce_rmsnorm@builtin.two_shot: " in ran.out
    assert ran.code == 0, ran.err + ran.out


def test_ranks_with_a_process_each_need_two_devices() -> None:
    space = get_space("allreduce_rmsnorm")
    can = Capabilities(launches=(), processes=("cuda",), max_processes=2, devices=("cuda",))
    info = TargetInfo("allreduce_rmsnorm@x", "allreduce_rmsnorm", "x", capabilities=can)
    assert not_here(space, info, "cuda") is None
    assert "runs on cuda" in str(not_here(space, info, "cpu"))
    single = replace(info, capabilities=replace(can, max_processes=1))  # as the pool says it of one GPU
    assert "not two here" in str(not_here(space, single, "cuda"))
    assert len(list(itertools.islice(strategies.grid(space, info, "cuda", seed=1), 5))) == 5
