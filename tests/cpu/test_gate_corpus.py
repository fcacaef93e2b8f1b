"""The files that a gate replays."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign import corpus
from moe_fuzz.campaign.gate.corpus import read
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import UsageError
from moe_fuzz.ops import get_space

INFO = TargetInfo("topk_softmax@torch", "topk_softmax", "torch")


def test_cases_and_records_of_one_in_the_order_of_their_paths(tmp_path: Path) -> None:
    grid = strategies.grid(get_space("topk_softmax"), INFO, "cpu", 0)
    plain, recorded, inline = (next(grid) for _ in range(3))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.json").write_text(plain.dumps())
    (tmp_path / "a.json").write_text(json.dumps({"cause": "why", "case": recorded.to_json()}))
    (tmp_path / "c.json").write_text(json.dumps({"moe_fuzz_corpus": 1, "case": inline.inline()}))
    (tmp_path / "d.json").write_text("{")
    (tmp_path / "e.json").write_text('{"other": 1}')
    (tmp_path / "f.json").write_text(json.dumps(plain.to_json() | {"op": "nobody", "digest": ""}))
    (tmp_path / "readme.md").write_text("no case")
    cases, notes = read([tmp_path])
    assert cases == (recorded, plain, inline)
    assert [note.partition(" is left out")[0].rpartition("/")[2] for note in notes] == ["d.json", "e.json", "f.json"]
    assert read([]) == ((), [])
    with pytest.raises(UsageError, match="there is no corpus"):
        read([tmp_path / "none"])


def test_a_damaged_file_stops_no_gate(tmp_path: Path) -> None:
    """Whatever lies in the folder is left out and told: an error of ours would make every gate of the project red."""
    case = next(strategies.grid(get_space("topk_softmax"), INFO, "cpu", 0))
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good.json").write_text(case.dumps())
    (tmp_path / "nan.json").write_text('{"case": NaN}')
    (tmp_path / "null.json").write_text("null")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zeros.json").write_bytes(b"\xff\xfe\0")
    cases, notes = read([tmp_path])
    assert cases == (case,)
    assert len(notes) == 7
    assert "pipe.json is no regular file" in notes[5]
    kept = corpus.load(tmp_path, get_space)
    assert set(kept.entries) == {case.digest}
    assert len(kept.damaged) == 7


def test_our_own_regressions_are_a_corpus() -> None:
    cases, notes = read([Path(__file__).parents[1] / "regressions"])
    assert len(cases) >= 12
    assert not notes
