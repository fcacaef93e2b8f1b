"""Where a target's error is said to be: in the innermost file of the target's, whoever raised."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from moe_fuzz.execute.call import TargetError, guarded

CODE = """
import json
from dataclasses import dataclass

@dataclass
class Plan:
    rows: int
    def __post_init__(self):
        raise ValueError("no rows")

def by_a_library(): return json.loads("{")
def by_a_made_init(): return Plan(0)
def in_made_code(): exec("raise ValueError('made')")
def by_torch():
    import torch
    return torch.zeros(2).view(3)
"""


@pytest.mark.parametrize(("name", "site"), [
    ("by_a_library", "kernels.py:11 in by_a_library"),
    ("by_a_made_init", "kernels.py:9 in __post_init__"),
    ("in_made_code", "kernels.py:13 in in_made_code"),
    ("by_torch", "kernels.py:16 in by_torch"),
])
def test_site_is_in_a_file_of_the_targets(tmp_path: Path, name: str, site: str) -> None:
    file = tmp_path / "kernels.py"
    file.write_text(CODE)
    spec = importlib.util.spec_from_file_location("kernels_of_this_test", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(TargetError) as caught:
        guarded(getattr(module, name), "cpu")
    assert caught.value.violation.site == site


def test_an_interrupt_that_a_target_raises_is_its_error() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(TargetError) as caught:
        guarded(interrupted, "cpu")
    assert caught.value.violation.message == "raised KeyboardInterrupt on a valid input"


def test_a_copy_of_the_process_does_not_come_back_from_the_call() -> None:
    copy = guarded(os.fork, "cpu")
    if copy == 0:
        os._exit(7)
    assert os.waitpid(copy, 0)[1] == 0
