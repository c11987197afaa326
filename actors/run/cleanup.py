"""Clears up what a run would leave in a cluster when it is killed."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from ..cluster.join import beside_driver


@ray.remote(num_cpus=0)
class Cleanup:
    """Outlives its run. Ray ends a dead driver's actors; Serve's replicas and requests to the autoscaler would stay.

    Looks every second whether the run-log actor, which dies with the driver, is still there; clears up once it is not.
    """

    async def watch(self, log: Any, apps: Sequence[str], asked: bool) -> None:
        """Waits for the end of the run; see ``start``."""
        with contextlib.suppress(RayActorError):
            while True:
                await log.stop_state.remote()
                await asyncio.sleep(1.0)
        await asyncio.to_thread(self._clear, apps, asked)
        ray.actor.exit_actor()

    def _clear(self, apps: Sequence[str], asked: bool) -> None:
        from ray import serve

        from ..cluster.join import request  # late: it brings torch into the process

        if asked:
            request([])
        running = serve.status().applications
        for app in apps:
            if app in running:
                serve.delete(app, _blocking=False)


def start(log: Any, apps: Sequence[str], asked: bool) -> Any:
    """The cleanup actor of a run; kill it once the run has cleared up by itself.

    Args:
        log: the run-log actor.
        apps: names of the run's Serve applications.
        asked: whether the run asks the autoscaler for nodes.
    """
    actor: Any = Cleanup
    cleanup = actor.options(name=f"cleanup-{uuid.uuid4().hex}", lifetime="detached", **beside_driver()).remote()
    cleanup.watch.remote(log, apps, asked)
    return cleanup
