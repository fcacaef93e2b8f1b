from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_fuzz import config, written
from moe_fuzz.errors import UsageError
from moe_fuzz.options import ProviderOptions


def write(folder: Path, body: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(f"[tool.moe-fuzz]\n{body}\n")
    return folder


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(90, 90.0), (1.5, 1.5), ("90", 90.0), ("90s", 90.0), ("2m", 120.0), ("1h30m", 5400.0), ("0.5h", 1800.0)],
)
def test_durations(text: object, seconds: float) -> None:
    assert written.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "m", "2 minutes", "-1", "0", 0, -3, True, None, "1e5", "nan", float("nan"), [1], "2m3"]
)
def test_bad_durations(text: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        written.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4 << 30), ("512MB", 512_000_000), ("1.5g", 1_500_000_000), (1 << 30, 1 << 30)]
)
def test_sizes(text: object, size: int) -> None:
    assert written.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "12", "4XB", -1, True, 1.5, None])
def test_bad_sizes(text: object) -> None:
    with pytest.raises(ValueError, match=r"size|small"):
        written.parse_size(text)


def test_nearest_table_upward_wins_and_files_without_one_are_passed(tmp_path: Path) -> None:
    outer = write(tmp_path, "cases = 1")
    inner = write(tmp_path / "a", "cases = 2")
    bare = tmp_path / "b"
    bare.mkdir()
    (bare / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert config.load(inner / "deep" / "er", {}).values == {"cases": 2}
    assert config.load(bare, {}).path == outer / "pyproject.toml"


def test_every_key_is_read(tmp_path: Path) -> None:
    body = """
targets = ["topk_softmax", "mine.py:f", "topk_softmax@sub/mine.py:f"]
time = "2m"
cases = 10
seed = 0
workers = 2
device = "cpu"
state-dir = "state"
profile = "quick"
deadline = 5
memory = "1GiB"
checks = ["ids"]
ops = ["topk_softmax"]
mode = ["eager"]
preset = ["mixtral-8x7b"]
faults = ["nan_rows"]
only = ["bias=false"]
fence = "all"
report = ["ndjson=out/events.ndjson"]
minimize-time = 3
"""
    values = config.load(write(tmp_path, body), {}).values
    assert {key.replace("_", "-") for key in values} == set(config.KEYS)
    assert values["time"] == 120.0
    assert values["memory"] == 1 << 30
    # paths are meant from the file's folder
    assert values["state_dir"] == str(tmp_path / "state")
    assert values["report"] == [f"ndjson={tmp_path}/out/events.ndjson"]
    assert values["targets"] == ["topk_softmax", f"{tmp_path}/mine.py:f", f"topk_softmax@{tmp_path}/sub/mine.py:f"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("tiem = 3", "did you mean time"),
        ("state_dir = 'x'", "did you mean state-dir"),
        ("zzzz = 1", "unknown key 'zzzz'"),
        ("cases = '10'", "cases: must be a whole number"),
        ("cases = true", "cases: must be a whole number"),
        ("cases = 0", "cases: must be at least 1"),
        ("seed = -1", "seed: must be at least 0"),
        ("seed = 9223372036854775808", "seed: must be"),
        ("time = []", "time: [] is not a duration"),
        ("device = 'gpu'", "device: must be one of auto, cpu, cuda"),
        ("profile = 'quik'", "did you mean quick"),
        ("gate.profile = 'quik'", "[tool.moe-fuzz.gate] profile: must be one of quick, default, deep, not 'quik'"),
        ("targets = 'topk_softmax'", "targets: must be a list of strings"),
        ("checks = [1]", "checks: must be a list of strings"),
        ("report = ['ndjson=']", "is not KIND=PATH"),
        ("memory = 12", "too small"),
        ("state-dir = ''", "state-dir: must be a string"),
        ("provider = 1", "did you mean providers"),
        ("providers = 1", "providers must be a table"),
        ("providers.vlm.python = 'x'", "no provider 'vlm' (did you mean vllm?)"),
        ("providers.vllm = 1", "[tool.moe-fuzz.providers.vllm] must be a table"),
        ("providers.vllm.pyton = 'x'", "unknown key 'pyton' (did you mean python?)"),
        ("providers.torch.lib = ['x']", "unknown key 'lib'"),
        ("providers.vllm.python = 3", "python: must be a string"),
        ("providers.vllm.lib = 'x'", "lib: must be a list of strings"),
        ("providers.vllm.env = {A = 1}", "env: must be a table of strings"),
    ],
)
def test_wrong_values_are_told_with_the_file(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        config.load(write(tmp_path, body), {})
    assert said in error.value.message
    assert str(tmp_path / "pyproject.toml") in error.value.message


PROVIDERS = """
[tool.moe-fuzz.providers.vllm]
python = "envs/vllm/bin/python"
lib = ["libs/_moe_C.abi3.so", "/abs/_C.abi3.so"]
env = { VLLM_MOE_SKIP_PADDING = "1" }
[tool.moe-fuzz.providers.torch]
python = "python3.12"
"""


def test_providers_have_interpreters_libraries_and_variables(tmp_path: Path) -> None:
    folder = write(tmp_path, PROVIDERS)
    found = config.load(folder, {}).providers
    libs = f"{tmp_path}/libs/_moe_C.abi3.so{os.pathsep}/abs/_C.abi3.so"
    env = {"VLLM_MOE_SKIP_PADDING": "1", "MOE_FUZZ_VLLM_LIB": libs}
    assert found["vllm"] == ProviderOptions(f"{tmp_path}/envs/vllm/bin/python", env)
    assert found["torch"] == ProviderOptions("python3.12", {})  # looked up in PATH
    # the environment wins over the file
    assert "MOE_FUZZ_VLLM_LIB" not in config.load(folder, {"MOE_FUZZ_VLLM_LIB": "x"}).providers["vllm"].env
    assert config.load(write(tmp_path / "bare", "cases = 1"), {}).providers == {}


@pytest.mark.parametrize("text", [
    "[tool.moe-fuzz", "[tool.moe_fuzz]\ncases = 1", "[tool.moefuzz]\ncases = 1", "[tool.MoE-Fuzz.gate]\ncases = 1",
    "[tool]\nmoe-fuzz = 3",
])
def test_broken_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(UsageError, match=r"pyproject\.toml"):
        config.load(tmp_path, {})


def test_a_file_that_is_nested_too_deep(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("x = " + 5000 * "[")
    with pytest.raises(UsageError, match="nested deeper than can be read"):
        config.load(tmp_path, {})


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not valid TOML"):
        config.load(tmp_path, {})


def test_environment_names() -> None:
    config.check_environment({"MOE_FUZZ_TIME": "3", "MOE": "x", "MOE_FUZZ_VLLM_LIB": "x", "MOE_FUZZ_SGLANG_LIB": "y"})
    config.check_environment({"MOE_FUZZ_EXPERTS_NVFP4_BACKEND": "large"})
    with pytest.raises(UsageError, match=r"MOE_FUZZ_CASE \(did you mean MOE_FUZZ_CASES\?\)"):
        config.check_environment({"MOE_FUZZ_CASE": "3"})
    with pytest.raises(UsageError, match=r"BACKEND names no backend: larg \(did you mean large\?\)"):
        config.check_environment({"MOE_FUZZ_EXPERTS_NVFP4_BACKEND": "larg"})
