"""The ``rlproxi`` command. A user's mistake is one line on stderr and exit status 2, never a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

#: What a user can get wrong: a value, a file that is missing, in the way or not readable. ConfigError is a ValueError.
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def at_least(minimum: int):
    """An argparse type: an integer >= minimum."""

    def convert(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    convert.__name__ = "integer"
    return convert


def counts(text: str) -> list[int]:
    """An argparse type: step counts, ascending."""
    return sorted({at_least(1)(part) for part in text.split(",")})


def share(text: str) -> float:
    """An argparse type: a finite number >= 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


class _SamplersHelp(argparse.HelpFormatter):
    """Fills in the samplers' names when the help is printed: importing them takes seconds."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        from ..evaluation.drawers import NAMES

        return action.help and action.help.replace("{samplers}", ", ".join(NAMES))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="rlproxi", description="Reward fine-tuning of text-to-image models around proximal diffusion."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # run, bench and doctor have parsers of their own, which get everything behind the word.
    commands.add_parser("run", add_help=False, help="pre-train, fine-tune, evaluate and report: python -m rlproxi.run")
    commands.add_parser("bench", add_help=False, help="measure this machine: rlproxi bench [--json FILE]")
    commands.add_parser(
        "doctor", add_help=False, help="what is missing, and whether a run fits a cluster: rlproxi doctor -h"
    )

    draw = commands.add_parser("sample", help="draw images from a trained model")
    draw.add_argument("prompts", nargs="+", metavar="PROMPT")
    draw.add_argument("--model", required=True, metavar="DIR", help="a run directory or a model folder")
    draw.add_argument("--steps", type=at_least(1), metavar="N", help="number of proximal steps (default: the model's)")
    draw.add_argument("--guidance", type=float, metavar="W", help="guidance scale; 1 is none (default: the model's)")
    draw.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        metavar="S",
        help="the first image's seed; the next ones count up, alike for every prompt (default 0)",
    )
    draw.add_argument("--count", type=at_least(1), default=4, metavar="K", help="images of each prompt (default 4)")
    draw.add_argument(
        "--out",
        type=Path,
        default=Path("sample.png"),
        metavar="FILE.png",
        help="one row for each prompt (default sample.png)",
    )
    draw.add_argument("--scale", type=at_least(1), default=8, metavar="X", help="enlargement (default 8)")
    draw.set_defaults(action=sample)

    judge = commands.add_parser("score", help="score images that already exist with a reward")
    judge.add_argument("images", nargs="+", metavar="IMAGES", help="files, or folders with images in them and below")
    judge.add_argument("--reward", required=True, metavar="NAME", help="a registered scorer, for example hpsv2")
    judge.add_argument("--checkpoint", metavar="FILE", help="its weights: short for --param checkpoint=FILE (or path=)")
    judge.add_argument(
        "--param", action="append", default=[], metavar="KEY=VALUE", help="another of its parameters; the value is YAML"
    )
    words = judge.add_mutually_exclusive_group()
    words.add_argument("--prompt", metavar="TEXT", help="one prompt for all images")
    words.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt for each image in order (.txt, .json, .jsonl), or a "
        "folder with the HPSv2 benchmark's; default: the .txt file beside each image",
    )
    judge.add_argument("--batch", type=at_least(1), default=32, metavar="N", help="images scored at once (default 32)")
    out = judge.add_mutually_exclusive_group()
    out.add_argument("--json", type=Path, metavar="FILE", help="also write the scores here")
    out.add_argument("--csv", type=Path, metavar="FILE", help="also write the scores here")
    judge.set_defaults(action=score)

    compare = commands.add_parser(
        "eval",
        help="draw from models by samplers at each number of steps, judge, and plot",
        description="Reward, diversity, distance to data and seconds an image against the number of steps. Models that share a LABEL are "
        "runs of one method: its intervals are over them and over --seeds.",
        formatter_class=_SamplersHelp,
    )
    compare.add_argument(
        "models",
        nargs="+",
        metavar="[LABEL=]MODEL[+LORA][@SAMPLER]",
        help="run directories, model folders, or diffusers folders (drawn from by their own pipeline)",
    )
    compare.add_argument(
        "--steps",
        type=counts,
        default=[1, 2, 4, 6, 8, 10, 16, 20, 50],
        metavar="N,N,...",
        help="(default 1,2,4,6,8,10,16,20,50)",
    )
    compare.add_argument(
        "--samplers",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,...",
        help="each model by each of: {samplers} (default: the model's own)",
    )
    compare.add_argument(
        "--config",
        metavar="RUN_DIR|FILE",
        help="prompts, rewards and data (default: the first model that is a run directory)",
    )
    compare.add_argument("--seeds", type=at_least(1), default=1, metavar="K", help="draws of the noise (default 1)")
    compare.add_argument("--prompts", type=at_least(1), metavar="P", help="held-out prompts (default: the config's)")
    compare.add_argument(
        "--samples", type=at_least(2), metavar="S", help="samples of each prompt (default: the config's)"
    )
    compare.add_argument("--guidance", type=float, metavar="W", help="guidance scale (default: each model's)")
    compare.add_argument(
        "--batch", type=at_least(1), default=64, metavar="B", help="images of one sampler call (default 64)"
    )
    compare.add_argument("--device", metavar="D", help="(default: a GPU where there is one)")
    compare.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="float32",
        help="the networks' arithmetic (default float32)",
    )
    compare.add_argument(
        "--reach", metavar="LABEL@N", help="also tell at how many steps each reaches this one's reward"
    )
    compare.add_argument(
        "--out",
        type=Path,
        default=Path("frontier"),
        metavar="DIR",
        help="what was measured before is kept there and not measured again (default frontier)",
    )
    compare.set_defaults(action=evaluate)

    give = commands.add_parser("export", help="write a model as a diffusers folder that stands alone")
    give.add_argument("model", metavar="MODEL", help="a run directory or a model folder")
    give.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not exist yet")
    give.add_argument(
        "--merge",
        action=argparse.BooleanOptionalAction,
        help="add adapters to the base's weights (default: where the base is a published network)",
    )
    give.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights as stored (default: as they are)"
    )
    give.add_argument("--adapter-only", action="store_true", help="the adapters alone, in diffusers' LoRA format")
    give.set_defaults(action=export)

    offer = commands.add_parser("serve", help="serve a model over HTTP, by Ray Serve")
    offer.add_argument("model", metavar="MODEL", help="a run directory or a model folder")
    offer.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine only)")
    offer.add_argument("--port", type=at_least(1), default=8000, help="(default 8000)")
    offer.add_argument("--replicas", type=at_least(1), default=1, metavar="N", help="copies of the model (default 1)")
    offer.add_argument("--gpus", type=share, default=0.0, metavar="F", help="GPUs for each, fractions too (default 0)")
    offer.add_argument("--cpus", type=share, default=1.0, metavar="F", help="CPUs for each (default 1)")
    offer.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="float32",
        help="the network's arithmetic (default float32)",
    )
    offer.add_argument(
        "--exact",
        action=argparse.BooleanOptionalAction,
        help="draw the images of a batch one at a time, so that none depends on its neighbours in its "
        "last digit (default: on a CPU)",
    )
    offer.add_argument("--max-batch", type=at_least(1), default=8, metavar="N", help="images at once (default 8)")
    offer.add_argument(
        "--batch-wait-ms",
        type=at_least(0),
        default=20,
        metavar="MS",
        help="how long a batch waits for company (default 20)",
    )
    offer.add_argument(
        "--max-queue",
        type=at_least(1),
        default=64,
        metavar="N",
        help="requests accepted and not yet answered; the next is told 503 (default 64)",
    )
    offer.add_argument(
        "--max-steps", type=at_least(1), default=100, metavar="N", help="a request may ask for (default 100)"
    )
    offer.add_argument("--max-prompt-chars", type=at_least(1), default=2000, metavar="N", help="(default 2000)")
    offer.set_defaults(action=serve)

    watch = commands.add_parser("dashboard", help="show runs on a live page: curves, samples, who does what")
    watch.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="run directories, or a folder of them")
    watch.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine only)")
    watch.add_argument("--port", type=at_least(0), metavar="N", help="0: any (default 8270, or the next free one)")
    watch.set_defaults(action=dashboard)

    tell = commands.add_parser("report", help="write report.html from a run directory")
    tell.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    tell.set_defaults(action=report)
    return top


def sample(arguments: argparse.Namespace) -> int:
    """Writes a grid: one row for each prompt, one column for each seed."""
    from ..evaluation.images import grid, save_png

    if arguments.out.suffix.lower() != ".png":  # known before the model is loaded
        raise ValueError(f"--out {arguments.out} must end in .png")
    # Heavy imports wait until the arguments are known to be good.
    from ..models.pipeline import TextToImage

    model = TextToImage.from_pretrained(arguments.model)
    for prompt in arguments.prompts:
        unknown = model.unknown_words(prompt)
        if unknown:
            print(f"warning: this model has no token for {', '.join(unknown)}", file=sys.stderr)
    prompts = [prompt for prompt in arguments.prompts for _ in range(arguments.count)]
    seeds = [arguments.seed + i for i in range(arguments.count)] * len(arguments.prompts)
    images = model(prompts, arguments.steps, arguments.guidance, seeds)
    print(save_png(grid(images, arguments.count, arguments.scale), arguments.out))
    return 0


def score(arguments: argparse.Namespace) -> int:
    from . import score as command

    return command.score(arguments)


def evaluate(arguments: argparse.Namespace) -> int:
    from ..evaluation import frontier

    return frontier.command(frontier.Options(**{f.name: getattr(arguments, f.name) for f in fields(frontier.Options)}))


def export(arguments: argparse.Namespace) -> int:
    from ..models import export as exporting

    print(exporting.export(arguments.model, arguments.out, arguments.merge, arguments.dtype, arguments.adapter_only))
    return 0


def serve(arguments: argparse.Namespace) -> int:
    """Serves until Ctrl-C or SIGTERM, then takes the application down."""
    import secrets
    import signal
    import threading

    import ray

    from actors.cluster.join import connect
    from actors.serve import image_service

    identity = secrets.token_hex(4)
    limits = image_service.Limits(
        arguments.max_queue,
        arguments.max_batch,
        arguments.batch_wait_ms,
        arguments.max_steps,
        arguments.max_prompt_chars,
    )
    app = image_service.application(
        arguments.model,
        identity,
        arguments.replicas,
        arguments.cpus,
        arguments.gpus,
        arguments.precision,
        arguments.exact,
        limits,
    )
    started, name = connect() == "started", f"images-{identity}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        image_service.check_size(arguments.replicas, arguments.cpus, arguments.gpus)
        print(
            f"serving {arguments.model} at {image_service.up(app, identity, name, arguments.host, arguments.port)}; "
            "Ctrl-C ends it",
            flush=True,
        )
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nending", flush=True)
    finally:
        image_service.down(name, everything=started)
        if started:
            ray.shutdown()
    return 0


def dashboard(arguments: argparse.Namespace) -> int:
    """Serves until Ctrl-C."""
    from ..dashboard import server

    return server.command(arguments.run_dirs, arguments.host, arguments.port)


def report(arguments: argparse.Namespace) -> int:
    from ..pages.report import write_report

    print(write_report(arguments.run_dir))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 2 for a user's mistake, or what ``run`` or ``bench`` returns."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("run", "bench"):
        return _delegate(argv[0], argv[1:])
    if argv and argv[0] == "doctor":
        return _doctor(argv[1:])
    arguments = parser().parse_args(argv)
    try:
        return arguments.action(arguments)
    except USER_ERRORS as error:
        return _complain(error)


def _doctor(argv: list[str]) -> int:
    from . import doctor

    def survey(address: str, folder: str) -> dict:
        from actors.cluster.survey import survey as ask

        return ask(address, folder)

    try:
        return doctor.command(argv, survey)
    except USER_ERRORS as error:
        return _complain(error)


def _delegate(command: str, argv: list[str]) -> int:
    """Runs another module's main(argv). Only errors known to be the user's are shortened: a run is long, and any
    other ValueError in it is a bug whose traceback is needed."""
    from ..errors import ConfigError

    try:
        if command == "run":
            from .run import main as target
        else:
            from .bench import main as target
        return int(target(argv) or 0)
    except (ConfigError, FileNotFoundError) as error:
        return _complain(error)


def _complain(error: Exception) -> int:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    print(f"error: {'; '.join(lines) or type(error).__name__}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
