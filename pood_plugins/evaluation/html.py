"""
A report as one page for a browser: ``report.html`` holds the table, ROC curves, distributions of
the scores, what failed or is missing, and the environment. It can be mailed or put on a shelf: it
loads nothing, from the network or from files beside it, and its content security policy forbids
browsers to.

.. code-block:: console

    $ pood benchmark digits --html

.. code-block:: python

    report.save("results/mine", html=True)
    report.to_html("report.html", sheets=[("GROOD", png, "Three images and their neighbors")])

A click on the head of a column sorts the table, the best first, and a second one the other way
round; what has no value stays last. That takes the few lines of JavaScript in the page. Without
them, the table is in the order of the report. Numbers and marks are those of
:meth:`~pood_plugins.evaluation.Report.to_markdown`. Each mark is explained below the table.

Curves and distributions need the scores: a report whose results have none is written without
them, and says so. Of combined reports, those of the first are drawn. The curves are those of at
most twelve detectors, as in :meth:`~pood_plugins.evaluation.Report.plot`, and are rounded to half
a pixel, so that the page stays below 3 MB for 40 detectors on eight OOD sets. They are drawn
without matplotlib, follow the dark or light colors that the reader prefers, and can be told apart
without colors by their dashes and widths.

Names, error messages and settings come from elsewhere and are shown as the text they are, never as
part of the page. The same report and sheets give the same page in the same environment.

..  autofunction:: pood_plugins.evaluation.html.render
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from html import escape
from string import Template
from typing import Any

import torch

from .plots import _most_telling, _ranks, roc_curve
from .report import Report, Result, environment

_MEANS = ("near", "far")
_BEST = "★ "
# of a panel with ROC curves: size, and margins for the labels at the left and the bottom
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 640, 560, 112, 84, 16
_BINS = 40
# on a phone, the columns may end just where the screen does
_HINT = '<p class="hint">Swipe the table sideways to see all of its columns.</p>\n'


def render(report: Report, sheets: Sequence[tuple[str, bytes, str]] = ()) -> str:
    """
    :param report: results
    :param sheets: pictures that explain decisions, each with its title, the bytes of a PNG, and
        what it shows in words, for those who don't see it
    :return: the page
    :raises ValueError: if a sheet is no PNG
    """
    benchmark = str(report.metadata.get("benchmark") or "benchmark")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(_STYLE)}; "
        f"script-src {_digest(_SCRIPT)}; base-uri 'none'; form-action 'none'"
    )
    sections = [
        ("Results", _table(report) + _legend(report)),
        ("Remarks", _remarks(report)),
        ("ROC curves and scores", _pictures(report)),
        ("Explanations", _sheets(sheets)),
        ("Environment", _environment(report)),
    ]
    return _PAGE.substitute(
        title=escape(f"Out-of-distribution detection: {benchmark}"),
        summary=_summary(report, benchmark),
        policy=policy,
        style=_STYLE,
        script=_SCRIPT,
        sections="".join(f"<section>\n<h2>{t}</h2>\n{s}</section>\n" for t, s in sections if s),
    )


def _digest(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _summary(report: Report, benchmark: str) -> str:
    sentence = (
        f"How well {_count(len(report.results), 'detector')} of out-of-distribution (OOD) data "
        f"tell {_count(len(report.ood_names), 'OOD set')} from the in-distribution (ID) test set "
        f"of {benchmark}, by the outlier scores they give to each image"
    )
    classifier = report.metadata.get("arch") or report.metadata.get("weights")
    if classifier:
        sentence += f", with the classifier {classifier}"
    if len(report._parts) > 1:
        sentence += f": means over {len(report._parts)} networks"
    return escape(sentence + ".")


def _table(report: Report) -> str:
    titles, *lines = report._table(lambda text: _BEST + text)
    n = len(report.columns)
    # what is asked for first: the means, where there are several sets, and the differences
    means = [column for column in report.columns if column in _MEANS]
    sets = [column for column in report.columns if column not in _MEANS]
    versus = [
        (escape(title).replace(" vs ", " vs <br>", 1), "descending")
        for title in titles[1 + n : -3]
    ]
    others = [
        ("ID accuracy", "descending"),
        ("fit <small>seconds</small>", "ascending"),
        ("score <small>seconds</small>", "ascending"),
    ]
    heads: list[str] = [_head("Detector", 0, "ascending", rows=2)]
    below: list[str] = []
    column = 1
    for pairs, singles in ((means, versus), (sets, others)):
        for name in pairs:
            title = _title(report, name)
            heads.append(f'<th colspan="2" scope="colgroup" class="group">{title}</th>')
            below.append(_head("AUROC", column, "descending", group=True))
            below.append(_head("FPR95", column + 1, "ascending"))
            column += 2
        for title, first in singles:
            heads.append(_head(title, column, first, rows=2, group=True))
            column += 1

    body = []
    for result, (name, *texts) in zip(report.results, lines):
        row = f'<tr><th scope="row" data-key="{escape(name)}">{escape(name)}</th>'
        if result.error:
            row += (
                f'<td colspan="{column - 1}" class="group failed">failed, '
                'see <a href="#failed">why</a></td>'
            )
        else:
            row += "".join(_metrics(report, result, means, texts))
            row += "".join(_differences(report, result, texts[n:-3]))
            row += "".join(_metrics(report, result, sets, texts))
            values = (result.accuracy, result.fit_seconds, result.score_seconds)
            row += "".join(_cell(t, v, group=True) for t, v in zip(texts[-3:], values))
        body.append(row + "</tr>\n")
    return (
        f'{_HINT}<div class="wide" role="region" aria-label="Table of results" tabindex="0">\n'
        '<table id="results">\n<thead>\n'
        f"<tr>{''.join(heads)}</tr>\n<tr>{''.join(below)}</tr>\n</thead>\n"
        f"<tbody>\n{''.join(body)}</tbody>\n</table>\n</div>\n"
    )


def _title(report: Report, column: str) -> str:
    if column in _MEANS:
        n = len(report._sets_of(column))
        return f"{column}-OOD <small>mean of {_count(n, 'set')}</small>"
    kinds = [f"{mean}-OOD" for mean in _MEANS if column in report._sets_of(mean)]
    return f"{escape(column)} <small>{', '.join(kinds) or 'OOD'}</small>"


def _head(text: str, column: int, first: str, rows: int = 1, group: bool = False) -> str:
    attributes = ' rowspan="2"' * (rows > 1) + ' class="group"' * group
    return f'<th scope="col" data-column="{column}" data-first="{first}"{attributes}>{text}</th>'


def _metrics(
    report: Report, result: Result, columns: Sequence[str], texts: Sequence[str]
) -> Iterable[str]:
    """Two cells for each of the columns, with the texts of the report's own table."""
    name = result.detector
    for column in columns:
        pair = texts[report.columns.index(column)].split(" / ")
        for metric, text in zip(("AUROC", "FPR95"), pair):
            ends = ""
            if report._resampled:
                low, high = report.interval(name, column, metric)
                ends = f"[{100 * low:.1f}, {100 * high:.1f}]"
            key = report.value(name, column, metric)[0]
            yield _cell(text, key, ends, group=metric == "AUROC")


def _differences(report: Report, result: Result, texts: Sequence[str]) -> Iterable[str]:
    means = [mean for mean in _MEANS if report.best_baseline(mean)]
    for mean, text in zip(means, texts):
        difference = report.difference(result.detector, mean)
        text, bracket, ends = text.partition("[")
        yield _cell(text, difference.mean if difference else None, bracket + ends, group=True)


def _cell(text: str, key: float | None, ends: str = "", group: bool = False) -> str:
    attributes = ' class="group"' * group
    if key is None or not math.isfinite(key):
        return f"<td{attributes}>–</td>"
    if text.startswith(_BEST):
        text = f"<strong>{text}</strong>"
    small = f"<small>{ends}</small>" if ends else ""
    return f'<td{attributes} data-key="{key!r}">{text}{small}</td>'


def _legend(report: Report) -> str:
    near, far = (escape(", ".join(report._sets_of(mean))) or "none" for mean in _MEANS)
    baselines = [report.best_baseline(mean) for mean in _MEANS] if report._resampled else []
    explained = {
        "AUROC": "Area under the ROC curve in percent: the chance that an OOD image gets a higher "
        "score than an ID image. Higher is better, 50 is guessing. OOD is the positive class.",
        "FPR95": "Share of ID images in percent that are flagged by mistake when 95 % of the OOD "
        "images are found. Lower is better.",
        "★": "Best of its column; all that are equal as printed are marked.",
    }
    if report._resampled:
        explained["[low, high]"] = (
            "95 % confidence interval: what another draw of the test images might have given."
        )
    if len(report._parts) > 1:
        explained["a ± b"] = (
            f"Mean and standard deviation over {len(report._parts)} networks, each trained anew."
        )
    if any(baselines):
        explained["near vs, far vs"] = (
            "Difference in AUROC, in percentage points, to the best of pytorch-ood's own "
            "detectors, on the same images."
        )
        explained["▲ ▼ ≈"] = (
            "▲ better and ▼ worse than it by more than another draw of the test images explains; "
            "≈ not told apart."
        )
    if any(result.images is not None for result in report.results):
        explained["[n images]"] = (
            "Only so many images of each set were scored, because the detector is slow. They may "
            "flatter it, so it is never marked as best or compared."
        )
    explained["near-OOD"] = f"Sets that resemble ID data: {near}."
    explained["far-OOD"] = f"Sets of another kind: {far}. Means weigh all sets alike."
    explained["ID accuracy"] = (
        "Share of ID images in percent that the classifier assigns to their class."
    )
    explained["fit, score"] = (
        "Seconds to fit the detector, and to score all sets, without the time that the network "
        "takes for features that detectors share."
    )
    explained["–"] = "No value."
    content = "".join(f"<dt>{mark}</dt><dd>{text}</dd>\n" for mark, text in explained.items())
    return f'<dl class="legend">\n{content}</dl>\n'


def _remarks(report: Report) -> str:
    kinds = {
        "failed": ("Failed", {r.detector: str(r.error) for r in report.failed}),
        "left-out": ("Left out", report.metadata.get("left_out") or {}),
        "missing": ("Missing sets", report.missing),
        "notes": ("Notes", report.notes),
    }
    return "".join(
        f'<h3 id="{key}">{title}</h3>\n{_definitions(said)}'
        for key, (title, said) in kinds.items()
        if said
    )


def _environment(report: Report) -> str:
    settings = {**environment(), **report.metadata}
    settings.pop("left_out", None)  # that is among the remarks
    return _definitions(
        {k.replace("_", " "): v for k, v in settings.items() if v not in (None, {}, [])}
    )


def _definitions(items: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(_plain(value))}</dd>\n"
        for name, value in items.items()
    )
    return f"<dl>\n{rows}</dl>\n"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(v)}" for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _sheets(sheets: Sequence[tuple[str, bytes, str]]) -> str:
    figures = []
    for title, picture, description in sheets:
        if not picture.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"The sheet {title!r} is no PNG: pass the bytes of a PNG file.")
        data = b64encode(picture).decode()
        figures.append(
            f"<figure><figcaption>{escape(title)}</figcaption>"
            f'<img src="data:image/png;base64,{data}" alt="{escape(description)}"></figure>\n'
        )
    return "".join(figures)


def _pictures(report: Report) -> str:
    failed = {result.detector for result in report.failed}
    good = [r for r in (report._parts or [report])[0].results if r.detector not in failed]
    results = [r for r in good if all(name in r.scores for name in report.ood_names)]
    if not results or not report.ood_names:
        return "<p>There are no scores to draw: the report was made without them.</p>\n"
    shown = _most_telling(results, report.ood_names)
    sentences = [
        "The higher and the farther left a curve, the better.",
        "The axis of the ID images is logarithmic.",
        "Where a curve meets the line at 95 %, its FPR95 is read.",
    ]
    if len(shown) < len(good):
        sentences.append(f"{len(shown)} of {len(good)} detectors are drawn; the table has all.")
    if len(report._parts) > 1:
        sentences.append(f"All pictures are of the first of {len(report._parts)} networks.")
    intro = f"<p>{' '.join(sentences)}</p>\n"
    entries = [(_line(i), result.detector) for i, result in enumerate(shown)]
    entries.append(("chance", "guessing"))
    key = "".join(
        '<li><svg class="sample" viewBox="0 0 56 12" aria-hidden="true">'
        f'<path class="line {style}" d="M0 6H56"/></svg>{escape(name)}</li>\n'
        for style, name in entries
    )
    panels = "".join(
        f"<figure><figcaption>{escape(name)}</figcaption>\n{_roc(shown, name)}</figure>\n"
        for name in report.ood_names
    )
    return (
        f'{intro}<ul class="key">\n{key}</ul>\n<div class="panels">\n{panels}</div>\n'
        + _distributions(results, report.ood_names)
    )


def _line(i: int) -> str:
    """Style of a curve: twelve differ in dashes or width, so that none needs its color."""
    return f"c{i % 6} d{i % 4} w{i // 4}"


def _roc(results: Sequence[Result], ood_name: str) -> str:
    most = max(len(result.scores[ood_name][0]) for result in results)
    lowest = math.log10(0.5 / most)  # where an FPR of 0 is drawn
    right, bottom = _WIDTH - _MARGIN, _HEIGHT - _BOTTOM

    def x(fpr: torch.Tensor) -> torch.Tensor:
        share = 1 - fpr.double().clamp(min=0.5 / most).log10() / lowest
        return _LEFT + share * (right - _LEFT)

    def y(tpr: torch.Tensor) -> torch.Tensor:
        return bottom - tpr.double() * (bottom - _MARGIN)

    def path(fpr: torch.Tensor, tpr: torch.Tensor, style: str, title: str = "") -> str:
        points = torch.stack([x(fpr), y(tpr)], dim=1).round().int().unique_consecutive(dim=0)
        d = "L".join(f"{a} {b}" for a, b in points.tolist())
        return f'<path class="line {style}" d="M{d}"><title>{escape(title)}</title></path>\n'

    marks = []
    for exponent in range(math.ceil(lowest), 1):
        at = round(float(x(torch.tensor(10.0**exponent))))
        marks.append(
            f'<path class="grid" d="M{at} {_MARGIN}V{bottom}"/>'
            f'<text x="{at}" y="{bottom + 30}" text-anchor="{"middle" if exponent else "end"}">'
            f"{100 * 10.0**exponent:g} %</text>"
        )
    for percent in (0, 25, 50, 75, 95):
        at = round(float(y(torch.tensor(percent / 100))))
        marks.append(
            f'<path class="{"mark" if percent == 95 else "grid"}" d="M{_LEFT} {at}H{right}"/>'
            f'<text x="{_LEFT - 8}" y="{at + 8}" text-anchor="end">{percent} %</text>'
        )
    middle = (_MARGIN + bottom) // 2
    labels = (
        f'<text x="{(_LEFT + right) // 2}" y="{_HEIGHT - 12}" text-anchor="middle">'
        "ID images flagged (FPR)</text>"
        f'<text transform="translate(22 {middle}) rotate(-90)" text-anchor="middle">'
        "OOD images found (TPR)</text>\n"
    )
    chance = torch.logspace(lowest, 0, 60)
    curves = [path(chance, chance, "chance", "guessing")]
    curves += [
        path(*roc_curve(*r.scores[ood_name]), _line(i), r.detector)
        for i, r in reversed(list(enumerate(results)))  # the first on top
    ]
    values = [100 * result.metrics[ood_name]["AUROC"] for result in results]
    description = (
        f"ROC curves of {_count(len(results), 'detector')} on {ood_name}, "
        f"AUROC from {min(values):.1f} to {max(values):.1f} %"
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(description)}">\n'
        f"{''.join(marks)}\n{labels}{''.join(curves)}</svg>\n"
    )


def _distributions(results: Sequence[Result], ood_names: Sequence[str]) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ood_names)
    body = "".join(
        f'<tr><th scope="row">{escape(result.detector)}</th>'
        + "".join(f"<td>{_histogram(result, name)}</td>" for name in ood_names)
        + "</tr>\n"
        for result in results
    )
    return (
        "<h3>Distributions of the scores</h3>\n<p>How many images have which outlier score: "
        '<svg class="sample" viewBox="0 0 56 24" aria-hidden="true"><path class="id" '
        'd="M0 22V4H56V22"/></svg> ID, filled; <svg class="sample" viewBox="0 0 56 24" '
        'aria-hidden="true"><path class="ood" d="M2 22V4H54V22"/></svg> OOD, outlined. The axis '
        "is the rank of the score among all images of a panel, low at the left, so that detectors "
        "with different scales can be compared. The less the two overlap, the better.</p>\n"
        f"{_HINT}"
        '<div class="wide" role="region" aria-label="Distributions of the scores" tabindex="0">\n'
        f'<table class="scores">\n<thead><tr><th scope="col">Detector</th>{heads}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table>\n</div>\n"
    )


def _histogram(result: Result, ood_name: str) -> str:
    shares = []
    for ranks in _ranks(*result.scores[ood_name]):
        counts = torch.histc(ranks, bins=_BINS, min=0, max=1)
        shares.append(counts / counts.sum().clamp(min=1))
    top = max(float(torch.cat(shares).max()), 1e-9)
    paths = []
    for share, style in zip(shares, ("id", "ood")):
        steps = "".join(f"V{v}h4" for v in (46 - 44 * share / top).round().int().tolist())
        paths.append(f'<path class="{style}" d="M2 46{steps}V46"/>')
    auroc = 100 * result.metrics[ood_name]["AUROC"]
    description = f"Scores of {result.detector} on ID and {ood_name}, AUROC {auroc:.1f} %"
    return (
        f'<svg viewBox="0 0 {4 * _BINS + 4} 48" role="img" aria-label="{escape(description)}">'
        f'{"".join(paths)}<path class="axis" d="M0 46H{4 * _BINS + 4}"/></svg>'
    )


# Colors have a contrast of at least 4.5 to their ground, or 3 where they only draw; the curves'
# are Okabe and Ito's, made darker or lighter to get there.
_STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --text: #1b1f24; --quiet: #565e68; --rule: #d5dae0; --head: #f1f4f7;
  --link: #0b5cad; --id: #7fb2dc; --ood: #a83f00;
  --c0: #000000; --c1: #0072b2; --c2: #d55e00; --c3: #00805c; --c4: #b0498a; --c5: #8c6d1f;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ground: #14181d; --text: #e7ebf0; --quiet: #a5aeb9; --rule: #39414b; --head: #1f252c;
    --link: #7db8f5; --id: #2f6798; --ood: #ffa15c;
    --c0: #ffffff; --c1: #56b4e9; --c2: #ff8b3d; --c3: #2bc79a; --c4: #ea9cc8; --c5: #e3c34c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--ground);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
p { max-width: 48rem; margin: .4rem 0 .8rem; }
a { color: var(--link); }
small { display: block; font-size: .86em; font-weight: normal; color: var(--quiet); }
.hint { display: none; color: var(--quiet); font-size: .9rem; }
.wide { overflow-x: auto; border: 1px solid var(--rule); border-radius: 6px; }
.wide:focus-visible, button:focus-visible { outline: 2px solid var(--link); outline-offset: -2px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9em; }
th, td {
  padding: .35rem .55rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--rule); font-variant-numeric: tabular-nums;
}
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--head); vertical-align: bottom; }
thead th[colspan] { text-align: center; }
.group { border-left: 1px solid var(--rule); }
th[scope=row], thead tr:first-child th:first-child {
  position: sticky; left: 0; text-align: left; white-space: normal; overflow-wrap: break-word;
  min-width: 9.5rem; max-width: 14rem; border-right: 1px solid var(--rule);
}
th[scope=row] { background: var(--ground); font-weight: 600; }
tbody tr:hover > * { background: var(--head); }
td.failed { text-align: left; }
th button {
  font: inherit; color: inherit; background: none; border: 0; margin: -.35rem -.55rem;
  padding: .35rem .55rem; cursor: pointer; text-align: inherit; min-height: 2rem;
}
th button::after { content: " ↕"; color: var(--quiet); }
[aria-sort=ascending] button::after { content: " ↑"; color: var(--link); }
[aria-sort=descending] button::after { content: " ↓"; color: var(--link); }
th button small { display: inline; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .3rem 1rem; }
dl { max-width: 60rem; margin: .8rem 0; font-size: .92em; }
dt { font-weight: 600; max-width: 14rem; }
dd { margin: 0; white-space: pre-wrap; }
.key { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; }
.sample { width: 2.4rem; height: 1rem; margin-right: .4rem; vertical-align: -.15rem; }
.panels { display: grid; gap: 1rem; }
.panels { grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0 0 1rem; text-align: center; }
figure > svg { display: block; width: 100%; }
figcaption { font-weight: 600; }
img { max-width: 100%; height: auto; background: #ffffff; }
svg text { fill: var(--text); font-size: 22px; }
.line { fill: none; stroke-linejoin: round; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
.d1 { stroke-dasharray: 14 6; } .d2 { stroke-dasharray: 3 4; }
.d3 { stroke-dasharray: 14 5 3 5; }
.w0 { stroke-width: 4.5; } .w1 { stroke-width: 2.8; } .w2 { stroke-width: 1.6; }
.chance { stroke: var(--quiet); stroke-width: 2; stroke-dasharray: 2 9; }
.grid, .axis { fill: none; stroke: var(--rule); stroke-width: 1.5; }
.mark { stroke: var(--quiet); stroke-width: 1.5; }
.id { fill: var(--id); stroke: var(--c1); stroke-width: 1; }
.ood { fill: none; stroke: var(--ood); stroke-width: 2; }
.scores td { padding: .2rem .5rem; }
.scores thead th { text-align: center; }
.scores td svg { display: block; width: 11rem; height: 3.2rem; margin: 0 auto; }
@media screen and (max-width: 40rem) {
  .hint { display: block; }
  th[scope=row], thead tr:first-child th:first-child { min-width: 7.8rem; max-width: 9rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}
@page { size: A4 landscape; margin: 12mm; }
@media print {
  body { max-width: none; padding: 0; font-size: 9pt; }
  .wide { overflow: visible; border: 0; }
  table { font-size: 6pt; }
  th, td { padding: .15rem .2rem; }
  th[scope=row], thead tr:first-child th:first-child { position: static; min-width: 0; }
  th button::after, [aria-sort] button::after { content: none; }
  .scores td svg { width: 6rem; height: 1.8rem; }
  .panels { grid-template-columns: repeat(3, 1fr); }
  tr, figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""

# The heads become buttons here, so that without JavaScript there are none that do nothing.
_SCRIPT = """
"use strict";
const table = document.getElementById("results");
const rows = Array.from(table.tBodies[0].rows);
for (const head of table.querySelectorAll("th[data-column]")) {
  const column = Number(head.dataset.column);
  const key = (row) => {
    const cell = row.cells[column];
    const text = cell === undefined ? undefined : cell.dataset.key;
    return column === 0 || text === undefined ? text : Number(text);
  };
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const other = {ascending: "descending", descending: "ascending"};
    const order = other[head.getAttribute("aria-sort")] || head.dataset.first;
    for (const sorted of table.querySelectorAll("[aria-sort]")) {
      sorted.removeAttribute("aria-sort");
    }
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === undefined || y === undefined) {
        return (x === undefined) - (y === undefined);
      }
      return sign * (column === 0 ? x.localeCompare(y) : x - y);
    });
    table.tBodies[0].append(...rows);
  });
}
"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>$summary</p>
</header>
<main>
$sections</main>
<script>$script</script>
</body>
</html>
""")
