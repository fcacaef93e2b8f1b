"""`moe-fuzz bench allreduce_rmsnorm` where there are no GPUs for it, and with what it does not take."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from moe_fuzz.cli import bench as command
from moe_fuzz.errors import EnvironmentProblem, UsageError


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["allreduce_rmsnorm", "allreduce_rmsnorm@torch"], UsageError),
        (["allreduce_rmsnorm", "--calibrate", "/nowhere/table.json"], UsageError),
        (["topk_softmax", "--ranks", "2"], UsageError),
        (["allreduce_rmsnorm", "--ranks", "2"], EnvironmentProblem),
    ],
)
def test_it_says_what_is_wrong(arguments, problem, monkeypatch):
    monkeypatch.setattr(command.machine, "gpus", lambda: ["one"])
    result = CliRunner().invoke(command.command, arguments)
    assert isinstance(result.exception, problem), result.output


@pytest.mark.parametrize(("misses", "points", "code"), [([], [1], 0), ([1], [1], 1), ([], [], 3)])
def test_a_table_that_is_too_slow_is_exit_code_1(misses, points, code, monkeypatch, tmp_path):
    measured = {"misses": misses, "points": points, "world": 2}
    asked = []
    monkeypatch.setattr(command.machine, "gpus", lambda: ["one", "two"])
    monkeypatch.setattr(command.allreduce, "measure", lambda *given: asked.append(given) or measured)
    monkeypatch.setattr(command.allreduce, "table_of", lambda result: {"entries": []})
    monkeypatch.setattr(command.allreduce, "rendered", lambda result: "table")
    monkeypatch.setattr(command.allreduce, "notes", lambda result: ["a note [with brackets]"])
    out, table = tmp_path / "out.json", tmp_path / "table.json"
    result = CliRunner().invoke(command.command, ["allreduce_rmsnorm", "--out", str(out), "--calibrate", str(table)])
    assert result.exit_code == code, result.output
    assert asked == [(2, True)]
    assert "a note [with brackets]" in result.output
    assert '"world": 2' in out.read_text()
    assert '"entries": []' in table.read_text()
