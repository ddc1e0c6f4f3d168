"""
The digits benchmark as the README shows it.

    python benchmarks/digits.py

writes ``digits.csv``, ``digits.json`` and ``digits.md`` to ``benchmarks/results``.
"""

from pathlib import Path

from pood_plugins.evaluation.digits import run_digits

RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    report = run_digits()
    report.to_csv(RESULTS / "digits.csv")
    report.to_json(RESULTS / "digits.json")
    (RESULTS / "digits.md").write_text(report.to_markdown())
    print(report.to_text())
