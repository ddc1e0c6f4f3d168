"""
Several processes give what one gives.

torchrun runs this very file in two processes, which write what they got for the tests to compare
with one process, the one of the tests.
"""

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.detector import KNN, MCD, ODIN, EnergyBased
from torch import nn
from torch.utils.data import ConcatDataset, TensorDataset

from pood_plugins import cli, distributed
from pood_plugins.dataset import ImagePack
from pood_plugins.detector import GROOD, NERO
from pood_plugins.evaluation import run
from pood_plugins.model import split_model
from pood_plugins.training.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, BATCH = 3, 8
LOADER = {"batch_size": BATCH}
#: images by set: 6, 4, 1 and 3 batches, so that shares are uneven, and one has no batch
SIZES = {"train": 45, "test": 27, "few": 5, "many": 20}


# what the processes run


class Images(Benchmark):
    """Random images, in memory as tensors or as a pack."""

    ood_names = ["few", "many"]

    def __init__(self, packed=False, broken=False):
        random = np.random.default_rng(0)
        self.sets = {}
        for i, (name, n) in enumerate(SIZES.items()):
            y = np.arange(n) % CLASSES if name in ("train", "test") else np.full(n, -1)
            x = random.integers(40 * i, 255, (n, 16, 16, 3), dtype=np.uint8)
            x[:, :, :, 0] //= (2 + y)[:, None, None].astype(np.uint8)
            pack = ImagePack(x, y)
            self.sets[name] = pack if packed else TensorDataset(*pack.batch(range(n)))
        if broken:
            self.sets["many"] = Broken(*self.sets["many"].tensors)

    def train_set(self):
        return self.sets["train"]

    def test_sets(self, known=True, unknown=True):
        oods = [self.sets[name] for name in self.ood_names]
        if known and unknown:
            return [ConcatDataset([self.sets["test"], ood]) for ood in oods]
        return [self.sets["test"]] if known else oods


class Broken(TensorDataset):
    """Its second batch, which is the second process's, can't be read."""

    def __getitem__(self, index):
        if index == BATCH + 1:
            raise OSError(f"image {index} is broken")
        return super().__getitem__(index)


class Failing(EnergyBased):
    def predict_logits(self, logits):
        raise ValueError("this detector fails")


class Seldom(nn.Module):
    """Fails in the second process only."""

    def forward(self, x):
        if distributed.rank() == 1:
            raise ValueError("this encoder fails")
        return x.mean((2, 3))


class Counting(nn.Module):
    n_seen = 0  # of the class: what a network keeps of its inputs makes it another one

    def forward(self, x):
        Counting.n_seen += len(x)
        return x.flatten(1)[:, :10]


class Death(BaseException):
    """Nobody expects it."""


class Dying(nn.Conv2d):
    def forward(self, x):
        if len(x) == BATCH and os.environ["RANK"] == "1":
            raise Death("in the midst of a data set")
        return super().forward(x)


class Killed(nn.Conv2d):
    def forward(self, x):
        if len(x) == BATCH and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def network(num_classes=CLASSES, first=nn.Conv2d):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            first(3, 8, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(8, num_classes),
        )
        # features of which some differ from one another
        with torch.no_grad():
            model[0].weight.mul_(3)
            model[2].weight.mul_(3)
    return model.eval()


def dying(num_classes=CLASSES):
    return network(num_classes, Dying)


def killed(num_classes=CLASSES):
    return network(num_classes, Killed)


def detectors():
    split = split_model(network(), example=torch.zeros(2, 3, 16, 16))
    return {
        "MCD": MCD(split, mode="mean", samples=5),  # draws at random
        "Energy": EnergyBased(split),
        "ODIN": ODIN(split),
        "KNN": KNN(split.encoder, k=3),
        "Failing": Failing(split),
        "GROOD": GROOD(split.encoder, split.head, bank_fraction=0.5),  # draws at random
        "NERO": NERO(split.encoder, split.head),
        "MCD again": MCD(split, mode="mean", samples=3),
    }


def results(report):
    return {result.detector: vars(result) for result in report.results}


def by_hand():
    """Features and scores without the runner, for images in tensors and in packs."""
    split = split_model(network(), example=torch.zeros(2, 3, 16, 16))
    found = {}
    for kind, benchmark in (("tensors", Images()), ("packs", Images(packed=True))):
        for name, dataset in benchmark.sets.items():
            features, labels = distributed.extract(split.encoder, dataset, loader_kwargs=LOADER)
            found[f"{kind} {name}"] = {"features": features, "labels": labels}
        energy = EnergyBased(split)
        batches = distributed.share(benchmark.sets["many"], loader_kwargs=LOADER)
        found[kind] = {"scores": distributed.gather([energy(x) for x, _ in batches])}
    return found


def message(function, *arguments, **options):
    with pytest.raises(Exception) as caught:
        function(*arguments, **options)
    return f"{caught.type.__name__}: {caught.value}"


def command(folder, output, arch="network"):
    arguments = ["benchmark", "folder", "--arch", f"test_distributed:{arch}", "--size", "16"]
    arguments += ["--mean", "0.5", "0.5", "0.5", "--std", "0.2", "--batch-size", str(BATCH)]
    arguments += ["--detectors", "GROOD,MCD,KNN,Energy,ODIN", "--output", str(output)]
    for option, value in {"train": "train", "test": "test", "far": "many=many"}.items():
        name, equals, directory = value.rpartition("=")
        arguments += [f"--{option}", f"{name}{equals}{folder / 'images' / directory}"]
    return arguments


def run_as_one_of_two(folder):
    """Writes what this process gets, by its number."""
    torch.distributed.init_process_group("gloo")
    folder = Path(folder)
    found = {}
    with distributed.join():
        rank = distributed.rank()
        found["results"] = results(run(Images(), detectors(), loader_kwargs=LOADER))
        workers = {**LOADER, "num_workers": 1}
        found["workers"] = results(
            run(Images(), {"Energy": detectors()["Energy"]}, loader_kwargs=workers)
        )
        found["packs"] = results(run(Images(packed=True), detectors(), loader_kwargs=LOADER))
        found["by hand"] = by_hand()
        found["types"] = {
            str(dtype): distributed.gather([torch.full((1 + rank, 2), rank).to(dtype)])
            for dtype in (torch.bool, torch.bfloat16, torch.int64, torch.complex64)
        }
        found["first only"] = distributed.gather([torch.full((2,), rank)], everywhere=False)
        few = [torch.full((2,), 7)] if rank == 0 else []
        found["few"] = distributed.gather(few)
        found["nothing"] = message(distributed.gather, [])
        found["misdealt"] = message(distributed.gather, [torch.zeros(2)] * (1 + 2 * rank))
        found["out of step"] = message(distributed.exchange, None, f"step {rank}")
        found["exchanged"] = distributed.exchange({"rank": rank, "long": "x" * 100 * rank}, "x")

        found["broken"] = message(
            run, Images(broken=True), detectors(), loader_kwargs={**LOADER, "num_workers": 1}
        )
        found["seldom"] = results(
            run(
                Images(),
                {"KNN": KNN(Seldom(), k=3), "ODIN": detectors()["ODIN"]},
                loader_kwargs=LOADER,
            )
        )

        runs = []
        for _ in range(2):
            Counting.n_seen = 0
            cached = {"KNN": KNN(Counting(), k=3)}
            report = run(Images(), cached, loader_kwargs=LOADER, cache_dir=folder / "cache")
            runs.append({"n_seen": Counting.n_seen, "results": results(report)})
        found["cached"] = runs

        with distributed.ahead():
            time.sleep(0.5 if rank == 0 else 0)
            with open(folder / "order", "a") as file:
                file.write(str(rank))
        found["says first"] = [distributed.says_first(text) for text in ("one", "two", "one")]

    out = io.StringIO()
    with redirect_stdout(out):
        found["status"] = cli.main(command(folder, folder / "together"))
    found["output"] = out.getvalue()
    with redirect_stdout(out):
        found["digits"] = cli.main(["benchmark", "digits"])
    save_checkpoint(folder / f"process{rank}.zip", found)
    torch.distributed.destroy_process_group()


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", *map(str, arguments)]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


# what there is to compare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    for name, dataset in Images(packed=True).sets.items():
        for i, (x, y) in enumerate(zip(dataset.x, dataset.y)):
            path = folder / "images" / name / (f"class{y}" if y >= 0 else "") / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(path)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """What each of two processes got."""
    done = torchrun(__file__, folder)
    assert done.returncode == 0, done.stderr
    found = [load_checkpoint(folder / f"process{i}.zip") for i in range(2)]
    for process in found:
        process["stderr"] = done.stderr
    return found


@pytest.fixture(scope="module")
def one():
    """What one process gets."""
    return {
        "results": results(run(Images(), detectors(), loader_kwargs=LOADER)),
        "packs": results(run(Images(packed=True), detectors(), loader_kwargs=LOADER)),
        "by hand": by_hand(),
    }


def assert_same(found, expected, tolerance=1e-5):
    """Of rows, all but the times."""
    assert list(found) == list(expected)
    for name, row in found.items():
        for key in ("detector", "class_name", "error", "images", "baseline", "accuracy"):
            assert row[key] == expected[name][key], (name, key)
        assert row["metrics"].keys() == expected[name]["metrics"].keys()
        for ood, metrics in row["metrics"].items():
            assert metrics == pytest.approx(expected[name]["metrics"][ood], abs=tolerance)
            for scores, others in zip(row["scores"][ood], expected[name]["scores"][ood]):
                torch.testing.assert_close(scores, others, rtol=tolerance, atol=tolerance)


# one run in two processes


@pytest.mark.parametrize("kind", ["results", "packs"])
def test_scores_are_those_of_one_process(one, two, kind):
    """Of all kinds of detectors, on every process, in the same order."""
    for process in two:
        assert_same(process[kind], one[kind])
    assert [name for name, row in one[kind].items() if row["error"]] == ["Failing"]


def test_a_detector_that_draws_is_among_them():
    detector = detectors()["MCD"]
    x = torch.ones(2, 3, 16, 16)
    assert not torch.equal(detector(x), detector(x))


def test_scores_with_worker_processes(one, two):
    for process in two:
        assert_same(process["workers"], {"Energy": one["results"]["Energy"]})


def test_features_and_scores_by_hand(one, two):
    for process in two:
        for name, found in process["by hand"].items():
            for key, tensor in found.items():
                expected = one["by hand"][name][key]
                torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)


def test_gather_any_type_in_uneven_parts(two):
    for process in two:
        for dtype, found in process["types"].items():
            assert str(found.dtype) == dtype
            assert found.real.long().tolist() == [[0, 0], [1, 1], [1, 1]]
        assert process["few"].tolist() == [7, 7]
        assert process["nothing"].startswith("ValueError: there is nothing to gather")
        assert process["misdealt"].startswith("ValueError: each process must give one tensor")
    assert [process["first only"].tolist() for process in two] == [[0, 0, 1, 1], []]


def test_exchange(two):
    for process in two:
        assert process["exchanged"] == [{"rank": 0, "long": ""}, {"rank": 1, "long": "x" * 100}]
        expected = "ProcessError: processes are out of step, at step 0 and step 1"
        assert process["out of step"] == expected


def test_a_broken_image_ends_the_run_on_all_processes(two):
    """With the words of one process, also if only the second process has to read it."""
    expected = message(run, Images(broken=True), detectors(), loader_kwargs=LOADER)
    assert expected == "ValueError: test many: image 9 is broken"
    assert [process["broken"] for process in two] == [expected] * 2


def test_an_encoder_that_fails_on_one_process_fails_on_all(two):
    for process in two:
        assert process["seldom"]["KNN"]["error"] == "RuntimeError: ValueError: this encoder fails"
        assert process["seldom"]["ODIN"]["error"] is None


def test_cached_features(two, folder):
    """The first process keeps them, and none computes them again."""
    n_seen = [[run["n_seen"] for run in process["cached"]] for process in two]
    assert [seen[0] for seen in n_seen] == [24 + 16 + 5 + 12, 21 + 11 + 0 + 8]
    assert [seen[1] for seen in n_seen] == [0, 0]
    for process in two:
        cold, warm = process["cached"]
        assert_same(warm["results"], cold["results"], tolerance=0)
    assert len(list((folder / "cache").iterdir())) == len(SIZES)


def test_the_first_process_goes_ahead(two, folder):
    assert (folder / "order").read_text() == "01"


def test_one_process_says_what_all_have_to_say(two):
    first, second = (process["says first"] for process in two)
    assert first[2] is second[2] is False
    assert [a + b for a, b in zip(first[:2], second[:2])] == [1, 1]


def test_command(two, folder, tmp_path, capsys):
    """The first process writes and prints what one process does, and all have its status."""
    assert cli.main(command(folder, tmp_path / "alone")) == 1
    captured = capsys.readouterr()

    def without_times(path):
        lines = [line.split(",") for line in path.read_text().splitlines()]
        times = [i for i, name in enumerate(lines[0]) if name.endswith("_seconds")]
        return [[c for i, c in enumerate(line) if i not in times] for line in lines]

    written = without_times(folder / "together" / "results.csv")
    assert written == without_times(tmp_path / "alone" / "results.csv")
    names = {path.name for path in (folder / "together").iterdir()}
    assert names == {path.name for path in (tmp_path / "alone").iterdir()}
    assert [process["status"] for process in two] == [1, 1]  # KNN has too few training images
    assert two[1]["output"] == ""
    cells = [text.split()[:4] for text in (two[0]["output"], captured.out)]
    assert cells[0] == cells[1] and "Report: " in two[0]["output"]
    assert captured.err in two[0]["stderr"] and two[0]["stderr"].count("KNN failed") == 1


def test_training_is_refused(two):
    assert [process["digits"] for process in two] == [2, 2]
    assert two[0]["stderr"].count("pood benchmark digits trains, which several processes") == 1


@pytest.mark.parametrize(
    "arch, trace",
    [("dying", "test_distributed.Death: in the midst of a data set"), ("killed", "SIGKILL")],
)
def test_a_process_that_dies_ends_the_run(folder, tmp_path, arch, trace):
    """With its traceback, if it had the time for one, and nothing is written."""
    output = tmp_path / "output"
    done = torchrun("-m", "pood_plugins.cli", *command(folder, output, arch=arch))
    assert done.returncode != 0
    assert trace in done.stderr and "Traceback" in done.stderr
    assert not done.stdout and not output.exists()


# without processes


@given(st.integers(0, 30), st.integers(1, 8))
def test_interleave_restores_the_order(n, size):
    items = list(range(n))
    shares = [items[rank::size] for rank in range(size)]
    assert distributed.interleave(shares) == items


@pytest.mark.parametrize("lengths", [(1, 2), (3, 1), (0, 1), (2, 2, 0)])
def test_interleave_refuses_what_was_not_dealt_out(lengths):
    with pytest.raises(ValueError, match="one tensor for each batch"):
        distributed.interleave([[None] * n for n in lengths])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "packed, options",
    [(False, {}), (False, {"drop_last": True}), (False, {"num_workers": 1}), (True, {})],
)
def test_shares_are_the_batches_of_one_process(monkeypatch, size, packed, options):
    dataset = Images(packed).sets["many"]  # three batches
    arguments = {**LOADER, **options}
    whole = list(distributed.share(dataset, loader_kwargs=arguments))
    assert [len(x) for x, _ in whole] == [8, 8] if "drop_last" in options else [8, 8, 4]
    monkeypatch.setattr(distributed, "_size", size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "_rank", rank)
        loader = distributed.share(dataset, loader_kwargs=arguments)
        shares.append(list(loader))
        assert len(loader) == len(shares[-1])
    together = distributed.interleave(shares)
    assert len(together) == len(whole)
    for (x, y), (x_whole, y_whole) in zip(together, whole):
        assert torch.equal(x, x_whole) and torch.equal(y, y_whole)


@pytest.mark.parametrize(
    "arguments", [["benchmark", "digits"], ["finetune", "--benchmark=digits"]]
)
def test_training_is_refused_in_one_sentence(monkeypatch, capsys, arguments):
    monkeypatch.setattr(distributed, "_size", 2)
    assert cli.main(arguments) == 2
    name = " ".join(arguments[: 1 if arguments[0] == "finetune" else 2])
    expected = f"pood: pood {name} trains, which several processes can't share: run it without"
    assert capsys.readouterr().err.startswith(expected)


def test_one_process_of_torchrun_is_one_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1" if name == "WORLD_SIZE" else "0")
    assert not distributed.launched()
    with distributed.join():
        assert not torch.distributed.is_initialized()
        assert (distributed.rank(), distributed.size()) == (0, 1)
        assert distributed.exchange("anything", "step") == ["anything"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.launched()
    monkeypatch.delenv("MASTER_PORT")
    assert not distributed.launched()


def test_more_processes_than_devices(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ValueError, match="more processes than GPUs: start 3, or let all use one"):
        with distributed.join("cuda"):
            pass


if __name__ == "__main__":
    run_as_one_of_two(sys.argv[1])
