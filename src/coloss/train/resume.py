"""Saving a run of `fit` so that it can be killed anywhere, and putting it back so that it ends bit-identically."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coloss.errors import InputError
from coloss.train import checkpoint as disk
from coloss.train.conflict import Conflict, ConflictMonitor
from coloss.train.outcome import LogPoint, NonFiniteLossError, Progress
from coloss.train.step import TrainingStep

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class RunCheckpoints:
    """The checkpoints of one run in their folder.

    Args:
        folder: where they are.
        step: the training step; its weights, buffers and extra states are stored.
        optimizer: the optimizer, as the user made it.
        fabric: tells the processes apart.
        monitor: whose findings are stored, if there is one.
    """

    def __init__(
        self,
        folder: Path,
        step: TrainingStep,
        optimizer: torch.optim.Optimizer,
        fabric: "Fabric",
        monitor: ConflictMonitor | None,
    ):
        self.folder, self.step, self.optimizer = folder, step, optimizer
        self.fabric, self.monitor = fabric, monitor
        self.last: Path | None = None

    def last_good(self) -> str:
        """Name the newest checkpoint, for an error message."""
        return f"last good checkpoint: {self.last}" if self.last is not None else "no checkpoint yet"

    def save(self, done: Progress) -> None:
        """Write a checkpoint; weights that are not finite are refused, so the newest checkpoint is a good one.

        Raises:
            NonFiniteLossError: if a weight is NaN or infinite.
            InputError: if the folder cannot be written, or a state is neither a tensor nor plain JSON.
        """
        state = self.step.state
        for name, value in self.step.named_parameters():
            if not torch.isfinite(value).all():
                raise NonFiniteLossError(
                    f"weight {name} is not finite at step {state.step}; {self.last_good()}"
                )
        random = torch.stack([torch.get_rng_state(), state.local_generator.get_state()])
        gathered: Any = self.fabric.all_gather(random) if self.fabric.world_size > 1 else random
        every = gathered.reshape(-1, *random.shape)
        if self.fabric.global_rank == 0:
            tensors, values = disk.split_state("step/", self.step.state_dict())
            optimizer_tensors, optimizer_values = disk.split_optimizer(self.optimizer)
            self.last = disk.save_checkpoint(
                self.folder,
                state.step,
                tensors
                | optimizer_tensors
                | {"random/local": every, "random/shared": state.generator.get_state()},
                {
                    "epoch": state.epoch,
                    "progress": state.progress,
                    "run": asdict(done),
                    "logged": state.logged,
                    "module": values,
                    "optimizer": optimizer_values,
                    "conflicts": [asdict(c) for c in self.monitor.found] if self.monitor is not None else [],
                },
            )
        self.fabric.barrier()

    def restore(self, resume: bool) -> Progress | None:
        """Put the newest checkpoint back into step, optimizer, monitor and randomness; None if there is none.

        Raises:
            InputError: if there is one but `resume` is False; if it is damaged or of another run.
        """
        found = disk.checkpoints(self.folder)
        if not found:
            return None
        if not resume:
            raise InputError(
                f"{self.folder} holds checkpoints of a run already: pass resume=True, or choose another checkpoint_dir"
            )
        tensors, values = disk.load_checkpoint(found[-1])
        try:
            self.step.load_state_dict(disk.join_state("step/", tensors, values["module"]))
            disk.join_optimizer(self.optimizer, tensors, values["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{found[-1]} is of another run (model, methods or optimizer differ): {reason}"
            ) from error
        local = tensors["random/local"]
        if len(local) != self.fabric.world_size:
            raise InputError(
                f"{found[-1]} was written by {len(local)} processes, this run has {self.fabric.world_size}"
            )
        state = self.step.state
        torch.set_rng_state(local[self.fabric.global_rank][0].clone())
        state.local_generator.set_state(local[self.fabric.global_rank][1].clone())
        state.generator.set_state(tensors["random/shared"])
        state.step, state.epoch, state.progress = values["step"], values["epoch"], values["progress"]
        state.logged = values.get("logged", {})
        if self.monitor is not None:
            self.monitor.found[:] = [Conflict(**conflict) for conflict in values["conflicts"]]
        self.last = found[-1]
        run = values["run"]
        run["history"] = [LogPoint(**point) for point in run["history"]]
        return Progress(**run)
