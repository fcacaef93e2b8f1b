"""A process whose kernels are compiled, running tests for a pytest whose kernels are interpreted: see conftest.py.

Reads the id of a test a line, and answers with a line of JSON: {"outcome": …, "text": …}.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

import pytest


class Heard:
    """What became of one test."""

    def __init__(self) -> None:
        self.outcome, self.text = "missing", "the test was not found"

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcome, self.text = report.outcome, str(report.longrepr or "")


def main() -> None:
    for line in sys.stdin:
        heard, said = Heard(), io.StringIO()
        with contextlib.redirect_stdout(said):
            pytest.main(["-q", "-p", "no:cacheprovider", line.strip()], plugins=[heard])
        text = heard.text if heard.outcome != "missing" else f"{heard.text}\n{said.getvalue()[-3000:]}"
        print(json.dumps({"outcome": heard.outcome, "text": text}), flush=True)


if __name__ == "__main__":
    main()
