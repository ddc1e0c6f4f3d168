"""
Fixtures that several test modules share.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Iterator

import hypothesis
import pytest
import torch
from torch import nn

# no time limit (machines differ) and the same examples in every run
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, print_blob=True
)
# more of them, and others in every run: pytest --hypothesis-profile=thorough tests/test_fuzz.py
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("repeatable")


def _folder(variable: str, content: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set to the folder with {content}")
    return Path(os.environ[variable])


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small problems run faster in one thread: with more, most of the time is spent waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    """Folder with reference values, from POOD_REFERENCE."""
    return _folder("POOD_REFERENCE", "reference values")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder with data sets, from POOD_DATA."""
    return _folder("POOD_DATA", "data sets")


@pytest.fixture(scope="session")
def blobs() -> SimpleNamespace:
    """
    Penultimate features of four classes (Gaussian clouds cut off at 0, as after a ReLU), the
    linear head that assigns them to the nearest center, and a fifth cloud of outliers.
    """
    generator = torch.Generator().manual_seed(0)

    def cloud(center: torch.Tensor, n: int) -> torch.Tensor:
        return (center + 0.6 * torch.randn(n, 20, generator=generator)).relu()

    centers = 5 * torch.eye(5).repeat_interleave(4, dim=1)
    head = nn.Linear(20, 4).requires_grad_(False)
    head.weight.copy_(0.2 * centers[:4])
    head.bias.copy_(-0.1 * centers[:4].square().sum(dim=1))
    return SimpleNamespace(
        head=head,
        z=torch.cat([cloud(center, 60) for center in centers[:4]]),
        y=torch.arange(4).repeat_interleave(60),
        z_in=torch.cat([cloud(center, 25) for center in centers[:4]]),
        z_out=cloud(centers[4], 100),
    )
