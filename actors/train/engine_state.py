"""The state of an engine in safetensors, by parameter name, for any ZeRO stage and number of ranks.

DeepSpeed's own checkpoints are pickles, which can execute code when they are loaded, and fit one number of ranks;
torch.distributed.checkpoint pickles its index. So DeepSpeed's documented accessors (``safe_get_*``) put the whole
tensors together, one at a time, and each rank writes its share of the files. All is float32: nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlproxi.models.loading import trainable

from .checkpoints import WRITE_ERRORS

WEIGHT, BUFFER, STEP = "weight", "buffer", "step"
#: A file is closed once it holds so many bytes: what a rank has in memory while it writes.
FILE_BYTES = 256 * 2**20


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*.safetensors"))


class EngineState:
    """The trained parameters of a DeepSpeed engine, their optimizer state, and the module's buffers.

    A key is <kind>/<parameter>; the kind is weight, buffer, step or the optimizer's name of a moment.
    """

    def __init__(self, engine, stage: int, device: torch.device):
        self.module: nn.Module = engine.module
        self.zero, self.stage, self.device = engine.optimizer, stage, device
        self.base = engine.optimizer.optimizer if stage else engine.optimizer
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.parameters = trainable(self.module)
        kept = self.module.state_dict().keys()  # buffers that are computed anew are not among them
        self.buffers = {name: buffer for name, buffer in self.module.named_buffers() if name in kept}

    # -- to files ---------------------------------------------------------------------------

    def save(self, folder: Path) -> list[Path]:
        """Writes the state into ``folder``; returns the files that this rank wrote.

        Raises OSError or SafetensorError where this rank could not write, after its part in the collectives.
        """
        files: list[Path] = []
        failed = None
        for number, keys in enumerate(self._shares()):
            mine = number % self.world == self.rank
            tensors = {}
            for key in keys:
                value = self._read(key)
                if mine and failed is None:
                    tensors[key] = value.detach().cpu().contiguous()
            if mine and failed is None:
                files.append(folder / f"state-{number:05d}.safetensors")
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    save_file(tensors, files[-1])
                except WRITE_ERRORS as error:
                    failed = error
        if failed is not None:
            raise failed
        return files

    def _shares(self) -> Iterator[list[str]]:
        """The keys of each file, the same on every rank."""
        keys: list[str] = []
        held = 0
        for key, size in self._entries():
            if keys and held + size > FILE_BYTES:
                yield keys
                keys, held = [], 0
            keys.append(key)
            held += size
        if keys:
            yield keys

    def _entries(self) -> Iterator[tuple[str, int]]:
        """(key, bytes), parameter by parameter."""
        for name in self.parameters:
            size = 4 * self._shape(name).numel()
            yield f"{WEIGHT}/{name}", size
            moments = self._moments(name)
            yield from ((f"{kind}/{name}", size) for kind in moments)
            if moments:
                yield f"{STEP}/{name}", 4
        yield from ((f"{BUFFER}/{name}", value.nbytes) for name, value in self.buffers.items())

    # -- from files -------------------------------------------------------------------------

    def load(self, folder: Path) -> None:
        """The inverse of ``save``; each file is read by one rank, which sends it to the others.

        Raises FileNotFoundError where there is no state, ValueError where it is of another network.
        """
        shapes = self._shapes(folder)
        self._check(folder, shapes)
        self._forget({key.partition("/")[0] for key in shapes} - {WEIGHT, BUFFER, STEP})
        steps = {}
        for number, file in enumerate(_files(folder)):
            with safe_open(file, framework="pt") as stored:
                for key in sorted(stored.keys()):
                    value = self._sent(key, stored, number % self.world)
                    kind, _, name = key.partition("/")
                    if kind == STEP:
                        steps[name] = value
                    else:
                        self._write(kind, name, value)
        self._set_steps(steps)

    def _sent(self, key: str, stored, source: int) -> Tensor:
        kind, _, name = key.partition("/")
        dtype = self.buffers[name].dtype if kind == BUFFER else torch.float32
        if self.rank == source:
            value = stored.get_tensor(key).to(self.device, dtype)
        else:
            value = torch.empty(stored.get_slice(key).get_shape(), dtype=dtype, device=self.device)
        if self.world > 1:
            dist.broadcast(value, src=source)
        return value

    def _shapes(self, folder: Path) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for file in _files(folder):
            with safe_open(file, framework="pt") as stored:
                keys = stored.keys()
                shapes.update({key: tuple(stored.get_slice(key).get_shape()) for key in keys})
        if not shapes:
            raise FileNotFoundError(f"{folder} holds no engine state that can be loaded")
        return shapes

    def _check(self, folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        own = {f"{WEIGHT}/{name}": tuple(self._shape(name)) for name in self.parameters}
        own.update({f"{BUFFER}/{name}": tuple(value.shape) for name, value in self.buffers.items()})
        wrong = [key for key, shape in own.items() if shapes.get(key) != shape]
        for key in sorted(shapes.keys() - own.keys()):
            kind, _, name = key.partition("/")
            expected = () if kind == STEP else own.get(f"{WEIGHT}/{name}")
            if kind in (WEIGHT, BUFFER) or name not in self.parameters or shapes[key] != expected:
                wrong.append(key)
        if wrong:
            some = f"{', '.join(wrong[:4])}{', ...' if len(wrong) > 4 else ''}"
            raise ValueError(
                f"{folder} is the state of another network; missing, unknown or of another shape: {some}. "
                "Resume with the model.* settings that it was written with"
            )

    # -- one tensor, whatever the stage -----------------------------------------------------

    def _shape(self, name: str) -> torch.Size:
        p = self.parameters[name]
        return getattr(p, "ds_shape", p.shape)

    def _flat(self) -> list[Tensor]:
        """What the optimizer itself steps: at ZeRO 1 to 3 this rank's flat pieces of all parameters."""
        if self.stage == 0:
            return list(self.parameters.values())
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _held(self, name: str) -> tuple[Tensor, dict]:
        """The tensor that the optimizer keeps a parameter's state under, and that state."""
        p = self.parameters[name] if self.stage == 0 else self._flat()[0]
        return p, self.base.state.get(p, {})

    def _moments(self, name: str) -> list[str]:
        p, state = self._held(name)
        # In one order on all ranks: each key is a collective.
        return sorted(kind for kind, value in state.items() if torch.is_tensor(value) and value.shape == p.shape)

    def _read(self, key: str) -> Tensor:
        """The whole tensor, on every rank; a collective from ZeRO 1 on."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        kind, _, name = key.partition("/")
        if kind == BUFFER:
            return self.buffers[name].clone()
        p, state = self.parameters[name], self._held(name)[1]
        if kind == STEP:
            # At ZeRO 1 to 3 it is one for all, and a file holds no tensor twice.
            return state[STEP].float().reshape(()).clone()
        if self.stage == 0:
            return p if kind == WEIGHT else state[kind]
        return safe_get_full_fp32_param(p) if kind == WEIGHT else safe_get_full_optimizer_state(p, kind)

    @torch.no_grad()
    def _write(self, kind: str, name: str, value: Tensor) -> None:
        if kind == BUFFER:
            self.buffers[name].copy_(value)
        elif self.stage == 0:
            (self.parameters[name] if kind == WEIGHT else self._held(name)[1][kind]).copy_(value)
        elif self.stage == 3:
            self._write_sharded(kind, self.parameters[name], value)
        else:
            self._write_partitioned(kind, self.parameters[name], value)

    @staticmethod
    def _write_partitioned(kind: str, p: Tensor, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind != WEIGHT:
            safe_set_full_optimizer_state(p, value, kind)
            return
        p.copy_(value)
        safe_set_full_fp32_param(p, value)

    def _write_sharded(self, kind: str, p: Tensor, value: Tensor) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        # Not safe_set_full_*: those cannot take a parameter whose size is no multiple of the ranks.
        part = p.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed puts it there
        padded = value.new_zeros(part * self.world)
        padded[: value.numel()] = value.flatten()
        local = padded[part * self.rank : part * (self.rank + 1)]
        if kind != WEIGHT:
            safe_set_local_optimizer_state(p, local, kind)
            return
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            p.copy_(value)
        safe_set_local_fp32_param(p, local)

    def _forget(self, kinds: set[str]) -> None:
        """Empty moments of these kinds, as before a first step, whatever was there."""
        for p in self._flat():
            self.base.state.pop(p, None)
            if kinds:
                moments = {kind: torch.zeros_like(p) for kind in sorted(kinds)}
                self.base.state[p] = {STEP: torch.zeros((), device=p.device), **moments}
        if self.stage in (1, 2):
            self.zero._hp_optimizer_states_linked = False
            if kinds:
                self.zero._lazy_init_hp_params_optimizer_state()  # else done by the first step alone

    def _set_steps(self, steps: dict[str, Tensor]) -> None:
        if self.stage == 0:
            for name in self.parameters:
                p, state = self._held(name)
                if name in steps:
                    state[STEP].copy_(steps[name])
                else:  # it has never had a gradient
                    self.base.state.pop(p, None)
        elif steps:
            for p in self._flat():
                self.base.state[p][STEP].copy_(max(steps.values()))
