"""A gate over a release with known defects: red, green with a ledger of what it found, red again without one entry.

    python benchmarks/gate_ledger.py vllm --profile quick --folder /tmp/gate          # on a GPU, with vLLM at hand
    python benchmarks/gate_ledger.py my_kernels.py:topk --op topk_softmax --cases 48  # anything else

Prints a line for each gate and ends in 0 only if all three ended as they should. Everything else is handed to
`moe-fuzz gate`. The findings are entered with a made-up tracker: the ledger is for this proof, not for a project.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

TRACKER, OWNER = "proof#1", "@benchmarks"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("gate-proof"))
    parser.add_argument("--rounds", type=int, default=3, help="gates until the ledger holds all that they find")
    options, words = parser.parse_known_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    ledger = folder / "ledger.toml"
    ledger.write_text("# The findings of a proof.\n")
    gates: list[dict[str, Any]] = []
    for number in range(options.rounds):  # time cuts a reduction, and then another round may name a defect otherwise
        gates.append(gate(folder, f"gate-{number}", words, ledger))
        if gates[-1]["exit_code"] != 1:
            break
        for finding in gates[-1]["new"]:
            add(folder, finding["id"], ledger)
    if len(gates) < 2 or gates[-1]["exit_code"] != 0:
        print(f"the gate over {' '.join(words)} was not red first and green then")
        return 1
    tables = ledger.read_text().split("[[known]]")
    entered = [finding for one in gates for finding in one["new"]]
    kinds = Counter(kind_of(finding) for finding in entered)
    # An entry beside others of its kind may be one that they cover: then nothing is new without it, and rightly so.
    before = min(entered, key=lambda finding: kinds[kind_of(finding)])["id"]
    kept = [table for table in tables[1:] if f'"{before}"' not in table]
    shorter = folder / "shorter.toml"
    shorter.write_text("".join(f"[[known]]{table}" for table in kept))
    last = gate(folder, "without-one", words, shorter)
    found = [finding["id"] for finding in last["new"]]
    print(f"without {before}: exit code {last['exit_code']}, new: {', '.join(found) or 'nothing'}")
    return 0 if last["exit_code"] == 1 else 1


def kind_of(finding: dict[str, Any]) -> tuple[str, ...]:
    return finding["target"], finding["check"], finding["symptom"]


def gate(folder: Path, name: str, words: list[str], ledger: Path) -> dict[str, Any]:
    """The summary of a gate. --strict: findings of class robustness are entered, and so have to be red."""
    events = folder / f"{name}.ndjson"
    start = time.monotonic()
    done = run("gate", *words, "--strict", "--ledger", str(ledger), "--state-dir", str(folder / "state"),
               "--report", f"ndjson={events}")  # fmt: skip
    (folder / f"{name}.txt").write_text(done.stdout + done.stderr)
    lines = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    summary = next((line["summary"] for line in lines if line["kind"] == "campaign-finished"), None)
    if summary is None:
        raise SystemExit(f"{name}: exit code {done.returncode}, no end\n{done.stderr}")
    statuses = [result["status"] for result in summary["gate"]["entries"]]
    counted = ", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses)))
    print(f"{name}: exit code {done.returncode}, plan {summary['gate']['plan']}, {summary['cases']} of "
          f"{summary['planned']} cases in {time.monotonic() - start:.0f} s, {len(summary['new'])} new, "
          f"{summary['flaky']} flaky; ledger: {counted or 'empty'}", flush=True)  # fmt: skip
    return {**summary, "exit_code": done.returncode}


def add(folder: Path, finding: str, ledger: Path) -> None:
    done = run("ledger", "add", finding, "--tracker", TRACKER, "--owner", OWNER, "--ledger", str(ledger),
               "--state-dir", str(folder / "state"))  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{finding} was not entered: {done.stderr}")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe_fuzz.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
