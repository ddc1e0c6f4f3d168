"""
Results of an evaluation as a table: on the terminal, as csv, json and Markdown, and as pictures.

Near- and far-OOD figures are means over the OOD sets of that kind; the json names the sets in each
mean. AUROC, AUPR and FPR95 are those of :class:`pytorch_ood.metrics.OODMetrics`, with OOD as the
positive class: FPR95 is the share of ID samples that are flagged when 95 % of the OOD samples are
found. All are fractions in :math:`[0, 1]`.

:meth:`.Report.bootstrap` adds what another draw of the test images might have given: 95 %
confidence intervals, and for each row the paired difference in AUROC to the best baseline, which
is the row of pytorch-ood's own detectors with the highest AUROC. In tables, ▲ and ▼ mark rows that
are better and worse than it by more than such a draw explains, and ≈ marks the others.

..  autoclass:: pood_plugins.evaluation.Report
    :members:

..  autoclass:: pood_plugins.evaluation.report.Result
    :members:

Statistics
----------

.. automodule:: pood_plugins.evaluation.statistics
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .statistics import Difference, bootstrap, interval, paired

if TYPE_CHECKING:
    from pandas import DataFrame

METRICS = ("AUROC", "AUPR-IN", "AUPR-OUT", "FPR95")
_MEANS = ("near", "far")


@dataclass
class Result:
    """
    What came of one detector.
    """

    detector: str  #: name of the row
    class_name: str  #: name of the detector's class
    #: metrics by OOD set, each a dictionary of AUROC, AUPR-IN, AUPR-OUT and FPR95
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    #: scores of the ID and the OOD samples by OOD set
    scores: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    accuracy: float | None = None  #: share of ID test samples classified correctly
    fit_seconds: float | None = None  #: without extraction of stored features
    score_seconds: float | None = None  #: for all OOD sets, the ID test set once with each
    error: str | None = None  #: why there are no metrics
    images: int | None = None  #: of each test set, if only a part was scored
    baseline: bool = False  #: whether it is one of the detectors that others are compared with

    def add(
        self, ood_name: str, metrics: dict[str, float], scores_id: Tensor, scores_ood: Tensor
    ) -> None:
        """Adds the metrics and scores of one OOD set."""
        self.metrics[ood_name] = metrics
        self.scores[ood_name] = (scores_id, scores_ood)


class Report:
    """
    Results of several detectors on one benchmark, or their mean over several networks or seeds.
    """

    def __init__(
        self,
        results: Sequence[Result],
        ood_names: Sequence[str],
        near_ood_names: Sequence[str] = (),
        far_ood_names: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
        missing: Mapping[str, str] | None = None,
        notes: Mapping[str, str] | None = None,
    ):
        """
        :param results: one result per detector
        :param ood_names: names of the OOD sets, in the order of the table
        :param near_ood_names: those that the near-OOD mean is taken over
        :param far_ood_names: those that the far-OOD mean is taken over
        :param metadata: further entries of the json, e.g. the seed
        :param missing: sets that the benchmark should have and has not, with the reason
        :param notes: what is to be said of sets that it has, or of the run
        """
        self.results = list(results)
        self.ood_names = list(ood_names)
        self.near_ood_names = list(near_ood_names)
        self.far_ood_names = list(far_ood_names)
        self.metadata = dict(metadata or {})
        self.missing = dict(missing or {})
        self.notes = dict(notes or {})
        #: pages for :meth:`to_html`: title, PNG and alternative text
        self.sheets: list[tuple[str, bytes, str]] = []
        self._parts: list[Report] = []
        self._resampled: dict[tuple[str, str], Tensor] = {}

    @classmethod
    def combine(
        cls, reports: Sequence[Report], metadata: Mapping[str, Any] | None = None
    ) -> Report:
        """
        :param reports: reports of the same detectors and OOD sets, e.g. for several seeds
        :param metadata: further entries of the json
        :return: report of the means; tables show the (sample) standard deviation beside them. A
            detector that failed in one report failed.
        :raises ValueError: if detectors, OOD sets or how many images were scored differ
        """
        first = reports[0]
        for report in reports[1:]:
            if [(r.detector, r.images) for r in report.results] != [
                (r.detector, r.images) for r in first.results
            ] or report.ood_names != first.ood_names:
                raise ValueError(
                    "Only reports of the same detectors, OOD sets and numbers of images can be "
                    "combined."
                )
        results = []
        for same in zip(*(report.results for report in reports)):
            errors = [result.error for result in same if result.error]
            result = Result(
                same[0].detector,
                same[0].class_name,
                error=errors[0] if errors else None,
                images=same[0].images,
                baseline=same[0].baseline,
            )
            if not errors:
                result.metrics = {
                    name: {m: fmean(r.metrics[name][m] for r in same) for m in METRICS}
                    for name in first.ood_names
                }
                result.scores = same[0].scores
                for attribute in ("accuracy", "fit_seconds", "score_seconds"):
                    values = [getattr(r, attribute) for r in same]
                    setattr(result, attribute, None if None in values else fmean(values))
            results.append(result)
        combined = cls(
            results,
            first.ood_names,
            first.near_ood_names,
            first.far_ood_names,
            metadata,
            first.missing,
            first.notes,
        )
        combined._parts = list(reports)
        return combined

    @property
    def failed(self) -> list[Result]:
        """Results of the detectors that failed."""
        return [result for result in self.results if result.error]

    def value(self, detector: str, column: str, metric: str) -> tuple[float, float | None]:
        """
        :param detector: name of the row
        :param column: name of an OOD set, ``"near"`` or ``"far"``
        :param metric: AUROC, AUPR-IN, AUPR-OUT or FPR95
        :return: value and its standard deviation over the combined reports, ``None`` for a single
            one
        :raises KeyError: if there is no such value
        """
        names = self._sets_of(column)
        if not names:
            raise KeyError(column)
        result = self._result(detector)
        mean = fmean(result.metrics[name][metric] for name in names)
        if len(self._parts) < 2:
            return mean, None
        return mean, stdev(part.value(detector, column, metric)[0] for part in self._parts)

    def bootstrap(self, n: int = 1000, seed: int = 0) -> None:
        """
        Resamples the test images, so that tables, files and pictures show intervals and paired
        differences. See :func:`~pood_plugins.evaluation.statistics.bootstrap`.

        :param n: number of resamples
        :param seed: seed of the resamples
        :raises ValueError: if the report combines several, which shows their deviation instead
        """
        if self._parts:
            raise ValueError("Resample reports of one network each, before combining them.")
        good = [result for result in self.results if not result.error]
        for stream, name in enumerate(self.ood_names):
            same_images: dict[int | None, list[Result]] = {}
            for result in good:
                same_images.setdefault(result.images, []).append(result)
            for group in same_images.values():
                scores = [result.scores[name] for result in group]
                values = torch.stack(bootstrap(scores, n=n, seed=seed, stream=stream))
                for result, row in zip(group, values.unbind(1)):
                    self._resampled[result.detector, name] = row
        for mean in _MEANS:
            for result in good:
                if names := self._sets_of(mean):
                    parts = [self._resampled[result.detector, name] for name in names]
                    self._resampled[result.detector, mean] = torch.stack(parts).mean(dim=0)

    def interval(self, detector: str, column: str, metric: str) -> tuple[float, float]:
        """
        :param detector: name of the row
        :param column: name of an OOD set, ``"near"`` or ``"far"``
        :param metric: AUROC or FPR95
        :return: ends of the 95 % interval, after :meth:`bootstrap`
        :raises KeyError: if there is no such interval
        """
        row = {"AUROC": 0, "FPR95": 1}[metric]
        low, high = interval(self._resampled[detector, column][row])
        return float(low), float(high)

    def best_baseline(self, column: str) -> str | None:
        """
        :param column: name of an OOD set, ``"near"`` or ``"far"``
        :return: name of the baseline with the highest AUROC of those that scored all images
        """
        rows = [r for r in self.results if r.baseline and not r.error and r.images is None]
        if not rows or not self._sets_of(column):
            return None
        return max(rows, key=lambda r: self.value(r.detector, column, "AUROC")[0]).detector

    def difference(self, detector: str, column: str) -> Difference | None:
        """
        :param detector: name of the row
        :param column: name of an OOD set, ``"near"`` or ``"far"``
        :return: its AUROC less that of the best baseline, on the same images, after
            :meth:`bootstrap`; ``None`` if there is nothing to compare
        """
        baseline = self.best_baseline(column)
        result = self._result(detector)
        if baseline in (None, detector) or result.error or result.images is not None:
            return None
        return paired(self._resampled[detector, column][0], self._resampled[baseline, column][0])

    def _result(self, detector: str) -> Result:
        return {result.detector: result for result in self.results}[detector]

    def _sets_of(self, column: str) -> list[str]:
        return {"near": self.near_ood_names, "far": self.far_ood_names}.get(column, [column])

    @property
    def frame(self) -> DataFrame:
        """
        One line per detector and column (OOD set, ``near``, ``far``), as a
        :class:`pandas.DataFrame`. Where reports were combined, columns ending in ``_std`` hold the
        standard deviation. After :meth:`bootstrap`, ``_low`` and ``_high`` hold intervals, and
        ``AUROC_difference`` is the mean difference to the baseline named in ``best_baseline``. A
        failed detector has one line with its ``error``.
        """
        pandas = _import("pandas")
        lines: list[dict[str, Any]] = []
        for result in self.results:
            for column in [""] if result.error else self.columns:
                line: dict[str, Any] = {"detector": result.detector, "dataset": column}
                for metric in METRICS:
                    value, std = (
                        (None, None)
                        if result.error
                        else self.value(result.detector, column, metric)
                    )
                    line[metric] = value
                    if self._parts:
                        line[f"{metric}_std"] = std
                if self._resampled:
                    line.update(self._statistics(result, column))
                line["images"] = result.images
                line["accuracy"] = result.accuracy
                line["fit_seconds"] = result.fit_seconds
                line["score_seconds"] = result.score_seconds
                line["error"] = result.error or ""
                lines.append(line)
        return pandas.DataFrame(lines)

    def _statistics(self, result: Result, column: str) -> dict[str, Any]:
        line: dict[str, Any] = {}
        for metric in ("AUROC", "FPR95"):
            ends = (None, None) if result.error else self.interval(result.detector, column, metric)
            line[f"{metric}_low"], line[f"{metric}_high"] = ends
        difference = None if result.error else self.difference(result.detector, column)
        line["best_baseline"] = self.best_baseline(column) if difference else None
        for name, attribute in (("", "mean"), ("_low", "low"), ("_high", "high")):
            value = getattr(difference, attribute) if difference else None
            line[f"AUROC_difference{name}"] = value
        return line

    @property
    def columns(self) -> list[str]:
        """OOD sets, then ``near`` and ``far`` where these have more than one set."""
        return self.ood_names + [mean for mean in _MEANS if len(self._sets_of(mean)) > 1]

    def save(self, directory: str | os.PathLike[str], html: bool = False) -> None:
        """
        Writes ``results.csv``, ``results.json``, the table as ``results.md``, and the pictures.

        :param directory: where to write, created if need be
        :param html: whether to write ``report.html`` as well
        :raises ImportError: if pandas or matplotlib is not installed
        """
        directory = Path(directory)
        self.to_csv(directory / "results.csv")
        self.to_json(directory / "results.json")
        _write(directory / "results.md", self.to_markdown())
        self.plot(directory)
        if html:
            self.to_html(directory / "report.html", self.sheets)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes :attr:`frame` to a file, floats with six decimals."""
        _write(path, self.frame.to_csv(index=False, float_format="%.6f", lineterminator="\n"))

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """
        Writes results, what the means are taken over, and what it takes to repeat them: versions,
        device, commit, the date and whatever the metadata hold.
        """
        parts = self._parts or [self]
        content = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **environment(),
            **self.metadata,
            "ood": self.ood_names,
            "near": self.near_ood_names,
            "far": self.far_ood_names,
            "missing": self.missing,
            "notes": self.notes,
            "results": [
                {
                    "detector": result.detector,
                    "class": result.class_name,
                    "error": result.error,
                    "images": result.images,
                    "accuracy": [part.results[i].accuracy for part in parts],
                    "fit_seconds": [part.results[i].fit_seconds for part in parts],
                    "score_seconds": [part.results[i].score_seconds for part in parts],
                    "metrics": {
                        name: {
                            metric: [part.results[i].metrics[name][metric] for part in parts]
                            for metric in METRICS
                        }
                        for name in self.ood_names
                        if not result.error
                    },
                    **(
                        {
                            "statistics": {
                                column: self._statistics(result, column) for column in self.columns
                            }
                        }
                        if self._resampled and not result.error
                        else {}
                    ),
                }
                for i, result in enumerate(self.results)
            ],
        }
        _write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def to_markdown(self) -> str:
        """
        :return: table of AUROC and FPR95 in percent, the best of each column in bold, and below it
            what is to be said of the sets
        """
        header, *rows = self._table(lambda text: f"**{text}**")
        lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
        table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
        return table + "".join(f"\n{note}\n" for note in self.remarks)

    def to_html(
        self, path: str | os.PathLike[str], sheets: Sequence[tuple[str, bytes, str]] = ()
    ) -> None:
        """
        Writes table, curves and environment as one page, see :mod:`pood_plugins.evaluation.html`.

        :param path: file to write
        :param sheets: pictures that explain decisions, each with its title, the bytes of a PNG,
            and what it shows in words
        :raises ValueError: if a sheet is no PNG
        """
        from ..training.checkpoint import replacing
        from .html import render

        # of a path that is no text, the bytes that are none get a mark in their place
        page = render(self, sheets).encode("utf-8", errors="replace")
        with replacing(path) as file:
            file.write(page)

    def to_text(self) -> str:
        """
        :return: the same table for a terminal, the best of each column marked by ``*``
        """
        table = self._table(lambda text: f"*{text}")
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in table
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *self.remarks]) + "\n"

    @property
    def remarks(self) -> list[str]:
        """Sentences below the table: what its sets are, what is missing, and why rows failed."""
        remarks = []
        if self.missing or self.notes:
            near, far = (", ".join(names) or "none" for names in map(self._sets_of, _MEANS))
            remarks.append(f"Near-OOD: {near}. Far-OOD: {far}.")
        if self.notes:
            remarks.append(". ".join(f"{name}: {note}" for name, note in self.notes.items()) + ".")
        if self.missing:
            sets = "; ".join(f"{name} ({why})" for name, why in self.missing.items())
            remarks.append(f"Missing: {sets}.")
        remarks += [f"{result.detector} failed: {result.error}" for result in self.failed]
        return remarks

    def plot(self, directory: str | os.PathLike[str]) -> list[Path]:
        """
        Draws ``roc.png`` (ROC curves of at most twelve detectors) and ``scores.png``
        (distributions of the scores), one panel per OOD set, and after :meth:`bootstrap` also
        ``intervals.png`` (AUROC and its intervals). Of combined reports, the first is drawn.

        :param directory: where to write, created if need be
        :return: the files
        :raises ImportError: if matplotlib is not installed
        """
        from .plots import plot_intervals, plot_roc, plot_scores

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        results = [r for r in (self._parts or [self])[0].results if not r.error]
        if not results:
            return []
        files = [directory / "roc.png", directory / "scores.png"]
        plot_roc(results, self.ood_names, files[0])
        plot_scores(results, self.ood_names, files[1])
        if self._resampled:
            files.append(directory / "intervals.png")
            plot_intervals(self, files[2])
        return files

    def _table(self, mark: Any) -> list[list[str]]:
        # the few images of a part may flatter
        good = [result for result in self.results if not result.error and result.images is None]
        best = {}
        for column in self.columns:
            for metric, better in (("AUROC", max), ("FPR95", min)):
                values = [self.value(r.detector, column, metric)[0] for r in good]
                # equal as printed is equal
                best[column, metric] = better((round(v, 3) for v in values), default=math.nan)

        def cell(name: str, column: str, metric: str) -> str:
            value, std = self.value(name, column, metric)
            text = f"{100 * value:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")
            whole = any(result.detector == name for result in good)
            return mark(text) if whole and round(value, 3) == best[column, metric] else text

        versus = {}
        if self._resampled:
            baselines = {mean: self.best_baseline(mean) for mean in _MEANS}
            versus = {mean: name for mean, name in baselines.items() if name is not None}

        names = {
            "near": f"near ({len(self.near_ood_names)})",
            "far": f"far ({len(self.far_ood_names)})",
        }
        columns = [names.get(column, column) for column in self.columns]
        columns += [f"{mean} vs {name}" for mean, name in versus.items()]
        table = [["AUROC / FPR95", *columns, "ID accuracy", "fit s", "score s"]]
        for result in self.results:
            if result.error:
                cells = ["failed"] * len(self.columns) + [""] * (len(versus) + 1)
            else:
                cells = [
                    f"{cell(result.detector, c, 'AUROC')} / {cell(result.detector, c, 'FPR95')}"
                    for c in self.columns
                ]
                cells += [_signed(self.difference(result.detector, mean)) for mean in versus]
                cells.append("" if result.accuracy is None else f"{100 * result.accuracy:.1f}")
            name = result.detector
            if result.images is not None:
                name += f" [{result.images:,} images]"
            times = [result.fit_seconds, result.score_seconds]
            table.append([name, *cells, *("" if t is None else f"{t:.2f}" for t in times)])
        return table


def _signed(difference: Difference | None) -> str:
    """A difference in AUROC in percentage points, with its interval."""
    if difference is None:
        return ""
    sign = ("▲" if difference.low > 0 else "▼") if difference.clear else "≈"
    mean, low, high = (100 * v for v in (difference.mean, difference.low, difference.high))
    return f"{sign} {mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def environment() -> dict[str, Any]:
    """
    :return: versions of the packages that results depend on, the platform, the number of threads
        (rounding depends on it), and the commit of the working tree, if any
    """
    versions = {}
    for package in (
        "pood-plugins",
        "pytorch-ood",
        "torch",
        "torchvision",
        "numpy",
        "scikit-learn",
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    arguments = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _write(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file at once: whoever reads it finds the old content or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _import(package: str) -> Any:
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"Reports need {package}: pip install 'pood-plugins[benchmark]'"
        ) from error
