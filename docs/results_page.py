"""
Directives that show what benchmarks wrote: ``markdown-table``, one table, and ``all-results``, the
page of everything in ``benchmarks/results``.
"""

import ast
import json
import re
from pathlib import Path

from sphinx.util.docutils import SphinxDirective

GREYED = re.compile(r"^(\(.*\) †)$")
LONGEST = 15  # rows of a table that is shown on the page of all results
NOT_RECORDED = "not recorded"
# what is told of a run -> the keys by which scripts record it, and how their values read
RECORD = {
    "Date": {"date": "{}", "measured": "{}"},
    "Commit": {"commit": "{}"},
    "Machine": {"machine": "{}", "processor": "{}", "processors": "{} processors"},
    "Device": {"device": "{}"},
    "Threads": {"threads": "{}"},
    "Seeds": {"seeds": "{}", "seed": "{}"},
    "Versions": {"python": "Python {}", "versions": "{}"},
}
RECORDED = {key for keys in RECORD.values() for key in keys}
TOLD = {*RECORDED, "quick"}  # elsewhere than in the table


def csv_table(header, rows, kind=""):
    """Lines of a table in reStructuredText."""
    cells = ["   " + ",".join('"{}"'.format(c.replace('"', '""')) for c in r) for r in rows]
    head = "   :header: " + ",".join('"{}"'.format(c.replace('"', '""')) for c in header)
    return [".. csv-table::", head, f"   :class: results {kind}", "", *cells, ""]


def of_markdown(text):
    """Lines in reStructuredText of the table, and the remarks below it, that a benchmark wrote."""
    # a figure and its deviation stay on one line
    lines = [line.replace(" ± ", "\u00a0±\u00a0") for line in text.strip().splitlines()]
    of_table = [line for line in lines if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in of_table]
    rows = [[GREYED.sub(r":greyed:`\1`", cell) for cell in row] for row in rows]
    return [*csv_table(header, rows), *(line for line in lines if line not in of_table)]


class MarkdownTable(SphinxDirective):
    """
    Shows a table that a benchmark wrote: ``.. markdown-table:: ../benchmarks/results/x.md``.
    Cells such as ``(88.1 / 41.4) †``, which are not to be compared, are greyed. Lines below the
    table are paragraphs.
    """

    required_arguments = 1

    def run(self):
        _, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(path)
        return self.parse_text_to_nodes("\n".join(of_markdown(Path(path).read_text("utf-8"))))


class AllResults(SphinxDirective):
    """
    Shows every result of the scripts in a folder: ``.. all-results:: ../benchmarks``.
    """

    required_arguments = 1

    def run(self):
        _, path = self.env.relfn2path(self.arguments[0])
        folder = Path(path)
        for file in [*folder.glob("*.py"), *folder.glob("results/*")]:
            self.env.note_dependency(str(file))
        self.env.note_reread()  # also for files that are new
        text = render(folder, Path(self.env.srcdir), self.arguments[0])
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def render(folder, docs, link):
    """
    :param folder: scripts, with ``results`` in it
    :param docs: pages of the documentation, to link those that show or name a result
    :param link: the folder as links from the page reach it
    :return: the page in reStructuredText, one section for each script that writes results
    :raises ValueError: if a result belongs to no script
    """
    scripts = {
        path.stem: ast.get_docstring(ast.parse(path.read_text("utf-8")))
        for path in sorted(folder.glob("*.py"))
    }
    files = {stem: [] for stem in scripts}
    for path in sorted((folder / "results").iterdir()):
        owners = [s for s in scripts if path.stem == s or path.stem.startswith(s + "_")]
        if not owners:
            raise ValueError(f"{path.name}: no script of {folder} writes a file of this name")
        files[max(owners, key=len)].append(path)
    pages = _pages(docs)
    lines = []
    for stem, docstring in scripts.items():
        if files[stem] or "benchmarks/results" in docstring:
            lines += _section(stem, docstring, files[stem], pages, link)
    return "\n".join(lines)


def _pages(docs):
    """Text of each page by its name, with that of the modules that it documents."""
    pages = {}
    for path in sorted(docs.glob("*.rst")):
        text = path.read_text("utf-8")
        for module in re.findall(r"automodule:: (pood_plugins\S*)", text):
            source = docs.parent / (module.replace(".", "/") + ".py")
            text += source.read_text("utf-8") if source.exists() else ""
        pages[path.stem] = text
    return pages


def _section(stem, docstring, files, pages, link):
    title = f"``{stem}.py``"
    tables = [path for path in files if path.suffix == ".md"]
    contents = [json.loads(path.read_text("utf-8")) for path in files if path.suffix == ".json"]
    shown = {path: _showing(f"results/{path.name}", pages) for path in tables}
    on_pages = sorted({page for names in shown.values() for page in names})
    on_pages = on_pages or _showing(f"benchmarks/{stem}.py", pages)
    links = ", ".join(f":doc:`{page}`" for page in on_pages)

    lines = [title, "-" * len(title), "", docstring.split("\n\n")[0], ""]
    lines += [".. code-block:: console", "", f"    $ {_command(stem, docstring, contents)}", ""]
    if not files:
        return [*lines, "**There is no result.**" + (f" See {links}." if links else ""), ""]
    if "true" in found(contents, "quick", "{}"):
        lines += ["**A quick run: its numbers mean nothing.**", ""]
    lines += [".. rst-class:: record", ""]
    lines += [f":{name}: {_recorded(contents, keys)}" for name, keys in RECORD.items()]
    downloads = (f":download:`{path.name} <{link}/results/{path.name}>`" for path in files)
    lines += [f":Files: {', '.join(downloads)}", f":Shown in: {links or 'no other page'}", ""]

    main = next((path for path in tables if path.stem == stem), None)
    text = main.read_text("utf-8") if main else ""
    n_rows = len([line for line in text.splitlines() if line.startswith("|")]) - 2
    if main and n_rows <= LONGEST:
        lines += [*of_markdown(text), ""]
    elif not tables:
        for content in contents:
            rows = [[_escaped(cell) for cell in row] for row in values(content)]
            lines += csv_table(("what", "value"), rows, "values")
    return lines


def _showing(name, pages):
    """Pages with this name in them, and not only as the beginning of a longer one."""
    return [page for page, text in pages.items() if re.search(re.escape(name) + r"\b", text)]


def _command(stem, docstring, contents):
    recorded = found(contents, "command", "{}")
    if recorded and recorded[0].startswith(f"python benchmarks/{stem}.py"):
        return recorded[0]
    return re.search(rf"python benchmarks/{stem}\.py[^`\n]*", docstring)[0]


def _recorded(contents, keys):
    texts = [text for key, form in keys.items() for text in found(contents, key, form)]
    if "seeds" in keys:  # a list of all makes those of single runs superfluous
        texts = found(contents, "seeds", "{}") or texts
    if "measured" in keys and len(texts) > 2:
        texts = [f"{min(texts)} to {max(texts)}"]
    return _escaped("; ".join(texts)) if texts else NOT_RECORDED


def found(content, key, form, depth=4):
    """Texts of the different values that a key has, at the top or a few levels below."""
    texts = []
    if isinstance(content, dict):
        if key in content:
            texts.append(form.format(_text(content[key])))
        content = [value for name, value in content.items() if name not in RECORDED]
        content = [value for value in content if isinstance(value, dict)]
    if depth:
        texts += [text for part in content for text in found(part, key, form, depth - 1)]
    return list(dict.fromkeys(texts))


def values(content, path=()):
    """Rows of name and value for all in a json but what is told of the run."""
    if isinstance(content, list) and any(isinstance(part, dict) for part in content):
        content = {str(number): part for number, part in enumerate(content, 1)}
    if not isinstance(content, dict):
        return [(": ".join(path), _text(content))]
    own = {key: part for key, part in content.items() if path or key not in TOLD}
    return [row for key, part in own.items() for row in values(part, (*path, key))]


def _text(value):
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return value if isinstance(value, str) else json.dumps(value)


def _escaped(text):
    return re.sub(r"([*`|_\\])", r"\\\1", text)


def setup(app):
    app.add_directive("markdown-table", MarkdownTable)
    app.add_directive("all-results", AllResults)
    return {"parallel_read_safe": True}
