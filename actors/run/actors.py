"""The actors behind the stages before, rl and after: conductor and weight store, rollout actors and rewards."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from rlproxi.config.loading import Config
from rlproxi.errors import ConfigError

from ..cluster.join import beside_driver
from ..rewards.service import deploy
from ..rl.conductor import Conductor
from ..rl.weights import WeightStore


class RunActors:
    """Starts, checks and ends the actors of a run. ``names``: by which the ranks find conductor and weight store."""

    def __init__(self, run_dir: Path, log: Any):
        self.run_dir, self.log = run_dir, log
        self.names = f"{run_dir.name} conductor", f"{run_dir.name} weights"
        self.conductor: Any = None
        self.store: Any = None
        self.apps: dict[str, str] = {}  # scorer -> its Serve application

    def start(self, config: Config, model: Path) -> None:
        """Makes all that is not there yet, and waits for it. Raises ConfigError where a reward cannot start."""
        if self.conductor is not None:
            return
        # Rollout actors load the model while the rewards are deployed.
        self.store = _named(WeightStore, self.names[1], keep=config.rl.max_staleness + 2)
        self.conductor = _named(Conductor, self.names[0], config, str(self.run_dir), str(model), self.log, self.store)
        try:
            placement, hang_s = config.resources.placement, config.faults.hang_timeout_s
            self.apps = self.apps or deploy(config.rewards, self.run_dir.name, placement, hang_s)
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            raise ConfigError(f"rewards: {error}") from None
        ray.get(self.conductor.connect.remote(self.apps))

    def handles(self) -> dict[str, Any]:
        """Name -> handle of the actors that the run cannot go on without; {} before ``start``."""
        return {} if self.conductor is None else {"conductor": self.conductor, "weight store": self.store}

    def well(self) -> bool:
        """Whether conductor and weight store are there and can go on."""
        try:
            answers = ray.get([role.alive.remote() for role in self.handles().values()], timeout=10)
        except (RayActorError, GetTimeoutError):
            return False
        return bool(answers) and all(answers)

    def close(self) -> None:
        """Ends conductor, rollout actors and weight store, whatever state they are in; the rewards stay."""
        if self.conductor is not None:
            with contextlib.suppress(RayError):  # it may be what is lost: then its actors have gone with it
                ray.get(self.conductor.close.remote(), timeout=10)
            ray.kill(self.conductor)
            ray.kill(self.store)
            self.conductor = self.store = None


def _named(kind: Any, name: str, *arguments: Any, **more: Any) -> Any:
    """An actor with a name, on this node; waits where one that was killed still has it."""
    given_up = time.monotonic() + 60
    while True:
        try:
            return kind.options(name=name, **beside_driver()).remote(*arguments, **more)
        except ValueError:
            if time.monotonic() > given_up:
                raise
            time.sleep(0.1)
