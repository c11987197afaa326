"""``rlproxi serve``: serve a model over HTTP with Ray Serve."""

from __future__ import annotations

import argparse

from .arguments import add_precision, at_least, share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run directory or a model folder")
    add("--host", default="127.0.0.1", help="the address to listen on (default: this machine only)")
    add("--port", type=at_least(1), default=8000, help="(default 8000)")
    add("--replicas", type=at_least(1), default=1, metavar="N", help="copies of the model (default 1)")
    add("--gpus", type=share, default=0.0, metavar="F", help="GPUs for each, fractions too (default 0)")
    add("--cpus", type=share, default=1.0, metavar="F", help="CPUs for each (default 1)")
    add_precision(parser)
    exact = "draw a batch's images one at a time: none then depends on the others in its last digit (default: on a CPU)"
    add("--exact", action=argparse.BooleanOptionalAction, help=exact)
    add("--max-batch", type=at_least(1), default=8, metavar="N", help="images at once (default 8)")
    wait = "how long a batch waits for more requests (default 20)"
    add("--batch-wait-ms", type=at_least(0), default=20, metavar="MS", help=wait)
    queue = "requests accepted and not yet answered; the next is answered 503 (default 64)"
    add("--max-queue", type=at_least(1), default=64, metavar="N", help=queue)
    add("--max-steps", type=at_least(1), default=100, metavar="N", help="a request may ask for (default 100)")
    add("--max-prompt-chars", type=at_least(1), default=2000, metavar="N", help="(default 2000)")


def command(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM, then take the application down. Returns 0."""
    import secrets
    import signal
    import threading

    import ray

    from actors.cluster.join import connect
    from actors.serve import image_service

    identity = secrets.token_hex(4)
    o = options
    limits = image_service.Limits(o.max_queue, o.max_batch, o.batch_wait_ms, o.max_steps, o.max_prompt_chars)
    app = image_service.application(o.model, identity, o.replicas, o.cpus, o.gpus, o.precision, o.exact, limits)
    started, name = connect() == "started", f"images-{identity}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        image_service.check_size(o.replicas, o.cpus, o.gpus)
        url = image_service.up(app, identity, name, o.host, o.port)
        print(f"serving {o.model} at {url}; Ctrl-C ends it", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nending", flush=True)
    finally:
        image_service.down(name, everything=started)
        if started:
            ray.shutdown()
    return 0
