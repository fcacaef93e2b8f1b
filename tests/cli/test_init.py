"""`init workflow` and the action: what they write is what the gate's own command line takes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moe_fuzz
from moe_fuzz._version import __version__
from moe_fuzz.campaign.gate.plan import PROFILES
from moe_fuzz.cli import gate
from moe_fuzz.cli.init import KINDS, render

ROOT = Path(moe_fuzz.__file__).parents[1]
OUTPUT = {kind.output: name for name, kind in KINDS.items()}


def command_of(text: str) -> list[str]:
    """The words of the `moe-fuzz gate` in a workflow, as a shell would give them in a pull request to main."""
    lines = text[text.index("moe-fuzz gate ") :].splitlines()
    end = next(at for at, line in enumerate(lines) if "--state-dir" in line)
    joined = " ".join(line.strip().removesuffix("\\") for line in lines[: end + 1])
    values = {"BASE": "origin/main", "PROFILE": "quick", "CI_MERGE_REQUEST_DIFF_BASE_SHA": "abc123"}
    done = subprocess.run(
        ["bash", "-c", f'printf "%s\\n" {joined}'], env=values, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[2:]


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_kind_gates_the_change(call: Callable, tmp_path: Path, kind: str) -> None:
    words = ("--target", "topk_softmax@torch", "--target", "topk_softmax@my kernels.py:topk", "--runner", "h200")
    assert call("init", "workflow", kind, *words).code == 0
    text = (tmp_path / KINDS[kind].output).read_text()
    assert f"moe-fuzz=={__version__}" in text
    assert "h200" in text
    assert "[[" not in text
    context = gate.command.make_context("gate", command_of(text))
    given = context.params
    assert given["targets"] == ("topk_softmax@torch", "topk_softmax@my kernels.py:topk")
    assert given["profile"] == "quick"
    assert given["changed_from"] in ("origin/main", "FETCH_HEAD", "abc123")
    assert [name for name, _ in given["reports"]] == ["junit", "html"]
    again = call("init", "workflow", kind)
    assert again.code == 2
    assert "is there already" in again.err
    assert call("init", "workflow", kind, "--force", "--profile", "deep").code == 0
    assert "topk_softmax@torch" not in (tmp_path / KINDS[kind].output).read_text()


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_installed_can_be_said(call: Callable, kind: str) -> None:
    for wanted in ("moe-fuzz @ git+https://example.org/moe-fuzz@v1#egg=moe-fuzz", "./third_party/moe-fuzz[dev]"):
        made = call("init", "workflow", kind, "--install", wanted, "--output", "-")
        assert made.code == 0
        assert f'python3 -m pip install "{wanted}"' in made.out
        assert "moe-fuzz==" not in made.out
    for odd in ('x"; touch evil; "', "$(touch evil)", "a`b`", "it's", "x\ny", "x #y", "x: y"):
        refused = call("init", "workflow", kind, "--install", odd, "--output", "-")
        assert (refused.code, refused.out) == (2, "")
        assert "write a plain requirement" in refused.err


def test_a_target_in_a_file_says_its_op(call: Callable) -> None:
    refused = call("init", "workflow", "github", "--target", "k.py:topk")
    assert refused.code == 2
    assert "write OP@k.py:topk, with one of" in refused.err


@pytest.mark.parametrize("profile", list(PROFILES))
@pytest.mark.parametrize("kind", list(KINDS))
def test_each_job_has_the_time_of_its_profile(kind: str, profile: str) -> None:
    """Also the nightly one, which takes another profile."""
    text = render(KINDS[kind], (), profile, None, "moe-fuzz")
    [limit] = re.findall(r"(?:timeout\S*:|timeout\(time:) *(.*)", text)
    limits = [int(number) * 60 for number in re.findall(r"\d+", limit)]
    profiles = [profile, "deep"] if kind == "github" else [profile]
    assert ("deep" in text) == ("deep" in profiles)
    assert len(limits) == len(profiles)
    for seconds, name in zip(limits, profiles, strict=True):
        assert seconds >= PROFILES[name].seconds + 600


def test_the_kind_is_the_one_that_the_repository_uses(call: Callable, tmp_path: Path) -> None:
    assert "which CI this repository uses is not known" in call("init", "workflow").err
    (tmp_path / ".gitlab-ci.yml").touch()
    assert call("init", "workflow").code == 0
    assert (tmp_path / ".gitlab" / "moe-fuzz.yml").exists()
    (tmp_path / "Jenkinsfile").touch()
    assert "uses gitlab and jenkins" in call("init", "workflow").err
    assert "pipeline {" in call("init", "workflow", "jenkins", "--output", "-").out
    assert call("init", "workflow", "jenkins", "--target", "topk_softmx").code == 2


def test_the_action_hands_its_inputs_on_as_they_are(tmp_path: Path) -> None:
    """A stand-in for the interpreter writes down what it is called with."""
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\nwith open('called', 'a') as file:\n"
        "    file.write(json.dumps(sys.argv[1:]) + '\\n')\nsys.exit(1 if 'gate' in sys.argv else 0)\n"
    )
    python.chmod(0o755)
    evil = '$(touch evil); "; touch evil'
    env = {
        "PATH": os.environ["PATH"], "GITHUB_ACTION_PATH": str(ROOT), "GITHUB_OUTPUT": str(tmp_path / "outputs"),
        "GATE_PYTHON": str(python), "GATE_TARGETS": "topk_softmax@torch  align *", "GATE_PROFILE": "quick",
        "GATE_CHANGED_FROM": evil, "GATE_ARGS": "--strict --cases 20", "GATE_OUTPUT": "out put",
    }  # fmt: skip
    done = subprocess.run(["bash", str(ROOT / ".ci" / "action")], cwd=tmp_path, env=env, check=False)
    assert done.returncode == 1
    assert (tmp_path / "outputs").read_text() == "exit-code=1\n"
    install, call = [json.loads(line) for line in (tmp_path / "called").read_text().splitlines()]
    assert install[:3] == ["-m", "pip", "install"]
    assert install[-1] == str(ROOT)
    assert call[:3] == ["-m", "moe_fuzz.cli.main", "gate"]
    given = gate.command.make_context("gate", call[3:]).params
    assert given["targets"] == ("topk_softmax@torch", "align", "*")
    assert (given["changed_from"], given["strict"], given["cases"]) == (evil, True, 20)
    assert [name for name, _ in given["reports"]] == ["junit", "sarif", "html"]
    assert not (tmp_path / "evil").exists()


def test_the_action_names_each_variable_of_its_script() -> None:
    text = (ROOT / "action.yml").read_text()
    script = (ROOT / ".ci" / "action").read_text()
    given = dict(re.findall(r"(GATE_\w+): \$\{\{ inputs\.([\w-]+) \}\}", text))
    assert set(given) == set(re.findall(r"GATE_\w+", script)) - {"GATE_"}
    inputs = text[text.index("inputs:") : text.index("outputs:")]
    assert set(re.findall(r"^  ([\w-]+):$", inputs, re.MULTILINE)) == {*given.values(), "artifact"}
    run = re.findall(r"^\s+run: (.*)$", text, re.MULTILINE)
    assert run == ['bash "$GITHUB_ACTION_PATH/.ci/action"']
    assert shlex.split(run[0])[0] == "bash"
