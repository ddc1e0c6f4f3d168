"""
Why images were flagged, in pictures and in a table.

.. code-block:: console

    $ pood explain --detector detector --data incoming --output explanations

writes into the output folder

- ``explanations.csv``: for each image the score, the decision, and what the detector's explanation
  says of it
- ``sheets/``: for each of the most outlying images (``--most``, by default 12) one page
- ``contact.png``: these images, the most outlying first
- ``scores.png``: the scores of all images, and the threshold

Explanations come from the detectors themselves, see :meth:`NERO.explain
<pood_plugins.detector.NERO.explain>` and :meth:`GROOD.explain
<pood_plugins.detector.GROOD.explain>`; others have none. What a page shows:

- of NERO: the image as the network sees it; the same with the heat map, which is where the
  relevance of the top neurons comes from; the top neurons, with the relevance that is usual for
  the nearest class and the one of this image; and the parts that the score is the product of.
- of GROOD: the image; the distances to the class prototypes and the probability of the OOD
  prototype; and the training samples with the nearest gradients, as images if their files are
  where they were.

The pictures can be read in black and white and with all common kinds of color vision: what is
positive has solid lines, what is negative dashed ones, and no meaning is in a color alone.

.. autofunction:: pood_plugins.explain.write_explanations

.. autofunction:: pood_plugins.explain.plot_nero

.. autofunction:: pood_plugins.explain.plot_grood

.. autofunction:: pood_plugins.explain.plot_contact_sheet

.. autofunction:: pood_plugins.explain.plot_scores

.. autofunction:: pood_plugins.explain.view_of
"""

from __future__ import annotations

import csv
import heapq
import io
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .benchmark.folder import read_image
from .deployment import Deployed, _Batches, _find, _Images, _Item
from .detector import grood, nero
from .evaluation.plots import _save, empty_figure, plain
from .model.preprocessing import Preprocessing
from .threshold import Threshold
from .training.checkpoint import reason, replacing

__all__ = [
    "Explained",
    "plot_contact_sheet",
    "plot_grood",
    "plot_nero",
    "plot_scores",
    "view_of",
    "write_explanations",
]

_Path = str | os.PathLike[str]
# Okabe and Ito's palette, see evaluation.plots
_BLUE, _ORANGE, _BLACK = "#0072B2", "#D55E00", "#000000"


class Explained(NamedTuple):
    """What :func:`write_explanations` did."""

    n_images: int
    n_errors: int
    sheets: list[Path]
    errors: dict[str, str]  #: why images could not be explained, by name
    without_map: str | None  #: why there are no heat maps of NERO, None if there are


class _Flagged(NamedTuple):
    """One of the most outlying images. Sorted by score, and the earlier first."""

    score: float
    order: int
    item: _Item
    explanation: Any  #: of this image alone
    caption: str


def write_explanations(
    deployed: Deployed,
    data: Iterable[_Path],
    output: _Path,
    *,
    most: int = 12,
    batch_size: int = 64,
    workers: int = 0,
) -> Explained:
    """
    :param deployed: classifier and detector
    :param data: see :meth:`Deployed.score <pood_plugins.deployment.Deployed.score>`
    :param output: folder to write into
    :param most: number of images to draw a page of
    :param batch_size: images at once
    :param workers: processes that read images
    :return: what was written
    :raises LookupError: if the detector has no explanations
    :raises ValueError: if a folder has no images, or a file with images is damaged
    :raises OSError: if a file can't be read or written
    :raises ImportError: without matplotlib
    """
    detector: Any = deployed.detector
    if not isinstance(detector, (nero.NERO, grood.GROOD)):
        raise LookupError(
            f"{type(detector).__name__} has no explanations: fit GROOD or NERO for these images"
        )
    output, data = Path(output).resolve(), list(data)
    if any(output.is_relative_to(Path(path).resolve()) for path in data):
        raise ValueError(f"{output} is among the images: name another folder by --output")
    images = _Images(_find(data), deployed.preprocessing)
    for page in [*(output / "sheets").glob("*.png"), *output.glob("*.png")]:
        if page.stem.isdigit() or page.name in ("contact.png", "scores.png"):
            page.unlink()  # of another run, whose images these are not
    n_errors = 0
    flagged: list[_Flagged] = []
    scores: list[float] = []
    errors: dict[str, str] = {}
    with replacing(output / "explanations.csv") as file:
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
        writer = csv.DictWriter(text, _columns(detector), lineterminator="\n")
        writer.writeheader()
        for items in _Batches(images, batch_size, workers, "explain").items():
            for item, (row, explanation) in zip(items, _rows(deployed, items)):
                writer.writerow(row)
                if explanation is None:
                    errors[item.name] = row["error"]
                    n_errors += 1
                    continue
                scores.append(row["score"])
                order = -len(scores)
                entry = _Flagged(row["score"], order, item, explanation, _caption(row))
                (heapq.heappush if len(flagged) < most else heapq.heappushpop)(flagged, entry)
        text.flush()
        text.detach()
    if not scores:
        return Explained(len(images), n_errors, [], errors, None)
    flagged.sort(reverse=True)
    layer, without_map = _find_layer(deployed, flagged[0].item)
    plot_scores(torch.tensor(scores), output / "scores.png", deployed.threshold)
    images_of = [entry.item.image for entry in flagged]
    views = [view_of(deployed.preprocessing, x) for x in images_of if x is not None]
    plot_contact_sheet(views, [entry.caption for entry in flagged], output / "contact.png")
    sheets = []
    for i, (entry, view) in enumerate(zip(flagged, views)):
        explanation, caption = entry.explanation, entry.caption
        path = output / "sheets" / f"{i + 1:03}.png"
        if isinstance(detector, nero.NERO):
            if layer is not None:
                heat_map, reason_of = _heat_map(deployed, entry.item, layer)
                without_map = without_map or reason_of
                # the rest is kept: what was scored in a batch may differ in the last digits
                explanation = replace(explanation, heat_map=heat_map)
            plot_nero(explanation, 0, view, path, caption, deployed.threshold)
        else:
            classes = [deployed.classes[class_id] for class_id in detector.classes_ or ()]
            names = deployed.fit_on
            picture = partial(_read_picture, names)
            plot_grood(explanation, 0, view, path, caption, classes, names, picture)
        sheets.append(path)
    return Explained(len(images), n_errors, sheets, errors, without_map)


def plot_nero(
    explanation: nero.Explanation,
    index: int,
    view: Tensor,
    path: Path,
    caption: str = "",
    threshold: Threshold | None = None,
) -> None:
    """
    One page: image, heat map if there is one, top neurons, and the parts of the score.

    :param explanation: of NERO
    :param index: which of its samples
    :param view: the image, in :math:`[0, 1]`, of shape :math:`H \\times W \\times 3` or
        :math:`H \\times W`
    :param path: file to write
    :param caption: title of the page
    :param threshold: for the score
    """
    heat = None if explanation.heat_map is None else explanation.heat_map[index].cpu()
    widths = [1.0] * (1 if heat is None else 2) + [1.4, 1.5]
    figure, axes = _page(widths, caption)
    _show(axes[0], view, "as the network sees it")
    if heat is not None:
        _show(axes[1], view, "relevance of the top neurons", grey=True)
        _overlay(axes[1], heat)
        axes[1].set_xlabel("orange, solid line: positive\npurple, dashed line: negative")
    _draw_neurons(axes[-2], explanation, index)
    _draw_parts(axes[-1], explanation, index, threshold)
    _write(figure, path)


def plot_grood(
    explanation: grood.Explanation,
    index: int,
    view: Tensor,
    path: Path,
    caption: str = "",
    classes: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    picture: Callable[[int], Tensor | None] = lambda position: None,
) -> None:
    """
    One page: image, distances to the class prototypes, and the training samples with the nearest
    gradients.

    :param explanation: of GROOD
    :param index: which of its samples
    :param view: see :func:`plot_nero`
    :param path: file to write
    :param caption: title of the page
    :param classes: names of the head's columns that have a prototype
    :param names: of the training samples, by position
    :param picture: gives a training sample by its position, like ``view``, or None
    """
    figure, axes = _page([1.0, 1.4, 2.2], caption)
    _show(axes[0], view, "as the network sees it")
    distances = explanation.distances[index].cpu()
    nearest = distances.argsort()[:8].tolist()
    labels = [classes[i] if classes and i < len(classes) else f"class {i}" for i in nearest]
    bars = axes[1].barh(
        range(len(nearest)), distances[nearest].tolist(), color=_BLUE, edgecolor=_BLACK
    )
    bars[0].set_hatch("///")
    axes[1].set_yticks(range(len(nearest)), [plain(label) for label in labels])
    axes[1].invert_yaxis()
    axes[1].set_xlabel("feature distance to the class prototypes")
    axes[1].set_title(f"probability of the OOD prototype: {explanation.probability[index]:.3g}")
    _draw_neighbors(axes[2], explanation, index, names, picture)
    _write(figure, path)


def plot_contact_sheet(views: Sequence[Tensor], captions: Sequence[str], path: Path) -> None:
    """
    Many images on one page.

    :param views: images, see :func:`plot_nero`
    :param captions: one for each, of one or more lines
    :param path: file to write
    """
    columns = min(4, len(views))
    rows = -(-len(views) // columns)
    figure = empty_figure(3.0 * columns, 3.5 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for i, axis in enumerate(axes):
        if i < len(views):
            _show(axis, views[i], f"{i + 1}. {captions[i]}", size=8)
        else:
            axis.axis("off")
    _write(figure, path)


def plot_scores(scores: Tensor, path: Path, threshold: Threshold | None = None) -> None:
    """
    The distribution of scores, and where the threshold is.

    :param scores: of shape :math:`N`
    :param path: file to write
    :param threshold: for these scores
    """
    scores = scores.double()
    figure = empty_figure(6.4, 3.2)
    axis = figure.subplots()
    low, median = float(scores.min()), float(scores.median())
    # a few scores that are far away would press all others together
    high = min(float(scores.max()), median + 6 * float((scores - median).abs().median()))
    if threshold is not None:
        low = min(low, threshold.value)
        high = max(high, low + 1.5 * (threshold.value - low))
    high = high if high > low else low + 1
    beyond = int((scores > high).sum())
    axis.hist(scores.numpy(), bins=60, range=(low, high), color=_BLUE)
    axis.set_xlim(low, high)
    axis.set(xlabel="outlier score", ylabel="images", title=f"{len(scores)} images")
    if beyond:
        axis.set_title(f"{len(scores)} images, {beyond} of them beyond the right edge")
    if threshold is not None:
        flagged = int(threshold(scores).sum())
        axis.axvline(threshold.value, color=_ORANGE, linestyle="--", linewidth=2)
        axis.text(
            threshold.value,
            0.97,
            f" {flagged} OOD →",
            transform=axis.get_xaxis_transform(),
            ha="left",
            va="top",
        )
    axis.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def _columns(detector: Any) -> list[str]:
    of_nero = ["distance", "bias", "feature_ratio", "top_neurons"]
    own = of_nero if isinstance(detector, nero.NERO) else ["probability", "neighbors"]
    return ["file", "score", "decision", "predicted", "nearest_class", *own, "error"]


def _rows(deployed: Deployed, items: list[_Item]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Row and explanation of each image, without explanation if there is an error."""
    explained = iter(_explain(deployed, [item for item in items if item.image is not None]))
    for item in items:
        if item.image is None:
            yield {"file": item.name, "error": item.error}, None
        else:
            yield next(explained)


@torch.no_grad()
def _explain(deployed: Deployed, items: list[_Item]) -> list[tuple[dict[str, Any], Any]]:
    """The same of images that could be read, at once or, if that fails, one by one."""
    if not items:
        return []
    detector: Any = deployed.detector
    try:
        z = deployed.split.encoder(_stack(deployed, items))
        explanation = detector.explain_features(z)
    except ValueError as error:  # such as for features that are not finite
        if len(items) == 1:
            return [({"file": items[0].name, "error": reason(error)}, None)]
        return [pair for item in items for pair in _explain(deployed, [item])]
    predicted = deployed.split.head(z).argmax(dim=1).tolist()
    own = _of_nero if isinstance(detector, nero.NERO) else _of_grood
    pairs = []
    for i, (item, score) in enumerate(zip(items, explanation.score.tolist())):
        row = deployed._row(item.name, score, predicted[i])._asdict()
        nearest = deployed.classes[int(explanation.nearest_class[i])]
        row = {**row, "nearest_class": nearest, **own(deployed, explanation, i)}
        row = {name: value for name, value in row.items() if value is not None}
        if "error" in row:
            pairs.append((row, None))
            continue
        alone = {
            field.name: getattr(explanation, field.name)[i : i + 1]
            for field in fields(explanation)
            if getattr(explanation, field.name) is not None
        }
        pairs.append((row, replace(explanation, **alone)))
    return pairs


def _of_nero(deployed: Deployed, explanation: nero.Explanation, i: int) -> dict[str, Any]:
    neurons = explanation.top_neurons[i].tolist()
    signs = ["+" if explanation.deviation[i, neuron] > 0 else "-" for neuron in neurons]
    return {
        "distance": float(explanation.distance[i]),
        "bias": float(explanation.bias[i]),
        "feature_ratio": float(explanation.feature_ratio[i]),
        "top_neurons": " ".join(f"{neuron}{sign}" for neuron, sign in zip(neurons, signs)),
    }


def _of_grood(deployed: Deployed, explanation: grood.Explanation, i: int) -> dict[str, Any]:
    names = [_name(n, deployed.fit_on) for n in explanation.neighbors[i].tolist()]
    return {"probability": float(explanation.probability[i]), "neighbors": "; ".join(names)}


def _name(position: int, names: Sequence[str] | None) -> str:
    known = names is not None and position < len(names)
    return names[position] if names and known else f"sample {position}"


def _caption(row: Mapping[str, Any]) -> str:
    verdict = f"{row['decision']}: " if "decision" in row else ""
    return (
        f"{Path(row['file']).name}\n{verdict}score {row['score']:.3g}\n"
        f"predicted {row['predicted']}, nearest {row['nearest_class']}"
    )


def _stack(deployed: Deployed, items: list[_Item]) -> Tensor:
    images = [item.image for item in items if item.image is not None]
    return torch.stack(images).to(deployed.split.head.weight.device)


def _find_layer(deployed: Deployed, item: _Item) -> tuple[Any, str | None]:
    """Where the feature maps for heat maps come from, or why there are none."""
    detector, split = deployed.detector, deployed.split
    if not isinstance(detector, nero.NERO):
        return None, None
    if split.feature_maps is None or not split.stages:
        return None, split.maps_reason
    layer = split.stages[-1]
    _, without_map = _heat_map(deployed, item, layer)
    return (layer, None) if without_map is None else (None, without_map)


def _heat_map(deployed: Deployed, item: _Item, layer: Any) -> tuple[Tensor | None, str | None]:
    """The heat map of an image by NERO, or why there is none."""
    detector: Any = deployed.detector
    try:
        return detector.explain(_stack(deployed, [item]), layer=layer).heat_map, None
    except ValueError as error:
        return None, reason(error)


def view_of(preprocessing: Preprocessing, x: Tensor) -> Tensor:
    """
    :param preprocessing: of the classifier
    :param x: an image as the network sees it, of shape :math:`C \\times H \\times W`
    :return: the image in :math:`[0, 1]`, see :func:`plot_nero`
    """
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    pixels = (x.cpu() * std + mean).clamp(0, 1)
    return pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)


# drawing


def _page(widths: Sequence[float], caption: str) -> tuple[Any, Sequence[Any]]:
    figure = empty_figure(3.2 * sum(widths), 4.0)
    if caption:
        figure.suptitle(plain("   ".join(caption.splitlines())), fontweight="bold")
    return figure, figure.subplots(1, len(widths), width_ratios=widths)


def _write(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, path)


def _show(axis: Any, view: Tensor, title: str, grey: bool = False, size: int = 10) -> None:
    pixels = view.mean(dim=2) if grey and view.ndim == 3 else view
    axis.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(plain(title), fontsize=size)
    axis.set(xticks=[], yticks=[])


def _overlay(axis: Any, heat: Tensor) -> None:
    """Colors where there is heat, and lines around its upper half, dashed if it is negative."""
    from matplotlib import colormaps

    largest = float(heat.abs().max()) or 1.0
    scaled = (heat / largest).numpy()
    colors = colormaps["PuOr_r"]((scaled + 1) / 2)
    colors[..., 3] = 0.85 * abs(scaled)
    axis.imshow(colors, interpolation="nearest")
    for level, style in ((0.5, "solid"), (-0.5, "dashed")):
        if scaled.min() < level < scaled.max():
            axis.contour(scaled, [level], colors="black", linestyles=style, linewidths=1.2)


def _draw_neurons(axis: Any, explanation: nero.Explanation, index: int) -> None:
    neurons = explanation.top_neurons[index].tolist()
    relevance = explanation.relevance[index, neurons].cpu()
    usual = relevance - explanation.deviation[index, neurons].cpu()
    rows = range(len(neurons))
    axis.barh(rows, relevance.tolist(), color=_BLUE, label="this image")
    axis.plot(
        usual.tolist(),
        rows,
        linestyle="none",
        marker="D",
        markerfacecolor="white",
        markeredgecolor=_BLACK,
        label="usual for the nearest class",
    )
    axis.axvline(0, color=_BLACK, linewidth=0.8)
    axis.set_yticks(rows, [f"neuron {neuron}" for neuron in neurons])
    axis.invert_yaxis()
    axis.set_title("relevance of the neurons that deviate most")
    _legend(axis)


def _draw_parts(
    axis: Any, explanation: nero.Explanation, index: int, threshold: Threshold | None
) -> None:
    distance, bias, ratio, score = (
        float(getattr(explanation, name)[index])
        for name in ("distance", "bias", "feature_ratio", "score")
    )
    outline = {"edgecolor": _BLACK, "height": 0.5}
    axis.barh(1, distance, color=_BLUE, label=f"distance {distance:.3g}", **outline)
    axis.barh(
        1,
        bias,
        left=distance,
        color="white",
        hatch="///",
        label=f"bias {bias:.3g}",
        **outline,
    )
    axis.barh(0, score, color=_ORANGE, hatch="..", **outline)
    axis.set_yticks([1, 0], ["distance + bias", f"× {ratio:.3g}\n= score"])
    if threshold is not None:
        axis.axvline(threshold.value, color=_BLACK, linestyle="--", linewidth=1.5)
        axis.text(
            threshold.value,
            -0.45,
            f" threshold {threshold.value:.3g}",
            ha="left",
            va="center",
            fontsize=8,
        )
    axis.set(title=f"score {score:.3g}", ylim=(-0.6, 1.6))
    _legend(axis)


def _legend(axis: Any) -> None:
    """Below the axis, where it hides nothing."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def _read_picture(names: Sequence[str] | None, position: int) -> Tensor | None:
    """A training image, if its file is where it was."""
    try:
        image = read_image(Path(_name(position, names)))
    except ValueError:
        return None
    return torch.from_numpy(np.array(image)) / 255


def _draw_neighbors(
    axis: Any,
    explanation: grood.Explanation,
    index: int,
    names: Sequence[str] | None,
    picture: Callable[[int], Tensor | None],
) -> None:
    """Training samples, as pictures where there are some."""
    axis.axis("off")
    axis.set_title("training samples with the nearest gradients")
    positions = explanation.neighbors[index].tolist()[:5]
    distances = explanation.neighbor_distances[index].tolist()
    for i, (position, distance) in enumerate(zip(positions, distances)):
        left = i / len(positions)
        view = picture(position)
        if view is not None:
            inset = axis.inset_axes((left, 0.4, 0.92 / len(positions), 0.45), anchor="S")
            _show(inset, view, "")
        text = "/".join(Path(_name(position, names)).parts[-2:])
        text = plain(textwrap.fill(text, 16))
        axis.text(left, 0.37, f"{text}\n{distance:.3g}", fontsize=8, va="top")
