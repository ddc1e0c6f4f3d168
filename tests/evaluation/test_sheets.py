"""
Pages of explanations in the HTML report of a benchmark.
"""

import base64
import re

import pytest
import torch

from pood_plugins import explain
from pood_plugins.benchmark import Digits
from pood_plugins.evaluation.digits import run_digits

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pages_are_those_of_the_most_outlying_images(monkeypatch, tmp_path):
    drawn = []
    for name in ("plot_nero", "plot_grood"):
        real = getattr(explain, name)

        def plot(*arguments, real=real, **more):
            drawn.append(arguments)
            real(*arguments, **more)
            for position in arguments[0].neighbors[0].tolist() if "picture" in more else ():
                view = more["picture"](position)
                assert torch.allclose(view, Digits().train_set()[position][0][0], atol=1e-6)

        monkeypatch.setattr(explain, name, plot)
    report = run_digits(["GROOD (mean)", "NERO", "GROOD", "Energy"], seeds=[0], sheets=True)
    titles = [title for title, _, _ in report.sheets]
    assert titles == [
        f"{row}: the most outlying image of {name}"
        for name in ("digits 6-9", "flower", "noise")
        for row in ("GROOD (mean)", "NERO")
    ]
    results = {result.detector: result for result in report.results}
    sets = dict(zip(Digits().ood_names, Digits().test_sets(known=False)))
    for title, arguments in zip(titles, drawn):
        row, name = title.split(": the most outlying image of ")
        explanation, _, view, _, caption = arguments[:5]
        of_set = results[row].scores[name][1]
        assert float(explanation.score) == pytest.approx(float(of_set.max()), rel=1e-2)
        index = int(caption.rsplit(" ", 1)[1])
        assert index == int(of_set.argmax())
        assert torch.allclose(view, sets[name][index][0][0], atol=1e-6)
        if row == "NERO":
            assert explanation.heat_map.shape == (1, 8, 8)
        else:
            assert arguments[5] == [f"class {class_id}" for class_id in range(6)]

    report.save(tmp_path, html=True)
    page = (tmp_path / "report.html").read_text()
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert [base64.b64decode(image) for image in images] == [png for _, png, _ in report.sheets]
    assert all(png.startswith(b"\x89PNG") for _, png, _ in report.sheets)


def test_no_pages_unless_asked_for():
    assert run_digits(["NERO"], seeds=[0]).sheets == []
    assert run_digits(["Energy"], seeds=[0], sheets=True).sheets == []
