"""Exit codes, lazy loading and streams: in processes of their own where that is what counts."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moe_fuzz
from moe_fuzz.cli.main import COMMANDS, main
from moe_fuzz.errors import EnvironmentProblem, MoeFuzzError, UsageError

Spawn = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("name", COMMANDS)
def test_short_help_is_the_commands_own(name: str) -> None:
    command = importlib.import_module(f"moe_fuzz.cli.{name}").command
    assert command.short_help == COMMANDS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(call: Callable, name: str) -> None:
    ran = call(name, "--help")
    assert ran.code == 0
    assert f"Usage: moe-fuzz {name}" in ran.out


@pytest.mark.parametrize("arguments", [["--help"], ["list", "checks"], ["run", "--help"], ["replay", "nothing"]])
def test_no_device_library_is_imported(spawn: Spawn, arguments: list[str]) -> None:
    program = (
        "import sys; from moe_fuzz.cli.main import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = spawn(f'{sys.executable} -c "{program}" {" ".join(arguments)}')
    assert done.stderr.splitlines()[-1] == "[]"


def test_help_loads_no_command(spawn: Spawn) -> None:
    program = "import sys; from moe_fuzz.cli.main import main; main(['--help']); print('rich' in sys.modules, \
any(name.startswith('moe_fuzz.campaign') for name in sys.modules), file=sys.stderr)"
    assert spawn(f'{sys.executable} -c "{program}"').stderr.strip() == "False False"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("moe-fuzz --version", 0, "moe-fuzz, version"),
        ("moe-fuzz", 2, "Usage: moe-fuzz"),
        ("moe-fuzz runn", 2, "did you mean run?"),
        ("moe-fuzz run --tim 3", 2, "No such option"),
        ("moe-fuzz run --cases x", 2, "is not a valid integer"),
        ("moe-fuzz run --time 0", 2, "a duration must be positive"),
        ("moe-fuzz run topk_sofmax", 2, "topk_softmax"),
        ("moe-fuzz run nothing.py:f --op topk_softmax", 2, "there is no file"),
        ("moe-fuzz run --report junk=x", 2, "there is no report of kind 'junk'"),
        ("moe-fuzz run --report ndjson", 2, "the report ndjson needs a file"),
        ("moe-fuzz run --report ndjson=", 2, "is not KIND=PATH"),
        ("moe-fuzz run --report ndjson=/proc/x/y", 2, "cannot be written"),
        ("moe-fuzz run --checks idz", 2, "did you mean ids?"),
        ("moe-fuzz replay nothing", 2, "there is neither a file nor a finding 'nothing'"),
        ("moe-fuzz replay mfz1:AAAA", 2, "the inline case is damaged"),
        ("moe-fuzz list nothing", 2, "is not one of"),
        ("moe-fuzz list ops > /dev/full", 3, "No space left on device"),
        ("moe-fuzz list ops >&-", 0, ""),
    ],
)
def test_exit_codes(spawn: Spawn, line: str, code: int, said: str) -> None:
    done = spawn(line)
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_quiet_and_changes_no_exit_code(spawn: Spawn) -> None:
    done = spawn("(for i in $(seq 3); do moe-fuzz list faults --json; echo code $? >&2; done) | head -c 1 >/dev/null")
    assert done.stderr.split() == ["code", "0"] * 3


def test_a_poor_encoding_is_no_error(spawn: Spawn) -> None:
    done = spawn("moe-fuzz --help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "Exit codes" in done.stdout


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("wrong", "do it right"), 2, "error: wrong\nhint: do it right\n"),
        (EnvironmentProblem("broken"), 3, "error: broken\n"),
        (MoeFuzzError("inside"), 4, "error: inside\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (OSError(28, "No space left on device"), 3, "No space left"),
        (ModuleNotFoundError("No module named 'rich'", name="rich"), 3, "the package rich is not installed"),
        (ModuleNotFoundError("No module named 'moe_fuzz.x'", name="moe_fuzz.x"), 4, "internal error"),
    ],
)
def test_errors_end_in_their_code(
    call: Callable, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    fail_with(monkeypatch, error)
    ran = call("list", "ops")
    assert ran.code == code
    assert said in ran.err


def test_an_internal_error_keeps_its_traceback(call: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fail_with(monkeypatch, ZeroDivisionError("oh"))
    ran = call("list", "ops")
    assert ran.code == 4
    assert "internal error: ZeroDivisionError: oh" in ran.err
    assert "not a finding" in ran.err
    (kept,) = (tmp_path / ".moe-fuzz" / "errors").iterdir()
    assert str(kept.relative_to(tmp_path)) in ran.err
    assert "Traceback" in kept.read_text()
    assert "Traceback" not in ran.err


def test_debug_prints_the_traceback_and_writes_nothing(
    call: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fail_with(monkeypatch, ZeroDivisionError("oh"))
    ran = call("--debug", "list", "ops")
    assert ran.code == 4
    assert "Traceback" in ran.err
    assert not (tmp_path / ".moe-fuzz").exists()


def test_an_internal_error_without_a_writable_place(
    call: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_FUZZ_STATE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file"))
    fail_with(monkeypatch, ZeroDivisionError("oh"))
    ran = call("list", "ops")
    assert ran.code == 4
    assert "Traceback" in ran.err


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("moe_fuzz.cli.list").command, "callback", fail)


def test_broken_configuration_is_2_but_help_and_doctor_survive(spawn: Spawn, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.moe-fuzz]\ntimme = 3\n")
    done = spawn("moe-fuzz list ops")
    assert done.returncode == 2
    assert "did you mean time?" in done.stderr
    assert spawn("moe-fuzz run --help").returncode == 0


def test_unknown_variable_is_2(spawn: Spawn) -> None:
    done = spawn("moe-fuzz list ops", MOE_FUZZ_CASE="3")
    assert done.returncode == 2
    assert "did you mean MOE_FUZZ_CASES?" in done.stderr


@pytest.mark.parametrize(
    ("number", "ignored", "ends"),
    [(signal.SIGTERM, False, True), (signal.SIGHUP, False, True), (signal.SIGHUP, True, False)],
)
def test_termination_is_an_interrupt(number: signal.Signals, ignored: bool, ends: bool) -> None:
    """A terminal that is closed, too; not where somebody started it to outlive that, as nohup does."""
    program = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_IGN if IGNORED else signal.SIG_DFL)  # whatever the tests are started by
from moe_fuzz.cli.main import main
import moe_fuzz.cli.list
moe_fuzz.cli.list.command.callback = lambda **settings: (print("up", flush=True), time.sleep(SECONDS))
sys.argv = ["moe-fuzz", "list", "ops"]
sys.exit(main())
""".replace("IGNORED", str(ignored)).replace("SECONDS", "60" if ends else "2")
    root = str(Path(moe_fuzz.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error.strip()) == ((130, "error: interrupted") if ends else (0, ""))


def test_click_does_not_own_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """main returns; whoever calls it decides when the process ends."""
    assert main(["--version"]) == 0
    monkeypatch.setattr("sys.argv", ["moe-fuzz", "nothing"])
    assert main(["list", "ops"]) == 0
