"""What every method promises, as checks for its tests: the same steps in every loop, exact resumption, two processes that equal one."""

import copy
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import coloss
from coloss import Budget, Method, TrainingStep
from coloss.data import Batch
from coloss.train import State

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def weights(module: nn.Module) -> dict[str, Any]:
    """Parameters, buffers and extra state as they are now."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in module.state_dict().items()
    }


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names under which two state dicts differ in a single bit."""
    return sorted(
        name
        for name in first.keys() | second.keys()
        if name not in first
        or name not in second
        or (
            not torch.equal(first[name], second[name])
            if isinstance(first[name], Tensor)
            else first[name] != second[name]
        )
    )


def check_loops(
    new_model: Callable[[], nn.Module],
    new_method: Callable[[], Method],
    batches: Sequence[tuple[Tensor, ...]],
    objective: Any = None,
    *,
    epochs: int = 2,
    optimizer: Callable[..., torch.optim.Optimizer] = SGD,
) -> nn.Module:
    """`fit`, a plain loop and Lightning's Trainer leave the same weights, which are not the initial ones; gives back fit's model."""
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader

    initial = new_model()
    fitted, looped, lit = (copy.deepcopy(initial) for _ in range(3))
    fit = coloss.fit(
        fitted,
        batches,
        objective,
        [_with_seeded_setup(new_method())],
        budget=Budget(epochs=epochs),
        optimizer=optimizer,
    )

    state = State(looped)
    state.generator.manual_seed(0)
    state.local_generator.manual_seed(1_000_003)
    step = TrainingStep(
        looped,
        objective,
        [_with_seeded_setup(new_method())],
        total_steps=epochs * len(batches),
        state=state,
    )
    own = optimizer(step.trainable)
    for _ in range(epochs):
        for batch in batches:
            own.zero_grad()
            step.backward(step(Batch.of(batch)))
            own.step()
            step.after_step()
        step.after_epoch()
    looped = step.finish()

    method = _with_seeded_setup(new_method())
    method.replaces_objective = method.replaces_objective or objective is None

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = lit

        def training_step(self, batch: Any, index: int) -> Tensor:
            parts = Batch.of(batch)
            outputs = self.model(parts.inputs)
            if objective is None:
                return sum(out.sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,)))
            return objective(outputs, parts.targets)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer([p for p in self.parameters() if p.requires_grad])

    module = Module()
    off = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=[coloss.MethodCallback([method])],
        **off,  # type: ignore[arg-type]
    ).fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]

    found = weights(fit.model)
    assert differing(weights(initial), found), "training changed nothing"
    assert not differing(found, weights(looped)), "a plain loop takes other steps than fit"
    assert not differing(found, weights(module.model)), "Lightning takes other steps than fit"
    return fit.model


class Killed(Exception):
    """Ends a run in its midst."""


class Kill(Method):
    """Raises after a step; 0 for never."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def on_step(self, state: State) -> None:
        if state.step == self.at:
            raise Killed


def check_resume(
    new_model: Callable[[], nn.Module],
    new_method: Callable[[], Method],
    data: Any,
    folder: Path,
    objective: Any = None,
    *,
    steps: int = 12,
    kill_at: int = 7,
    checkpoint_every: int = 3,
    batch_size: int = 8,
    **options: Any,
) -> None:
    """A run that is killed and resumed ends bit-identical to one that was not, the method's own state included."""

    def run(kill_at: int, **more: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        model, method = new_model(), new_method()
        fit = coloss.fit(
            model,
            data,
            objective,
            [method, Kill(kill_at)],
            budget=Budget(steps=steps),
            batch_size=batch_size,
            optimizer=SGD,
            **(options | more),
        )
        return weights(fit.model) | {f"method.{name}": value for name, value in weights(method).items()}

    whole = run(0)
    kept = {"checkpoint_dir": folder, "checkpoint_every": checkpoint_every}
    with pytest.raises(Killed):
        run(kill_at, **kept)
    assert not differing(whole, run(0, resume=True, **kept))


def check_two_processes(
    train: Callable[[Fabric], dict[str, Tensor]], folder: Path, *, atol: float = 1e-9
) -> None:
    """What `train` gives on two gloo processes is what it gives on one: on both ranks, to within `atol`.

    Args:
        train: takes a launched Fabric of one or two CPU processes and gives named tensors; a fresh seed is set before. Work in float64,
            with one `batch_size` over all processes.
        folder: for the results.
        atol: largest difference of an element.
    """
    one = run_processes(train, folder, 1)[0]
    for rank, found in enumerate(run_processes(train, folder, 2)):
        assert one.keys() == found.keys()
        for name, value in one.items():
            torch.testing.assert_close(
                found[name],
                value,
                rtol=0,
                atol=atol,
                msg=lambda text, n=name, r=rank: f"{n}, rank {r}: {text}",
            )


def run_processes(
    work: Callable[[Fabric], dict[str, Tensor]],
    folder: Path,
    processes: int = 2,
    timeout: float = 120,
    *,
    strategy: Any = "ddp",
) -> list[dict[str, Tensor]]:
    """Results of `work` on each of several forked CPU processes joined by gloo (one runs here).

    Forking spares each of them the import of torch. One thread each, as in a DataLoader's workers.
    """
    if processes == 1:
        torch.manual_seed(0)
        fabric = Fabric(accelerator="cpu", devices=1)
        fabric.launch()
        return [work(fabric)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    running = [
        context.Process(target=_process, args=(work, folder, rank, processes, port, strategy), daemon=True)
        for rank in range(processes)
    ]
    for process in running:
        process.start()
    try:
        for process in running:
            process.join(timeout)
    finally:
        for process in running:
            process.kill()
    complaints = [path.read_text() for path in sorted(folder.glob("error-*.txt"))]
    assert not complaints, complaints[0]
    assert all(process.exitcode == 0 for process in running), [process.exitcode for process in running]
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(processes)]


def _process(
    work: Callable[..., Any], folder: Path, rank: int, processes: int, port: int, strategy: Any
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        fabric = Fabric(accelerator="cpu", devices=processes, strategy=strategy)
        fabric.launch()
        found = {name: value.detach().clone().contiguous() for name, value in work(fabric).items()}
        save_file(found, folder / f"rank-{rank}.safetensors")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        code = 0
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        code = 1
    os._exit(code)


def _with_seeded_setup(method: Method) -> Method:
    """Heads are drawn from the global generator, which the three loops leave in different states before."""
    setup = method.setup

    def seeded(state: State) -> None:
        torch.manual_seed(0)
        setup(state)

    method.setup = seeded  # type: ignore[method-assign]
    return method
