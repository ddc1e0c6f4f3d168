"""
Pages that explain the most outlying test images, for the HTML report.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_ood.api import Detector
from pytorch_ood.benchmark import Benchmark
from torch import Tensor
from torch.utils.data import Dataset

from ..detector import GROOD, NERO
from ..model.preprocessing import Preprocessing
from .report import Report


def explanation_sheets(
    report: Report,
    benchmark: Benchmark,
    detectors: Mapping[str, Detector],
    preprocessing: Preprocessing,
) -> list[tuple[str, bytes, str]]:
    """
    :param report: of these detectors on this benchmark
    :param benchmark: where the images come from
    :param detectors: made by the registry and fitted, by the names of their rows; the first NERO
        and the first GROOD explain
    :param preprocessing: of the images
    :return: for the most outlying image of each OOD set, title, PNG and alternative text
    """
    scores = {result.detector: result.scores for result in report.results if not result.error}
    chosen: dict[type, str] = {}
    for row, detector in detectors.items():
        if isinstance(detector, (NERO, GROOD)) and row in scores:
            chosen.setdefault(type(detector), row)
    sheets = []
    train_set = benchmark.train_set()
    sets = zip(benchmark.ood_names, benchmark.test_sets(known=False, unknown=True))
    for name, dataset in sets:
        for row in chosen.values():
            index = int(scores[row][name][1].argmax())
            x = dataset[index][0]
            title = f"{row}: the most outlying image of {name}"
            page = _page(detectors[row], x, preprocessing, f"{name} {index}", train_set)
            sheets.append((title, page, f"Explanation by {row} of image {index} of {name}"))
    return sheets


def _page(
    detector: Any, x: Tensor, preprocessing: Preprocessing, caption: str, train_set: Dataset[Any]
) -> bytes:
    from ..explain import plot_grood, plot_nero, view_of

    split = detector.build_record.split
    view = view_of(preprocessing, x)
    batch = x[None].to(split.head.weight.device)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "page.png"
        if isinstance(detector, GROOD):

            def picture(position: int) -> Tensor:
                return view_of(preprocessing, train_set[position][0])

            explanation = detector.explain(batch)
            classes = [f"class {class_id}" for class_id in detector.classes_ or ()]
            plot_grood(explanation, 0, view, path, caption, classes, picture=picture)
        else:
            layer = split.stages[-1] if split.feature_maps is not None and split.stages else None
            try:
                explanation = detector.explain(batch, layer=layer)
            except ValueError:  # these maps are not what is pooled: the page has no heat map
                explanation = detector.explain(batch)
            plot_nero(explanation, 0, view, path, caption)
        return path.read_bytes()
