"""benchmarks/picture.py draws what is in a campaign's own files, and nothing else."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

from moe_fuzz.campaign.finding import Finding
from moe_fuzz.report.ndjson import Ndjson
from tests.benchmark_script import benchmark
from tests.cli.campaign_told import ROW, TARGET, told

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def picture() -> ModuleType:
    return benchmark("picture")


def bars(file: Path) -> list[str]:
    root = ET.parse(file).getroot()  # so it is well-formed
    rects = root.iter("{http://www.w3.org/2000/svg}rect")
    return [str(rect[0].text) for rect in rects if rect.get("class") == "bar"]


def test_the_stream_of_a_campaign(picture: ModuleType, finding: Finding, tmp_path: Path) -> None:
    with (tmp_path / "events.ndjson").open("w") as stream:
        report = Ndjson(stream)
        for event in told(finding):
            report.handle(event)
    out = tmp_path / "img" / "budgets.svg"
    assert picture.main([str(tmp_path / "events.ndjson"), "--out", str(out)]) == 0
    assert bars(out) == [
        "0 to 5 % of the bound: 60 cases", "5 to 10 % of the bound: 15 cases", "10 to 15 % of the bound: 4 cases",
        "95 to 100 % of the bound: 1 cases",
    ]  # fmt: skip
    assert f"{TARGET}, 80 cases" in out.read_text()


def test_results_and_statistics_are_added_up(picture: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"runs": [{"target": TARGET, "budgets": list(ROW.budgets)}]}))
    stats = {"targets": {TARGET: {"budgets": {"0": 40}}, "x@y": {"budgets": {"3": 1}}}}
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    out = tmp_path / "out.svg"
    files = [str(tmp_path / "a.json"), str(tmp_path / "stats.json")]
    assert picture.main([*files, "--target", TARGET, "--out", str(out)]) == 0
    assert bars(out)[0] == "0 to 5 % of the bound: 100 cases"
    assert "x@y" not in out.read_text()


def test_rates_of_the_engine(picture: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out.svg"
    assert picture.main([str(ROOT / "benchmarks/results/engine-cpu.json"), "--rates", "--out", str(out)]) == 0
    assert "18.5 cases/s" in out.read_text()
    assert "through two workers" in out.read_text()


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("{}", 3, "nothing to draw"),
        ('{"kind": "note"}\n{"kind": "progress"}\n', 2, "no campaign came to its end"),
        ('{"kind": "note"}\n{"ki', 2, "file:2: no JSON"),
    ],
)
def test_a_file_without_them_is_told(
    picture: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, code: int, said: str
) -> None:
    (tmp_path / "file").write_text(text)
    assert picture.main([str(tmp_path / "file"), "--out", str(tmp_path / "out.svg")]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.svg").exists()
