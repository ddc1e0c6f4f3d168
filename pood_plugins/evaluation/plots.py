"""
Pictures of a report: ROC curves and distributions of scores. Needs matplotlib.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .report import Report, Result, _import

# Okabe and Ito's palette: distinct for all common kinds of color vision
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F")
_DASHES = ("-", "--", ":", "-.")
_ID_COLOR, _OOD_COLOR = "#0072B2", "#D55E00"
_MOST = 12  # curves in a picture
_ARROW = 4  # matplotlib's number for a caret with its tip, to the left, at the point


def plot_roc(results: Sequence[Result], ood_names: Sequence[str], path: Path) -> None:
    """
    ROC curves, OOD as the positive class, one panel per OOD set, one line per detector. The axis
    of the FPR is logarithmic, so that good detectors can be told apart. More than twelve lines
    can't be told apart: of more detectors, those that are no baselines are drawn, and of the
    baselines those with the best mean AUROC. The table has all.

    :param results: results that have scores
    :param ood_names: panels
    :param path: file to write
    """
    figure, axes = _figure(1, len(ood_names), width=4.2, height=4.4)
    shown = _most_telling(results, ood_names)
    for axis, name in zip(axes[0], ood_names):
        for i, result in enumerate(shown):
            fpr, tpr = roc_curve(*result.scores[name])
            fpr = fpr.clamp(min=0.5 / len(result.scores[name][0]))  # 0 has no logarithm
            style = {"color": _COLORS[i % 8], "linestyle": _DASHES[i // 8 % 4], "linewidth": 1.3}
            label = plain(result.detector) if name == ood_names[0] else None
            axis.plot(fpr, tpr, label=label, **style)
        axis.set(
            title=plain(name), xlabel="ID samples flagged (FPR)", xscale="log", ylim=(0, 1.02)
        )
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("OOD samples found (TPR)")
    left_out = len(results) - len(shown)
    title = f"{len(shown)} of {len(results)} detectors, the table has all" if left_out else None
    columns = min(5, len(shown))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, title=title)
    _save(figure, path)


def _most_telling(results: Sequence[Result], ood_names: Sequence[str]) -> list[Result]:
    """The results to draw if there is no room for all."""
    if len(results) <= _MOST:
        return list(results)

    def rank(result: Result) -> tuple[bool, float]:
        mean = fmean(result.metrics[name]["AUROC"] for name in ood_names)
        return result.baseline, -mean if result.baseline else 0.0

    return sorted(results, key=rank)[:_MOST]


def plot_scores(results: Sequence[Result], ood_names: Sequence[str], path: Path) -> None:
    """
    Distribution of the outlier score of ID and OOD samples, one row per detector, one column per
    OOD set. The axis is the rank of the score among all samples of the panel, so that detectors
    with different scales can be compared.

    :param results: results that have scores
    :param ood_names: columns
    :param path: file to write
    """
    figure, axes = _figure(len(results), len(ood_names), width=3.4, height=0.9)
    for row, result in zip(axes, results):
        for axis, name in zip(row, ood_names):
            id_ranks, ood_ranks = _ranks(*result.scores[name])
            for ranks, color, label, hatch in (
                (id_ranks, _ID_COLOR, "ID", None),
                (ood_ranks, _OOD_COLOR, "OOD", "///"),
            ):
                axis.hist(
                    ranks.numpy(),
                    bins=40,
                    range=(0, 1),
                    density=True,
                    color=color,
                    edgecolor=color,
                    histtype="stepfilled",
                    alpha=0.5,
                    hatch=hatch,
                    label=label if axis is axes[0][0] else None,
                )
            axis.set(xticks=[], yticks=[])
            axis.spines[["top", "right", "left"]].set_visible(False)
        row[0].set_ylabel(plain(result.detector), rotation=0, ha="right", va="center")
    for axis, name in zip(axes[0], ood_names):
        axis.set_title(plain(name))
    for axis in axes[-1]:
        axis.set_xlabel("outlier score, by rank →")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def plot_intervals(report: Report, path: Path) -> None:
    """
    AUROC with its 95 % interval, one panel per OOD set, one line per detector, best on top in the
    first panel. The vertical line marks the best baseline, filled marks differ from it clearly. An
    arrow at the left edge marks a detector that is worse than the axis shows.

    :param report: report after :meth:`~pood_plugins.evaluation.Report.bootstrap`
    :param path: file to write
    """
    results = [result for result in report.results if not result.error]
    first = report.ood_names[0]
    results.sort(key=lambda result: report.value(result.detector, first, "AUROC")[0])
    rows = [result.detector for result in results]
    figure, axes = _figure(1, len(report.ood_names), width=3.2, height=0.24 * len(rows) + 0.6)
    for axis, name in zip(axes[0], report.ood_names):
        values = [100 * report.value(row, name, "AUROC")[0] for row in rows]
        # a few that guess, or are worse, would press all others together
        best, median, worst = max(values), sorted(values)[len(values) // 2], min(values)
        left = max(worst - 2, min(median - 12, best - 5))
        for y, (result, value) in enumerate(zip(results, values)):
            color = _ID_COLOR if result.baseline else _OOD_COLOR
            low, high = report.interval(result.detector, name, "AUROC")
            axis.plot([100 * low, 100 * high], [y, y], color=color, linewidth=1.2)
            difference = report.difference(result.detector, name)
            axis.plot(
                max(value, left),
                y,
                marker=_ARROW if value < left else "o" if result.baseline else "D",
                color=color,
                markersize=4.5 if value >= left else 7,
                fillstyle="full" if difference is not None and difference.clear else "none",
                clip_on=False,
            )
        baseline = report.best_baseline(name)
        if baseline is not None:
            mark = 100 * report.value(baseline, name, "AUROC")[0]
            axis.axvline(mark, color="#555555", linewidth=0.8, linestyle="--")
        axis.set(title=plain(name), xlabel="AUROC [%]", ylim=(-0.7, len(rows) - 0.3))
        axis.set_xlim(left=left)
        axis.grid(axis="x", alpha=0.3)
        labels = [plain(row) for row in rows] if name == first else [""] * len(rows)
        axis.set_yticks(range(len(rows)), labels)
    _save(figure, path)


def roc_curve(scores_id: Tensor, scores_ood: Tensor) -> tuple[Tensor, Tensor]:
    """
    :param scores_id: outlier scores of ID samples
    :param scores_ood: outlier scores of OOD samples
    :return: FPR and TPR at each distinct threshold, ascending, from (0, 0) to (1, 1)
    """
    scores = torch.cat([scores_id, scores_ood])
    ood = torch.cat([torch.zeros_like(scores_id), torch.ones_like(scores_ood)])
    scores, order = scores.sort(descending=True, stable=True)
    tpr = ood[order].cumsum(0) / len(scores_ood)
    fpr = (1 - ood[order]).cumsum(0) / len(scores_id)
    last = torch.ones_like(scores, dtype=torch.bool)  # ties are passed at once
    last[:-1] = scores[:-1] != scores[1:]
    zero = torch.zeros(1, dtype=scores.dtype)
    return torch.cat([zero, fpr[last]]), torch.cat([zero, tpr[last]])


def plain(text: str) -> str:
    """
    :param text: a name that somebody gave
    :return: the same for matplotlib, to which a dollar sign begins a formula
    """
    # bytes of file names that are no text can't be drawn
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def _ranks(scores_id: Tensor, scores_ood: Tensor) -> tuple[Tensor, Tensor]:
    """Mid-ranks in :math:`[0, 1]`; equal scores have equal ranks."""
    scores = torch.cat([scores_id, scores_ood])
    ordered = scores.sort().values
    below = torch.searchsorted(ordered, scores, right=False)
    upto = torch.searchsorted(ordered, scores, right=True)
    ranks = (below + upto).double() / (2 * len(scores))
    return ranks[: len(scores_id)], ranks[len(scores_id) :]


def empty_figure(width: float, height: float) -> Any:
    """
    :param width: in inches
    :param height: in inches
    :return: figure of matplotlib
    :raises ImportError: without matplotlib
    """
    _import("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # without pyplot: no window, no global state
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    figure = empty_figure(width * columns + 0.8, height * rows + 1.2)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.part.png")
    try:
        figure.savefig(temporary, dpi=120)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
