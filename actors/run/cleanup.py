"""What a run leaves behind in a cluster when it is killed, and who clears it up."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import ray

from ..cluster.join import beside_driver


@ray.remote(num_cpus=0)
class Caretaker:
    """Outlives its run. Ray ends a dead driver's actors; Serve's replicas, and what was asked of the autoscaler, would
    stay.

    Looks every second whether the run's scribe, which dies with the driver, is still there; clears up once it is not.
    """

    async def watch(self, scribe: Any, apps: list[str], asked: bool) -> None:
        from ray.exceptions import RayActorError

        while True:
            try:
                await scribe.stop_reason.remote()
            except RayActorError:
                break
            await asyncio.sleep(1.0)
        await asyncio.to_thread(self._clear, apps, asked)
        ray.actor.exit_actor()

    def _clear(self, apps: list[str], asked: bool) -> None:
        from ray import serve

        from ..cluster.join import request

        if asked:
            request([])
        running = serve.status().applications
        for app in apps:
            if app in running:
                serve.delete(app, _blocking=False)


def start(scribe: Any, apps: list[str], asked: bool) -> Any:
    """A caretaker for the run of ``scribe``; kill it once the run has cleared up by itself.

    Args:
        apps: names of the run's Serve applications. asked: whether the run asks the autoscaler for nodes.
    """
    caretaker = Caretaker.options(name=f"caretaker-{uuid.uuid4().hex}", lifetime="detached", **beside_driver()).remote()
    caretaker.watch.remote(scribe, apps, asked)
    return caretaker
