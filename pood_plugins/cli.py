"""
The ``pood`` command.

.. code-block:: console

    $ pood list detectors
    $ pood benchmark digits
    $ pood benchmark digits --quick
    $ pood benchmark digits --detectors GROOD,NERO,Energy,KNN --output results/mine
    $ pood benchmark digits --train greg
    $ pood benchmark cifar10-openood --root data --arch resnet20 --weights resnet20.pt
    $ pood benchmark folder --train DIR --test DIR --near cats=DIR --far noise=DIR \\
        --arch resnet18 --weights model.pt --size 224 --mean 0.485 0.456 0.406 \\
        --std 0.229 0.224 0.225
    $ pood finetune --benchmark digits --train greg+ --epochs 10
    $ pood fit --arch resnet18 --weights model.pt --size 224 --mean 0.485 0.456 0.406 \\
        --std 0.229 0.224 0.225 --data data/train --detector GROOD --output detector
    $ pood score --detector detector --data incoming --output scores.csv
    $ pood explain --detector detector --data incoming --output explanations
    $ pood inspect detector

``pood benchmark`` writes ``results.csv``, ``results.json``, ``results.md``, ``roc.png`` and
``scores.png`` into the output folder, ``results/NAME`` by default. With ``--html``, it also writes
``report.html``, see :mod:`pood_plugins.evaluation.html`.

- ``digits`` trains its own classifiers; with ``--train HOW``, they are fine-tuned with the
  benchmark's training outliers first. ``--quick`` takes one network, two epochs and five
  detectors, to see in seconds that an installation works. Its table and its json say that it is no
  result to report.
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

``pood fit`` fits, calibrates and saves a detector with its classifier, ``pood score`` scores
images with it, and ``pood inspect`` tells what is in its directory, see
:mod:`pood_plugins.deployment`. ``pood explain`` tells why images have their scores, see
:mod:`pood_plugins.explain`.

Under torchrun, several processes share the work of ``pood benchmark``, see
:mod:`pood_plugins.distributed`.

The exit status is 0 if all went well, 2 for names and options that there are not or that do not go
together, 130 if it was interrupted, and 1 if anything else failed, such as a file that can't be
read or a value that does not work. Errors are one line; ``--verbose`` shows where they come from.
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
    from .persistence import Saved

    _Task = tuple[SplitModel, Dataset[Any], Callable[..., list[dict[str, float]]]]

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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a table is worth more than its signs
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
            with distributed.join(getattr(options, "device", "cpu")):
                status: int = options.run(options)
                return distributed.exchange(status, "exit status")[0]
    except KeyboardInterrupt:
        print("pood: interrupted", file=sys.stderr)
        return 130
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

    _add_list(commands, common)
    _add_benchmark(commands, common)
    _add_finetune(commands, common)
    _add_fit(commands, common)
    _add_score(commands, common)
    _add_explain(commands, common)
    _add_inspect(commands, common)
    return parser


def _add_list(commands: Any, common: argparse.ArgumentParser) -> None:
    listing = commands.add_parser("list", parents=[common], help="list what is installed")
    listing.add_argument("kind", nargs="?", choices=list(_KINDS), help="default: everything")
    listing.set_defaults(run=_list)


def _add_benchmark(commands: Any, common: argparse.ArgumentParser) -> None:
    benchmark = commands.add_parser(
        "benchmark",
        parents=[common, _classifier(), _reading(256)],
        help="evaluate detectors on a benchmark",
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
        "--quick",
        action="store_true",
        help="digits: one network, few epochs and detectors, to see that it runs; no result to "
        "report",
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
        "--output", type=Path, metavar="DIR", help="where to write (default: results/NAME)"
    )
    benchmark.add_argument(
        "--html", action="store_true", help="also write report.html, one page for a browser"
    )
    benchmark.set_defaults(run=_benchmark)


def _add_finetune(commands: Any, common: argparse.ArgumentParser) -> None:
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


def _add_fit(commands: Any, common: argparse.ArgumentParser) -> None:
    fit = commands.add_parser(
        "fit",
        parents=[common, _classifier(), _reading(64)],
        help="fit a detector for a classifier, calibrate a threshold, and save all of it",
    )
    fit.add_argument(
        "--resize", type=_positive, metavar="N", help="shorter side before the center is cropped"
    )
    fit.add_argument("--interpolation", metavar="HOW", help="of resizing (default: bilinear)")
    fit.add_argument(
        "--channels", type=int, choices=(1, 3), help="1 for networks of grey images (default: 3)"
    )
    fit.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR|NPZ",
        help="ID images, one folder per class, or an npz with x and y",
    )
    fit.add_argument(
        "--calibration", type=Path, metavar="DIR|NPZ", help="other ID images for the threshold"
    )
    fit.add_argument(
        "--holdout",
        type=float,
        metavar="X",
        help="without them, fraction of the images to hold out for the threshold (default: 0.2)",
    )
    fit.add_argument(
        "--outliers", type=Path, metavar="DIR|NPZ", help="outliers to try the threshold on"
    )
    fit.add_argument(
        "--tpr",
        type=float,
        metavar="X",
        help="share of the ID images to accept (default: 0.95)",
    )
    fit.add_argument(
        "--fpr", type=float, metavar="X", help="instead: share of the outliers to accept at most"
    )
    fit.add_argument(
        "--detector", default="pood-plugins:GROOD", metavar="NAME", help="default: GROOD"
    )
    fit.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument for the detector's constructor; may be repeated",
    )
    fit.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of what is held out (default: 0)"
    )
    fit.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="where to save the detector"
    )
    fit.set_defaults(run=_fit)


def _add_score(commands: Any, common: argparse.ArgumentParser) -> None:
    score = commands.add_parser(
        "score",
        parents=[common, _saved(), _reading(64)],
        help="score images with a saved detector",
    )
    score.add_argument(
        "--output",
        type=Path,
        default=Path("scores.csv"),
        metavar="FILE",
        help="where to write (default: scores.csv)",
    )
    score.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run ended"
    )
    score.set_defaults(run=_score)


def _add_explain(commands: Any, common: argparse.ArgumentParser) -> None:
    explain = commands.add_parser(
        "explain",
        parents=[common, _saved(), _reading(64)],
        help="tell why images have their scores",
    )
    explain.add_argument(
        "--most",
        type=_positive,
        default=12,
        metavar="N",
        help="draw so many of the most outlying images (default: 12)",
    )
    explain.add_argument(
        "--output",
        type=Path,
        default=Path("explanations"),
        metavar="DIR",
        help="where to write (default: explanations)",
    )
    explain.set_defaults(run=_explain)


def _add_inspect(commands: Any, common: argparse.ArgumentParser) -> None:
    inspect = commands.add_parser(
        "inspect", parents=[common], help="tell what a saved detector is, and check its files"
    )
    inspect.add_argument("path", type=Path, metavar="DIR", help="what pood fit wrote")
    inspect.set_defaults(run=_inspect)


def _classifier() -> argparse.ArgumentParser:
    """Arguments for the classifier and what is done to its images."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--arch", metavar="NAME", help="architecture, or package.module:name")
    parser.add_argument("--weights", metavar="FILE|KEY", help="state dict, or pytorch-ood's key")
    parser.add_argument("--classes", type=_positive, metavar="N", help="classes of the weights")
    parser.add_argument("--size", type=_positive, metavar="N", help="input size in pixels")
    for flag in ("--mean", "--std"):
        parser.add_argument(
            flag, type=float, nargs="+", metavar="X", help="of the channels, for normalization"
        )
    return parser


def _saved() -> argparse.ArgumentParser:
    """Arguments for a saved detector and the images that are given to it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--detector", type=Path, required=True, metavar="DIR", help="what pood fit wrote"
    )
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="image files, folders and npz",
    )
    parser.add_argument("--arch", metavar="NAME", help="needed if it is package.module:name")
    return parser


def _reading(batch_size: int) -> argparse.ArgumentParser:
    """Arguments for reading and computing."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=batch_size,
        metavar="N",
        help=f"default: {batch_size}",
    )
    parser.add_argument(
        "--workers", type=_count, default=0, metavar="N", help="processes that read images"
    )
    parser.add_argument("--device", default="cpu", help="e.g. cuda (default: cpu)")
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
    except (ValueError, RecursionError):  # text that is no literal stands for itself
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
    if options.detectors is not None:
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
    report.save(output, html=options.html)

    print(report.to_text())
    print("AUROC and FPR95 in percent, OOD is the positive class; * marks the best of a column.")
    seeds = 1 if options.quick else options.seeds or 3
    if digits and seeds > 1:
        print(f"Mean ± standard deviation of {seeds} networks, trained with seeds from 0.")
    if not digits:
        print(
            "▲ better and ▼ worse in AUROC than the best of pytorch-ood's detectors, by more than "
            "another draw of the test images explains; ≈ not told apart; [95 % interval]."
        )
    for name, reason in report.metadata.get("left_out", {}).items():
        print(f"pood: {name} is left out: {reason}", file=sys.stderr)
    for result in report.failed:
        print(f"pood: {result.detector} failed: {result.error}", file=sys.stderr)
    print(f"Report: {output}")
    return 1 if report.failed else 0


def _refuse_unused(options: argparse.Namespace) -> None:
    """Whoever gives an argument believes that it does something."""
    name = options.name.casefold()
    folders, images = ("test", "near", "far"), ("root", "download", "option")
    classifier = ("arch", "weights", "classes", "size", "mean", "std")
    unused: tuple[str, ...] = ("seeds", "quick", "train", *folders)
    if name == "digits":
        unused = (*folders, *images, *classifier, "features_cache", "max_images", "workers")
    elif name == "folder":
        unused = ("seeds", "quick", *images)
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
    if options.quick and options.seeds is not None:
        raise LookupError("--quick trains one network: leave out --seeds")
    from .evaluation.digits import run_digits

    seeds = range(options.seeds or 3)
    return run_digits(
        detectors,
        seeds=seeds,
        device=options.device,
        train=options.train,
        sheets=options.html,
        quick=options.quick,
    )


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
        sheets=options.html,
    )


def _finetune(options: argparse.Namespace) -> int:
    _refuse_several("finetune")
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(
            "writing weights needs safetensors: pip install 'pood-plugins[deploy]'"
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


def _fit(options: argparse.Namespace) -> int:
    _refuse_several("fit")
    if options.fpr is not None and options.outliers is None:
        raise LookupError("--fpr needs outliers: name some by --outliers")
    if options.fpr is not None and options.tpr is not None:
        raise LookupError("there is one threshold for --tpr or --fpr: leave one out")
    if options.calibration is not None and options.holdout is not None:
        raise LookupError("with --calibration, nothing is held out: leave out --holdout")
    from .deployment import find_classes, fit
    from .model.preprocessing import complete
    from .model.zoo import load_classifier

    n_classes = options.classes or len(find_classes(options.data))
    model, found = load_classifier(options.arch, options.weights, n_classes)
    given = ("size", "mean", "std", "resize", "interpolation", "channels")
    preprocessing = complete(found, **{name: getattr(options, name) for name in given})
    fitted = fit(
        options.detector,
        model,
        options.arch or options.weights,
        preprocessing,
        options.data,
        options.output,
        hyperparameters=dict(options.option),
        calibration=options.calibration,
        holdout=0.2 if options.holdout is None else options.holdout,
        outliers=options.outliers,
        tpr=0.95 if options.tpr is None else options.tpr,
        fpr=options.fpr,
        seed=options.seed,
        device=options.device,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    if fitted.n_fit:
        print(f"{options.detector.rpartition(':')[2]} was fitted on {fitted.n_fit} images.")
    print(f"The classifier is right on {fitted.accuracy:.1%} of those it was calibrated on.")
    print(fitted.threshold)
    print(f"Saved: {options.output}")
    if fitted.accuracy < 0.5:
        _say(
            "warning: the classifier is wrong more often than right: check the preprocessing, and "
            "that the folders are its classes, in its order"
        )
    return _report_errors(fitted.unreadable, "were left out")


def _refuse_missing(paths: Sequence[Path]) -> None:
    """A folder with a mistyped name has no images to score. A file that is missing is a row."""
    missing = [str(path) for path in paths if not path.suffix and not path.exists()]
    if missing:
        raise ValueError(f"there is no {' and no '.join(missing)}: check --data")


def _score(options: argparse.Namespace) -> int:
    _refuse_several("score")
    _refuse_missing(options.data)
    from .deployment import Deployed, write_scores

    deployed = Deployed.load(options.detector, options.device, options.arch)
    scored = write_scores(
        deployed,
        options.data,
        options.output,
        batch_size=options.batch_size,
        workers=options.workers,
        resume=options.resume,
    )
    n_scored = scored.n_images - scored.n_errors
    if deployed.threshold is None:
        print(f"{n_scored} images scored; there is no threshold to decide by.")
    else:
        print(f"{n_scored} images scored, {scored.n_ood} of them OOD.")
    print(f"Scores: {options.output}")
    return _report_errors(scored.errors, "have an error in the place of a score")


def _explain(options: argparse.Namespace) -> int:
    _refuse_several("explain")
    _refuse_missing(options.data)
    from .deployment import Deployed
    from .explain import write_explanations

    explained = write_explanations(
        Deployed.load(options.detector, options.device, options.arch),
        options.data,
        options.output,
        most=options.most,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    print(f"{explained.n_images - explained.n_errors} images explained.")
    if explained.without_map:
        print(f"There are no heat maps: {explained.without_map}")
    print(f"Table and {len(explained.sheets)} pages: {options.output}")
    return _report_errors(explained.errors, "could not be explained")


def _report_errors(errors: Mapping[str, str], consequence: str) -> int:
    """The first of them, and the exit status."""
    from .training.checkpoint import short

    for name, error in list(errors.items())[:3]:
        print(f"pood: {short(name, 1000)}: {error}", file=sys.stderr)
    if errors:
        print(f"pood: {len(errors)} images {consequence}", file=sys.stderr)
    return 1 if errors else 0


def _inspect(options: argparse.Namespace) -> int:
    from .persistence import Saved

    saved = Saved(options.path)
    saved.check()
    with saved.reading():  # what is in it may be anything
        lines = _describe(saved)
    for name, text in lines.items():
        print(f"{name + ':':15} " + str(text).replace("\n", "\n" + " " * 16))
    print("All files are what was written.")
    return 0


def _describe(saved: "Saved") -> dict[str, Any]:
    from .training.checkpoint import short

    config = saved.config
    model, classifier = config["model"], config["classifier"] or {}
    lines: dict[str, Any] = {
        "detector": "{name} {version}".format(**config["detector"]),
        "arguments": _compact(config["arguments"]) or "defaults",
        "fitted": _compact(config["attributes"]) or "nothing",
        "model": "{class}, {features} features, {classes} classes".format(**model),
        "fingerprint": model["fingerprint"],
    }
    if classifier:
        classes = classifier["classes"]
        lines["architecture"] = classifier["arch"]
        lines["classes"] = ", ".join(map(str, classes[:10])) + ", ..." * (len(classes) > 10)
        lines["accuracy"] = f"{classifier['accuracy']:.1%} of what it was calibrated on"
        lines["preprocessing"] = _compact(classifier["preprocessing"])
    lines["versions"] = _compact(config["versions"])
    lines["files"] = ", ".join(
        f"{file} ({(saved.path / file).stat().st_size:,} bytes)" for file in config["checksums"]
    )
    lines = {name: short(text, 1000) for name, text in lines.items()}
    lines["threshold"] = saved.threshold or "none"
    return lines


def _compact(values: Mapping[str, Any]) -> str:
    """Names and values in a line, of tensors the shape."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping) and "tensor" in value:
            return " x ".join(map(str, value["shape"])) or "scalar"
        return json.dumps(value) if not isinstance(value, str) else value

    return ", ".join(f"{name} {text(value)[:60]}" for name, value in values.items())


def _accuracy(split: "SplitModel", dataset: "Dataset[Any]") -> float:
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
