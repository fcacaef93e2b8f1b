"""What `benchmarks/tune_nvfp4.py` makes of its times, and that it rewrites the table as it stands."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from moe_fuzz.kernels.experts_nvfp4 import blocks
from moe_fuzz.kernels.experts_nvfp4.blocks import FEW, NARROW, PLANS, Tile
from tests.benchmark_script import FOLDER, benchmark


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))  # it imports its neighbours
    return benchmark("tune_nvfp4")


def test_the_table_is_rewritten(tune: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(blocks.__file__).read_text()
    file = tmp_path / "blocks.py"
    file.write_text(source)
    tune.write(list(PLANS), blocks.LARGE_FROM, file)
    assert file.read_text() == source  # what it writes of the table is the table
    plans = [replace(plan, gate_up=Tile(32, 64, 256, 2, 4, 3), down=Tile(32, 64, 128, 2, 4, 5, 168)) for plan in PLANS]
    tune.write(plans, 77, file)
    written = ModuleType("moe_fuzz.rewritten")
    monkeypatch.setitem(sys.modules, written.__name__, written)  # where its dataclasses look for their names
    exec(compile(file.read_text(), str(file), "exec"), vars(written))
    found = vars(written)
    assert [tune.line(plan) for plan in found["PLANS"]] == [tune.line(plan) for plan in plans]
    assert found["LARGE_FROM"] == 77


def test_the_best_of_parts_timed_apart(tune: ModuleType) -> None:
    base, other = "16x64x128g1w4s4r128", "16x64x256g1w4s3r160"
    times = {f"{base} {base}": 10.0, f"{other} {base}": 8.0, f"{base} {other}": 9.0, "large": 7.5}
    assert tune.sums(times)[f"{other} {other}"] == pytest.approx(7.0)
    row = {"times": times, "best": [7.0, ""], "band": 0, "slots": 0.5}
    plan = tune.best_plan(PLANS[0], [row, row])
    assert (plan.gate_up, plan.down) == (Tile(16, 64, 256, 1, 4, 3, 160),) * 2
    assert tune.best_plan(PLANS[0], []) is PLANS[0]
    rows = [{**row, "slots": slots, "times": {"large": large}, "best": [best, ""]}
            for slots, large, best in ((1, 50.0, 10.0), (64, 60.0, 40.0), (256, 90.0, 100.0))]  # fmt: skip
    assert tune.best_limit(rows) == round(math.sqrt(64 * 256))
    assert tune.best_limit(rows[:2]) == 128


def test_each_point_is_timed_with_what_is_made_for_its_slots(tune: ModuleType) -> None:
    assert [tune.band(slots) for slots in (0.1, FEW, FEW + 1, PLANS[0].up_to + 1)] == [0, 0, 1, 2]
    assert len(tune.CANDIDATES) == 1 + len(PLANS)
    assert [tiles[0] for tiles in tune.CANDIDATES] == [NARROW, *(plan.gate_up for plan in PLANS)]
    for tiles in tune.CANDIDATES:
        assert len(set(tiles)) == len(tiles)
