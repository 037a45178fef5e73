"""One result of several runs of `qvg-paged bench` that shared a machine: its rows side by side, its bounds judged anew.

    python benchmarks/bench_together.py run-*.json --json benchmarks/results/<device>/bench.json

A machine of several GPUs measures parts of the benchmark beside each other; a row and all it is compared with come from
one run. Runs must be of one commit and of GPUs of one name. Ceilings are the first run's.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import results_file
from bench.bounds import judge
from bench.plot import plot

Result = dict[str, Any]


def together(runs: list[Result]) -> Result:
    """The runs as one result.

    Raises:
        ValueError: they are of several commits or kinds of device, or measured a row twice.
    """
    for what in ("commit", "versions"):
        if any(run[what] != runs[0][what] for run in runs):
            raise ValueError(f"{what}: expected the same in every run, got {[run[what] for run in runs]}")
    if len(names := {run["device"]["name"] for run in runs}) > 1:
        raise ValueError(f"device: expected one kind in every run, got {sorted(names)}")
    found = [run["results"] for run in runs]
    rows = [row for results in found for row in results["rows"]]
    named = [f"{row['part']}: {row['name']}" for row in rows]
    twice = {name for name in named if named.count(name) > 1}
    if twice:
        raise ValueError(f"rows: expected each in one run, got twice: {sorted(twice)}")
    waiting = dict.fromkeys(row for part in found for row in part["not_started"] if row not in named)
    results = {
        "ceilings": found[0]["ceilings"], "rows": rows, "bounds": judge(rows),
        "not_started": [*waiting],
        "seconds": sum(part["seconds"] for part in found), "right": all(part["right"] for part in found),
        "warnings": [line for part in found for line in part["warnings"]],
    }  # fmt: skip
    return {
        **runs[0], "command": "; ".join(run["command"] for run in runs), "date": max(run["date"] for run in runs),
        "config": [run["config"] for run in runs], "results": results,
        "warnings": [line for run in runs for line in run["warnings"]],
    }  # fmt: skip


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--warning", action="append", default=[], help="what a reader should know; repeatable")
    arguments = parser.parse_args()
    content = together([json.loads(path.read_text()) for path in arguments.runs])
    content["warnings"] += arguments.warning
    results_file.write(arguments.json, content)
    if arguments.plot:
        plot(content["results"], arguments.plot)
    for bound in content["results"]["bounds"]:
        print(f"{bound['bound']:40s} {bound['required']:8.2f} {bound['value'] or 0:8.3f} {bound['held']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
