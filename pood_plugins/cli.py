"""
The ``pood`` command.

.. code-block:: console

    $ pood list detectors
    $ pood benchmark digits
    $ pood benchmark digits --detectors GROOD,NERO,Energy,KNN --output results/mine
    $ pood benchmark digits --train greg
    $ pood benchmark cifar10-openood --root data --arch resnet20 --weights resnet20.pt
    $ pood benchmark folder --train DIR --test DIR --near cats=DIR --far noise=DIR \\
        --arch resnet18 --weights model.pt --size 224 --mean 0.485 0.456 0.406 \\
        --std 0.229 0.224 0.225
    $ pood finetune --benchmark digits --train greg+ --epochs 10

``pood benchmark`` writes ``results.csv``, ``results.json``, ``results.md``, ``roc.png`` and
``scores.png`` into the output folder, ``results/NAME`` by default.

- ``digits`` trains its own classifiers; with ``--train HOW``, they are fine-tuned with the
  benchmark's training outliers first.
- ``cifar10-openood``, ``cifar100-openood``, ``imagenet200-openood`` and ``imagenet-openood`` are
  OpenOOD's benchmarks on the data sets that are there, see :mod:`pood_plugins.benchmark.openood`.
- ``folder`` is a benchmark of your own images, see :mod:`pood_plugins.benchmark.folder`.
- Any other name is that of a benchmark in the registry, made with ``--root`` and ``--option``.

All but digits need a classifier, by ``--arch`` and ``--weights`` (see
:mod:`pood_plugins.model.zoo`), and how its images were prepared, by ``--size``, ``--mean`` and
``--std`` if that is not known. They also write ``intervals.png``. With ``--features-cache``, a
second run over other detectors takes seconds, and one that was interrupted goes on.
``--detectors all`` adds detectors that need many passes over the images, see
:mod:`pood_plugins.evaluation.rows` for the rows there are.

``pood finetune`` fine-tunes one classifier and writes ``model.safetensors``, the state dict of the
weights, ``history.csv``, one line per step, ``finetune.json``, the settings and the ID accuracy,
and ``checkpoint.zip``, from which ``--resume`` goes on after an interruption.

The ways to fine-tune are ``ce`` (cross-entropy, without outliers), ``oe`` (outlier exposure),
``energy`` (energy-regularized training), ``greg`` and ``greg+``.

Under torchrun, several processes share the work of ``pood benchmark``, see
:mod:`pood_plugins.distributed`.

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
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, distributed, registry

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from .evaluation import Report
    from .model.split import SplitModel

    _Task = tuple[SplitModel, Dataset, Callable[..., list[dict[str, float]]]]

_KINDS = {"detectors": "detector", "losses": "loss", "benchmarks": "benchmark"}
_TRAININGS = ("ce", "oe", "energy", "greg", "greg+")
_OPENOOD = ("cifar10-openood", "cifar100-openood", "imagenet200-openood", "imagenet-openood")
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
            warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
            with distributed.join(getattr(options, "device", "cpu")):
                return distributed.exchange(options.run(options), "exit status")[0]
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (LookupError, argparse.ArgumentError) as error:
        return _fail(error, 2, options.verbose)
    except AssertionError as error:  # torch's way to say that there is no such device
        if "CUDA" not in str(error):
            raise
        return _fail(error, 1, options.verbose)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return _fail(error, 1, options.verbose)


def _fail(error: Exception, status: int, verbose: bool) -> int:
    if verbose:
        raise error
    message = error.args[0] if isinstance(error, LookupError) and error.args else error
    # of several processes, the first to fail says why: the others fail like it, or because of it
    if distributed.says_first("error"):
        print(f"pood: {message}", file=sys.stderr)
    return status


def _say(message: str) -> None:
    if distributed.says_first(message):
        print(f"pood: {message}", file=sys.stderr)


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
    benchmark.add_argument(
        "name", metavar="NAME", help="digits, folder, cifar10-openood, ... or any that is listed"
    )
    benchmark.add_argument(
        "--detectors",
        metavar="A,B,...",
        help="rows of the table, or 'all' for everything that can be built",
    )
    benchmark.add_argument(
        "--seeds", type=_positive, metavar="N", help="digits: networks (default: 3)"
    )
    benchmark.add_argument(
        "--train",
        metavar="HOW|DIR",
        help=f"digits: fine-tune first, by one of {', '.join(_TRAININGS)}; folder: ID training "
        "images, one folder per class",
    )
    benchmark.add_argument(
        "--test", type=Path, metavar="DIR", help="folder: ID test images, one folder per class"
    )
    for flag in ("--near", "--far"):
        benchmark.add_argument(
            flag,
            type=_named,
            action="append",
            default=[],
            metavar="NAME=DIR",
            help=f"folder: a {flag[2:]}-OOD set; may be repeated",
        )
    benchmark.add_argument("--root", type=Path, metavar="DIR", help="folder with the images")
    benchmark.add_argument(
        "--download", action="store_true", help="fetch images and lists that are missing"
    )
    benchmark.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument for the benchmark's constructor; may be repeated",
    )
    benchmark.add_argument("--arch", metavar="NAME", help="architecture, or package.module:name")
    benchmark.add_argument(
        "--weights", metavar="FILE|KEY", help="state dict, or pytorch-ood's key"
    )
    benchmark.add_argument("--classes", type=_positive, metavar="N", help="classes of the weights")
    benchmark.add_argument("--size", type=_positive, metavar="N", help="input size in pixels")
    for flag in ("--mean", "--std"):
        benchmark.add_argument(
            flag, type=float, nargs="+", metavar="X", help="of the channels, for normalization"
        )
    benchmark.add_argument(
        "--features-cache", type=Path, metavar="DIR", help="keep features and scores there"
    )
    benchmark.add_argument(
        "--max-images",
        type=_positive,
        metavar="N",
        help="images of each test set that every detector that needs images scores "
        "(default: all, but 1000 for the slowest)",
    )
    benchmark.add_argument(
        "--batch-size", type=_positive, default=256, metavar="N", help="default: 256"
    )
    benchmark.add_argument(
        "--workers", type=_count, default=0, metavar="N", help="processes that read images"
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


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def _named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, value


def _option(text: str) -> tuple[str, Any]:
    name, value = _named(text)
    try:
        return name, json.loads(value.lower() if value in ("True", "False") else value)
    except ValueError:  # text that is no number or other literal stands for itself
        return name, value


def _list(options: argparse.Namespace) -> int:
    if distributed.rank():
        return 0
    for plural, kind in _KINDS.items():
        if options.kind in (None, plural):
            plugins = registry.list_plugins(kind)
            width = max(map(len, plugins), default=0)
            print(f"{plural} ({len(plugins)})")
            for name, info in plugins.items():
                print(f"  {name:{width}}  {info.origin} {info.version}")
    return 0


def _benchmark(options: argparse.Namespace) -> int:
    detectors = None
    if options.detectors:
        detectors = [name.strip() for name in options.detectors.split(",")]
    digits = options.name.casefold() == "digits"
    _refuse_unused(options)
    output = options.output or Path("results") / options.name.casefold()
    place = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):  # now, and not after the run
        raise ValueError(f"nothing can be written to {place}: name another folder by --output")
    if digits:
        _refuse_several("benchmark digits")
    report = _run_digits(options, detectors) if digits else _run_images(options, detectors)
    if distributed.rank():
        return 0
    report.save(output)

    print(report.to_text())
    print("AUROC and FPR95 in percent, OOD is the positive class; * marks the best of a column.")
    seeds = options.seeds or 3
    if digits and seeds > 1:
        print(f"Mean ± standard deviation of {seeds} networks, trained with seeds from 0.")
    if not digits:
        print(
            "▲ better and ▼ worse in AUROC than the best of pytorch-ood's detectors, by more than "
            "another draw of the test images explains; ≈ not told apart; [95 % interval]."
        )
    for result in report.failed:
        print(f"pood: {result.detector} failed: {result.error}", file=sys.stderr)
    print(f"Report: {output}")
    return 1 if report.failed else 0


def _refuse_unused(options: argparse.Namespace) -> None:
    """Whoever gives an argument believes that it does something."""
    name = options.name.casefold()
    folders, images = ("test", "near", "far"), ("root", "download", "option")
    classifier = ("arch", "weights", "classes", "size", "mean", "std")
    unused: tuple[str, ...] = ("seeds", "train", *folders)
    if name == "digits":
        unused = (*folders, *images, *classifier, "features_cache", "max_images", "workers")
    elif name == "folder":
        unused = ("seeds", *images)
    given = [argument for argument in unused if getattr(options, argument) not in (None, [], 0)]
    given = [argument for argument in given if getattr(options, argument) is not False]
    if given:
        flags = ", ".join("--" + argument.replace("_", "-") for argument in given)
        raise LookupError(f"{options.name} has no use for {flags}: leave it out")


def _refuse_several(command: str) -> None:
    if distributed.size() > 1:
        raise LookupError(
            f"pood {command} trains, which several processes can't share: run it without torchrun"
        )


def _run_digits(options: argparse.Namespace, detectors: list[str] | None) -> "Report":
    if options.train is not None and options.train not in _TRAININGS:
        choices = ", ".join(_TRAININGS)
        raise LookupError(f"no way to fine-tune is called {options.train!r}: choose {choices}")
    from .evaluation.digits import run_digits

    seeds = range(options.seeds or 3)
    return run_digits(detectors, seeds=seeds, device=options.device, train=options.train)


def _run_images(options: argparse.Namespace, detectors: list[str] | None) -> "Report":
    known = options.name.casefold()
    if known not in ("folder", *_OPENOOD):
        try:
            registry.get_info(options.name, "benchmark")
        except LookupError as error:
            names = ", ".join(("digits", "folder", *_OPENOOD))
            raise LookupError(f"{error.args[0]}; or one of {names}") from error
    from .evaluation.images import run_images
    from .evaluation.rows import SLOW

    oods = [name for name, _ in options.near + options.far]
    twice = sorted({name for name in oods if oods.count(name) > 1})
    if twice:
        raise ValueError(f"two OOD sets are called {', '.join(twice)}: give each its own name")
    limits: Mapping[str, int] = SLOW
    if options.max_images is not None:
        limits = defaultdict(lambda: options.max_images)
    return run_images(
        options.name,
        root=options.root,
        arch=options.arch,
        weights=options.weights,
        num_classes=options.classes,
        size=options.size,
        mean=options.mean,
        std=options.std,
        detectors=detectors,
        options=dict(options.option),
        folders={
            "train": options.train,
            "test": options.test,
            "ood": dict(options.near + options.far),
            "near": [name for name, _ in options.near],
        },
        download=options.download,
        cache_dir=options.features_cache,
        max_images=limits,
        device=options.device,
        batch_size=options.batch_size,
        workers=options.workers,
    )


def _finetune(options: argparse.Namespace) -> int:
    _refuse_several("finetune")
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
