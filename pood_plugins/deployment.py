"""
From a trained classifier to a detector in front of it: fit on images, calibrate on others, save
all that is needed to score in one directory, and score with nothing but that directory.

.. code-block:: console

    $ pood fit --arch resnet18 --weights model.pt --size 224 --mean 0.485 0.456 0.406 \\
        --std 0.229 0.224 0.225 --data data/train --detector GROOD --output detector
    $ pood score --detector detector --data incoming --output scores.csv
    $ pood inspect detector

.. code-block:: python

    from pood_plugins.deployment import Deployed

    deployed = Deployed.load("detector", device="cuda")
    for row in deployed.score(["a.jpg", "b.jpg"]):
        print(row.file, row.score, row.decision, row.predicted, row.error)

Images come from a folder with one folder per class, as for torchvision's ``ImageFolder``, or from
a file: an ``.npz`` with unsigned bytes ``x`` of shape :math:`N \\times H \\times W \\times 3`, or
:math:`N \\times H \\times W` if grey, and labels ``y``, or an :mod:`image pack
<pood_plugins.dataset.packs>`. An array ``classes`` in it names the classes.

.. warning::

    The class folders in alphabetical order, or the labels, must be the columns of the classifier.
    ``pood fit`` prints the accuracy, which tells if they are not.

What ``pood fit`` does
----------------------

1. It takes the preprocessing that is known of the weights, or what ``--size``, ``--mean``,
   ``--std``, ``--resize``, ``--interpolation`` and ``--channels`` say.
2. It constructs the classifier a second time, as ``pood score`` will, and compares their logits.
3. A fifth of the images of each class (``--holdout``) is held out, unless there are others to
   calibrate on (``--calibration``). On the rest, the detector is fitted. Detectors that need no
   fit are calibrated on all images.
4. The threshold is calibrated on the images held out, see :mod:`pood_plugins.threshold`. If the
   classifier was trained on them, it is more sure of them than of new ones, and the threshold
   accepts fewer new ones than it says: calibrate on images that it was not trained on. Images
   that belong together, such as those of one patient, may be held out in part: give images of
   other patients by ``--calibration``.
5. Detector, threshold, classifier, class names and preprocessing are saved, see
   :mod:`pood_plugins.persistence`, and so are the paths of up to 200,000 images that the detector
   was fitted on, for :mod:`explanations <pood_plugins.explain>`.

What ``pood score`` does
------------------------

It writes a row for each image, in the order given, as it goes: ``file``, ``score``, ``decision``
(``ID`` or ``OOD``), ``predicted`` (the class), ``error``. An image that can't be read or scored is
a row with the reason. The file appears when all is written; until then, the rows are in a hidden
file beside it, from which ``--resume`` goes on.

Grey images with more than 8 bits are refused, since conversion would cut them at 255, and so are
images of several pages or frames. Of 16-bit color images, Pillow takes the upper 8 bits. A note in
a file that says how to turn the image (EXIF) is ignored, as torchvision does.

If the architecture is your own code (``package.module:callable``), it is not run because a file
says so: name it again by ``--arch``.

.. autoclass:: pood_plugins.deployment.Deployed
    :members:

.. autofunction:: pood_plugins.deployment.fit

.. autofunction:: pood_plugins.deployment.write_scores

.. autofunction:: pood_plugins.deployment.find_classes

.. autoclass:: pood_plugins.deployment.Row

.. autoclass:: pood_plugins.deployment.Fitted

.. autoclass:: pood_plugins.deployment.Scored
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import persistence, registry
from .benchmark.folder import files_by_class, find_images, read_image
from .dataset.packs import read_pack
from .model.preprocessing import Preprocessing
from .model.split import SplitModel, split_model
from .model.zoo import construct
from .threshold import Threshold, calibrate
from .training.checkpoint import reason

if TYPE_CHECKING:
    from pytorch_ood.api import Detector

__all__ = ["Deployed", "Fitted", "Row", "Scored", "find_classes", "fit", "write_scores"]

_Path = str | os.PathLike[str]
_PACKS = (".npz", ".zip")
#: names of images that are saved with a detector, for explanations
_MOST_NAMES = 200_000


class Row(NamedTuple):
    """What there is to say of one image. What is not known is None."""

    file: str
    score: float | None = None
    decision: str | None = None  #: ``"ID"`` or ``"OOD"``
    predicted: str | None = None  #: name of the class
    error: str | None = None


class _Source(NamedTuple):
    """An image before it is read."""

    name: str
    image: Path | np.ndarray
    label: int = -1


class _Item(NamedTuple):
    """An image after it was read, or why it can't be."""

    name: str
    image: Tensor | None
    label: int
    error: str | None


class _Images(Dataset[_Item]):
    """Images of which some can't be read."""

    def __init__(self, sources: Sequence[_Source], preprocessing: Preprocessing):
        self.sources, self.preprocessing = list(sources), preprocessing

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> _Item:
        name, image, label = self.sources[index]
        try:
            if isinstance(image, Path):
                rgb = read_image(image, cut=False)
            else:
                rgb = Image.fromarray(image).convert("RGB")
            return _Item(name, self.preprocessing.transform(rgb), label, None)
        except Exception as error:  # of whatever kind: one image must not end a run
            return _Item(name, None, label, reason(error))


def find_classes(data: _Path) -> list[str]:
    """
    :param data: folder with one folder per class, ``.npz`` or pack
    :return: names of the classes
    :raises ValueError: if there are no images, or the file is damaged
    """
    return _find_labeled(data)[1]


def _find_labeled(data: _Path) -> tuple[list[_Source], list[str]]:
    """
    :param data: folder with one folder per class, ``.npz`` or pack
    :return: labeled images, and names of the classes
    """
    if _is_pack(Path(data)):
        arrays = read_pack(data)
        names = arrays.get("classes", range(arrays["y"].astype(np.int64).max(initial=-1) + 1))
        return _of_arrays(data, arrays), [str(name) for name in names]
    by_class = files_by_class(data)
    found = [
        _Source(str(file), file, label)
        for label, files in enumerate(by_class.values())
        for file in files
    ]
    if not found:
        raise ValueError(
            f"{data} has no images in folders: make one folder of images for each class"
        )
    return found, list(by_class)


def _find(data: Iterable[_Path]) -> list[_Source]:
    """
    :param data: image files, folders with images at any depth, ``.npz`` and packs
    :return: images in this order
    """
    found = []
    for path in map(Path, data):
        if _is_pack(path):
            found += _of_arrays(path, read_pack(path))
            continue
        files = find_images(path) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path} has no images: name files, or a folder with some")
        found += [_Source(str(file), file) for file in files]
    return found


def _is_pack(path: Path) -> bool:
    return path.suffix.lower() in _PACKS and not path.is_dir()


def _of_arrays(path: _Path, arrays: Mapping[str, np.ndarray]) -> list[_Source]:
    pairs = zip(arrays["x"], arrays["y"].tolist())
    return [_Source(f"{path}[{i}]", x, y) for i, (x, y) in enumerate(pairs)]


class _Batches:
    """Iterates over images, any number of times, and notes which can't be read."""

    def __init__(self, images: _Images, batch_size: int, workers: int, description: str):
        self.dataset = images
        self.batch_size, self.workers = batch_size, workers
        self.description = description
        self.unreadable: dict[str, str] = {}
        self.readable: list[str] = []  # of the last pass

    def items(self) -> Iterator[list[_Item]]:
        loader = DataLoader(
            self.dataset, self.batch_size, num_workers=self.workers, collate_fn=list
        )
        # off when the output is no terminal
        with tqdm(total=len(self.dataset), desc=self.description, disable=None) as progress:
            for items in loader:
                yield items
                progress.update(len(items))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.readable = []
        for items in self.items():
            self.unreadable.update({i.name: i.error for i in items if i.error is not None})
            readable = [item for item in items if item.image is not None]
            self.readable += [item.name for item in readable]
            if readable:
                labels = torch.tensor([item.label for item in readable])
                yield torch.stack([item.image for item in readable]), labels  # type: ignore[misc]


@dataclass(frozen=True)
class Deployed:
    """
    A classifier with a detector in front of it.
    """

    detector: Detector  #: fitted
    split: SplitModel  #: the classifier, in evaluation mode
    threshold: Threshold | None  #: None if the detector was saved without
    classes: list[str]  #: names of the classifier's columns
    preprocessing: Preprocessing  #: what is done to an image before
    identity: str = ""  #: checksum of all this
    fit_on: list[str] | None = None  #: names of the images that the detector was fitted on

    @classmethod
    def load(
        cls, path: _Path, device: str | torch.device = "cpu", arch: str | None = None
    ) -> Deployed:
        """
        :param path: directory that ``pood fit`` wrote
        :param device: where to compute
        :param arch: the architecture, needed only if it is ``package.module:callable``
        :return: what is in the directory
        :raises ValueError: if it is no such directory, is damaged, or needs ``arch``
        :raises OSError: if a file can't be read
        :raises LookupError: if there is no such architecture
        :raises ImportError: if a plugin can't be imported
        """
        saved = persistence.Saved(path)
        description = saved.config.get("classifier")
        if description is None:
            raise ValueError(
                f"{path} holds a detector without its classifier: load it by persistence.load, or "
                "make a directory with both by `pood fit`"
            )
        try:
            made_for, classes = description["arch"], list(map(str, description["classes"]))
            if not isinstance(made_for, str) or len(made_for) > 1000:
                raise ValueError("its architecture has no name")
            preprocessing = Preprocessing.of_json(description["preprocessing"])
            names = description.get("fit_on")
            fit_on = None if names is None else list(map(str, names))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} describes no classifier ({reason(error)}): fit the detector anew"
            ) from error
        if arch is None and _runs_own_code(made_for):
            raise ValueError(
                f"{path} runs the code {made_for}: if you know and trust it, say so by --arch "
                f"{made_for}"
            )
        if arch not in (None, made_for):
            raise ValueError(f"{path} was made for --arch {made_for}, and not {arch}: correct it")
        model = construct(made_for, len(classes))
        saved.load_weights(model)
        split = _split(model, preprocessing, device)
        return cls(
            saved.detector(split),
            split,
            saved.threshold,
            classes,
            preprocessing,
            saved.config["checksum"],
            fit_on,
        )

    def score(
        self, data: Iterable[_Path], *, batch_size: int = 64, workers: int = 0
    ) -> Iterator[Row]:
        """
        Score images, one batch after the other.

        :param data: image files, folders with images at any depth, ``.npz`` and packs
        :param batch_size: images at once
        :param workers: processes that read images
        :return: rows in this order, also for images that can't be read or scored
        :raises ValueError: if a folder has no images, or a file with images is damaged
        """
        images = _Images(_find(data), self.preprocessing)
        for rows in self._rows(_Batches(images, batch_size, workers, "score")):
            yield from rows

    def _rows(self, batches: _Batches) -> Iterator[list[Row]]:
        for items in batches.items():
            scored = iter(self._score([item for item in items if item.image is not None]))
            yield [
                Row(item.name, error=item.error) if item.image is None else next(scored)
                for item in items
            ]

    def _score(self, items: list[_Item]) -> list[Row]:
        """Rows of images that could be read, scored at once or, if that fails, one by one."""
        if not items:
            return []
        x = torch.stack([item.image for item in items])  # type: ignore[misc]
        try:
            scores, predicted = self._predict(x)
        except ValueError as error:  # such as for features that are not finite
            if len(items) == 1:
                return [Row(items[0].name, error=reason(error))]
            return [row for item in items for row in self._score([item])]
        names = [item.name for item in items]
        return list(map(self._row, names, scores.tolist(), predicted.tolist()))

    def _row(self, name: str, score: float, predicted: int) -> Row:
        if not math.isfinite(score):
            return Row(name, error=f"its score is {score}")
        decision = None
        if self.threshold is not None:
            decision = "OOD" if bool(self.threshold([score])) else "ID"
        return Row(name, score, decision, self.classes[predicted])

    def _scores(self, batches: _Batches) -> tuple[Tensor, Tensor]:
        """Scores of all images that can be read, and whether their labels are predicted."""
        parts = [(*self._predict(x), y) for x, y in batches]
        if not parts:
            reasons = list(batches.unreadable.values())
            raise ValueError(
                f"no image to {batches.description} can be read ({', '.join(reasons[:1])}): "
                "name others"
            )
        scores, predicted, labels = map(torch.cat, zip(*parts))
        return scores, predicted == labels

    @torch.no_grad()
    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and predicted classes, by one forward pass where that is enough."""
        from pytorch_ood.api import FeaturesDetector, GradientDetector, LogitsDetector

        x = x.to(self.split.head.weight.device)
        z = self.split.encoder(x)
        logits = self.split.head(z)
        detector: Any = self.detector
        if isinstance(detector, GradientDetector):
            scores = detector(x)
        elif isinstance(detector, FeaturesDetector):
            scores = detector.predict_features(z)
        elif isinstance(detector, LogitsDetector):
            scores = detector.predict_logits(logits)
        else:
            scores = detector(x)
        # what the network can't tell a class of gets no score
        unsound = ~logits.isfinite().all(dim=1)
        scores = scores.detach().flatten().masked_fill(unsound, math.nan)
        return scores.cpu(), logits.argmax(dim=1).cpu()


class Fitted(NamedTuple):
    """What :func:`fit` did."""

    threshold: Threshold
    n_fit: int  #: images that the detector was fitted on
    accuracy: float  #: of the classifier on the images that the threshold was calibrated on
    unreadable: dict[str, str]  #: why images could not be read, by name; they were left out


def fit(
    detector: str,
    model: nn.Module,
    arch: str,
    preprocessing: Preprocessing,
    data: _Path,
    output: _Path,
    *,
    hyperparameters: Mapping[str, Any] | None = None,
    calibration: _Path | None = None,
    holdout: float = 0.2,
    outliers: _Path | None = None,
    tpr: float = 0.95,
    fpr: float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    workers: int = 0,
) -> Fitted:
    """
    Fit, calibrate and save a detector with its classifier.

    :param detector: name in the registry
    :param model: the classifier
    :param arch: what :func:`~pood_plugins.model.zoo.construct` constructs it from
    :param preprocessing: its preprocessing
    :param data: labeled ID images, a folder with one folder per class, an ``.npz`` or a pack
    :param output: directory to write
    :param hyperparameters: arguments for the detector's constructor
    :param calibration: like ``data``, images to calibrate on
    :param holdout: without them, fraction of the images of each class to calibrate on
    :param outliers: image files, for the threshold: a folder, file, ``.npz`` or pack
    :param tpr: see :func:`~pood_plugins.threshold.calibrate`
    :param fpr: likewise; needs outliers
    :param seed: of the choice of images to hold out
    :param device: where to compute
    :param batch_size: images at once
    :param workers: processes that read images
    :return: what was done
    :raises LookupError: if there is no such detector
    :raises ValueError: if images, classes, classifier and detector don't fit together, or nothing
        can be saved
    :raises OSError: if a file can't be read or written
    """
    output = Path(output).resolve()
    persistence.check_replaceable(output, losing_model=False)
    calibrate([0.0], tpr, scores_ood=None if outliers is None else [0.0], fpr=fpr)
    fit_on, classes = _find_labeled(data)
    split = _split(model, preprocessing, device)
    if len(classes) != split.head.out_features:
        raise ValueError(
            f"the classifier has {split.head.out_features} classes, but {data} has {len(classes)}"
            f" ({', '.join(classes[:3])}, ...): each column needs a folder, which may be empty"
        )
    built: Any = registry.build(detector, split, **(hyperparameters or {}))
    _check_rebuilds(split, arch, _example(preprocessing, device))
    if calibration is not None:
        calibrate_on, of_calibration = _find_labeled(calibration)
        if of_calibration != classes:
            raise ValueError(f"{calibration} has other classes than {data}: use the same folders")
    elif built.requires_fit:
        calibrate_on, fit_on = _hold_out(fit_on, holdout, seed)
    else:
        calibrate_on = fit_on
    calibrate_on = [source for source in calibrate_on if source.label >= 0]
    rejected = [] if outliers is None else _find([outliers])
    _check_apart(fit_on if built.requires_fit else [], calibrate_on, "fitted and calibrated on")
    _check_apart([*fit_on, *calibrate_on], rejected, "both ID and outliers")

    def batches(sources: list[_Source], purpose: str) -> _Batches:
        return _Batches(_Images(sources, preprocessing), batch_size, workers, purpose)

    fitting = batches(fit_on if built.requires_fit else [], "fit")
    calibrating = batches(calibrate_on, "calibrate")
    rejecting = batches(rejected, "outliers")
    if built.requires_fit:
        built.fit(fitting)
    deployed = Deployed(built, split, None, classes, preprocessing)
    scores, correct = deployed._scores(calibrating)
    scores_ood = None if outliers is None else deployed._scores(rejecting)[0]
    threshold = calibrate(scores, tpr, scores_ood=scores_ood, fpr=fpr)
    accuracy = float(correct.double().mean())
    # other commands may run elsewhere
    fit_names = [os.path.abspath(name) for name in fitting.readable]
    persistence.save(
        built,
        output,
        threshold=threshold,
        classifier={
            "arch": arch,
            "classes": classes,
            "preprocessing": preprocessing.to_json(),
            "fit_on": fit_names if len(fit_names) <= _MOST_NAMES else None,
            "accuracy": accuracy,
        },
    )
    unreadable = {**fitting.unreadable, **calibrating.unreadable, **rejecting.unreadable}
    n_fit = len(fitting.dataset) - len(fitting.unreadable)
    return Fitted(threshold, n_fit, accuracy, unreadable)


class Scored(NamedTuple):
    """What :func:`write_scores` did."""

    n_images: int
    n_ood: int
    n_errors: int
    errors: dict[str, str]  #: why images could not be scored, by name


def write_scores(
    deployed: Deployed,
    data: Iterable[_Path],
    output: _Path,
    *,
    batch_size: int = 64,
    workers: int = 0,
    resume: bool = False,
) -> Scored:
    """
    Score images into a csv file, which appears when all is written.

    :param deployed: classifier and detector
    :param data: see :meth:`Deployed.score`
    :param output: csv file
    :param batch_size: images at once
    :param workers: processes that read images
    :param resume: go on where an interrupted call with the same detector and output ended. If the
        images are the same, so is the result.
    :return: what was done
    :raises ValueError: as :meth:`Deployed.score`, or if there are other images than before
    :raises OSError: if a file can't be written
    """
    output = Path(output).resolve()
    if output.exists() and not output.is_file():
        raise ValueError(f"{output} is no file: name one by --output")
    sources = _find(data)
    if any(isinstance(s.image, Path) and s.image.resolve() == output for s in sources):
        raise ValueError(f"{output} is one of the images: name another file by --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    # named after the detector, so that rows of another are not taken for its own
    partial = output.with_name(f".{output.name}.{deployed.identity[:12]}.part")
    done = _read_rows(partial) if resume and partial.exists() else []
    # batches as in a run without interruption, on which the last digits depend
    del done[len(done) // batch_size * batch_size :]
    if [row.file for row in done] != [source.name for source in sources[: len(done)]]:
        raise ValueError(
            f"{partial} has rows of other images: give the same ones, or start anew without "
            "--resume"
        )
    n_ood = sum(row.decision == "OOD" for row in done)
    errors = {row.file: row.error for row in done if row.error}
    n_errors = sum(row.error is not None for row in done)
    images = _Images(sources[len(done) :], deployed.preprocessing)
    rest = _Batches(images, batch_size, workers, "score")
    # surrogates stand for bytes of file names that are not UTF-8
    with open(partial, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(done)
        for rows in deployed._rows(rest):
            writer.writerows(rows)
            file.flush()
            n_ood += sum(row.decision == "OOD" for row in rows)
            errors.update({row.file: row.error for row in rows if row.error})
            n_errors += sum(row.error is not None for row in rows)
        os.fsync(file.fileno())
    os.replace(partial, output)
    return Scored(len(sources), n_ood, n_errors, errors)


def _read_rows(path: Path) -> list[Row]:
    """The rows that were written whole."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    header, *rows = csv.reader(io.StringIO(whole)) if whole else [list(Row._fields)]
    if header != list(Row._fields):
        raise ValueError(f"{path} is no file of scores: remove it, or start without --resume")
    # the last one may end in the middle of a name with a line break
    complete = [row for row in rows if len(row) == len(header)]
    try:
        return [
            Row(file, float(score) if score else None, *(text or None for text in texts))
            for file, score, *texts in complete
        ]
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({reason(error)}): remove it, or start without --resume"
        ) from error


def _hold_out(
    sources: list[_Source], fraction: float, seed: int
) -> tuple[list[_Source], list[_Source]]:
    """
    :return: images held out, of each ID class the same fraction, and the others
    """
    if not 0 < fraction < 1:
        raise ValueError(f"--holdout is {fraction}: use a fraction between 0 and 1, such as 0.2")
    labels = torch.tensor([source.label for source in sources])
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels[labels >= 0].unique():
        rows = (labels == label).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held_out[rows[: int(fraction * len(rows))]] = True
    without = [label for label in set(labels.tolist()) if not held_out[labels == label].any()]
    without = [label for label in without if label >= 0]
    if without:
        raise ValueError(
            f"{len(without)} classes have too few images to hold {fraction:.0%} of them out: name "
            "others by --calibration, or raise --holdout"
        )
    parts = (held_out, ~held_out)
    return tuple([s for s, chosen in zip(sources, part) if chosen] for part in parts)  # type: ignore[return-value]


def _check_apart(some: list[_Source], others: list[_Source], purpose: str) -> None:
    """Scores of images that a detector was fitted on say nothing of new ones."""
    names = {os.path.realpath(source.name) for source in some}
    both = [source.name for source in others if os.path.realpath(source.name) in names]
    if both:
        raise ValueError(f"{len(both)} images, such as {both[0]}, would be {purpose}: name others")


def _example(preprocessing: Preprocessing, device: str | torch.device) -> Tensor:
    """Two random images, as the network sees them."""
    generator = torch.Generator().manual_seed(0)
    size = preprocessing.size
    x = torch.rand(2, preprocessing.channels, size, size, generator=generator)
    example: Tensor = preprocessing.normalize(x).to(device)
    return example


def _split(model: nn.Module, preprocessing: Preprocessing, device: Any) -> SplitModel:
    return split_model(model.to(device).eval(), example=_example(preprocessing, device))


def _check_rebuilds(split: SplitModel, arch: str, x: Tensor) -> None:
    """Whether the architecture and the weights are all there is to the classifier."""
    again = construct(arch, split.head.out_features).to(x.device).eval()
    try:
        again.load_state_dict(split.model.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"{arch} constructs another network than this one, so it can't be loaded again "
            f"({reason(error)}): name the architecture of these weights by --arch"
        ) from error
    with torch.no_grad():
        expected = split.model(x)
        difference = float((again(x) - expected).abs().max())
    if not difference <= 1e-2 * float(expected.abs().max()):
        raise ValueError(
            f"{arch} constructs a network with other logits for the same weights (by "
            f"{difference:.2g}), so it can't be loaded again: make all that its forward depends "
            "on a parameter, a buffer or an argument with a default"
        )


def _runs_own_code(arch: str) -> bool:
    where, colon, _ = arch.partition(":")
    return bool(colon) and where not in ("torchvision", "timm")
