"""
What becomes of damaged and made-up input: counts the cases that the tests try, and how they end.

    python benchmarks/reliability.py

runs, each in a process of its own,

- ``tests/test_fuzz.py`` and ``tests/test_fuzz_saved.py`` with ``--hypothesis-profile=thorough``:
  files that are damaged or made up, others in every run, for everything that reads files. Each
  must give a valid result or one of the documented exceptions, as ``tests/mutations.py`` has it;
- ``tests/detector/test_bad_input.py``: every detector with every kind of bad input, one test each.

Whatever else comes out of a case, or ends the process, counts as unhandled, and the exit status is
then 1. With ``--quick``, there are few files: to see whether it runs. Writes
``benchmarks/results/reliability.json`` and the table ``reliability.md``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pood_plugins.evaluation.report import environment
from pood_plugins.training.checkpoint import replacing

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = [
    "tests/test_fuzz.py",
    "tests/test_fuzz_saved.py",
]  # whose cases are files, counted by tests/mutations.py
MATRIX = "tests/detector/test_bad_input.py"
UNHANDLED = "unhandled"


def run(tests: list[str], *arguments: str, limit: int) -> dict[str, Any]:
    """
    :param tests: modules of tests
    :param arguments: further ones of pytest
    :param limit: seconds, after which the process is ended
    :return: the number of tests by outcome, the names of those that failed, how often each loader
        ended in which way, and seconds
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report, tally = Path(folder, "report.xml"), Path(folder, "tally.json")
        command = [sys.executable, "-m", "pytest", "-q", *tests, *arguments]
        command += [f"--junitxml={report}", "-p", "no:cacheprovider"]
        variables = {**os.environ, "POOD_FUZZ_TALLY": str(tally)}
        try:
            process = subprocess.run(command, cwd=REPOSITORY, env=variables, timeout=limit)
            end = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            end = f"ended after {limit} s"
        outcomes, failed = _outcomes(report)
        # 1 says that tests failed, which the report tells, and all others that there is none
        if end not in ("exit status 0", "exit status 1"):
            failed.append(f"{' '.join(tests)}: {end}")
        return {
            "tests": outcomes,
            "failed": failed,
            "loaders": json.loads(tally.read_text()) if tally.exists() else {},
            "seconds": round(time.perf_counter() - start, 1),
        }


def _outcomes(report: Path) -> tuple[dict[str, int], list[str]]:
    outcomes: Counter[str] = Counter()
    failed = []
    if report.exists():
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            outcome = kinds.pop() if kinds else "passed"
            outcomes[outcome] += 1
            if outcome in ("failure", "error"):
                failed.append(f"{case.get('classname')}: {case.get('name')}")
    return dict(outcomes), failed


def table(content: dict[str, Any]) -> str:
    rows = [["What is read", "Cases", "Read", "Refused", "With", "Unhandled"]]
    totals: Counter[str] = Counter()
    for loader, counts in content["loaders"].items():
        read = sum(n for outcome, n in counts.items() if outcome.startswith("read"))
        refused = {k: n for k, n in counts.items() if not k.startswith("read") and k != UNHANDLED}
        row = {"cases": sum(counts.values()), "read": read, "refused": sum(refused.values())}
        row["unhandled"] = counts.get(UNHANDLED, 0)
        totals.update(row)
        rows.append([loader, *_numbers(row, ", ".join(sorted(refused)))])
    totals["unhandled"] = max(totals["unhandled"], len(content["files"]["failed"]))
    rows.append(["all files", *_numbers(totals, "")])
    matrix = content["matrix"]
    if matrix is None:
        rows.append(["detectors with bad input", "absent", "", "", "", ""])
    else:
        cells = sum(matrix["tests"].values()) - matrix["tests"].get("skipped", 0)
        bad = len(matrix["failed"])
        rows.append(["detectors with bad input", f"{cells:,}", "", "", "", f"{bad:,}"])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    remarks = [
        f"{content['date']}, ``{content['command']}``, {content['seconds']:.0f} s, "
        f"Python {content['python']}, torch {content['versions']['torch']}",
    ]
    if content["quick"]:
        remarks.append("With few cases, to see whether it runs.")
    return "\n".join([*lines, "", *remarks]) + "\n"


def _numbers(row: dict[str, int], exceptions: str) -> list[str]:
    cases, read, refused, unhandled = (
        f"{row[name]:,}" for name in ("cases", "read", "refused", "unhandled")
    )
    return [cases, read, refused, exceptions, unhandled]


def main() -> None:
    parser = argparse.ArgumentParser(description="What becomes of damaged and made-up input")
    parser.add_argument("--quick", action="store_true", help="few cases")
    default = Path(__file__).resolve().parent / "results"
    parser.add_argument("--output", type=Path, default=default, metavar="DIR")
    options = parser.parse_args()

    profile = "repeatable" if options.quick else "thorough"
    files = run(FILES, f"--hypothesis-profile={profile}", limit=1800)
    there = (REPOSITORY / MATRIX).exists()
    matrix = run([MATRIX], limit=1800) if there else None
    tallied = sum(counts.get(UNHANDLED, 0) for counts in files["loaders"].values())
    content = {
        **environment(),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "command": " ".join(["python", "benchmarks/reliability.py", *sys.argv[1:]]),
        "quick": options.quick,
        # a test may also fail at what a loader returned, which is then no valid result
        "unhandled": max(len(files["failed"]), tallied) + (len(matrix["failed"]) if matrix else 0),
        "cases": sum(sum(counts.values()) for counts in files["loaders"].values()),
        "seconds": round(files["seconds"] + (matrix["seconds"] if matrix else 0), 1),
        "loaders": {name: files["loaders"][name] for name in sorted(files["loaders"])},
        "files": {name: files[name] for name in ("tests", "failed", "seconds")},
        "matrix": matrix and {name: matrix[name] for name in ("tests", "failed", "seconds")},
    }
    for name, text in {
        "reliability.json": json.dumps(content, indent=1) + "\n",
        "reliability.md": table(content),
    }.items():
        with replacing(options.output / name) as file:
            file.write(text.encode())
    print(table(content))
    failed = files["failed"] + (matrix["failed"] if matrix else [])
    if not there:
        print(f"{MATRIX} is absent", file=sys.stderr)
    for name in failed:
        print(f"unhandled: {name}", file=sys.stderr)
    raise SystemExit(1 if failed or content["unhandled"] else 0)


if __name__ == "__main__":
    main()
