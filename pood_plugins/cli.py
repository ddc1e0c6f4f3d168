"""
The ``pood`` command.

.. code-block:: console

    $ pood list detectors
    $ pood benchmark digits
    $ pood benchmark digits --detectors GROOD,NERO,Energy,KNN --output results/mine

``pood benchmark`` writes ``results.csv``, ``results.json``, ``results.md``, ``roc.png`` and
``scores.png`` into the output folder, ``results/NAME`` by default. The exit status is 0 if all
went well, 1 if something failed, and 2 if the command was wrong. Errors are one line;
``--verbose`` shows where they come from.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from . import __version__, registry

_LISTS = {
    "detectors": ("detector", registry.list_detectors),
    "losses": ("loss", registry.list_losses),
    "benchmarks": ("benchmark", registry.list_benchmarks),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """
    :param arguments: command line without the program's name; default is that of the process
    :return: exit status
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.WARNING,
        format="pood: %(message)s",
    )
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(
                f"pood: warning: {message}", file=sys.stderr
            )
            return options.run(options)
    except (LookupError, argparse.ArgumentError) as error:
        return _fail(error, 2, options.verbose)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return _fail(error, 1, options.verbose)


def _fail(error: Exception, status: int, verbose: bool) -> int:
    if verbose:
        raise error
    message = error.args[0] if isinstance(error, LookupError) and error.args else error
    print(f"pood: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pood", description="Out-of-distribution detectors of pytorch-ood and its plugins."
    )
    parser.add_argument("--version", action="version", version=f"pood-plugins {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--verbose", action="store_true", help="show the origin of errors")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", parents=[common], help="list what is installed")
    listing.add_argument("kind", nargs="?", choices=list(_LISTS), help="default: everything")
    listing.set_defaults(run=_list)

    benchmark = commands.add_parser(
        "benchmark", parents=[common], help="evaluate detectors on a benchmark"
    )
    benchmark.add_argument("name", metavar="NAME", help="name of the benchmark: digits")
    benchmark.add_argument(
        "--detectors",
        metavar="A,B,...",
        help="rows of the table, or 'all' for everything that can be built",
    )
    benchmark.add_argument(
        "--seeds", type=_positive, default=3, metavar="N", help="networks to train (default: 3)"
    )
    benchmark.add_argument("--device", default="cpu", help="e.g. cuda (default: cpu)")
    benchmark.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write (default: results/NAME)"
    )
    benchmark.set_defaults(run=_benchmark)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _list(options: argparse.Namespace) -> int:
    for plural, (kind, list_names) in _LISTS.items():
        if options.kind not in (None, plural):
            continue
        names = list_names()
        width = max(map(len, names), default=0)
        print(f"{plural} ({len(names)})")
        for name in names:
            info = registry.get_info(name, kind)
            print(f"  {name:{width}}  {info.origin} {info.version}")
    return 0


def _benchmark(options: argparse.Namespace) -> int:
    if options.name.casefold() != "digits":
        raise LookupError(f"no benchmark '{options.name}' can be run from here: choose digits")
    from .evaluation.digits import run_digits

    detectors = options.detectors.split(",") if options.detectors else None
    report = run_digits(detectors, seeds=range(options.seeds), device=options.device)
    output = options.output or Path("results") / "digits"
    report.save(output)

    print(report.to_text())
    print("AUROC and FPR95 in percent, OOD is the positive class; * marks the best of a column.")
    if options.seeds > 1:
        print(f"Mean ± standard deviation of {options.seeds} networks, trained with seeds from 0.")
    for result in report.failed:
        print(f"pood: {result.detector} failed: {result.error}", file=sys.stderr)
    print(f"Report: {output}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
