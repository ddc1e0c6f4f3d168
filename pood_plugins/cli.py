"""
The ``pood`` command.

.. code-block:: console

    $ pood list detectors
    $ pood benchmark digits
    $ pood benchmark digits --detectors GROOD,NERO,Energy,KNN --output results/mine
    $ pood benchmark digits --train greg
    $ pood finetune --benchmark digits --train greg+ --epochs 10

``pood benchmark`` writes ``results.csv``, ``results.json``, ``results.md``, ``roc.png`` and
``scores.png`` into the output folder, ``results/NAME`` by default. With ``--train``, classifiers
are fine-tuned with the benchmark's training outliers first.

``pood finetune`` fine-tunes one classifier and writes ``model.safetensors``, the state dict of the
weights, ``history.csv``, one line per step, ``finetune.json``, the settings and the ID accuracy,
and ``checkpoint.zip``, from which ``--resume`` goes on after an interruption.

The ways to fine-tune are ``ce`` (cross-entropy, without outliers), ``oe`` (outlier exposure),
``energy`` (energy-regularized training), ``greg`` and ``greg+``.

The exit status is 0 if all went well, 1 if something failed, and 2 if the command was wrong.
Errors are one line; ``--verbose`` shows where they come from.
"""

import argparse
import csv
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, registry

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from .model.split import SplitModel

    _Task = tuple[SplitModel, Dataset, Callable[..., list[dict[str, float]]]]

_KINDS = {"detectors": "detector", "losses": "loss", "benchmarks": "benchmark"}
_TRAININGS = ("ce", "oe", "energy", "greg", "greg+")
_LOSS_ARGUMENTS = {
    "alpha": "weight of the outlier or energy term",
    "beta": "weight of the gradient term",
    "margin_in": "margin energy of ID samples",
    "margin_out": "margin energy of outliers",
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
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
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
    listing.add_argument("kind", nargs="?", choices=list(_KINDS), help="default: everything")
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
    benchmark.add_argument(
        "--train", choices=_TRAININGS, help="fine-tune the networks first (default: no)"
    )
    benchmark.add_argument("--device", default="cpu", help="e.g. cuda (default: cpu)")
    benchmark.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write (default: results/NAME)"
    )
    benchmark.set_defaults(run=_benchmark)

    finetune = commands.add_parser(
        "finetune", parents=[common], help="fine-tune the classifier of a benchmark with outliers"
    )
    finetune.add_argument("--benchmark", choices=list(_FINETUNING), required=True)
    finetune.add_argument(
        "--train", choices=_TRAININGS, default="greg", help="how to fine-tune (default: greg)"
    )
    finetune.add_argument(
        "--data", type=Path, metavar="DIR", help="data of cifar10 (default: $POOD_DATA)"
    )
    finetune.add_argument("--epochs", type=_positive, metavar="N")
    finetune.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    finetune.add_argument(
        "--lr", type=float, metavar="X", dest="learning_rate", help="learning rate at the start"
    )
    for name, description in _LOSS_ARGUMENTS.items():
        flag = "--" + name.replace("_", "-")
        finetune.add_argument(flag, type=float, metavar="X", help=description)
    finetune.add_argument("--device", default="cpu", help="e.g. cuda (default: cpu)")
    finetune.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write (default: results/finetune-...)"
    )
    finetune.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in the output folder"
    )
    finetune.set_defaults(run=_finetune)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _list(options: argparse.Namespace) -> int:
    for plural, kind in _KINDS.items():
        if options.kind in (None, plural):
            plugins = registry.list_plugins(kind)
            width = max(map(len, plugins), default=0)
            print(f"{plural} ({len(plugins)})")
            for name, info in plugins.items():
                print(f"  {name:{width}}  {info.origin} {info.version}")
    return 0


def _benchmark(options: argparse.Namespace) -> int:
    if options.name.casefold() != "digits":
        raise LookupError(f"no benchmark '{options.name}' can be run from here: choose digits")
    from .evaluation.digits import run_digits

    detectors = options.detectors.split(",") if options.detectors else None
    report = run_digits(
        detectors, seeds=range(options.seeds), device=options.device, train=options.train
    )
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


def _finetune(options: argparse.Namespace) -> int:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(
            "writing weights needs safetensors: pip install pood-plugins[deploy]"
        ) from error
    from .evaluation.report import environment
    from .training.checkpoint import replacing
    from .training.variants import make_criterion

    def given(names: Iterable[str]) -> dict[str, Any]:
        return {n: getattr(options, n) for n in names if getattr(options, n) is not None}

    make_criterion(options.train, **given(_LOSS_ARGUMENTS))  # refuses what does not belong to it
    arguments = given(("train", "seed", "epochs", "learning_rate", *_LOSS_ARGUMENTS))
    output = options.output or Path("results") / f"finetune-{options.benchmark}-{options.train}"
    split, test_set, finetune = _FINETUNING[options.benchmark](options)
    before = _accuracy(split, test_set)
    history = finetune(
        checkpoint=output / "checkpoint.zip", resume=options.resume, progress=True, **arguments
    )
    after = _accuracy(split, test_set)

    table = io.StringIO()
    writer = csv.DictWriter(table, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    record = {
        **environment(),
        "benchmark": options.benchmark,
        "arguments": arguments,
        "device": options.device,
        "steps": len(history),
        "accuracy before": before,
        "accuracy": after,
    }
    weights = {name: t.contiguous() for name, t in split.model.state_dict().items()}
    for name, content in {
        "model.safetensors": save(weights),
        "history.csv": table.getvalue().encode(),
        "finetune.json": (json.dumps(record, indent=1) + "\n").encode(),
    }.items():
        with replacing(output / name) as file:
            file.write(content)

    terms = [name for name in history[0] if name not in ("epoch", "step", "learning_rate")]
    print("epoch" + "".join(f"{term:>15}" for term in terms) + "   (means over the steps)")
    for epoch in range(1, int(history[-1]["epoch"]) + 1):
        steps = [step for step in history if step["epoch"] == epoch]
        means = (sum(step[term] for step in steps) / len(steps) for term in terms)
        print(f"{epoch:5}" + "".join(f"{mean:15.4g}" for mean in means))
    print(f"ID accuracy {100 * after:.1f} %, before {100 * before:.1f} %")
    print(f"Weights, history and checkpoint: {output}")
    return 0


def _accuracy(split: "SplitModel", dataset: "Dataset") -> float:
    import torch
    from torch.utils.data import DataLoader

    split.eval()
    device = split.head.weight.device
    correct = []
    with torch.no_grad():
        for x, y in DataLoader(dataset, batch_size=256):
            correct.append(split(x.to(device)).argmax(dim=1).cpu() == y)
    return float(torch.cat(correct).double().mean())


def _digits(options: argparse.Namespace) -> "_Task":
    from functools import partial

    from .benchmark.digits import Digits, finetune_classifier, train_classifier
    from .model import split_model

    benchmark = Digits()
    split = split_model(train_classifier(benchmark, options.seed, device=options.device))
    (test_set,) = benchmark.test_sets(known=True, unknown=False)
    return split, test_set, partial(finetune_classifier, benchmark, split)


def _cifar10(options: argparse.Namespace) -> "_Task":
    from functools import partial

    from .training.cifar10 import finetune_cifar10, load_cifar10

    folder = options.data or os.environ.get("POOD_DATA")
    if not folder:
        raise ValueError(
            "--benchmark cifar10 needs images and weights: name their folder by --data"
        )
    data = load_cifar10(folder)
    data.split.to(options.device)
    return data.split, data.test, partial(finetune_cifar10, data, device=options.device)


#: By benchmark: from the options to a classifier, its ID test set and what fine-tunes it. That is
#: called with train, seed, checkpoint, resume and progress, and with epochs, learning_rate and
#: arguments of the loss where they are given, and returns the history.
_FINETUNING: dict[str, "Callable[[argparse.Namespace], _Task]"] = {
    "digits": _digits,
    "cifar10": _cifar10,
}


if __name__ == "__main__":
    sys.exit(main())
