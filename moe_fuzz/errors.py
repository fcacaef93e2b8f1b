"""The errors moe-fuzz reports to a person. Each carries the way out, and the exit code it ends in.

Exit codes: 0 clean, 1 new confirmed finding, 2 usage or configuration, 3 environment or nothing ran, 4 internal error,
130 interrupted.
"""

from __future__ import annotations

EXIT_CLEAN = 0
EXIT_FINDING = 1
EXIT_USAGE = 2
EXIT_ENVIRONMENT = 3
EXIT_INTERNAL = 4
EXIT_INTERRUPTED = 130


class MoeFuzzError(Exception):
    """An error with a message for a person and a hint that names the way out."""

    exit_code = EXIT_INTERNAL

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MoeFuzzError):
    """The command line, the configuration or a file given by the user is wrong."""

    exit_code = EXIT_USAGE


class CaseError(UsageError):
    """A case is not valid; `where` is the path of the offending field, e.g. `steps[0].rows`."""

    def __init__(self, where: str, problem: str, hint: str = "") -> None:
        super().__init__(f"{where}: {problem}" if where else problem, hint)
        self.where = where


class EnvironmentProblem(MoeFuzzError):
    """The machine cannot do what was asked: no GPU, a full disk, a directory that cannot be written, a dead zygote."""

    exit_code = EXIT_ENVIRONMENT
