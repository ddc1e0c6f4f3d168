"""The ``pood`` command, in this process but for one call."""

import io
import subprocess
import sys

import pytest

from pood_plugins import __version__, cli


def test_list(capsys):
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for name in ("GROOD", "NERO", "KNN", "EnergyRegularizedLoss", "CIFAR10_OpenOOD", "Digits"):
        assert f"  {name} " in text
    assert "pood-plugins" in text and "pytorch-ood" in text


def test_list_one_kind(capsys):
    assert cli.main(["list", "benchmarks"]) == 0
    text = capsys.readouterr().out
    assert "Digits" in text and "GROOD" not in text


def test_light_commands_import_nothing_heavy():
    """``--help`` and ``list`` answer at once because they load neither torch nor pytorch-ood."""
    code = (
        "import sys; from pood_plugins import cli\n"
        "cli.main(['list'])\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pytorch_ood', 'sklearn', 'matplotlib', 'pandas'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and __version__ in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["list", "cats"], ["benchmark"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: pood" in capsys.readouterr().err


def test_wrong_number_of_seeds(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["benchmark", "digits", "--seeds", "0"])
    assert stop.value.code == 2 and "at least 1" in capsys.readouterr().err


def test_unknown_names_are_one_line(capsys):
    assert cli.main(["benchmark", "digit"]) == 2
    assert cli.main(["benchmark", "digits", "--seeds", "1", "--detectors", "GRODD"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("pood: ") for line in lines)
    assert "GROOD" in lines[1]


def test_verbose_shows_where_an_error_comes_from():
    with pytest.raises(LookupError):
        cli.main(["benchmark", "digit", "--verbose"])


def test_benchmark_digits(tmp_path, capsys):
    arguments = ["benchmark", "digits", "--seeds", "1", "--detectors", "energy,GROOD (mean)"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "Energy" in captured.out and "GROOD (mean)" in captured.out
    assert str(tmp_path) in captured.out
    assert (tmp_path / "results.csv").exists() and (tmp_path / "scores.png").exists()


def test_benchmark_reports_failures(tmp_path, capsys, monkeypatch):
    from pood_plugins.detector import NERO

    def fail(*_):
        raise RuntimeError("no luck")

    monkeypatch.setattr(NERO, "fit_features", fail)
    arguments = ["benchmark", "digits", "--seeds", "1", "--detectors", "NERO,MSP"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "NERO failed: RuntimeError: no luck" in captured.err
    assert "Traceback" not in captured.err and "MSP" in captured.out


def test_an_interruption_is_one_line(capsys, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_list", interrupt)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "pood: interrupted\n"


def test_output_that_has_not_all_signs(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(cli, "_list", lambda _: print("▲ 1.0") or 0)
    assert cli.main(["list"]) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"? 1.0\n"


def test_an_empty_list_of_detectors_is_not_the_default(capsys):
    assert cli.main(["benchmark", "digits", "--quick", "--detectors", ""]) == 2
    assert "no detector is called ''" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["score", "explain"])
def test_images_that_are_not_there(command, tmp_path, capsys):
    arguments = ["--detector", str(tmp_path), "--data", str(tmp_path), str(tmp_path / "nope")]
    assert cli.main([command, *arguments, "--output", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err == f"pood: there is no {tmp_path / 'nope'}: check --data\n"
    assert list(tmp_path.iterdir()) == []
