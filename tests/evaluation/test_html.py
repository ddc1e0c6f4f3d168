"""The page says what the report says, loads nothing, and shows foreign text as text."""

import base64
import hashlib
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from pood_plugins.evaluation import Report, html
from pood_plugins.evaluation.report import METRICS, Result

pytestmark = pytest.mark.usefixtures("one_thread")

VOID = {"meta", "br", "img"}
PNG = b"\x89PNG\r\n\x1a\n..."
HOSTILE = [
    "<script>alert(1)</script>",
    "\"' onmouseover='alert(1)",
    "</style></svg></table>",
    "--> <img src=x onerror=alert(1)>",
    "$title ${script} & &lt; \u2028 \\",
]


class Page(HTMLParser):
    """Elements with attributes and text; refuses tags that don't match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), attributes
        element = {"tag": tag, "attributes": dict(attributes), "text": ""}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "attributes": dict(attributes), "text": ""})

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def find(self, tag, **attributes):
        return [
            e
            for e in self.elements
            if e["tag"] == tag and attributes.items() <= e["attributes"].items()
        ]

    def rows(self):
        """Cells by detector, of the table of results."""
        rows, row = {}, None
        for element in self.elements:
            if element["tag"] == "table" and element["attributes"].get("id") != "results":
                break
            if element["tag"] == "th" and element["attributes"].get("scope") == "row":
                row = rows.setdefault(element["text"], [])
            elif element["tag"] == "td":
                row.append(element)
        return rows

    def legend(self):
        names = [e["text"] for e in self.find("dt")]
        return dict(zip(names, (e["text"] for e in self.find("dd"))))


def result(name, seed=0, separation=1.0, n=60, ood_names=("x", "y", "z"), **attributes):
    generator = torch.Generator().manual_seed(seed)
    made = Result(name, "Class", accuracy=0.9, fit_seconds=1.0, score_seconds=10.0, **attributes)
    for ood in ood_names:
        scores = torch.randn(2, n, generator=generator, dtype=torch.float64)
        metrics = dict.fromkeys(METRICS, torch.sigmoid(torch.tensor(separation)).item())
        made.add(ood, metrics, scores[0], scores[1] + separation)
    return made


def make(*results, **arguments):
    return Report(results, ["x", "y", "z"], ["x", "y"], ["z"], **arguments)


def compared():
    report = make(
        result("best", 1, 1.0, baseline=True),
        result("better", 2, 4.0),
        result("alike", 1, 1.0),
        result("worse", 4, -2.0),
        result("part", 5, 5.0, n=30, images=30),
        Result("broken", "Class", error="ValueError: why"),
        metadata={"benchmark": "letters", "arch": "resnet18", "seconds": 12.5, "train": None},
    )
    report.bootstrap(n=100)
    return report


# content


def test_numbers_and_marks_are_those_of_the_table():
    report = compared()
    titles, *lines = report._table(lambda text: f"★ {text}")
    order = [titles.index(t) for t in ("near (2)", "near vs best", "far vs best", "x", "y", "z")]
    rows = Page(html.render(report)).rows()
    assert list(rows) == [line[0] for line in lines]
    for line, cells in zip(lines[:-1], rows.values()):
        expected = [part for i in order for part in line[i].split(" / ")] + line[-3:]
        expected = [text.split(" [")[0] or "–" for text in expected]  # intervals: see below
        assert [cell["text"].split("[")[0].strip() for cell in cells] == expected
    marks = {name: cells[2]["text"][0] for name, cells in rows.items() if name != "broken"}
    assert "".join(marks.values()) == "–▲≈▼–"
    assert rows["better"][0]["text"].startswith("★ 98.2")
    assert not any("★" in cell["text"] for cell in rows["part [30 images]"])


def test_intervals():
    report = compared()
    cells = Page(html.render(report)).rows()["better"]
    for column, first in {"near": 0, "x": 4, "z": 8}.items():
        for cell, metric in zip(cells[first:], ("AUROC", "FPR95")):
            low, high = (100 * end for end in report.interval("better", column, metric))
            assert cell["text"].endswith(f"[{low:.1f}, {high:.1f}]")
    difference = report.difference("better", "far")
    assert cells[3]["text"].endswith(
        f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    )


def test_numbers_to_sort_by():
    report = compared()
    rows = Page(html.render(report)).rows()
    keys = [float(cell["attributes"].get("data-key", "nan")) for cell in rows["better"]]
    value = report.value("better", "x", "AUROC")[0]
    differences = [report.difference("better", mean).mean for mean in ("near", "far")]
    assert keys == [value, value, *differences, *[value] * 6, 0.9, 1.0, 10.0]
    (failed,) = rows["broken"]
    assert "data-key" not in failed["attributes"]
    assert failed["attributes"]["colspan"] == str(len(keys))


def test_heads_name_the_column_they_sort():
    page = Page(html.render(compared()))
    heads = {int(e["attributes"]["data-column"]): e for e in page.find("th") if is_sortable(e)}
    assert sorted(heads) == list(range(14))
    first = [heads[i]["attributes"]["data-first"] for i in range(14)]
    metrics = ["descending", "ascending"]  # the best first
    rest = ["descending", "ascending", "ascending"]
    assert first == ["ascending", *metrics, "descending", "descending", *metrics * 3, *rest]
    assert [heads[i]["text"] for i in (0, 1, 2, 3, 13)] == [
        "Detector",
        "AUROC",
        "FPR95",
        "near vs best",
        "score seconds",
    ]


def is_sortable(element):
    return "data-column" in element["attributes"]


def test_what_has_no_value_has_no_number_to_sort_by():
    report = make(result("a"), result("b", 1, 2.0))
    report.results[0].metrics["x"]["AUROC"] = math.nan
    report.results[0].fit_seconds = report.results[0].accuracy = None
    cells = Page(html.render(report)).rows()["a"]
    # the mean over x and y, x, accuracy, fit
    for i in (0, 2, 8, 9):
        assert cells[i]["text"] == "–" and "data-key" not in cells[i]["attributes"]
    assert float(cells[10]["attributes"]["data-key"]) == 10


def test_every_mark_is_explained():
    report = compared()
    legend = Page(html.render(report)).legend()
    for mark in ("★", "▲ ▼ ≈", "–", "[low, high]", "[n images]", "near vs, far vs"):
        assert mark in legend
    assert "OOD is the positive class" in legend["AUROC"]
    assert legend["near-OOD"].endswith(": x, y.") and ": z." in legend["far-OOD"]
    plain = Page(html.render(make(result("a")))).legend()
    for mark in ("▲ ▼ ≈", "[low, high]", "[n images]", "near vs, far vs", "a ± b"):
        assert mark not in plain


def test_remarks_and_environment():
    report = compared()
    report.missing, report.notes = {"SVHN": "no list"}, {"x": "3 of 5 images"}
    report.metadata["left_out"] = {"slow_one": "it needs images"}
    page = Page(html.render(report))
    said = page.legend()
    assert said["broken"] == "ValueError: why" and said["SVHN"] == "no list"
    assert said["x"] == "3 of 5 images" and said["slow_one"] == "it needs images"
    assert (
        said["seconds"] == "12.5"
        and f"torch {torch.__version__.split('+')[0]}" in said["versions"]
    )
    assert said["threads"] == "1" and "train" not in said and "left out" not in said
    (link,) = page.find("a")
    assert page.find("h3", id=link["attributes"]["href"].removeprefix("#"))
    assert page.find("title")[0]["text"] == "Out-of-distribution detection: letters"
    assert "6 detectors" in page.find("p")[0]["text"] and "resnet18" in page.find("p")[0]["text"]
    assert "Remarks" not in html.render(make(result("a")))


def test_combined_reports():
    first, second = make(result("a", 0, 1.0)), make(result("a", 1, 3.0))
    report = Report.combine([first, second], {"seeds": [0, 1]})
    page = Page(html.render(report))
    assert page.rows()["a"][0]["text"] == "★ 84.2 ± 15.7"
    assert "2 networks" in page.legend()["a ± b"] and page.legend()["seeds"] == "0, 1"
    texts = " ".join(e["text"] for e in page.find("p"))
    assert "means over 2 networks" in texts and "first of 2 networks" in texts


def test_failures_only():
    report = make(Result("broken", "Class", error="why"))
    page = Page(html.render(report))
    assert page.rows()["broken"][0]["text"] == "failed, see why"
    assert not page.find("figure")


# pictures


def test_curves_and_distributions():
    page = Page(html.render(compared()))
    described = [e["attributes"]["aria-label"] for e in page.find("svg", role="img")]
    assert described[:3] == [
        f"ROC curves of 5 detectors on {name}, AUROC from 11.9 to 99.3 %" for name in "xyz"
    ]
    assert described[3] == "Scores of best on ID and x, AUROC 73.1 %"
    assert len(described) == 3 + 5 * 3
    for element in page.find("svg"):
        attributes = element["attributes"]
        assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"


def test_curves_lie_where_they_should():
    separate = Result("a", "Class")
    separate.add("x", dict.fromkeys(METRICS, 1.0), torch.zeros(50), torch.ones(20))
    page = Page(html.render(Report([separate], ["x"])))
    (curve,) = [
        e["attributes"]["d"] for e in page.find("path") if "c0 d0 w0" in str(e) and is_curve(e)
    ]
    left, right, bottom = html._LEFT, html._WIDTH - html._MARGIN, html._HEIGHT - html._BOTTOM
    assert curve == f"M{left} {bottom}L{left} {html._MARGIN}L{right} {html._MARGIN}"
    # all scores of a kind are equal: one bar at their middle rank
    inside, outside = (e["attributes"]["d"] for kind in ("id", "ood") for e in bars(page, kind))
    assert inside == "M2 46" + 14 * "V46h4" + "V2h4" + 25 * "V46h4" + "V46"
    assert outside == "M2 46" + 34 * "V46h4" + "V2h4" + 5 * "V46h4" + "V46"


def bars(page, kind):
    return [e for e in page.find("path", **{"class": kind}) if "h" in e["attributes"]["d"]]


def test_no_curve_needs_its_color():
    styles = [html._line(i) for i in range(12)]
    assert len({style.split(" ", 1)[1] for style in styles}) == 12
    for name in set(" ".join(styles).split()) - {"d0"}:  # that is without dashes
        assert f".{name} {{ stroke" in html._STYLE


def is_curve(element):
    return "L" in element["attributes"]["d"]


def test_without_scores():
    report = make(result("a"), result("b"))
    report.results[0].scores = {}
    page = Page(html.render(report))
    assert "1 of 2 detectors" in page.find("p")[2]["text"]
    report.results[1].scores = {}
    text = html.render(report)
    assert "There are no scores to draw" in text and "<svg" not in text
    assert list(Page(text).rows()) == ["a", "b"]


def test_sheets():
    page = Page(html.render(make(result("a")), [("GROOD & co", PNG, 'a "cat"')]))
    (image,) = page.find("img")
    kind, data = image["attributes"]["src"].split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == PNG
    assert image["attributes"]["alt"] == 'a "cat"'
    assert "GROOD & co" in [e["text"] for e in page.find("figcaption")]
    with pytest.raises(ValueError, match="'cat' is no PNG"):
        html.render(make(result("a")), [("cat", b"GIF89a", "")])


def test_size():
    sets = [f"set {i}" for i in range(8)]
    rows = [result(f"detector {i}", i, i / 20, 2000, sets, baseline=i > 3) for i in range(40)]
    text = html.render(Report(rows, sets, sets[:4], sets[4:]))
    assert len(text.encode()) < 3e6
    assert "12 of 40 detectors are drawn" in text


# safety


def hostile():
    results = [result(name, i, ood_names=HOSTILE) for i, name in enumerate(HOSTILE)]
    results.append(Result("broken", "Class", error="\n".join(HOSTILE)))
    report = Report(
        results,
        HOSTILE,
        HOSTILE[:3],
        HOSTILE[3:],
        {
            "benchmark": HOSTILE[0],
            "arch": HOSTILE[1],
            HOSTILE[2]: HOSTILE[3],
            "left_out": dict(zip(HOSTILE, HOSTILE)),
            "settings": {HOSTILE[3]: [HOSTILE[4]]},
        },
        dict(zip(HOSTILE, HOSTILE)),
        dict(zip(HOSTILE, HOSTILE)),
    )
    for made in results[:2]:
        made.baseline = True
    report.bootstrap(n=10)
    return report


def test_foreign_text_stays_text():
    page = Page(html.render(hostile(), [(HOSTILE[0], PNG, HOSTILE[1])]))
    assert list(page.rows()) == [*HOSTILE, "broken"]
    heads = page.find("th", scope="row")
    assert [e["attributes"]["data-key"] for e in heads[: len(HOSTILE)]] == HOSTILE
    assert len(page.find("script")) == len(page.find("style")) == len(page.find("img")) == 1
    assert page.legend()["broken"] == "\n".join(HOSTILE)
    used = {name for e in page.elements for name in e["attributes"]}
    assert not any(name.startswith("on") for name in used)
    plain = Page(html.render(compared(), [("", PNG, "")]))
    assert used == {name for e in plain.elements for name in e["attributes"]}


def test_nothing_is_loaded():
    text = html.render(hostile(), [("sheet", PNG, "what")])
    page = Page(text)
    for element in page.elements:
        for name in ("src", "srcset", "href", "xlink:href", "action", "poster", "style"):
            value = element["attributes"].get(name, "#")
            assert value.startswith(("#", "data:")), (element["tag"], name)
    assert not page.find("link") and not page.find("iframe") and not page.find("base")
    assert "://" not in text and "@import" not in text and "url(" not in text


def test_policy_allows_this_script_and_no_other():
    page = Page(html.render(compared()))
    (policy,) = page.find("meta", **{"http-equiv": "Content-Security-Policy"})
    for tag in ("script", "style"):
        digest = hashlib.sha256(page.find(tag)[0]["text"].encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in str(policy)
    assert "default-src 'none'" in policy["attributes"]["content"]
    assert "unsafe" not in policy["attributes"]["content"]


def test_colors_have_contrast():
    """Of text to its ground 4.5, of what is drawn 3."""
    light, dark = re.findall(r":root \{(.*?)\}", html._STYLE, re.DOTALL)[:2]
    for rules in (light, dark):
        colors = dict(re.findall(r"--(\w+): (#\w{6})", rules))
        for name, color in colors.items():
            if name in ("text", "quiet", "link"):
                assert contrast(color, colors["ground"]) >= 4.5, name
                assert contrast(color, colors["head"]) >= 4.5, name
            elif name.startswith("c") or name == "ood":
                assert contrast(color, colors["ground"]) >= 3, name


def contrast(first, second):
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), parts))

    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


# files


def test_files(tmp_path):
    report = compared()
    report.save(tmp_path / "new", html=True)
    written = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert written == html.render(report) == html.render(compared())
    report.to_html(tmp_path / "again" / "page.html", [("sheet", PNG, "what")])
    assert "data:image/png" in (tmp_path / "again" / "page.html").read_text(encoding="utf-8")
    report.save(tmp_path / "without")
    assert not (tmp_path / "without" / "report.html").exists()


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="no PNG"):
        compared().to_html(path, [("sheet", b"", "")])
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_paths_that_are_no_text(tmp_path):
    make(result("a"), metadata={"weights": "caf\udce9.pt"}).to_html(tmp_path / "report.html")
    assert "caf?.pt" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("flags, written", [([], False), (["--html"], True)])
def test_command(monkeypatch, tmp_path, capsys, flags, written):
    from pood_plugins import cli

    monkeypatch.setattr(cli, "_run_digits", lambda *_: make(result("a")))
    assert cli.main(["benchmark", "digits", "--output", str(tmp_path), *flags]) == 0
    assert (tmp_path / "report.html").exists() == written
    assert (tmp_path / "results.json").exists()
