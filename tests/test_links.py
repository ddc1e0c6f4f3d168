"""
What the pages point at is there, and papers have their names. References between pages and to
Python names are checked when the documentation is built: warnings are errors.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.rst"))]
SOURCES = sorted((ROOT / "pood_plugins").rglob("*.py"))
# a file of the repository in single or double backquotes, perhaps as an argument of python
FILE = re.compile(
    r"`(?:python (?:-m pytest )?)?((?:benchmarks|docs|tests|pood_plugins|\.ci)/[\w./-]+\.\w+)[ `]"
)
TYPED = re.compile(r"^    \$ python ((?:benchmarks|tests)/\S+\.py)", re.M)
PAPERS = {
    "2312.14427": (
        "GROOD: GRadient-Aware Out-of-Distribution Detection",
        ("ElAraby", "Sahoo", "Pequignot", "Novello", "Paull"),
    ),
    "2506.15404": (
        "NERO: Explainable Out-of-Distribution Detection with Neuron-level Relevance",
        ("Chhetri", "Korhonen", "Gyawali", "Bhattarai"),
    ),
    "2404.12368": (
        "Gradient-Regularized Out-of-Distribution Detection",
        ("Sharifi", "Entesari", "Safaei", "Patel", "Fazlyab"),
    ),
    "PyTorch-OOD": (
        "PyTorch-OOD: A Library for Out-of-Distribution Detection based on PyTorch",
        ("Kirchheim", "Filax", "Ortmeier"),
    ),
}


def relative(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=relative)
def test_files_that_are_named_exist(path):
    text = path.read_text("utf-8")
    for name in {*FILE.findall(text), *TYPED.findall(text)}:
        assert (ROOT / name).is_file(), f"{relative(path)} names {name}, which is not there"


def test_files_are_found_in_the_text():
    text = "see ``benchmarks/a.py`` and `python benchmarks/b.py --data DIR`, not ``benchmarks/``"
    assert FILE.findall(text) == ["benchmarks/a.py", "benchmarks/b.py"]
    found = {n for path in PAGES for n in FILE.findall(path.read_text("utf-8"))}
    assert {"benchmarks/cifar10.py", "tests/test_contract.py"} <= found


def test_every_page_is_in_the_contents_once():
    entries = re.findall(r"^    (\w+)$", (DOCS / "index.rst").read_text("utf-8"), re.M)
    assert sorted(entries) == sorted(p.stem for p in DOCS.glob("*.rst") if p.stem != "index")


def test_links_of_the_readme_are_complete():
    text = (ROOT / "README.md").read_text("utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (ROOT / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("path", [*PAGES, *SOURCES, ROOT / "CITATION.cff"], ids=relative)
def test_papers_and_authors_have_their_names(path):
    """A title that is begun is ended, and an author is spelled as on the paper."""
    text = " ".join(re.sub(r'[*`"#]', " ", path.read_text("utf-8")).split())
    for title, authors in PAPERS.values():
        beginning = " ".join(title.split()[:2])
        for match in re.finditer(re.escape(beginning), text, re.I):
            found = text[match.start() :][: len(title)]
            assert found.casefold() == title.casefold(), found
        for author in authors:
            for word in re.findall(rf"(?<![\w/]){author[:6]}[a-z]*", text, re.I):
                assert word == author, word


def test_the_papers_are_cited_in_full():
    text = " ".join((DOCS / "guide_researcher.rst").read_text("utf-8").split())
    for key, (title, authors) in PAPERS.items():
        entry = next(e for e in text.split(" - **") if title in e)
        names = entry.split(f"*{title}*")[0]
        assert [n for n in re.findall(r"\w+(?=[,.])", names) if n in authors] == list(authors)
        assert key in entry
