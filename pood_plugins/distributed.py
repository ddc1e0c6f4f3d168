"""
One run in several processes, such as one for each GPU. Put torchrun in front of the command:

.. code-block:: console

    $ torchrun --nproc-per-node 4 -m pood_plugins.cli benchmark cifar10-openood --root data \\
        --arch resnet20 --weights resnet20.pt --device cuda

Scores and table are those of one process, up to rounding. The first process alone writes files,
prints and shows progress. ``--device cuda`` gives each process the GPU of its local number,
``--device cuda:0`` gives that one to all. Without a GPU, one process uses all cores by itself;
torchrun gives each process one thread unless ``OMP_NUM_THREADS`` says otherwise, and nothing was
gained on two cores (``benchmarks/several_processes.py``). Processes were tried on a CPU only.

Shared out are

- the features: batches are dealt out in turn and whole, so that each image is read and passed
  through the network once, together with the same images as in one process;
- the detectors that need images: each is fitted and scored by one process, so that those that
  draw at random draw the same.

Not shared out are detectors of logits and features, which the first process fits and scores, the
preparation of the benchmark and the network, and the OOD prototypes of GROOD that need images,
which every process computes for itself. With ``--download``, the first process of each machine
goes ahead. Cached features are read and written by the first process, cached scores by the one
that computes them. ``digits`` and ``pood finetune``, which train, run in one process only.

If one process fails, the run does: with the same sentence as in one process, such as the name of
a broken image, or with the traceback of a process that dies. Nothing is written then, as results
come last. Whenever a process fails, also after a table in which a detector failed, torchrun adds a
report of its own, and its exit status is 1.

In your own program, work is shared out inside :func:`join` and nowhere else:

.. code-block:: python

    from pood_plugins import distributed, evaluation

    with distributed.join("cuda"):
        report = evaluation.run(benchmark, detectors, device="cuda")
        if distributed.rank() == 0:
            report.save("results")

        # or by hand
        features, labels = distributed.extract(split.encoder, train_set, device="cuda")
        detector.fit_features(features, labels)    # the same on every process
        batches = distributed.share(test_set, device="cuda")
        scores = distributed.gather([detector(x.to("cuda")) for x, _ in batches])

The report is the same on every process, but a detector that :func:`evaluation.run
<pood_plugins.evaluation.run>` fitted is fitted only where it was scored.

..  autofunction:: pood_plugins.distributed.join

..  autofunction:: pood_plugins.distributed.rank

..  autofunction:: pood_plugins.distributed.share

..  autofunction:: pood_plugins.distributed.extract

..  autofunction:: pood_plugins.distributed.gather

..  autoexception:: pood_plugins.distributed.ProcessError
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset

T = TypeVar("T")

_LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_rank, _size = 0, 1  # of the processes that share out work; outside of `join`, only this one


class ProcessError(RuntimeError):
    """Another process of the run has ended, or does something else."""


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return _LAUNCHED <= os.environ.keys() and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def join(device: str | torch.device = "cpu") -> Iterator[None]:
    """
    A context in which the processes that torchrun started share out work. All of them must call
    the same functions in the same order. In a single process, it has no effect.

    A process group that is there already is used, and must take tensors on CPU. Otherwise there is
    a new one: gloo for tensors on CPU, nccl for those on a GPU.

    :param device: where to compute. ``"cuda"`` is the GPU of the process's local number.
    :raises ValueError: if there is no such GPU
    :raises ProcessError: if another process has ended
    """
    global _rank, _size
    if not launched():
        yield
        return
    import torch
    import torch.distributed as dist

    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        local, n = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if 0 < n <= local:
            raise ValueError(
                f"there are more processes than GPUs: start {n}, or let all use one, as cuda:0"
            )
        torch.cuda.set_device(local)
    own = not dist.is_initialized()
    if own:
        # a slow process is no error, and one that has ended closes its connections
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=365))
    _rank, _size = dist.get_rank(), dist.get_world_size()
    try:
        yield
        exchange(None, "end")
    finally:
        _rank, _size = 0, 1
    if own:
        dist.destroy_process_group()


def rank() -> int:
    """
    :return: number of this process; 0 is the first, and any outside of :func:`join`
    """
    return _rank


def size() -> int:
    """How many processes share out work."""
    return _size


def interleave(shares: Sequence[Sequence[T]]) -> list[T]:
    """Puts what was dealt out in turn back into its order."""
    count, n = len(shares), sum(map(len, shares))
    if [len(share) for share in shares] != [len(range(n)[i::count]) for i in range(count)]:
        raise ValueError("each process must give one tensor for each batch of its share")
    return [shares[i % count][i // count] for i in range(n)]


class _Share:
    """Of batches of indices, those that this process has to load."""

    def __init__(self, batches: Any):
        self.batches = batches

    def __len__(self) -> int:
        return len(range(len(self.batches))[_rank::_size])

    def __iter__(self) -> Iterator[Any]:
        return islice(self.batches, _rank, None, _size)


def share(
    dataset: Dataset[Any],
    *,
    device: str | torch.device = "cpu",
    loader_kwargs: Mapping[str, Any] | None = None,
) -> Iterable[tuple[Tensor, Tensor]]:
    """
    :param dataset: images and labels
    :param device: where image packs make their batches; those of other data sets are on CPU
    :param loader_kwargs: arguments for :class:`torch.utils.data.DataLoader`, e.g. ``{"batch_size":
        256}``, which is the default. Data are never shuffled.
    :return: loader of this process's batches, which may be none. Of n processes, process i has
        batches i, i + n, i + 2n, ... of a single process.
    """
    from torch.utils.data import DataLoader

    from .dataset.packs import ImagePack, PackLoader

    arguments: dict[str, Any] = {"batch_size": 256, **(loader_kwargs or {}), "shuffle": False}
    if isinstance(dataset, ImagePack):
        part = (_rank, _size)
        return PackLoader(dataset, arguments["batch_size"], device=device, part=part)
    loader: DataLoader[Any] = DataLoader(dataset, **arguments)
    if _size > 1:
        for settled in ("batch_size", "shuffle", "sampler", "drop_last"):
            arguments.pop(settled, None)
        loader = DataLoader(dataset, batch_sampler=_Share(loader.batch_sampler), **arguments)
    return loader


def extract(
    encoder: Callable[[Tensor], Tensor],
    dataset: Dataset[Any],
    *,
    device: str | torch.device = "cpu",
    loader_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Passes a data set through a network, each process its share.

    :param encoder: network in evaluation mode, on the device
    :param dataset: images and labels
    :param device: where to compute, and where features and labels are then
    :param loader_kwargs: see :func:`share`
    :return: features of shape :math:`N \\times D` and labels of shape :math:`N` of all images, in
        the order of the data set, on every process
    :raises RuntimeError: if it fails on another process, with the reason. Where it fails, its own
        exception is raised.
    """
    import torch

    features: list[Tensor] = []
    labels: list[Tensor] = []

    def compute() -> None:
        with torch.no_grad():
            for x, y in share(dataset, device=device, loader_kwargs=loader_kwargs):
                features.append(encoder(x.to(device)).flatten(1))
                labels.append(y.to(device))

    together(compute, ValueError, "extract")
    return gather(features), gather(labels)


def gather(batches: Sequence[Tensor], *, everywhere: bool = True) -> Tensor:
    """
    :param batches: what this process made of the batches of its share, one tensor for each; of the
        same type and the same shape on all processes, but for the first dimension
    :param everywhere: whether all processes need the result, or only the first
    :return: all of it, :math:`N \\times \\dots`, in the order of the data set; no rows where it is
        not needed
    :raises ValueError: if no process has a batch, or one has not as many as its share
    """
    import torch
    import torch.distributed as dist

    batches = [batch.detach() for batch in batches]
    if _size == 1 and batches:
        return torch.cat(batches)
    sample: list[Any] = [batches[0][:0].cpu(), batches[0].device.type] if batches else []
    told: list[Any] = exchange([[len(batch) for batch in batches], sample], "gather")
    samples = [sample for _, sample in told if sample]
    if not samples:
        raise ValueError("there is nothing to gather: no process has a batch")
    nothing = samples[0][0].to(samples[0][1])
    needed = everywhere or _rank == 0
    shares = []
    for source, (lengths, _) in enumerate(told):
        if not lengths or not (needed or source == _rank):
            shares.append([nothing] * len(lengths))
            continue
        mine = torch.cat(batches) if source == _rank else None
        rows = nothing.new_empty(sum(lengths), *nothing.shape[1:]) if mine is None else mine
        content = rows.reshape(-1).view(torch.uint8)  # gloo does not know every type
        with _connected():
            if everywhere:
                dist.broadcast(content, source)
            elif source != 0:
                dist.recv(content, source) if mine is None else dist.send(content, 0)
        shares.append(list(rows.split(lengths)))
    ordered = interleave(shares)
    return torch.cat(ordered) if needed else nothing


def exchange(value: T, step: str) -> list[T]:
    """
    The values of all processes, by rank: tensors, numbers, text, lists and dictionaries of these.
    They travel as JSON and bytes, without pickle. All processes must be at the same step.
    """
    if _size == 1:
        return [value]
    import torch
    import torch.distributed as dist

    from .training.checkpoint import pack_state, unpack_state

    content = torch.frombuffer(bytearray(pack_state([step, value])), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(_size)]
    with _connected():
        dist.all_gather(lengths, torch.tensor([len(content)]))
        longest = int(max(lengths))
        contents = [torch.empty(longest, dtype=torch.uint8) for _ in range(_size)]
        dist.all_gather(contents, torch.nn.functional.pad(content, (0, longest - len(content))))
    told = [unpack_state(c[: int(n)].numpy().tobytes()) for c, n in zip(contents, lengths)]
    steps = {step for step, _ in told}
    if len(steps) > 1:
        raise ProcessError(f"processes are out of step, at {' and '.join(sorted(steps))}")
    return [value for _, value in told]


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessError("another process of the run has ended") from error


def together(compute: Callable[[], None], error: type[Exception], step: str) -> None:
    """
    Calls a function that, if it fails on one process, fails on all. Errors of the given class are
    of that class on all, others are a RuntimeError on those where they did not occur.
    """
    failure = None
    try:
        compute()
    except Exception as problem:
        failure = problem
    name = type(failure).__name__
    for source, told in enumerate(exchange([name, str(failure)] if failure else None, step)):
        if told and failure and source == _rank:
            raise failure
        if told:
            name, text = told
            raise error(text) if name == error.__name__ else RuntimeError(f"{name}: {text}")


def unless_found(find: Callable[[Callable[[], T]], T], compute: Callable[[], T]) -> T | None:
    """
    On the first process, calls ``find``, which calls its argument if it does not find a value. If
    and when it does, all processes compute. Returns None on the others if they did not.
    """
    if _rank != 0:
        return compute() if exchange(False, "find")[0] else None
    missed = False

    def miss() -> T:
        nonlocal missed
        missed = exchange(True, "find")[0]
        return compute()

    value = find(miss)
    if not missed:
        exchange(False, "find")
    return value


@contextmanager
def ahead() -> Iterator[None]:
    """A context that the first process of each machine leaves before the others enter."""
    first = _size == 1 or int(os.environ["LOCAL_RANK"]) == 0
    if not first:
        exchange(None, "ahead")
    yield
    if first:
        exchange(None, "ahead")


def says_first(message: str) -> bool:
    """Whether no process of this run has called this with the same text before."""
    if not launched():
        return True
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        # a new connection, as a process that loads images must not use that of its parent
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"pood {attempt} {message}", 1) == 1
    except RuntimeError:  # the store has ended with its process
        return True
