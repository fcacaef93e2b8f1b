"""How the kernels of fences are launched, with a stand-in for Triton and its driver."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_fuzz.fence import launching


class Kernel:
    """Compiled on its first launch for a device, as Triton does it."""

    def __init__(self, said: list[tuple[Any, ...]], device: list[int]) -> None:
        self.said, self.device = said, device

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: int, **constants: int) -> Any:
            binary = f"binary of {self.device[0]}"
            self.said.append(("looked up", grid, arguments, constants))
            return SimpleNamespace(run=lambda *given: self.said.append(given), function=binary, packed_metadata="meta")

        return launch


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found[0])
    streams = SimpleNamespace(get_current_stream=lambda at: f"stream of {at}")
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=streams))
    return found


def test_a_kernel_is_looked_up_once_a_device(monkeypatch: pytest.MonkeyPatch, device: list[int]) -> None:
    monkeypatch.setattr(launching, "JITFunction", Kernel)
    said: list[tuple[Any, ...]] = []
    launch = launching.Launcher(Kernel(said, device), BLOCK=8, OTHER=9)
    launch(3, 2, 10, 11)
    launch(5, 4, 12, 13)
    device[0] = 1
    launch(3, 2, 14, 15)
    launch(7, 6, 16, 17)
    device[0] = 0
    launch(1, 1, 18, 19)
    looked_up = [("looked up", (3, 2), given, {"BLOCK": 8, "OTHER": 9}) for given in ((10, 11), (14, 15))]
    straight = [(*grid, 1, f"stream of {at}", f"binary of {at}", "meta", None, None, None, *given, 8, 9)
                for grid, at, given in (((5, 4), 0, (12, 13)), ((7, 6), 1, (16, 17)), ((1, 1), 0, (18, 19)))]
    assert said == [looked_up[0], straight[0], looked_up[1], straight[1], straight[2]]


def test_an_interpreted_kernel_is_called_as_it_is(device: list[int]) -> None:
    said: list[tuple[Any, ...]] = []
    launch = launching.Launcher(Kernel(said, device), BLOCK=8)
    launch(3, 2, 10)
    launch(3, 1, 11)
    assert said == [("looked up", (3, 2), (10,), {"BLOCK": 8}), ("looked up", (3, 1), (11,), {"BLOCK": 8})]
