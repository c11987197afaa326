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


#: Of tests/system, what needs nothing of the smoke run: on a Ray of its own it keeps the second process at work as long
#: as the first.
ON_A_RAY_OF_THEIR_OWN = ("test_curation", "test_published", "test_serve_images")


def pytest_xdist_make_scheduler(config, log):
    """With `-n 2` one process takes the tests that share the smoke run and its Ray, the other the rest by file."""
    from xdist.scheduler import LoadScopeScheduling

    class OneRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0])
            return "ray" if file.parent.name == "system" and file.stem not in ON_A_RAY_OF_THEIR_OWN else str(file)

    config.option.loadscopereorder = False  # in the order below
    return OneRay(config, log)


#: Files and folders whose tests are marked slow: each takes more than 15 CPU seconds. What is left,
#: ``-m fast``, may take five minutes on two cores.
SLOW = (
    "actors/train/test_engine_state.py",
    "actors/train/test_saving.py",
    "actors/train/test_two_ranks.py",
    "fuzz",
    "models/test_diffusers_pipeline.py",
    "models/test_export.py",
    "models/test_lora.py",
    "planning/test_memory.py",
    "planning/test_memory_algorithms.py",
)
TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by -m
def pytest_collection_modifyitems(items):
    """Mark what is slow or fast, and sort: what takes longest begins first."""
    slow = [TESTS / place for place in SLOW]
    assert all(place.exists() for place in slow), f"SLOW names what is not there: {slow}"
    for item in items:
        if any(item.path.is_relative_to(place) for place in slow):
            item.add_marker("slow")
        if not any(item.get_closest_marker(name) for name in ("system", "slow", "exhaustive")):
            item.add_marker("fast")
    # Of the system tests, those that count seconds come last, when the other process is at its end.
    items.sort(key=lambda item: (item.get_closest_marker("system") is None, "test_faults" in item.nodeid))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# What a test runs in this process may set another number, and images are equal to the bit only at one number of
# threads.
@pytest.fixture(scope="module", autouse=True)
def one_thread_for_what_a_module_shares():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


_LINEAR = torch.nn.functional.linear


# ZeRO 3 puts its own in the place of torch's, for good: it knows no autocast, and needs another amount of memory.
@pytest.fixture(autouse=True)
def torchs_own_linear():
    torch.nn.functional.linear = _LINEAR
    yield
    torch.nn.functional.linear = _LINEAR


@pytest.fixture(scope="session")
def process_group():
    """A torch.distributed world of this process, one for all tests: DeepSpeed keeps what it knows of the first."""
    import torch.distributed as dist

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            patch.setenv(name, value)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()
