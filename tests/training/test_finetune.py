"""Fine-tuning, against loops written out, and against itself after all kinds of interruptions."""

import math
import signal
import subprocess
import sys
import zipfile
from itertools import cycle, islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_ood.loss import CrossEntropyLoss, EnergyRegularizedLoss, OutlierExposureLoss
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from pood_plugins.loss import GRegLoss
from pood_plugins.model.split import split_model
from pood_plugins.training import DivergenceError, EnergyClusterSampler, checkpoint, finetune

WIDTH, N_CLASSES = 8, 3
MARGINS = {"margin_in": -4.0, "margin_out": -1.0}

pytestmark = pytest.mark.usefixtures("one_thread", "own_random_state")


@pytest.fixture
def own_random_state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def make_split(dropout=0.0, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(WIDTH, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(16, N_CLASSES),
        )
    return split_model(model.eval())


def id_data(n=40):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, WIDTH, generator=g), torch.randint(N_CLASSES, (n,), generator=g)


def outlier_data(n=30):
    g = torch.Generator().manual_seed(2)
    return 2 + torch.rand(n, WIDTH, generator=g), torch.full((n,), -1)


def batches(data, size=10):
    """A loader without random choices."""
    return list(zip(*(tensor.split(size) for tensor in data)))


def shuffled(data, size=10, **arguments):
    return DataLoader(TensorDataset(*data), batch_size=size, shuffle=True, **arguments)


def small_sampler():
    return EnergyClusterSampler(n_clusters=4, n_init=1)


class Spy(nn.Module):
    """Energy-regularized training that remembers its batches and can stop at a step."""

    def __init__(self, stop=math.inf):
        super().__init__()
        self.loss = EnergyRegularizedLoss(0.1, **MARGINS)
        self._stop, self._batches, self._modes = stop, [], []

    def terms(self, model, x, targets):
        if len(self._batches) == self._stop:
            raise KeyboardInterrupt
        self._batches.append((x.clone(), targets))
        self._modes.append(model.training)
        return {"loss": self.loss(model(x), targets), "batch": torch.tensor(float(len(x)))}


def same_state(a, b):
    """Equality bit by bit of nested dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


# --- one loop written out for each kind of criterion ---


def loop(model, steps, loss, epochs, lr=1e-3):
    """What the documentation says, step by step, for batches that are always the same."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    n, losses = epochs * len(steps), []
    model.train()
    for step, (x, y) in enumerate(steps * epochs):
        optimizer.param_groups[0]["lr"] = (
            1e-6 + (lr - 1e-6) * (1 + math.cos(math.pi * step / n)) / 2
        )
        optimizer.zero_grad()
        value = loss(model, x, y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize(
    "criterion, loss",
    [
        (nn.CrossEntropyLoss(), lambda model, x, y: F.cross_entropy(model(x), y)),
        (CrossEntropyLoss(), lambda model, x, y: F.cross_entropy(model(x), y)),
        (OutlierExposureLoss(), lambda model, x, y: OutlierExposureLoss()(model(x), y)),
        (
            EnergyRegularizedLoss(0.3, **MARGINS),
            lambda model, x, y: EnergyRegularizedLoss(0.3, **MARGINS)(model(x), y),
        ),
        (GRegLoss(0.3, 2.0, **MARGINS), GRegLoss(0.3, 2.0, **MARGINS)),
    ],
    ids=["torch", "plain", "oe", "energy", "greg"],
)
def test_is_the_loop_written_out(criterion, loss):
    known, outliers = batches(id_data()), batches(outlier_data(), 6)
    without = isinstance(criterion, (nn.CrossEntropyLoss, CrossEntropyLoss))
    steps = known
    if not without:
        steps = [
            (torch.cat([x, more_x]), torch.cat([y, more_y]))
            for (x, y), (more_x, more_y) in zip(known, outliers)
        ]
    split, expected = make_split(), make_split()
    history = finetune(split, known, None if without else outliers, criterion, epochs=3)
    losses = loop(expected.model, steps, loss, epochs=3)
    assert [row["loss"] for row in history] == pytest.approx(losses, rel=1e-5)
    for a, b in zip(split.model.state_dict().values(), expected.model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.equal(split.head.weight, make_split().head.weight)


def test_history():
    split = make_split()
    history = finetune(
        split,
        batches(id_data()),
        batches(outlier_data()),
        GRegLoss(0.3, 2.0, **MARGINS),
        epochs=2,
        optimizer=torch.optim.SGD(split.parameters(), lr=0.02),
    )
    assert [row["step"] for row in history] == list(range(1, 9))
    assert [row["epoch"] for row in history] == [1] * 4 + [2] * 4
    rates = [row["learning_rate"] for row in history]
    assert rates[0] == 0.02 and rates == sorted(rates, reverse=True) and rates[-1] > 1e-6
    for row in history:
        total = row["cross_entropy"] + 0.3 * row["energy"] + 2 * row["gradient"]
        assert row["loss"] == pytest.approx(total)
        assert list(row)[3:] == ["loss", "cross_entropy", "energy", "gradient", "gradient_norm"]


def test_cross_entropy_is_that_of_id_samples():
    split = make_split()
    x, y = id_data(20)
    expected = F.cross_entropy(make_split().model.train()(torch.cat([x, x + 1]))[:20], y)
    row = finetune(
        split, [(x, y)], [(x + 1, y - 5)], EnergyRegularizedLoss(), epochs=1, progress=False
    )[0]
    assert row["cross_entropy"] == pytest.approx(expected.item())
    assert row["loss"] > row["cross_entropy"]


def test_gradient_norm_and_clipping():
    def run(clip_norm):
        split = make_split()
        before = torch.cat([p.detach().flatten() for p in split.parameters()])
        optimizer = torch.optim.SGD(split.parameters(), lr=1.0)
        row = finetune(
            split,
            batches(id_data(10)),
            None,
            nn.CrossEntropyLoss(),
            epochs=1,
            optimizer=optimizer,
            clip_norm=clip_norm,
        )[0]
        after = torch.cat([p.detach().flatten() for p in split.parameters()])
        return row["gradient_norm"], (after - before).norm().item()

    norm, length = run(None)
    assert length == pytest.approx(norm, rel=1e-4)
    clipped_norm, clipped_length = run(norm / 10)
    assert clipped_norm == norm
    assert clipped_length == pytest.approx(norm / 10, rel=1e-3)


def test_training_with_outliers_raises_their_energy():
    def energies(split):
        return -split(outlier_data()[0]).logsumexp(dim=1)

    split = make_split()
    before = energies(split)
    optimizer = torch.optim.SGD(split.parameters(), lr=0.05, momentum=0.9)
    criterion = GRegLoss(1.0, 1.0, **MARGINS)
    arguments = (batches(id_data()), batches(outlier_data()), criterion)
    finetune(split, *arguments, epochs=10, optimizer=optimizer)
    assert energies(split).mean() > before.mean() + 0.5


# --- which outliers ---


@pytest.mark.parametrize("n, size", [(30, 10), (35, 10), (7, 7), (100, 10), (3, 1)])
def test_outliers_begin_anew_with_each_epoch_and_whenever_they_end(n, size):
    spy = Spy()
    loader = batches(outlier_data(n), size)
    finetune(make_split(), batches(id_data()), loader, spy, epochs=2)
    expected = [x for x, _ in islice(cycle(loader), 4)] * 2
    assert len(spy._batches) == 8
    for (x, targets), outliers in zip(spy._batches, expected):
        assert torch.equal(x[10:], outliers)
        assert (targets[:10] >= 0).all() and (targets[10:] == -1).all()


class RecordingSampler(EnergyClusterSampler):
    def __init__(self):
        super().__init__(n_clusters=4, n_init=1)
        self._calls = []

    def select(self, features, logits, n):
        chosen = super().select(features, logits, n)
        self._calls.append((features, logits, n, chosen))
        return chosen


@pytest.mark.parametrize("size", [1, 7, 24, 50])
def test_sampler_selects_among_candidates(size):
    """Pools of 24 of 50 outliers, however they are batched; features and logits in eval mode."""
    spy, sampler, split = Spy(), RecordingSampler(), make_split(dropout=0.5)
    finetune(
        split,
        batches(id_data(30)),
        batches(outlier_data(50), size),
        spy,
        epochs=1,
        sampler=sampler,
        candidates_per_step=24,
        optimizer=torch.optim.SGD(split.parameters(), lr=0.0),
    )
    x, _ = outlier_data(50)
    pools = [x[:24], x[24:48], torch.cat([x[48:], x[:22]])]
    for pool, call, (batch, _) in zip(pools, sampler._calls, spy._batches, strict=True):
        features, logits, n, chosen = call
        assert n == 20 and len(batch) == 30
        assert torch.equal(batch[10:], pool[chosen])
        torch.testing.assert_close(logits, split.head(features))
    torch.testing.assert_close(sampler._calls[0][0], make_split().encoder(x[:24]))
    assert spy._modes == [True] * 3


def test_candidates_leave_batch_norm_alone():
    """The statistics are those of the training batches, by hand."""
    spy, split = Spy(), make_split()
    expected = make_split().model.train()
    finetune(
        split,
        batches(id_data()),
        batches(outlier_data()),
        spy,
        epochs=1,
        sampler=small_sampler(),
        candidates_per_step=24,
        optimizer=torch.optim.SGD(split.parameters(), lr=0.0),
    )
    for x, _ in spy._batches:
        expected(x)
    torch.testing.assert_close(split.model[1].running_mean, expected[1].running_mean)
    assert int(split.model[1].num_batches_tracked) == 4


def test_modes_are_restored():
    spy, split = Spy(), make_split()
    split.model[1].train()
    split.model[3].train()
    finetune(split, batches(id_data()), batches(outlier_data()), spy, epochs=1)
    assert spy._modes == [True] * 4
    assert [m.training for m in split.model] == [False, True, False, True, False]

    class Broken(Spy):
        def terms(self, model, x, targets):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        finetune(split, batches(id_data()), batches(outlier_data()), Broken(), epochs=1)
    assert [m.training for m in split.model] == [False, True, False, True, False]


def test_frozen_parameters_stay():
    split = make_split()
    split.encoder.requires_grad_(False)
    before = [p.clone() for p in split.parameters()]
    finetune(split, batches(id_data()), None, nn.CrossEntropyLoss(), epochs=1)
    changed = [not torch.equal(p, b) for p, b in zip(split.parameters(), before)]
    assert changed == [False] * 4 + [True] * 2


def test_no_random_number_is_drawn_without_need():
    state = torch.get_rng_state()
    finetune(
        make_split(),
        batches(id_data()),
        batches(outlier_data()),
        Spy(),
        epochs=1,
        sampler=small_sampler(),
        candidates_per_step=24,
    )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("progress, disable", [(True, None), (False, True)])
def test_progress(progress, disable, monkeypatch):
    module = sys.modules["pood_plugins.training.finetune"]
    given = {}

    def bar(**arguments):
        given.update(arguments)
        return original(**{**arguments, "disable": True})

    original = module.tqdm
    monkeypatch.setattr(module, "tqdm", bar)
    finetune(
        make_split(), batches(id_data()), None, nn.CrossEntropyLoss(), epochs=3, progress=progress
    )
    assert given["disable"] is disable and given["total"] == 12


# --- interruptions ---


def variants():
    """Arguments of runs, made anew by each call: (loaders, further arguments)."""

    def plain(split):
        return (shuffled(id_data()), shuffled(outlier_data())), {}

    def longer_outliers(split):
        return (shuffled(id_data()), shuffled(outlier_data(90))), {}

    def shorter_outliers(split):
        return (shuffled(id_data(43)), shuffled(outlier_data(16), 7)), {}

    def generators(split):
        g = torch.Generator().manual_seed(5)
        sampler = RandomSampler(range(30), generator=torch.Generator().manual_seed(6))
        outliers = DataLoader(TensorDataset(*outlier_data()), batch_size=10, sampler=sampler)
        return (shuffled(id_data(), generator=g), outliers), {}

    def shared_generator(split):
        g = torch.Generator().manual_seed(5)
        return (shuffled(id_data(), generator=g), shuffled(outlier_data(), generator=g)), {}

    def sampler(split):
        arguments = {"sampler": small_sampler(), "candidates_per_step": 24}
        return (shuffled(id_data()), shuffled(outlier_data(), 7)), arguments

    def adam(split):
        optimizer = torch.optim.Adam(
            [
                {"params": list(split.encoder.parameters()), "betas": (0.8, 0.9)},
                {"params": list(split.head.parameters()), "lr": 0.01},
            ],
            lr=0.003,
        )
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6, 9], gamma=0.3)
        arguments = {"optimizer": optimizer, "scheduler": scheduler, "clip_norm": 0.5}
        return (shuffled(id_data()), shuffled(outlier_data())), arguments

    def schedules(split):
        optimizer = torch.optim.SGD(split.parameters(), lr=0.1, momentum=0.9)
        make = torch.optim.lr_scheduler
        first = make.LinearLR(optimizer, total_iters=5)
        second = make.LambdaLR(optimizer, lambda step: 0.9**step)
        scheduler = make.SequentialLR(optimizer, [first, second], [5])
        arguments = {"optimizer": optimizer, "scheduler": scheduler}
        return (shuffled(id_data()), shuffled(outlier_data())), arguments

    def mixed_precision(split):
        return (shuffled(id_data()), shuffled(outlier_data())), {"amp": True}

    def workers(split):
        loaders = (shuffled(id_data(), num_workers=1), shuffled(outlier_data()))
        return loaders, {}

    return {name: make for name, make in locals().items()}


class Run:
    """A run of four epochs of about four steps that can be interrupted and gone on with."""

    def __init__(self, variant, path, epochs=4):
        self.split = make_split(dropout=0.3)
        self.loaders, self.arguments = variants()[variant](self.split)
        self.arguments.setdefault(
            "optimizer", torch.optim.SGD(self.split.parameters(), lr=0.1, momentum=0.9)
        )
        self.path, self.epochs = path, epochs

    def __call__(self, stop=math.inf, resume=False):
        self.history = finetune(
            self.split,
            *self.loaders,
            Spy(stop),
            epochs=self.epochs,
            checkpoint=self.path,
            resume=resume,
            **self.arguments,
        )
        return self

    @property
    def state(self):
        sampler = self.arguments.get("sampler")
        return [
            self.split.model.state_dict(),
            self.arguments["optimizer"].state_dict(),
            self.history,
            torch.get_rng_state(),
            sampler.state_dict() if sampler else None,
        ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Final states of runs that nothing stopped."""
    states = {}

    def state(variant):
        if variant not in states:
            torch.manual_seed(11)
            states[variant] = Run(variant, tmp_path_factory.mktemp("run") / "c")().state
        return states[variant]

    return state


# a scheduler of schedulers calls itself so in torch 2.4
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("stop", [0, 3, 9])
def test_interrupted_run_ends_with_the_very_same_weights(variant, stop, uninterrupted, tmp_path):
    expected = uninterrupted(variant)
    torch.manual_seed(11)
    with pytest.raises(KeyboardInterrupt):
        Run(variant, tmp_path / "c")(stop)
    torch.manual_seed(99)  # a new process starts with another random state
    torch.rand(stop)
    resumed = Run(variant, tmp_path / "c")(resume=True)
    assert same_state(resumed.state, expected)
    assert not same_state(expected[0], make_split().model.state_dict())


def test_interrupted_twice(uninterrupted, tmp_path):
    torch.manual_seed(11)
    with pytest.raises(KeyboardInterrupt):
        Run("sampler", tmp_path / "c")(5)
    for stop in (0, 6):
        torch.manual_seed(99)
        with pytest.raises(KeyboardInterrupt):
            Run("sampler", tmp_path / "c")(stop, resume=True)
    assert same_state(Run("sampler", tmp_path / "c")(resume=True).state, uninterrupted("sampler"))


def test_checkpoints_change_nothing(uninterrupted):
    torch.manual_seed(11)
    assert same_state(Run("plain", None)().state, uninterrupted("plain"))


def test_complete_run_is_only_loaded(tmp_path):
    first = Run("plain", tmp_path / "c")()
    again = Run("plain", tmp_path / "c")(stop=0, resume=True)
    assert same_state(again.state, first.state)


@pytest.mark.parametrize("call", [1, 5, 14])
def test_interrupted_while_writing_the_checkpoint(call, uninterrupted, tmp_path, monkeypatch):
    """The checkpoint before stays what it was, and nothing else stays."""
    expected = uninterrupted("adam")
    torch.manual_seed(11)
    run = Run("adam", tmp_path / "c")
    n_calls, to_bytes = 0, checkpoint._to_bytes
    tensors = len(zipped(run, tmp_path)) - 1

    def interrupted(tensor):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2 * tensors + call:
            raise KeyboardInterrupt
        return to_bytes(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_to_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert checkpoint.load_checkpoint(tmp_path / "c")["epochs"] >= 1
    assert same_state(Run("adam", tmp_path / "c")(resume=True).state, expected)


def zipped(run, folder):
    """Names in the checkpoint of a run that was stopped after its first epoch."""
    state = torch.get_rng_state()
    other = Run("adam", folder / "other")
    with pytest.raises(KeyboardInterrupt):
        other(5)
    torch.set_rng_state(state)
    with zipfile.ZipFile(folder / "other") as archive:
        names = archive.namelist()
    (folder / "other").unlink()
    return names


# run here and in another process, which is killed in the middle of its third checkpoint
_RUN = """
import os, signal, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from pood_plugins.model.split import split_model
from pood_plugins.training import EnergyClusterSampler, checkpoint, finetune

class Energy(nn.Module):
    def forward(self, logits, targets):
        energy = -logits.logsumexp(dim=1)
        hinges = torch.where(targets < 0, (-1 - energy).relu(), (energy + 4).relu())
        return nn.functional.cross_entropy(logits, targets, ignore_index=-1) + hinges.mean()

def run(path, resume):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    split = split_model(nn.Sequential(*layers))
    known = TensorDataset(torch.randn(40, 8), torch.arange(40) % 3)
    unknown = TensorDataset(torch.rand(30, 8), torch.full((30,), -1))
    loaders = [DataLoader(data, batch_size=10, shuffle=True) for data in (known, unknown)]
    sampler = EnergyClusterSampler(n_clusters=4, n_init=1)
    history = finetune(
        split, *loaders, Energy(), epochs=4, sampler=sampler, candidates_per_step=24,
        checkpoint=path, resume=resume
    )
    return split.state_dict(), history, torch.get_rng_state()
"""
_KILLED = """
to_bytes, calls = checkpoint._to_bytes, []
def killed(tensor):
    calls.append(tensor)
    if len(calls) == 9 + 15 + 7:  # there are no momenta in the first checkpoint
        os.kill(os.getpid(), signal.SIGKILL)
    return to_bytes(tensor)
checkpoint._to_bytes = killed
print("pytorch_ood" in sys.modules, flush=True)
run(sys.argv[1], False)
"""


def test_killed_while_writing_the_checkpoint(tmp_path):
    path = tmp_path / "c"
    arguments = [sys.executable, "-c", _RUN + _KILLED, str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == "False\n"  # training does without pytorch-ood, which is slow to import
    assert checkpoint.load_checkpoint(path)["epochs"] == 1
    names: dict[str, Any] = {}
    exec(_RUN, names)
    assert same_state(names["run"](path, True), names["run"](None, False))


def test_without_a_checkpoint_yet_it_starts_with_a_warning(uninterrupted, tmp_path, caplog):
    torch.manual_seed(11)
    run = Run("plain", tmp_path / "new" / "c")(resume=True)
    assert "starts from the beginning" in caplog.text
    assert same_state(run.state, uninterrupted("plain"))


def test_without_resume_it_starts_anew(uninterrupted, tmp_path):
    Run("plain", tmp_path / "c")()
    torch.manual_seed(11)
    assert same_state(Run("plain", tmp_path / "c")().state, uninterrupted("plain"))


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda run: setattr(run, "epochs", 5), "epochs was 4, now 5"),
        (
            lambda run: setattr(run, "loaders", (shuffled(id_data(90)), run.loaders[1])),
            "steps per",
        ),
        (lambda run: run.arguments.update(clip_norm=1.0), "clip_norm was None, now 1.0"),
        (lambda run: run.arguments.update(sampler=small_sampler()), "sampler was None"),
        (
            lambda run: run.arguments.update(
                optimizer=torch.optim.SGD(run.split.parameters(), lr=0.2, momentum=0.9)
            ),
            "lr=0.1.*lr=0.2",
        ),
        (
            lambda run: run.arguments.update(optimizer=torch.optim.Adam(run.split.parameters())),
            "SGD.*Adam",
        ),
        (
            lambda run: run.loaders[0].sampler.__setattr__("generator", torch.Generator()),
            "generators",
        ),
    ],
)
def test_checkpoint_of_another_run_is_refused(change, text, tmp_path):
    Run("plain", tmp_path / "c")()
    run = Run("plain", tmp_path / "c")
    change(run)
    before = [tensor.clone() for tensor in run.split.state_dict().values()]
    with pytest.raises(ValueError, match=text):
        run(resume=True)
    assert same_state(list(run.split.state_dict().values()), before)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    Run("plain", tmp_path / "c")()
    other = split_model(nn.Sequential(nn.Linear(WIDTH, 9), nn.Linear(9, N_CLASSES)))
    with pytest.raises(ValueError, match="weights of another model than this Sequential"):
        finetune(
            other,
            shuffled(id_data()),
            shuffled(outlier_data()),
            Spy(),
            epochs=4,
            checkpoint=tmp_path / "c",
            resume=True,
        )


def test_file_of_another_kind_is_refused(tmp_path):
    torch.save({}, tmp_path / "c")
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        Run("plain", tmp_path / "c")(resume=True)


# --- divergence ---


class Failing(nn.Module):
    """A loss that goes wrong in a step."""

    def __init__(self, step, how):
        super().__init__()
        self._left, self._how = step, how

    def forward(self, logits, targets):
        self._left -= 1
        loss = F.cross_entropy(logits, targets)
        return self._how(loss) if self._left == 0 else loss


def infinite_gradient(loss):
    return loss + (loss - loss).sqrt()


@pytest.mark.parametrize(
    "how, text",
    [
        (lambda loss: loss * math.nan, "loss nan, cross_entropy 1"),
        (lambda loss: loss * math.inf, "loss inf"),
        (infinite_gradient, "loss 1.*gradient_norm nan"),
    ],
)
def test_divergence(how, text, tmp_path):
    path = tmp_path / "c"
    split = make_split()
    states = []

    class Watching(Failing):
        def forward(self, logits, targets):
            states.append({n: t.clone() for n, t in split.model.state_dict().items()})
            return super().forward(logits, targets)

    with pytest.raises(DivergenceError, match=f"epoch 2, step 6: {text}.*learning rate"):
        loaders = (batches(id_data()), None)
        finetune(split, *loaders, Watching(6, how), epochs=3, checkpoint=path)
    after = split.model.state_dict()
    assert not split.training
    # weights are those before the step; and so are running means, which the batch did change
    assert same_state([after["0.weight"]], [states[-1]["0.weight"]])
    assert not torch.equal(states[-1]["1.running_mean"], after["1.running_mean"])
    stored = checkpoint.load_checkpoint(path)
    assert stored["epochs"] == 1 and len(stored["history"]) == 4
    assert same_state(stored["model"], {n: stored["model"][n] for n in after})
    assert torch.equal(stored["model"]["0.weight"], states[4]["0.weight"])
    assert all(tensor.isfinite().all() for tensor in stored["model"].values())


def test_input_that_is_not_finite_leaves_the_model_usable():
    known = batches(id_data())
    known[2][0][0, 0] = math.nan
    split = make_split()
    with pytest.raises(DivergenceError, match="step 3: loss nan.*inputs are finite"):
        finetune(split, known, None, nn.CrossEntropyLoss(), epochs=1)
    assert split(id_data()[0]).isfinite().all()
    assert int(split.model[1].num_batches_tracked) == 2


def test_candidate_that_is_not_finite():
    x, y = outlier_data()
    x[29] = math.inf
    with pytest.raises(DivergenceError, match="step 1: logits of candidates nan"):
        finetune(
            make_split(),
            batches(id_data()),
            batches((x, y)),
            Spy(),
            epochs=1,
            sampler=small_sampler(),
            candidates_per_step=30,
        )


def test_weights_that_only_the_next_step_would_show(tmp_path):
    """The last step of an epoch; without the check, its checkpoint would be the ruin."""
    split = make_split()
    known = batches(id_data())
    groups = [{"params": [p], "lr": 1e38} for p in split.parameters()]
    optimizer = torch.optim.SGD(groups)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 7))
    with pytest.raises(DivergenceError, match="epoch 2, step 8: .*weight nan"):
        finetune(
            split,
            known,
            None,
            Failing(8, lambda loss: loss * 1e4),
            epochs=3,
            optimizer=optimizer,
            scheduler=rates,
            checkpoint=tmp_path / "c",
        )
    assert checkpoint.load_checkpoint(tmp_path / "c")["epochs"] == 1


# --- precision ---


@pytest.mark.parametrize("criterion", [GRegLoss(0.1, 1.0, **MARGINS), OutlierExposureLoss()])
def test_mixed_precision_is_close(criterion):
    def run(amp):
        loaders = (batches(id_data()), batches(outlier_data()))
        return finetune(make_split(), *loaders, criterion, epochs=2, amp=amp)

    exact, mixed = run(False), run(True)
    assert [row["loss"] for row in mixed] == pytest.approx([r["loss"] for r in exact], rel=0.02)
    assert mixed != exact


def test_scaler_leaves_out_steps_until_gradients_are_finite(monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, enabled=True)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler)
    split, weights = make_split(), []

    class Watching(nn.Module):
        def forward(self, logits, targets):
            weights.append(split.head.weight.detach().clone())
            return F.cross_entropy(logits, targets) * 100

    history = finetune(split, batches(id_data()), None, Watching(), epochs=5)
    assert len(history) == 20
    left_out = [torch.equal(a, b) for a, b in zip(weights, weights[1:])]
    n = left_out.index(False)
    assert 0 < n < 19 and not any(left_out[n:])
    rates = [row["learning_rate"] for row in history]
    assert rates[: n + 1] == [1e-3] * (n + 1) and rates[n + 1] < 1e-3
    assert scaler.get_scale() == 2.0 ** (127 - n)


def test_scaler_does_not_hide_divergence(monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=True)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler)

    class Hopeless(nn.Module):
        def forward(self, logits, targets):
            return infinite_gradient(F.cross_entropy(logits, targets))

    with pytest.raises(DivergenceError, match="step 3"):
        finetune(make_split(), batches(id_data()), None, Hopeless(), epochs=2)


def test_double_precision():
    split = make_split()
    split.double()
    x, y = id_data()
    outliers, labels = outlier_data()
    history = finetune(
        split, batches((x.double(), y)), batches((outliers.double(), labels)), Spy(), epochs=1
    )
    assert len(history) == 4 and split.head.weight.dtype == torch.float64


# --- bad input ---


def bad_input():
    known, unknown = batches(id_data()), batches(outlier_data())
    x, y = id_data(10)
    z, negative = outlier_data(10)
    ce, energy = nn.CrossEntropyLoss(), EnergyRegularizedLoss()
    other = make_split()
    sgd = torch.optim.SGD
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    sampler = {"sampler": small_sampler()}
    return {
        "epochs": (known, None, ce, {"epochs": 0}, "epochs must be at least 1, got 0"),
        "candidates": (
            known,
            unknown,
            energy,
            {"candidates_per_step": 0},
            "candidates_per_step must be",
        ),
        "clip": (known, None, ce, {"clip_norm": 0.0}, "clip_norm must be positive"),
        "nan clip": (known, None, ce, {"clip_norm": math.nan}, "clip_norm must be positive"),
        "resume": (known, None, ce, {"resume": True}, "resume needs a checkpoint"),
        "class": (known, unknown, GRegLoss, {}, "GRegLoss"),
        "no outliers": (known, None, energy, {}, "EnergyRegularizedLoss needs outliers"),
        "no outliers for sampler": (known, None, ce, sampler, "the sampler needs outliers"),
        "unused outliers": (known, unknown, ce, {}, "CrossEntropyLoss takes no outliers"),
        "unused too": (known, unknown, CrossEntropyLoss(), {}, "takes no outliers"),
        "empty": ([], None, ce, {}, "id_loader is empty"),
        "no length": (iter(known), None, ce, {}, "id_loader has no length"),
        "empty outliers": (known, [], energy, {}, "outlier_loader has 0 outliers"),
        "labels": ([(x, y - 5)], None, ce, {}, "id_loader yields labels from -5 to -"),
        "many classes": ([(x, y + 1)], None, ce, {}, "knows 0 to 2"),
        "known outliers": (known, [(z, y)], energy, {}, "outlier_loader yields label"),
        "no labels": ([x], None, ce, {}, "id_loader must yield pairs"),
        "no outlier labels": (known, [[z]], energy, {}, "outlier_loader must yield pairs"),
        "float labels": ([(x, y.float())], None, ce, {}, "integer labels"),
        "fewer labels": ([(x, y[1:])], None, ce, {}, "must yield pairs"),
        "empty batch": ([(x[:0], y[:0])], None, ce, {}, "must yield pairs"),
        "shape": (known, [(z[:, 1:], negative)], energy, {}, "give both the same transform"),
        "dtype": (known, [(z.byte(), negative)], energy, {}, "torch.uint8.*same transform"),
        "reduction": (known, None, nn.CrossEntropyLoss(reduction="none"), {}, "reduction='mean'"),
        "too few candidates": (
            known,
            unknown,
            energy,
            {**sampler, "candidates_per_step": 19},
            "20 outliers, twice the number.*19 candidates: raise candidates_per_step",
        ),
        "too few outliers": (
            known,
            unknown,
            energy,
            {**sampler, "candidates_per_step": 31},
            "has 30 outliers, but candidates_per_step is 31",
        ),
        "optimizer": (
            known,
            None,
            ce,
            {"optimizer": sgd(other.parameters(), lr=0.1)},
            "no parameter of the classifier",
        ),
        "scheduler": (
            known,
            None,
            ce,
            {"scheduler": cosine(sgd(other.parameters(), lr=0.1), 5)},
            "another optimizer",
        ),
    }


@pytest.mark.parametrize("case", bad_input())
def test_bad_input(case):
    id_loader, outlier_loader, criterion, arguments, text = bad_input()[case]
    split = make_split()
    with pytest.raises(ValueError, match=text):
        finetune(split, id_loader, outlier_loader, criterion, **{"epochs": 1, **arguments})
    assert same_state(split.model[0].state_dict(), make_split().model[0].state_dict())


def test_model_must_be_split():
    with pytest.raises(ValueError, match=r"pass split_model\(model\)"):
        finetune(nn.Linear(2, 2), batches(id_data()), None, nn.CrossEntropyLoss(), epochs=1)


def test_state_that_cannot_be_stored_fails_before_training(tmp_path):
    split, spy = make_split(), Spy()
    optimizer = torch.optim.SGD(split.parameters(), lr=0.1)
    optimizer.param_groups[0]["note"] = object()
    loaders = (batches(id_data()), batches(outlier_data()))
    with pytest.raises(ValueError, match="checkpoint holds tensors, numbers and text.*object"):
        finetune(split, *loaders, spy, epochs=1, optimizer=optimizer, checkpoint=tmp_path / "c")
    assert not spy._batches


def test_outliers_in_order_are_warned_of(caplog):
    loader = DataLoader(TensorDataset(*outlier_data()), batch_size=10)
    finetune(make_split(), batches(id_data()), loader, Spy(), epochs=1)
    assert "outlier_loader does not shuffle" in caplog.text
    caplog.clear()
    finetune(make_split(), batches(id_data()), shuffled(outlier_data()), Spy(), epochs=1)
    assert not caplog.text
