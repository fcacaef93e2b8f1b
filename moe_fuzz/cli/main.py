"""The command `moe-fuzz`: which commands there are, and which exit code everything ends in.

A command's module is imported when it is called, so that `moe-fuzz --help` starts at once. No exception leaves `main`:
a traceback of ours ends in 4 and can never look like a finding, which is 1.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from moe_fuzz import config
from moe_fuzz._version import __version__
from moe_fuzz.cli import streams
from moe_fuzz.errors import (
    EXIT_CLEAN,
    EXIT_ENVIRONMENT,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    MoeFuzzError,
    UsageError,
)

#: Command → one line of help. The module of a command has its name and an attribute `command`.
COMMANDS = {
    "run": "Run a campaign: generate cases, confirm and minimize what fails.",
    "gate": "A fixed plan of cases for CI: red on a new confirmed finding.",
    "ledger": "Write findings into the ledger of known ones.",
    "replay": "Run one case again: FIXED (0), FAILED (1) or ERROR (3).",
    "show": "Show what a case is made of.",
    "minimize": "Make a failing case smaller.",
    "findings": "List the findings in the state directory.",
    "sanitize": "Run one case under compute-sanitizer: which line of the kernel.",
    "corpus": "Add, merge and prune cases worth running again.",
    "selftest": "Prove that the checks can fire: find every planted bug.",
    "bench": "Time implementations of an op side by side, on a GPU.",
    "list": "List ops, targets, checks, faults or presets.",
    "doctor": "Look at this machine: what works, what does not, and the way out.",
    "init": "Write a workflow for your CI.",
}

#: Which keys of the configuration a command takes. The others are not for it, though they are valid.
_WORKER_KEYS = ("device", "state_dir", "deadline", "memory")
_KEYS = {
    "run": tuple(key.replace("-", "_") for key in config.KEYS),
    "gate": (*_WORKER_KEYS, "targets", "workers", "report"),
    "ledger": ("state_dir",),
    "init": (),
    "replay": (*_WORKER_KEYS, "fence"),
    "show": ("device", "state_dir"),
    "minimize": (*_WORKER_KEYS, "fence", "minimize_time"),
    "findings": ("state_dir",),
    "corpus": ("state_dir",),
    "sanitize": ("device", "state_dir"),
    "selftest": ("workers", "device", "memory"),
    "bench": (),
    "list": (),
    "doctor": ("workers", "device", "state_dir", "memory"),
}
_EXIT_HELP = (
    "0 clean · 1 a new confirmed finding · 2 usage or configuration · 3 environment, or nothing ran · "
    "4 internal error · 130 interrupted"
)
_LONGEST = 1000  # characters of a line of an error
_MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)


class LazyGroup(click.Group):
    """A group that imports a command when it is called, and suggests one when the name is unknown."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"moe_fuzz.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            raise click.UsageError(f"no such command: {name}{config.did_you_mean(name, COMMANDS)}", ctx)
        if not {"--help", "-h"} & set(args):  # help must be had with a broken configuration too
            self._configure(ctx, name)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def _configure(self, ctx: click.Context, name: str) -> None:
        try:
            found = config.load(Path.cwd(), os.environ)
        except UsageError as error:
            if name != "doctor":  # which reports it as one of its lines
                raise
            found = config.Config()
            ctx.ensure_object(dict)["config_error"] = error
        ctx.ensure_object(dict)["config"] = found
        values = {key: value for key, value in found.values.items() if key in _KEYS.get(name, ())}
        if name == "gate":
            values |= found.gate
        if "report" in values:
            values["reports"] = values.pop("report")  # as the parameter is called
        ctx.default_map = {name: values}


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"max_content_width": 110, "help_option_names": ["--help", "-h"]},
    epilog=f"Exit codes: {_EXIT_HELP}",
)
@click.version_option(__version__, prog_name="moe-fuzz")
@click.option("--debug", is_flag=True, envvar="MOE_FUZZ_DEBUG", help="Print the traceback of an internal error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Correctness and robustness fuzzer for mixture-of-experts serving kernels."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(EXIT_USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code. Without `argv` it owns the process: its streams and signals."""
    if argv is None:
        streams.install()
        signal.signal(signal.SIGTERM, _terminate)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup, which outlives its terminal
            signal.signal(signal.SIGHUP, _terminate)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        result = cli.main(arguments, prog_name="moe-fuzz", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else EXIT_CLEAN
    except MoeFuzzError as error:
        return _complain(error.message, error.hint, error.exit_code)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "moe-fuzz"
        return _complain(error.format_message(), f"`{command} --help` says what can be written", EXIT_USAGE)
    except click.ClickException as error:
        return _complain(error.format_message(), "", EXIT_USAGE)
    except (click.Abort, KeyboardInterrupt):
        return _complain("interrupted", "", EXIT_INTERRUPTED)
    except OSError as error:
        if error.errno in _MACHINE_ERRORS:
            place = f" ({error.filename})" if error.filename else ""
            return _complain(f"{error.strerror}{place}", "`moe-fuzz doctor` looks at the machine", EXIT_ENVIRONMENT)
        return _internal(error, arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "moe_fuzz").partition(".")[0]
        if package == "moe_fuzz":
            return _internal(error, arguments)
        hint = "install moe-fuzz with pip, which brings all that it needs; its sources alone on PYTHONPATH do not"
        return _complain(f"the package {package} is not installed for {sys.executable}", hint, EXIT_ENVIRONMENT)
    except Exception as error:  # noqa: BLE001 -- the last resort: whatever it is, it is no finding
        return _internal(error, arguments)


def _terminate(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _complain(message: str, hint: str, code: int) -> int:
    with contextlib.suppress(OSError):  # a full disk behind stdout or stderr must not change the exit code
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(f"error: {_readable(message)}", file=sys.stderr)
        if hint:
            print(f"hint: {_readable(hint)}", file=sys.stderr)
    return code


def _readable(text: str) -> str:
    """What a damaged file held can neither steer the terminal nor fill it."""
    lines = ["".join(char if char.isprintable() else ascii(char)[1:-1] for char in line) for line in text.split("\n")]
    return "\n".join(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…" for line in lines)


def _internal(error: Exception, arguments: Sequence[str]) -> int:
    """Keeps the traceback for a report to us; on the screen stand the error and where the traceback is."""
    text = "".join(traceback.format_exception(error))
    summary = f"internal error: {type(error).__name__}: {error}"
    if "--debug" in arguments or os.environ.get("MOE_FUZZ_DEBUG"):
        return _complain(f"{summary}\n{text}", "", EXIT_INTERNAL)
    header = f"moe-fuzz {__version__}, Python {sys.version.split()[0]}\narguments: {arguments}\n\n"
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in _places(arguments):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(header + text, encoding="utf-8")
        except OSError:  # the next place will do
            continue
        hint = f"this is a bug of moe-fuzz, not a finding; please report it with {folder / name}"
        return _complain(summary, hint, EXIT_INTERNAL)
    return _complain(f"{summary}\n{text}", "", EXIT_INTERNAL)


def _places(arguments: Sequence[str]) -> Iterator[Path]:
    """Where a traceback can be kept: the state directory, else the folder for temporary files."""
    values: dict[str, Any] = {}
    with contextlib.suppress(UsageError):
        values = dict(config.load(Path.cwd(), os.environ).values)
    state = os.environ.get("MOE_FUZZ_STATE_DIR") or values.get("state_dir") or config.DEFAULT_STATE_DIR
    for before, word in zip(arguments, [*arguments[1:], ""], strict=True):
        if before == "--state-dir" and word:
            state = word
        elif before.startswith("--state-dir="):
            state = before.partition("=")[2]
    yield Path(state) / "errors"
    yield Path(tempfile.gettempdir())


if __name__ == "__main__":
    sys.exit(main())
