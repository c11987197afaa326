"""What ``rlproxi doctor`` checks on this machine: packages, GPUs, tokens, disk, memory, clock, ports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config.loading import Config
from .findings import Finding, fail, ok, warn

NEEDED = (
    *("ray", "torch", "deepspeed", "transformers", "diffusers", "peft", "safetensors"),
    *("numpy", "pydantic", "matplotlib", "pillow", "sentencepiece", "tqdm"),
)
#: Port of a Ray head -> what listens there.
RAY_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard and job server"}
_GIB = 1024**3


def packages() -> Iterator[Finding]:
    """Compare the installed versions with what the installed rlproxi asks for."""
    bounds = _bounds()
    versions, wrong = [f"python {platform.python_version()}"], []
    for name in NEEDED:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield fail("packages", f"{name} is not installed", "pip install rlproxi, or `pip install .` in a checkout")
            continue
        versions.append(f"{name} {version}")
        bound = bounds.get(name)
        if bound is not None and not bound.contains(version, prereleases=True):
            wrong.append(fail("packages", f"{name} {version} is outside of {bound}", f"pip install '{name}{bound}'"))
    yield ok("packages", ", ".join(versions))
    yield from wrong


def _bounds() -> dict[str, Any]:
    """{package: packaging's SpecifierSet that rlproxi asks for}; {} where rlproxi is not installed."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(text) for text in importlib.metadata.requires("rlproxi") or []]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    return {
        r.name: r.specifier
        for r in wanted
        if str(r.specifier) and (r.marker is None or r.marker.evaluate({"extra": ""}))
    }


def accelerators(config: Config, asked: float, elsewhere: bool) -> Iterator[Finding]:
    """Compare the GPUs that torch sees with those the run asks for; check NCCL for a learner of several ranks.

    Args:
        asked: GPUs of all roles together.
        elsewhere: the run is meant for a cluster, not for this machine.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        about = torch.cuda.get_device_properties(i)
        yield ok("gpu", f"{i}: {about.name}, {about.total_memory / _GIB:.0f} GiB")
    if not count:
        driver = _driver()
        if driver:
            text = f"the driver is there ({driver}), but torch {torch.__version__} sees no GPU"
            yield fail(
                "gpu", text, "install a CUDA build of torch that this driver takes (the table is on pytorch.org)"
            )
        else:
            yield ok("gpu", "none on this machine; everything runs on CPUs")
    if asked > count:
        text = f"this run asks for {asked:g} GPUs and this machine has {count}"
        if elsewhere:
            yield ok("gpu", f"{text}; the cluster is looked at below")
        else:
            local = "set resources.*_gpus and rewards.num_gpus to 0"
            yield fail("gpu", text, f"name the cluster it is for (--cluster FILE or --address), or {local}")
    several = config.resources.learner_gpus > 0 and config.resources.learner_workers > 1
    if several and count:
        if torch.distributed.is_available() and torch.distributed.is_nccl_available():
            yield ok("nccl", ".".join(map(str, torch.cuda.nccl.version())))
        else:
            text = "this build of torch has no NCCL, and the learner has several ranks on GPUs"
            yield fail("nccl", text, "install torch's CUDA build for Linux")


def _driver() -> str | None:
    """The first GPU's name and driver version; None where nvidia-smi finds none."""
    return _answer("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").partition("\n")[0] or None


def _answer(*command: str) -> str:
    """What a command prints; '' where it cannot be run, fails or takes 20 s."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def token() -> Iterator[Finding]:
    """Check the token that this shell would send to a cluster, and what `ray start` would do (Ray 2.60)."""
    mode, spelt = os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    there = bool(spelt) or file.is_file()
    if mode == "token" and not there:
        text = f"RAY_AUTH_MODE=token, and there is no token in RAY_AUTH_TOKEN or {file}"
        yield fail("token", text, "`ray get-auth-token --generate`, or copy the cluster's token there")
    elif mode == "token":
        yield ok("token", "RAY_AUTH_MODE=token, and a token is there")
    elif mode is None and there:
        text = f"a token is there ({'RAY_AUTH_TOKEN' if spelt else file}), but RAY_AUTH_MODE is not set: "
        text += "`ray start --head` turns tokens on, and clients of this shell send none"
        yield warn("token", text, "export RAY_AUTH_MODE=token (docs/cluster.md, Tokens)")
    else:
        text = f"RAY_AUTH_MODE is {mode or 'not set, and there is no token'}"
        yield ok("token", f"{text}: a cluster started here is open to whoever reaches it")
    if file.is_file() and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        yield warn("token", f"{file} can be read by others on this machine", f"chmod 600 {file}")


def space(config: Config) -> Iterator[Finding]:
    """Check the free space where run directories are made, and the memory for Ray's objects."""
    folder = Path(config.run.dir).absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        free = shutil.disk_usage(there).free / _GIB
        writable = os.access(there, os.W_OK)
    except OSError as error:
        yield fail("disk", f"run.dir {config.run.dir}: {error}")
        return
    if not writable:
        yield fail("disk", f"run.dir {config.run.dir}: {there} cannot be written", "give run.dir a folder of yours")
    else:
        level = "fail" if free < 1 else "warn" if free < 20 else "ok"
        need = "" if level == "ok" else "checkpoints of a model of 1 B parameters take about 16 GB each; two are kept"
        yield Finding(level, "disk", f"run.dir {config.run.dir}: {free:.0f} GiB free", need)
    shm, memory = Path("/dev/shm"), _memory()
    if shm.is_dir() and memory:
        size = shutil.disk_usage(shm).total
        text = f"{memory / _GIB:.0f} GiB, /dev/shm {size / _GIB:.0f} GiB"
        remedy = "Ray keeps objects in /dev/shm: start the container with --shm-size of a third of its memory"
        yield ok("memory", text) if size >= 0.25 * memory else warn("memory", text, remedy)


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def clock() -> Iterator[Finding]:
    """Check the clock, which certificates, cloud tokens and timelines need. systemd says whether NTP runs."""
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    if time.gmtime().tm_year < 2025:
        yield fail("clock", f"it is {now} here, which cannot be", "set the clock: sudo timedatectl set-ntp true")
        return
    kept = _answer("timedatectl", "show", "-p", "NTPSynchronized", "--value")
    if kept == "no":
        yield warn("clock", f"{now}, and no NTP client keeps it right", "sudo timedatectl set-ntp true")
    else:
        yield ok("clock", now + (", kept by NTP" if kept == "yes" else ""))


def ports(config: Config) -> Iterator[Finding]:
    """Check the ports where a Ray head and the live page would listen."""
    for port, what in RAY_PORTS.items():
        state = "in use; a run here joins the cluster, if it is Ray's" if _taken("127.0.0.1", port) else "free"
        yield ok("ports", f"{port} ({what}): {state}")
    t = config.telemetry
    if t.dashboard and t.dashboard_port and _taken(t.dashboard_host, t.dashboard_port):
        yield ok("ports", f"{t.dashboard_port} (the live page): in use; the next free one is taken")


def _taken(host: str, port: int) -> bool:
    with socket.socket() as one:
        one.settimeout(1)
        try:
            return one.connect_ex(("127.0.0.1" if re.fullmatch(r"0\.0\.0\.0|::", host) else host, port)) == 0
        except OSError:
            return False
