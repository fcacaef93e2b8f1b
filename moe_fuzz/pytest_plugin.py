"""The pytest plugin (entry point `pytest11`). It serves `@fuzz` tests and leaves every other test run alone.

It is loaded into each pytest run on a machine that has moe-fuzz installed, so it imports nothing but pytest itself.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

from moe_fuzz.fuzz import close

_REPLAYS = "moe_fuzz_replays"  # on the exception of a failed @fuzz test, and then on its report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Puts the replay lines on the report: unlike the exception it travels from an xdist worker to the terminal."""
    report = yield
    replays = getattr(call.excinfo.value, _REPLAYS, ()) if call.excinfo else ()
    if replays:
        setattr(report, _REPLAYS, list(replays))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    failed = [report for report in terminalreporter.getreports("failed") if getattr(report, _REPLAYS, ())]
    if not failed:
        return
    terminalreporter.section("moe-fuzz: replay these findings")
    for report in failed:
        terminalreporter.write_line(report.nodeid)
        for line in getattr(report, _REPLAYS):
            terminalreporter.write_line(f"  {line}")


def pytest_sessionfinish() -> None:
    close()
