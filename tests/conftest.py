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


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
