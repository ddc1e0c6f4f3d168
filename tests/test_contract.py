"""
What pytorch-ood asks of a detector, loss or benchmark, checked for every class that a plugin
registers through entry points, this package's and others' that are installed beside it:

    python -m pytest tests/test_contract.py -k my-distribution

Each rule is a function ``check_...`` that takes a class and raises an AssertionError, whose text
is a sentence, if the class breaks the rule. ``BROKEN`` has a class for each of them that does.
"""

import contextlib
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_ood.api import (
    BenchmarkInfo,
    Detector,
    DetectorInfo,
    FeatureMapsDetector,
    FeaturesDetector,
    GradientDetector,
    LogitsDetector,
    LossInfo,
    ModelNotSetException,
    Paper,
    Representation,
    RequiresFittingException,
    StructuredDetector,
    Task,
)
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.utils import GridSearch, extract_features
from pytorch_ood.utils.utils import _check_fraction
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pood_plugins import registry
from pood_plugins.model import SplitModel, split_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # few samples and an untrained network are a reason to warn
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

N_CLASSES = 3
N_FEATURES = 16

# base class -> what it scores, and the constructor's argument that makes this from inputs
REPRESENTATIONS: dict[type, tuple[str, str | None]] = {
    LogitsDetector: ("logits", "model"),
    FeaturesDetector: ("features", "encoder"),
    FeatureMapsDetector: ("feature_maps", "backbone"),
    StructuredDetector: ("structured", None),
}


# -- material ----------------------------------------------------------------------------


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextlib.contextmanager
def must_work(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__}: {error}") from error


def classifier() -> SplitModel:
    """An untrained network, which gets whole classes wrong."""
    with seeded():
        network = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, N_FEATURES, 3, stride=2, padding=1), nn.ReLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(N_FEATURES, N_CLASSES),
        )
    return split_model(network, example=torch.zeros(2, 3, 8, 8)).eval()


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def labels(n: int) -> Tensor:
    return torch.arange(n) % N_CLASSES


def loader(n: int = 24, batch_size: int = 6) -> DataLoader:
    return DataLoader(TensorDataset(images(n), labels(n)), batch_size=batch_size)


def id_and_ood(n: int = 16) -> TensorDataset:
    """ID samples, then as many OOD samples."""
    x = torch.cat([images(n, seed=1), 2 + images(n, seed=2)])
    return TensorDataset(x, torch.cat([labels(n), torch.full((n,), -1)]))


def build(cls: type, split: SplitModel | None = None, **given: Any) -> Any:
    """A detector whose arguments are filled as by ``registry.build``, not yet registered."""
    parts = {**registry._parts(cls, split or classifier()), **given}
    arguments = {}
    for parameter in inspect.signature(cls).parameters.values():
        required = parameter.default is parameter.empty
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in given or (
            parts.get(parameter.name) is not None and (required or parameter.default is None)
        ):
            arguments[parameter.name] = parts[parameter.name]
        elif required:
            pytest.skip(f"{cls.__name__} needs {parameter.name}, which is no part of a classifier")
    with must_work(f"{cls.__name__}'s constructor"), seeded():
        return cls(**arguments)


def fitted(cls: type, split: SplitModel | None = None, n: int = 24, **given: Any) -> Any:
    detector = build(cls, split, **given)
    if detector.requires_fit:
        with must_work(f"fit() on {n} samples"), seeded():
            detector.fit(loader(n))
    return detector


def representation(cls: type) -> tuple[str, str] | None:
    """What a class scores and where that comes from, if this is one tensor."""
    for base, (name, producer) in REPRESENTATIONS.items():
        if issubclass(cls, base) and producer is not None:
            return name, producer
    return None


def is_cached(cls: type) -> bool:
    """Whether benchmarks and searches keep what the detector scores."""
    cacheable = issubclass(cls, (LogitsDetector, FeaturesDetector))
    return cacheable and not issubclass(cls, GradientDetector)


def overrides(cls: type, method: str) -> bool:
    own = getattr(cls, method, None)
    bases = [Detector, *REPRESENTATIONS]
    return own is not None and own not in [getattr(base, method, None) for base in bases]


# -- rules for all classes ---------------------------------------------------------------


def check_own_info(cls: type) -> None:
    kinds = {Detector: DetectorInfo, nn.Module: LossInfo, Benchmark: BenchmarkInfo}
    expected = next(info for base, info in kinds.items() if issubclass(cls, base))
    info = vars(cls).get("info")
    assert isinstance(info, expected), (
        f"{cls.__name__} must define info, a {expected.__name__}, itself, not inherit it"
    )
    assert info.tasks and all(isinstance(task, Task) for task in info.tasks), (
        f"{cls.__name__}.info must name at least one task, as a member of Task"
    )
    if expected is LossInfo:
        assert info.inputs and all(isinstance(i, Representation) for i in info.inputs), (
            f"{cls.__name__}.info must name the inputs, as members of Representation"
        )


def check_docstring_examples(cls: type) -> None:
    """pytorch-ood runs those of losses. Those of detectors speak of the reader's model."""
    pattern = r"\.\. code-block:: python\n\n(.*?)(?=\n\S|\Z)"
    for block in re.findall(pattern, inspect.getdoc(cls) or "", re.DOTALL):
        with must_work(f"An example in the docstring of {cls.__name__}"):
            code = compile(textwrap.dedent(block), f"<docstring of {cls.__name__}>", "exec")
            if issubclass(cls, nn.Module):
                with seeded(), contextlib.redirect_stdout(None):
                    exec(code, {})


# -- rules for detectors -----------------------------------------------------------------


def check_signatures(cls: type) -> None:
    calls = {"predict": 1, "fit": 1}
    if named := representation(cls):
        calls.update({f"predict_{named[0]}": 1, f"fit_{named[0]}": 2})
    for method, n_arguments in calls.items():
        signature = inspect.signature(getattr(cls, method))
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        assert method.startswith("fit") or inspect.Parameter.VAR_POSITIONAL not in kinds, (
            f"{cls.__name__}.{method} must name its arguments, not take *arguments"
        )
        try:
            signature.bind(None, *range(n_arguments))
        except TypeError as error:
            raise AssertionError(
                f"{cls.__name__}.{method} must be callable with {n_arguments} positional "
                f"argument(s) beside self: {error}"
            ) from None


def check_taxonomy(cls: type) -> None:
    assert not inspect.isabstract(cls), (
        f"{cls.__name__} is abstract: it must define {', '.join(cls.__abstractmethods__)}"
    )
    for base, (name, producer) in REPRESENTATIONS.items():
        predict, fit = f"predict_{name}", f"fit_{name}"
        if issubclass(cls, base):
            assert overrides(cls, predict), (
                f"{cls.__name__} is a {base.__name__}, so it must define {predict}"
            )
            assert not (cls.requires_fit and producer) or overrides(cls, fit), (
                f"{cls.__name__} is a {base.__name__} that requires fitting, so it must define "
                f"{fit}"
            )
        else:
            assert not hasattr(cls, predict), (
                f"{cls.__name__} has {predict} but is no {base.__name__}"
            )


def check_requires_fit(cls: type) -> None:
    assert isinstance(cls.requires_fit, bool), f"{cls.__name__}.requires_fit must be a bool"
    split = classifier()
    detector = build(cls, split)
    assert "requires_fit" not in vars(detector), (
        f"{cls.__name__}.requires_fit must be an attribute of the class"
    )
    if cls.requires_fit:
        x = images(8)
        calls = {"predict": x}
        if named := representation(cls):
            calls[f"predict_{named[0]}"] = registry._parts(cls, split)[named[1]](x)
        for method, argument in calls.items():
            error = _raised(lambda: getattr(detector, method)(argument))
            assert isinstance(error, RequiresFittingException), (
                f"{cls.__name__}.{method} before fit() must raise RequiresFittingException, "
                f"not {error!r}"
            )
    with must_work(f"{cls.__name__}.fit()"), seeded():
        returned = detector.fit(loader())
    assert returned is detector, f"{cls.__name__}.fit() must return the detector"


def check_model_not_set(cls: type) -> None:
    named = representation(cls)
    if not is_cached(cls) or named is None:
        return  # only these are promised to work without a network
    name, producer = named
    if producer not in inspect.signature(cls).parameters:
        return
    split = classifier()
    detector = build(cls, split, **{producer: None})
    if cls.requires_fit:
        z = registry._parts(cls, split)[producer](images(24)).detach()
        with must_work(f"{cls.__name__}.fit_{name}() with {producer}=None"), seeded():
            getattr(detector, f"fit_{name}")(z, labels(24))
    error = _raised(lambda: detector.predict(images(8)))
    assert isinstance(error, ModelNotSetException), (
        f"{cls.__name__}.predict() with {producer}=None must raise ModelNotSetException, not "
        f"{error!r}"
    )


def check_devices(cls: type) -> None:
    detector = fitted(cls)
    assert detector.to("cpu") is detector, f"{cls.__name__}.to() must return the detector"
    assert detector.device == torch.device("cpu"), (
        f"{cls.__name__}.device must be where its state is, not {detector.device}"
    )
    # any other device shows what stays behind, and this one is everywhere
    detector.to("meta")
    left = sorted({path for path, tensor in _tensors(detector, "") if not tensor.is_meta})
    assert not left, f"{cls.__name__}.to() leaves {', '.join(left)} where it was"
    if torch.cuda.is_available():
        detector = fitted(cls).to("cuda")
        with must_work(f"{cls.__name__}.predict() on a GPU, of inputs on the CPU"):
            scores = detector.predict(images(8))
        assert scores.is_cuda, f"{cls.__name__} on a GPU must return scores there"
        if cls.requires_fit:
            with must_work(f"{cls.__name__}.fit() on a GPU"), seeded():
                build(cls).to("cuda").fit(loader())


def check_hyperparameters(cls: type) -> None:
    space = cls.hyperparameter_space
    assert isinstance(space, dict) and all(isinstance(v, list) and v for v in space.values()), (
        f"{cls.__name__}.hyperparameter_space must map names to lists that are not empty"
    )
    detector = build(cls)
    before = detector.get_hyperparameters()
    assert before.keys() == space.keys(), (
        f"{cls.__name__}.get_hyperparameters() must have the names of hyperparameter_space"
    )
    for name, value in [(name, value) for name, values in space.items() for value in values]:
        with must_work(f"set_hyperparameters({name}={value!r})"):
            returned = detector.set_hyperparameters(**{name: value})
        assert returned is detector, (
            f"{cls.__name__}.set_hyperparameters() must return the detector"
        )
        assert detector.get_hyperparameters()[name] == value, (
            f"{cls.__name__} does not keep {name}={value!r}"
        )
        if name in inspect.signature(cls).parameters:
            assert build(cls, **{name: value}).get_hyperparameters()[name] == value, (
                f"{cls.__name__}'s constructor does not keep {name}={value!r}"
            )
    detector.set_hyperparameters(**before)
    assert detector.get_hyperparameters() == before, (
        f"{cls.__name__} does not return to hyper-parameters it had"
    )
    error = _raised(lambda: detector.set_hyperparameters(no_such_hyperparameter=1))
    assert isinstance(error, ValueError), (
        f"{cls.__name__}.set_hyperparameters() must raise a ValueError for an unknown name, not "
        f"{error!r}"
    )


def check_fractions(cls: type) -> None:
    for parameter in inspect.signature(cls).parameters.values():
        name, default = parameter.name, parameter.default
        by_name = re.search(r"(percentile|quantile|fraction)$", name)
        if not by_name and not (isinstance(default, float) and 0 <= default <= 1):
            continue
        try:
            build(cls, **{name: 0.5})
        except AssertionError:
            continue  # no such number
        error = _raised(lambda: fitted(cls, **{name: 95.0}))
        error = getattr(error, "__cause__", None) or error
        if not by_name and not re.search(r"fraction|\[0, 1\]", str(error)):
            continue  # not told to be a fraction, e.g. a temperature
        assert isinstance(error, ValueError) and "use 0.95 instead of 95" in str(error), (
            f"{cls.__name__} must refuse {name}=95.0 with a ValueError that says 'use 0.95 "
            f"instead of 95', not {error!r}"
        )


def check_smoke(cls: type) -> None:
    split = classifier()
    detector = fitted(cls, split)
    with must_work(f"{cls.__name__}.predict() on 8 samples"), seeded():
        scores = detector(images(8, seed=1))
    shape = tuple(scores.shape)
    assert shape == (8,), f"{cls.__name__} must give 8 scores for 8 samples, got shape {shape}"
    assert scores.is_floating_point() and scores.isfinite().all(), (
        f"{cls.__name__} must give finite floating point scores"
    )
    assert not split.training, f"{cls.__name__} must leave the network in the mode it is in"
    assert all(parameter.grad is None for parameter in split.parameters()), (
        f"{cls.__name__} must leave no gradient in the network"
    )


def check_grid_search(cls: type) -> None:
    space = cls.hyperparameter_space
    if not space:
        return
    split = classifier()
    detector, calls = build(cls, split), _count_calls(cls, split)
    fit_loader = loader(240, batch_size=60) if cls.requires_fit else None
    validation = DataLoader(id_and_ood(), batch_size=16)
    search = GridSearch(detector, fit_loader, validation)
    with must_work(f"GridSearch over the hyper-parameters of {cls.__name__}"), seeded():
        best = search.run()
    n_candidates = math.prod(len(values) for values in space.values())
    assert len(search.results_) == n_candidates, (
        f"GridSearch tried {len(search.results_)} of {n_candidates} candidates of {cls.__name__}"
    )
    broken = [result["params"] for result in search.results_ if not 0 <= result["score"] <= 1]
    assert not broken, f"{cls.__name__} has no finite scores with {broken[0]}"
    assert detector.get_hyperparameters() == best, f"{cls.__name__} does not keep the best"
    if is_cached(cls):
        passes = 2 + (4 if cls.requires_fit else 0)
        assert len(calls) == passes, (
            f"GridSearch must run the network of {cls.__name__} once per batch, {passes} times, "
            f"not {len(calls)}"
        )
    fresh = build(cls, split, **best)
    x = images(16, seed=1)
    with must_work(f"{cls.__name__} with {best}"), seeded():
        if fit_loader is not None:
            fresh.fit(fit_loader)
        expected = fresh.predict(x)
        scores = detector.predict(x)
    assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-6), (
        f"{cls.__name__} after GridSearch must score as if constructed with {best} and fitted once"
    )


def check_benchmark_caching(cls: type) -> None:
    split, benchmark = classifier(), _Toy()
    detectors = [fitted(cls, split), fitted(cls, split)]
    calls = _count_calls(cls, split)
    settings = {"loader_kwargs": {"batch_size": 8}, "cache": True}
    with must_work(f"Benchmark.evaluate() of {cls.__name__}"), seeded():
        results = benchmark.evaluate(detectors, **settings)
        first = len(calls)
        again = benchmark.evaluate(detectors[0], **settings)
    assert [result.get("Detector") for result in results] == [cls.__name__] * 2, (
        f"{cls.__name__} must be one row for each detector, with its name"
    )
    assert "Detector" not in again[0] and 0 <= again[0]["AUROC"] <= 1, (
        f"{cls.__name__} alone must give one row with metrics"
    )
    if is_cached(cls):
        n_batches = math.ceil(len(id_and_ood()) / 8)
        assert first == n_batches, (
            f"Two {cls.__name__} of one network must run it once per batch, {n_batches} times, "
            f"not {first}"
        )
        assert len(calls) == first, (
            f"Benchmark.evaluate() ran the network of {cls.__name__} again, although it keeps "
            "the outputs"
        )


class _Toy(Benchmark):
    ood_names = ["toy"]

    def train_set(self) -> Dataset:
        return loader().dataset

    def test_sets(self, known: bool = True, unknown: bool = True) -> list[Dataset]:
        return [id_and_ood()]


def _count_calls(cls: type, split: SplitModel) -> list[None]:
    """A list that grows whenever the network makes what the detector scores."""
    calls: list[None] = []
    named = representation(cls)
    module = registry._parts(cls, split)[named[1]] if named else split
    if isinstance(module, nn.Module):
        module.register_forward_hook(lambda *_: calls.append(None))
    return calls


def _raised(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def _tensors(value: Any, path: str, seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """All tensors that a value holds, also where pytorch-ood does not look for them."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (type, ModuleType)):
        return
    seen.add(id(value))
    inner: dict[str, Any] = {}
    if isinstance(value, Tensor):
        yield path.lstrip("."), value
    elif isinstance(value, nn.Module):
        own = itertools.chain(value.named_parameters(), value.named_buffers())
        yield from ((f"{path}.{name}".lstrip("."), tensor) for name, tensor in own)
    elif isinstance(value, dict):
        inner = {f"[{key!r}]": item for key, item in value.items()}
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = {f"[{i}]": item for i, item in enumerate(value)}
    elif isinstance(value, MethodType):
        inner = {"": value.__self__}
    elif isinstance(value, partial):
        inner = {"": [value.func, value.args, value.keywords]}
    elif isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or ())
        inner = {f"[{name}]": cell.cell_contents for name, cell in cells}
    elif hasattr(value, "__dict__"):
        inner = {f".{name}": item for name, item in vars(value).items()}
    for name, item in inner.items():
        yield from _tensors(item, path + name, seen)


# -- rules for losses --------------------------------------------------------------------


def build_loss(cls: type) -> nn.Module:
    sizes = {"n_classes": N_CLASSES, "num_classes": N_CLASSES}
    sizes.update(n_dim=N_FEATURES, n_embedding=N_FEATURES)
    arguments = {}
    for parameter in inspect.signature(cls).parameters.values():
        # variadic ones are those of nn.Module, of a class without a constructor of its own
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic:
            if parameter.name not in sizes:
                pytest.skip(f"{cls.__name__} needs {parameter.name}, which is unknown")
            arguments[parameter.name] = sizes[parameter.name]
    with must_work(f"{cls.__name__}'s constructor"), seeded():
        return cls(**arguments)


def loss_value(loss: nn.Module, targets: Tensor, device: str = "cpu") -> Tensor:
    """Value for as many samples as targets. Arguments are told by their names."""
    split = classifier().to(device)
    x, targets = images(len(targets)).to(device), targets.to(device)
    takes_images = Representation.INPUTS in type(loss).info.inputs
    choices = {
        "model": lambda: split,
        "x": lambda: x if takes_images else split.encoder(x),
        "logits": lambda: split(x),
        "features": lambda: split.encoder(x),
        "z": lambda: split.encoder(x),
        **dict.fromkeys(("distances", "distmat"), lambda: split(x).abs()),
        **dict.fromkeys(("target", "targets", "y", "labels"), lambda: targets),
    }
    arguments = []
    for parameter in inspect.signature(loss.forward).parameters.values():
        if parameter.default is parameter.empty:
            if parameter.name not in choices:
                name = type(loss).__name__
                pytest.skip(f"{name}.forward needs {parameter.name}, which is unknown")
            arguments.append(choices[parameter.name]())
    kind = {1: "all OOD", 0: "all ID"}.get(float((targets < 0).float().mean()), "mixed")
    with must_work(f"{type(loss).__name__} of targets that are {kind}"), seeded():
        return loss(*arguments)


def loss_targets() -> dict[str, Tensor]:
    mixed = labels(8).masked_fill(torch.arange(8) % 3 == 1, -1)
    return {"mixed": mixed, "all ID": labels(8), "all OOD": torch.full((8,), -1)}


def check_loss_values(cls: type) -> None:
    supervised = cls.info.supervised
    for kind, targets in loss_targets().items():
        if kind == "all OOD" and not supervised:
            continue  # nothing to average
        loss = build_loss(cls)
        for _ in range(3):  # some keep running centers
            value = loss_value(loss, targets)
            assert value.dim() == 0 and value.isfinite(), (
                f"{cls.__name__} must be one finite number for targets that are {kind}, got "
                f"{value}"
            )
            assert value.requires_grad, (
                f"{cls.__name__} must keep the graph for targets that are {kind}"
            )
            with must_work(f"backward() of {cls.__name__} for targets that are {kind}"):
                value.backward()


def check_loss_reductions(cls: type) -> None:
    loss = build_loss(cls)
    if not hasattr(loss, "reduction"):
        return
    targets = loss_targets()["mixed"]
    values = {}
    for reduction in ("mean", "sum", "none"):
        loss.reduction = reduction
        values[reduction] = loss_value(loss, targets)
    for reduction in ("mean", "sum"):
        assert values[reduction].dim() == 0 and values[reduction].isfinite(), (
            f"{cls.__name__} with reduction {reduction} must be one finite number"
        )
    assert values["none"].dim() > 0, f"{cls.__name__} with reduction none must not be reduced"
    assert torch.allclose(values["none"].sum(), values["sum"], rtol=1e-4), (
        f"{cls.__name__} with reduction sum must be the sum of that with reduction none"
    )


def check_loss_devices(cls: type) -> None:
    loss = build_loss(cls)
    plain = [name for name, value in vars(loss).items() if isinstance(value, Tensor)]
    assert not plain, f"{cls.__name__} must keep {', '.join(plain)} as buffers, which .to() moves"
    if any(True for _ in itertools.chain(loss.parameters(), loss.buffers())):
        assert ".to(device)" in (inspect.getdoc(cls) or ""), (
            f"{cls.__name__} holds tensors, so its docstring must mention .to(device)"
        )
    elif torch.cuda.is_available():
        targets = loss_targets()["mixed"]
        expected, value = loss_value(loss, targets), loss_value(loss, targets, "cuda")
        assert torch.allclose(value.cpu(), expected, rtol=1e-3), (
            f"{cls.__name__} must work on the device of its inputs, with the same value"
        )


def check_loss_example(cls: type) -> None:
    required = [
        parameter.name
        for parameter in list(inspect.signature(cls.forward).parameters.values())[1:]
        if parameter.default is parameter.empty
    ]
    usual = len(required) == 2 and required[0] == "logits"
    assert usual or ".. code-block:: python" in (inspect.getdoc(cls) or ""), (
        f"{cls.__name__} is called with {', '.join(required)}: its docstring must show how"
    )


# -- rules for benchmarks ----------------------------------------------------------------


def check_benchmark_methods(cls: type) -> None:
    assert not inspect.isabstract(cls), (
        f"{cls.__name__} is abstract: it must define {', '.join(cls.__abstractmethods__)}"
    )
    parameters = inspect.signature(cls.test_sets).parameters
    defaults = {
        name: parameters[name].default for name in ("known", "unknown") if name in parameters
    }
    assert defaults == {"known": True, "unknown": True}, (
        f"{cls.__name__}.test_sets() must take known=True and unknown=True"
    )


def check_benchmark_sets(cls: type) -> None:
    required = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
    if required:
        pytest.skip(f"{cls.__name__} needs {', '.join(required)}, which are the user's data")
    with must_work(f"{cls.__name__}'s constructor"):
        benchmark = cls()
    both, oods = benchmark.test_sets(), benchmark.test_sets(known=False)
    for sets in (both, oods):
        assert len(sets) == len(benchmark.ood_names), (
            f"{cls.__name__} has {len(benchmark.ood_names)} names for {len(sets)} OOD sets"
        )
    ids = benchmark.test_sets(unknown=False)
    assert len(ids) == 1, f"{cls.__name__} must have one ID test set, not {len(ids)}"
    for name, dataset, ood in zip(benchmark.ood_names, both, oods):
        assert len(dataset) == len(ids[0]) + len(ood), (
            f"{cls.__name__}'s set {name} must be its ID test set and the OOD set"
        )
        assert ood[0][1] < 0 and ood[len(ood) - 1][1] < 0, (
            f"{cls.__name__} must give OOD samples of {name} a label < 0"
        )
    assert ids[0][0][1] >= 0 and benchmark.train_set()[0][1] >= 0, (
        f"{cls.__name__} must give ID samples a label >= 0"
    )
    error = _raised(lambda: benchmark.test_sets(known=False, unknown=False))
    assert isinstance(error, ValueError), (
        f"{cls.__name__}.test_sets() without ID and OOD must raise a ValueError, not {error!r}"
    )


RULES: dict[str, list[Callable[[type], None]]] = {
    "detector": [
        check_own_info,
        check_docstring_examples,
        check_signatures,
        check_taxonomy,
        check_requires_fit,
        check_model_not_set,
        check_devices,
        check_hyperparameters,
        check_fractions,
        check_smoke,
        check_grid_search,
        check_benchmark_caching,
    ],
    "loss": [
        check_own_info,
        check_docstring_examples,
        check_loss_values,
        check_loss_reductions,
        check_loss_devices,
        check_loss_example,
    ],
    "benchmark": [
        check_own_info,
        check_docstring_examples,
        check_benchmark_methods,
        check_benchmark_sets,
    ],
}


# -- the classes that are registered -----------------------------------------------------


def registered(kind: str) -> dict[str, registry.PluginInfo]:
    """What plugins add, by qualified name."""
    infos = registry.list_plugins(kind).values()
    return {info.qualified_name: info for info in infos if info.origin != "pytorch-ood"}


def broken_rules(kind: str, cls: type) -> dict[str, str]:
    """The rules that a class breaks, and what is wrong."""
    broken = {}
    for rule in RULES[kind]:
        try:
            rule(cls)
        except AssertionError as error:
            broken[rule.__name__] = str(error).partition("\nassert ")[0]
    return broken


@pytest.mark.parametrize(
    "info, rule",
    [
        pytest.param(info, rule, id=f"{name}-{rule.__name__}")
        for kind, rules in RULES.items()
        for name, info in registered(kind).items()
        for rule in rules
    ],
)
def test_contract(info, rule):
    rule(info.load())


def test_all_of_this_package_are_covered():
    names = {name for kind in RULES for name in registered(kind)}
    expected = {"GROOD", "NERO", "GRegLoss", "Digits", "GastroVision", "KvasirV2"}
    assert {f"pood-plugins:{name}" for name in expected} <= names


# -- the rules themselves ----------------------------------------------------------------


class Sound(FeaturesDetector):
    """
    Distance to a quantile of the features.

    .. code-block:: python

        detector = Sound(model.features).fit(loader)
    """

    info = DetectorInfo(tasks={Task.CLASSIFICATION})
    requires_fit = True
    hyperparameter_space = {"percentile": [0.1, 0.5, 0.9]}

    def __init__(self, encoder, percentile=0.5):
        self.encoder = encoder
        self.percentile = _check_fraction("percentile", percentile)
        self.center_ = None

    def fit(self, data_loader):
        if self.encoder is None:
            raise ModelNotSetException
        return self.fit_features(*extract_features(data_loader, self.encoder, self.device))

    def fit_features(self, z, labels):
        device = self.device or z.device
        self.center_ = z.to(device).quantile(self.percentile, dim=0)
        return self

    def predict(self, x):
        if self.encoder is None:
            raise ModelNotSetException
        return self.predict_features(self.encoder(x))

    def predict_features(self, z):
        if self.center_ is None:
            raise RequiresFittingException
        return (z - self.center_).norm(dim=1).detach()


class SoundLogits(LogitsDetector):
    """Negated norm of the logits."""

    info = DetectorInfo(tasks={Task.CLASSIFICATION})

    def __init__(self, model):
        self.model = model

    def predict_logits(self, logits):
        return -logits.norm(dim=1)


class SoundLoss(nn.Module):
    """
    Cross-entropy of the ID samples.

    .. code-block:: python

        import torch
        loss = torch.zeros(1)
    """

    info = LossInfo({Task.CLASSIFICATION}, {Representation.LOGITS}, supervised=True)

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, logits, targets):
        known = targets >= 0
        values = nn.functional.cross_entropy(logits, targets.clamp(min=0), reduction="none")
        values = values * known
        if self.reduction == "none":
            return values
        return values.sum() / (known.sum().clamp(min=1) if self.reduction == "mean" else 1)


class SoundBenchmark(Benchmark):
    """Random images."""

    info = BenchmarkInfo(
        Paper("Nothing", "arXiv", 2020, "https://arxiv.org"), {Task.CLASSIFICATION}
    )

    def __init__(self):
        self.ood_names = ["random"]

    def train_set(self):
        return loader().dataset

    def test_sets(self, known=True, unknown=True):
        x, y = id_and_ood().tensors
        if known and unknown:
            return [TensorDataset(x, y)]
        if known or unknown:
            keep = (y >= 0) if known else (y < 0)
            return [TensorDataset(x[keep], y[keep])]
        raise ValueError("neither ID nor OOD")


SOUND = {
    "detector": [Sound, SoundLogits],
    "loss": [SoundLoss],
    "benchmark": [SoundBenchmark],
}


class InheritsInfo(Sound):
    pass


class NoTask(Sound):
    info = DetectorInfo(tasks=[])


class NoInputs(SoundLoss):
    info = LossInfo({Task.CLASSIFICATION}, [], supervised=True)


class WrongInfo(SoundBenchmark):
    info = Sound.info


class ExampleThatFails(SoundLoss):
    """
    .. code-block:: python

        loss = criterion(logits)
    """


class ExampleThatIsNoPython(Sound):
    """
    .. code-block:: python

        Sound(model
    """


class AnyArguments(Sound):
    def predict_features(self, *args):
        return super().predict_features(*args)


class OneArgumentTooMany(Sound):
    def fit_features(self, z, labels, weights):
        return super().fit_features(z, labels)


class Abstract(FeaturesDetector):
    pass


class ScoresNothing(FeaturesDetector):
    def predict(self, x):
        return x.sum(dim=(1, 2, 3))


class FitsNoFeatures(ScoresNothing):
    requires_fit = True

    def predict_features(self, z):
        return z.sum(dim=1)


class TakesLogitsToo(Sound):
    def predict_logits(self, logits):
        return logits.sum(dim=1)


class ScoresUnfitted(Sound):
    def predict_features(self, z):
        return z.sum(dim=1)


class FailsObscurely(Sound):
    def predict_features(self, z):
        return (z - self.center_).norm(dim=1)


class FitReturnsNothing(Sound):
    def fit(self, data_loader):
        super().fit(data_loader)


class DecidesLater(Sound):
    def __init__(self, encoder):
        super().__init__(encoder)
        self.requires_fit = True


class RequiresFitIsAWord(Sound):
    requires_fit = "yes"


class CallsNone(Sound):
    def predict(self, x):
        return self.predict_features(self.encoder(x))


class HidesState(Sound):
    def fit_features(self, z, labels):
        self.bank_ = SimpleNamespace(rows=z)
        return super().fit_features(z, labels)


class HidesStateInAFunction(Sound):
    def fit_features(self, z, labels):
        self.distance_ = partial(torch.cdist, z)
        rows = z.clone()
        self.nearest_ = lambda x: torch.cdist(x, rows)
        return super().fit_features(z, labels)


class ToReturnsNothing(Sound):
    def to(self, device):
        super().to(device)


class LivesNowhere(Sound):
    @property
    def device(self):
        return None


class EmptySpace(Sound):
    hyperparameter_space = {"percentile": []}


class ForgetsHyperparameters(Sound):
    def set_hyperparameters(self, **hyperparameters):
        return self


class SetReturnsNothing(Sound):
    def set_hyperparameters(self, **hyperparameters):
        super().set_hyperparameters(**hyperparameters)


class ConstructorForgets(Sound):
    def __init__(self, encoder, percentile=0.5):
        super().__init__(encoder)


class RenamesHyperparameters(Sound):
    def get_hyperparameters(self):
        return {"quantile": self.percentile}


class TakesUnknownHyperparameters(Sound):
    def set_hyperparameters(self, **hyperparameters):
        vars(self).update(hyperparameters)
        return self


class TakesPercent(Sound):
    def __init__(self, encoder, percentile=50):
        self.encoder, self.percentile, self.center_ = encoder, percentile, None

    def fit_features(self, z, labels):
        self.center_ = z.quantile(min(self.percentile, 1), dim=0)
        return self


class RefusesInOtherWords(Sound):
    def __init__(self, encoder, percentile=0.5, share=0.5):
        super().__init__(encoder, percentile)
        if not 0 <= share <= 1:
            raise ValueError(f"share must be a fraction, got {share}")


class ScoresInColumns(Sound):
    def predict_features(self, z):
        return super().predict_features(z)[:, None]


class ScoresNan(Sound):
    def predict_features(self, z):
        return super().predict_features(z) * float("nan")


class NeedsManySamples(Sound):
    def fit_features(self, z, labels):
        if len(z) < 100:
            raise ValueError("too few samples")
        return super().fit_features(z, labels)


class ChangesMode(Sound):
    def predict(self, x):
        self.encoder.train()
        return super().predict(x)


class LeavesGradients(Sound):
    def predict(self, x):
        self.encoder(x).sum().backward()
        return super().predict(x)


class FitsWithTheFirst(Sound):
    def __init__(self, encoder, percentile=0.5):
        super().__init__(encoder, percentile)
        self.first = percentile

    def fit_features(self, z, labels):
        self.center_ = z.quantile(self.first, dim=0)
        return self


class ScoresNanWithSome(Sound):
    def predict_features(self, z):
        return super().predict_features(z) / (float("nan") if self.percentile > 0.5 else 1)


class EncodesAgain(Sound):
    def predict_features(self, z):
        self.encoder(images(1))
        return super().predict_features(z)


class NeedsOutliers(SoundLoss):
    def forward(self, logits, targets):
        return super().forward(logits, targets) + logits[targets < 0].mean()


class LosesTheGraph(SoundLoss):
    def forward(self, logits, targets):
        return super().forward(logits, targets) if (targets >= 0).any() else torch.zeros(())


class ReturnsAVector(SoundLoss):
    def forward(self, logits, targets):
        return super().forward(logits, targets)[None]


class AlwaysReduces(SoundLoss):
    def forward(self, logits, targets):
        return nn.functional.cross_entropy(logits, targets, ignore_index=-1)


class SumIsMean(SoundLoss):
    def forward(self, logits, targets):
        value = super().forward(logits, targets)
        return value / len(targets) if self.reduction == "sum" else value


class PlainTensor(SoundLoss):
    def __init__(self):
        super().__init__()
        self.centers = torch.zeros(N_CLASSES)


class UndocumentedBuffer(SoundLoss):
    """Holds tensors."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centers", torch.zeros(N_CLASSES))


class NoExample(SoundLoss):
    """No example."""

    def forward(self, model, x, targets):
        return super().forward(model(x), targets)


class AbstractBenchmark(Benchmark):
    pass


class OtherDefaults(SoundBenchmark):
    def test_sets(self, known, unknown=True):
        return super().test_sets(known, unknown)


class OneNameTooMany(SoundBenchmark):
    def __init__(self):
        self.ood_names = ["random", "other"]


class TrainsOnOutliers(SoundBenchmark):
    def train_set(self):
        return self.test_sets(known=False)[0]


class OneIdSetForEach(SoundBenchmark):
    def test_sets(self, known=True, unknown=True):
        return super().test_sets(known, unknown) * (1 if unknown else 2)


class NothingIsASet(SoundBenchmark):
    def test_sets(self, known=True, unknown=True):
        return super().test_sets(known, unknown) if known or unknown else []


class IdIsMissing(SoundBenchmark):
    def test_sets(self, known=True, unknown=True):
        return super().test_sets(known and not unknown, unknown)


class LabelsAreTurned(SoundBenchmark):
    def test_sets(self, known=True, unknown=True):
        sets = super().test_sets(known, unknown)
        return [TensorDataset(x, -1 - y) for x, y in (dataset.tensors for dataset in sets)]


# rule -> classes that break it, and a part of what it says
BROKEN: dict[Callable[[type], None], dict[type, str]] = {
    check_own_info: {
        InheritsInfo: "must define info",
        NoTask: "at least one task",
        NoInputs: "must name the inputs",
        WrongInfo: "a BenchmarkInfo",
    },
    check_docstring_examples: {
        ExampleThatFails: "NameError: name 'criterion'",
        ExampleThatIsNoPython: "SyntaxError",
    },
    check_signatures: {
        AnyArguments: "predict_features must name its arguments",
        OneArgumentTooMany: "fit_features must be callable with 2",
    },
    check_taxonomy: {
        Abstract: "must define predict",
        ScoresNothing: "so it must define predict_features",
        FitsNoFeatures: "so it must define fit_features",
        TakesLogitsToo: "has predict_logits but is no LogitsDetector",
    },
    check_requires_fit: {
        ScoresUnfitted: "must raise RequiresFittingException, not None",
        FailsObscurely: "must raise RequiresFittingException, not TypeError",
        FitReturnsNothing: "must return the detector",
        RequiresFitIsAWord: "must be a bool",
        DecidesLater: "must be an attribute of the class",
    },
    check_model_not_set: {
        CallsNone: "with encoder=None must raise ModelNotSetException, not TypeError",
    },
    check_devices: {
        ToReturnsNothing: "must return the detector",
        LivesNowhere: "must be where its state is, not None",
        HidesState: "leaves bank_.rows where it was",
        HidesStateInAFunction: r"leaves distance_\[1\]\[0\], nearest_\[rows\] where it was",
    },
    check_hyperparameters: {
        EmptySpace: "lists that are not empty",
        ForgetsHyperparameters: "does not keep percentile=0.1",
        SetReturnsNothing: "must return the detector",
        ConstructorForgets: "constructor does not keep percentile=0.1",
        RenamesHyperparameters: "must have the names",
        TakesUnknownHyperparameters: "must raise a ValueError for an unknown name",
    },
    check_fractions: {
        TakesPercent: "must refuse percentile=95.0 .* not None",
        RefusesInOtherWords: "must refuse share=95.0 .* not ValueError",
    },
    check_smoke: {
        ScoresInColumns: r"got shape \(8, 1\)",
        ScoresNan: "must give finite",
        NeedsManySamples: r"fit\(\) on 24 samples raised ValueError: too few samples",
        ChangesMode: "must leave the network in the mode",
        LeavesGradients: "must leave no gradient",
    },
    check_grid_search: {
        ForgetsHyperparameters: "does not keep the best",
        FitsWithTheFirst: "must score as if constructed with",
        ScoresNanWithSome: "has no finite scores with {'percentile': 0.9}",
        EncodesAgain: "once per batch, 6 times, not 9",
    },
    check_benchmark_caching: {
        EncodesAgain: "once per batch, 4 times, not 6",
        NeedsManySamples: "raised ValueError",
    },
    check_loss_values: {
        NeedsOutliers: "finite number for targets that are all ID",
        LosesTheGraph: "must keep the graph for targets that are all OOD",
        ReturnsAVector: "must be one finite number for targets that are mixed",
    },
    check_loss_reductions: {
        AlwaysReduces: "none must not be reduced",
        SumIsMean: "must be the sum of that",
    },
    check_loss_devices: {
        PlainTensor: "must keep centers as buffers",
        UndocumentedBuffer: r"must mention .to\(device\)",
    },
    check_loss_example: {NoExample: "its docstring must show how"},
    check_benchmark_methods: {
        AbstractBenchmark: "is abstract",
        OtherDefaults: "must take known=True and unknown=True",
    },
    check_benchmark_sets: {
        OneNameTooMany: "has 2 names for 1 OOD sets",
        TrainsOnOutliers: "must give ID samples a label >= 0",
        OneIdSetForEach: "must have one ID test set, not 2",
        NothingIsASet: "must raise a ValueError, not None",
        IdIsMissing: "must be its ID test set and the OOD set",
        LabelsAreTurned: "must give OOD samples of random a label < 0",
    },
}


def test_every_rule_can_be_broken():
    assert BROKEN.keys() == {rule for rules in RULES.values() for rule in rules}


@pytest.mark.parametrize(
    "rule, cls",
    [
        pytest.param(rule, cls, id=f"{rule.__name__}-{cls.__name__}")
        for rule, classes in BROKEN.items()
        for cls in classes
    ],
)
def test_rules_catch_what_breaks_them(rule, cls):
    with pytest.raises(AssertionError, match=BROKEN[rule][cls]):
        rule(cls)


@pytest.mark.parametrize(
    "kind, cls", [(kind, cls) for kind, classes in SOUND.items() for cls in classes]
)
def test_sound_classes_pass(kind, cls):
    assert broken_rules(kind, cls) == {}


@pytest.mark.parametrize("name", ["MaxSoftmax", "GEN", "ReAct", "ODIN", "PNML", "RMD"])
def test_classes_of_the_host_pass(name):
    assert broken_rules("detector", registry.load(name)) == {}


def test_another_plugin_is_checked(tmp_path, monkeypatch):
    info = tmp_path / "another-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: another\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pytorch_ood.detectors]\nThird = another:Third\n")
    (tmp_path / "another.py").write_text(
        "from pytorch_ood.api import DetectorInfo, LogitsDetector, Task\n\n"
        "class Third(LogitsDetector):\n"
        "    info = DetectorInfo(tasks={Task.CLASSIFICATION})\n"
        "    def __init__(self, model):\n"
        "        self.model = model\n"
        "    def predict_logits(self, logits):\n"
        "        return logits.argmax(dim=1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    third = registered("detector")["another:Third"].load()
    assert broken_rules("detector", third) == {
        "check_smoke": "Third must give finite floating point scores"
    }
