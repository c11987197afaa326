"""The messages between the roles of the stage rl."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from actors.rl.messages import Ended, Leave, Lost, Ready, Stopped, Trained
from rlproxi.algorithms.requests import SampleRequest
from rlproxi.telemetry.timeline import Span

REQUESTS = [SampleRequest("train", 3, ("a hat",), (7,), 2), SampleRequest("train", 3, ("a face",), (8,), 2)]


def test_a_batch_keeps_its_requests_through_a_pickle():
    ready = Ready(Ready.pickle(REQUESTS), (3, 2), np.zeros((2, 2), np.float32), {1: "chain"}, "broken")
    again = pickle.loads(pickle.dumps(ready))
    assert again.requests() == REQUESTS and again.pickled == ready.pickled
    assert (again.versions, again.chains, again.refused) == ((3, 2), {1: "chain"}, "broken")
    assert np.array_equal(again.rewards, ready.rewards)


@pytest.mark.parametrize(
    "message",
    [Ended(), Stopped(), Leave(), Lost("gone"), Trained(1, 3, {"loss": 1.0}, (Span("learner", 0, "train", 1, 2),))],
)
def test_a_message_is_equal_to_its_copy(message):
    assert pickle.loads(pickle.dumps(message)) == message


def test_the_weight_store_imports_no_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, actors.rl.weights; assert 'torch' not in sys.modules"], check=True
    )
