"""The page of all results: nothing is left out, and what it shows is what the files hold."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
JSONS = sorted(RESULTS.glob("*.json"))


def module_of(path, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def render(monkeypatch):
    page = module_of(ROOT / "docs" / "results_page.py", monkeypatch)
    return lambda folder: page.render(folder, ROOT / "docs", "../benchmarks")


def section_of(text, script):
    parts = re.split(r"^``(\w+)\.py``\n-+\n", text, flags=re.M)
    return parts[parts.index(script) + 1]


@pytest.fixture
def copy(tmp_path):
    """Scripts and results that may be changed."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for script in (ROOT / "benchmarks").glob("*.py"):
        shutil.copy(script, folder)
    shutil.copytree(RESULTS, folder / "results")
    return folder


def test_every_file_and_every_script_that_writes_results_is_there(render):
    text = render(ROOT / "benchmarks")
    for path in RESULTS.iterdir():
        assert text.count(f":download:`{path.name} <../benchmarks/results/{path.name}>`") == 1
    for path in (ROOT / "benchmarks").glob("*.py"):
        writes = "benchmarks/results" in path.read_text("utf-8").split('"""')[1]
        assert (f"\n``{path.name}``\n---" in "\n" + text) == writes
    assert "all-results:: ../benchmarks" in (ROOT / "docs" / "results.rst").read_text("utf-8")


def test_what_a_run_recorded(render):
    text = render(ROOT / "benchmarks")
    record = json.loads((RESULTS / "digits.json").read_text())
    section = section_of(text, "digits")
    assert "The digits benchmark as the README shows it." in section
    assert "$ python benchmarks/digits.py\n" in section
    assert f":Commit: {record['commit']}\n" in section
    assert f"torch {record['versions']['torch']}" in section
    assert ":Date: not recorded\n" in section or "date" in record
    assert section.count("GROOD (noise)") == 1


def test_a_script_without_a_result_says_so(render, copy):
    for path in (copy / "results").glob("memory*"):
        path.unlink()
    section = section_of(render(copy), "memory")
    assert "There is no result" in section and ":Date:" not in section


def test_a_result_without_a_script_is_an_error(render, copy):
    (copy / "results" / "dreamt.json").write_text("{}")
    with pytest.raises(ValueError, match=r"dreamt\.json: no script"):
        render(copy)


def test_another_version_in_a_json_changes_the_page(render, copy):
    before = render(copy)
    for i, path in enumerate(JSONS):
        text = (copy / "results" / path.name).read_text("utf-8")
        text = re.sub(r'"python": "[\d.]+"', f'"python": "2.7.{i}"', text)
        (copy / "results" / path.name).write_text(text, "utf-8")
    after = render(copy)
    for i in range(len(JSONS)):
        assert not re.search(rf"2\.7\.{i}\b", before) and re.search(rf"2\.7\.{i}\b", after)


def test_every_value_of_a_json_without_a_table_is_on_the_page(render, copy):
    values = []

    def numbered(part):
        if isinstance(part, dict):
            return {key: numbered(value) for key, value in part.items() if key != "quick"}
        if isinstance(part, list):
            return [numbered(value) for value in part]
        values.append(f"value number {len(values)}.")
        return values[-1]

    for path in JSONS:
        if not list(RESULTS.glob(f"{path.stem}*.md")):
            content = json.loads(path.read_text("utf-8"))
            (copy / "results" / path.name).write_text(json.dumps(numbered(content)), "utf-8")
    text = render(copy)
    assert len(values) > 50
    assert not [value for value in values if value not in text]


def in_percent(values):
    return f"{100 * fmean(values):.1f} ± {100 * stdev(values):.1f}"


def test_every_number_of_the_readme_is_in_the_json():
    record = json.loads((RESULTS / "digits.json").read_text())
    assert not record["missing"] and len(record["far"]) == 2
    readme = (ROOT / "README.md").read_text("utf-8")
    lines = readme[readme.index("| AUROC / FPR95") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip(" *") for cell in line[1:-1].split(" | ")] for line in lines]
    header, _, *rows = [[cell.replace("**", "") for cell in row] for row in rows]
    sets = [[name] for name in record["ood"]] + [record["far"]]
    assert header[1 : 1 + len(sets)] == [*record["ood"], "far (2)"]
    assert [row[0] for row in rows] == [entry["detector"] for entry in record["results"]]
    for row, entry in zip(rows, record["results"]):
        expected = []
        for names in sets:
            by_metric = [
                [fmean(seeds) for seeds in zip(*(entry["metrics"][n][metric] for n in names))]
                for metric in ("AUROC", "FPR95")
            ]
            expected.append(" / ".join(map(in_percent, by_metric)))
        expected.append(f"{100 * fmean(entry['accuracy']):.1f}")
        for key in ("fit_seconds", "score_seconds"):
            expected.append("" if None in entry[key] else f"{fmean(entry[key]):.2f}")
        assert row[1:] == expected, row[0]


@pytest.mark.parametrize(
    "stem, tables",
    [
        ("cifar10", lambda script, content, folder: script.write_tables(content, folder)),
        ("deployment", lambda script, content, _: script.table(content["detectors"])),
        ("explanations", lambda script, content, _: script.table(content)),
        ("greg_cifar10", lambda script, content, _: script.table(content)),
        ("reliability", lambda script, content, _: script.table(content)),
        ("speed", lambda script, content, folder: script.write_tables(content, folder, "speed")),
        ("splitting", lambda script, content, _: script.table(content["networks"])),
    ],
)
def test_tables_are_what_the_scripts_make_of_the_json(monkeypatch, tmp_path, stem, tables):
    """So whoever changes a number changes it in both, or is found out."""
    script = module_of(ROOT / "benchmarks" / f"{stem}.py", monkeypatch)
    content = json.loads((RESULTS / f"{stem}.json").read_text("utf-8"))
    made = tables(script, content, tmp_path)
    if isinstance(made, str):
        (tmp_path / f"{stem}.md").write_text(made, "utf-8")
    elif not list(tmp_path.glob("*.md")):
        script.write_markdown(tmp_path / f"{stem}.md", made)
    written = sorted(tmp_path.glob("*.md"))
    assert written
    for path in written:
        assert path.read_text("utf-8").strip() == (RESULTS / path.name).read_text("utf-8").strip()
