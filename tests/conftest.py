"""Makes the checkout and tests/ importable, and keeps runs repeatable and off each other's cores."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """With `-n 2` one process takes all that shares the session's Ray, first and in order; the other the rest by file."""
    for item in items:
        with_ray = item.get_closest_marker("system") is not None
        item.add_marker(pytest.mark.xdist_group("ray" if with_ray else item.path.name))
    items.sort(key=lambda item: item.get_closest_marker("system") is None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# What a test runs in this process may set another number, and images are equal to the bit only at one number of threads.
@pytest.fixture(scope="module", autouse=True)
def one_thread_for_what_a_module_shares():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
