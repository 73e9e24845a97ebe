r"""Gives a classifier some of what sharpness-aware training gives, at the price of plain training.

Jiawei Du, Daquan Zhou, Jiashi Feng, Vincent Y. F. Tan, Joey Tianyi Zhou 2022, "Sharpness-Aware Training for Free", NeurIPS 2022,
arXiv 2205.14083.

Sharpness-aware minimisation (SAM) takes two gradients a step. SAF takes the fall of the loss along the training trajectory for the
sharpness instead, and damps it: predictions may not move far from what the network itself said about the same sample some
epochs ago.

    SAF     L = CE(z, y) + weight * T^2 / B * sum_i KL(softmax(z_i(e - lag) / T) || softmax(z_i / T))     in epochs e > start
    MESA    the same with the logits of averaged weights v on the same input in place of z_i(e - lag);
            v <- decay * v + (1 - decay) * w after each step

z are logits, e is the epoch, w the weights; the earlier side is a constant. `TrajectoryDistillation` is SAF, which needs a
table of past logits by sample id; `EMADistillation` is MESA, which needs a copy of the network and one more forward pass. In the
paper, on ImageNet, SAF costs 0-2% and MESA 15% of a step, SAM 100%.

When it helps: labels are few and the network can memorise them. Measured (`coloss verify saf`: 540 digits, a perceptron, the learning
rate of each arm chosen on validation images, 10 seeds): 96.8% on test images against 96.1% with SGD, MESA 97.0%, SAM 96.2%. Where the
training loss has fallen to 0.1 the relative curvature (`sharpness`) is 46 with SGD, 35 with SAM, 27 with SAF, 8 with MESA: the network
is led to a flatter place, as the paper says. The larger the learning rate, the smaller the gain: a large one does much of the same.

When not: on short trainings the term never acts; `start_epoch` and `lag` are in epochs. With 30% wrong labels (a look outside
the claim) SAF gained two points at a learning rate at which the network memorises them, and nothing at one at which it does not. In a network so small that a step takes a
millisecond or less, the table's bookkeeping (a quarter of a millisecond) is no longer free. SAF needs stable sample ids, and compares
different crops of an image under random augmentation (as the authors mean it to; MESA does not). Outputs memorise wrong
labels late in training: set `end_epoch` there. With mixup or cutmix an id no longer names an input: put the ids of the second samples
and the shares into `batch.extras["mixed_ids"]` and `["mixed_share"]`, or use MESA.

Distributed: in SAF every process keeps the rows of all processes, so shards may be reshuffled between epochs and two
processes take the steps of one; rows that were never written (dropped batches, a resumed run without its table) are left out
instead of being taken for a uniform prediction. Checkpoints hold the table (`save_history=False` leaves it out; the term then pauses for
`lag` epochs after resuming), and for MESA the averaged network.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.classification.logit_history import LogitHistory
from coloss.classification.past_outputs import EMATeacherLoss, TrajectoryLoss, slots_for
from coloss.classification.sharpness_trial import SharpnessAwareMinimization, few_digits, measure_arms
from coloss.errors import InputError
from coloss.metrics import evaluate_classifier
from coloss.nn import MLP
from coloss.train.budget import Budget
from coloss.train.method import Method
from coloss.train.schedules import Schedule, cosine
from coloss.train.state import State
from coloss.train.system import Claim, System
from coloss.train.task import Setting, Task

_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


class TrajectoryDistillation(Method):
    """Holds predictions close to what the network itself said about each sample some epochs ago: SAF.

    Adds the term `trajectory`, 0 until it acts; see `TrajectoryLoss` for the term, `LogitHistory` for the table.

    Args:
        weight: of the term: a number >= 0, or a schedule of progress. It counts after the factor T^2.
        temperature: T > 0.
        lag: epochs to look back, >= 1.
        start_epoch: the term acts in epochs after this one (counted from 0).
        end_epoch: and before this one; None acts to the end.
        num_samples: rows of the table; None grows with the largest sample id.
        dtype: of the table.
        device: of the table; on a GPU it saves the copies, and costs its memory.
        top_k: remember only each sample's largest logits, an extension.
        every: remember only every so many epochs, an extension; the lag is then up to `every - 1` epochs longer.
        save_history: keep the table in checkpoints.

    Attributes:
        loss: the `TrajectoryLoss`, whose `history` holds the table.

    Raises:
        InputError: for values out of range; during training, if batches have no ids or outputs are not (batch, classes).

    Cost:
        Reading and writing one row for each sample. Memory: (lag + 1) * samples * (2 * classes + 4) bytes in float16.

    Source:
        Du et al., 2022, arXiv 2205.14083, section 3.2.

    Examples:
        >>> import coloss
        >>> data = (torch.randn(64, 4), torch.randint(3, (64,)))
        >>> method = TrajectoryDistillation(lag=1, start_epoch=0)
        >>> run = coloss.fit(nn.Linear(4, 3), data, F.cross_entropy, [method], budget=coloss.Budget(epochs=3))
        >>> sorted(run.history[-1].terms), run.history[-1].terms["trajectory"] > 0
        (['cross_entropy', 'trajectory'], True)
    """

    def __init__(
        self,
        *,
        weight: Schedule = 0.3,
        temperature: float = 5.0,
        lag: int = 3,
        start_epoch: int = 5,
        end_epoch: int | None = None,
        num_samples: int | None = None,
        dtype: Literal["float16", "bfloat16", "float32", "float64"] = "float16",
        device: str = "cpu",
        top_k: int | None = None,
        every: int = 1,
        save_history: bool = True,
    ) -> None:
        super().__init__()
        _check_weight(weight)
        if dtype not in _DTYPES:
            raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        if every < 1:
            raise InputError(f"every must be >= 1, got {every}")
        history = LogitHistory(
            max(slots_for(lag, every), 1),
            num_samples,
            dtype=_DTYPES[dtype],
            device=device,
            top_k=top_k,
            every=every,
            save=save_history,
        )
        self.loss = TrajectoryLoss(
            history,
            weight=1.0,
            temperature=temperature,
            lag=lag,
            start_epoch=start_epoch,
            end_epoch=end_epoch,
        )
        self.term_weights = {"trajectory": weight}

    def terms(self, state: State) -> dict[str, Tensor]:
        batch = state.batch
        if batch.ids is None:
            raise InputError(
                "past outputs are found by sample id and the batch has none: train on a coloss.data.IndexedDataset, wrap a torch "
                "data set in coloss.classification.NumberedDataset, or call step(inputs, targets, ids)"
            )
        mixed_ids, mixed_share = (batch.extras.get(name) for name in ("mixed_ids", "mixed_share"))
        return {
            "trajectory": self.loss(
                _logits(state), batch.ids, state.epoch, mixed_ids=mixed_ids, mixed_share=mixed_share
            )
        }

    @classmethod
    def for_setting(
        cls,
        setting: Setting,
        *,
        variant: Literal["saf", "mesa"] = "saf",
        start_epoch: int | None = None,
        decay: float | None = None,
        **parameters: Any,
    ) -> Method:
        """Build either variant for a task of the lab.

        Args:
            setting: of the trial.
            variant: "saf", or "mesa" for `EMADistillation`.
            start_epoch: default: 5, or 30% of the epochs if that is less.
            decay: of MESA's average; default: 0.9995, or what looks back on a fifth of the training if that is less.
            parameters: of the method.
        """
        if variant not in ("saf", "mesa"):
            raise InputError(f'variant must be "saf" or "mesa", got {variant!r}')
        if variant == "saf" and decay is not None:
            raise InputError("decay is for variant mesa: leave it out, or say variant=mesa")
        steps, epochs = _length(setting)
        if start_epoch is None:
            start_epoch = min(5, int(0.3 * epochs)) if epochs is not None else 5
        if variant == "mesa":
            if decay is None:
                decay = min(0.9995, max(1 - 5 / steps, 0.0)) if steps is not None else 0.995
            return EMADistillation(decay=decay, start_epoch=start_epoch, **parameters)
        method = cls(start_epoch=start_epoch, **parameters)
        first = max(start_epoch + 1, method.loss.lag)
        if epochs is not None and epochs <= first and not setting.smoke:
            warnings.warn(
                f"saf acts from epoch {first} on and this budget ends after {epochs:.3g}: it trains like the plain objective; "
                "use a longer budget, a smaller lag, or variant=mesa",
                stacklevel=2,
            )
        return method


class EMADistillation(Method):
    """Holds predictions close to those of the network's own averaged weights on the same input: MESA.

    Adds the term `ema_distillation`, 0 until it acts; see `EMATeacherLoss`. The network ships as trained; its average stays in
    `loss.average.module`. Methods that change the network's layers must stand before this one.

    Args:
        weight: of the term: a number >= 0, or a schedule of progress. It counts after the factor T^2.
        decay: of the average, in [0, 1]: choose it by the length of training, see `EMATeacherLoss`.
        temperature: T > 0.
        start_epoch: the term acts in epochs after this one (counted from 0).
        end_epoch: and before this one; None acts to the end.

    Attributes:
        loss: the `EMATeacherLoss`, from `setup` on.

    Raises:
        InputError: for values out of range; during training, if outputs are not (batch, classes).

    Cost:
        A copy of the network and, where the term acts, one forward pass.

    Source:
        Du et al., 2022, arXiv 2205.14083, section 3.3.

    Examples:
        >>> import coloss
        >>> data = (torch.randn(64, 4), torch.randint(3, (64,)))
        >>> method = EMADistillation(decay=0.9, start_epoch=0)
        >>> run = coloss.fit(nn.Linear(4, 3), data, F.cross_entropy, [method], budget=coloss.Budget(epochs=3))
        >>> run.history[-1].terms["ema_distillation"] > 0, int(method.loss.average.updates) == run.steps
        (True, True)
    """

    def __init__(
        self,
        *,
        weight: Schedule = 0.8,
        decay: float = 0.9995,
        temperature: float = 5.0,
        start_epoch: int = 5,
        end_epoch: int | None = None,
    ) -> None:
        super().__init__()
        _check_weight(weight)
        self.options: dict[str, Any] = {
            "decay": decay,
            "temperature": temperature,
            "start_epoch": start_epoch,
            "end_epoch": end_epoch,
        }
        EMATeacherLoss(nn.Identity(), **self.options)  # checks them now, the network is known at setup
        self.term_weights = {"ema_distillation": weight}

    def setup(self, state: State) -> None:
        self.loss = EMATeacherLoss(state.model, weight=1.0, **self.options)

    def terms(self, state: State) -> dict[str, Tensor]:
        return {"ema_distillation": self.loss(_logits(state), state.batch.inputs, state.epoch)}

    def on_step(self, state: State) -> None:
        self.loss.update()


def _check_weight(weight: Schedule) -> None:
    if not callable(weight) and not 0 <= weight < math.inf:
        raise InputError(f"weight must be >= 0 and finite, or a schedule, got {weight}")


def _logits(state: State) -> Tensor:
    outputs = state.outputs
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"the model must give one tensor of logits (batch, classes), got {found}")
    return outputs


def _length(setting: Setting) -> tuple[float | None, float | None]:
    """Steps and epochs of a trial, as far as its budget says."""
    budget = setting.budget
    try:
        per_epoch = max(len(setting.splits.train) / setting.task.batch_size, 1.0)
    except (AttributeError, TypeError):
        return budget.steps, budget.epochs
    if budget.steps is not None:
        return budget.steps, budget.steps / per_epoch
    return (budget.epochs * per_epoch, budget.epochs) if budget.epochs is not None else (None, None)


SYSTEM = System(
    slug="saf",
    title="Sharpness-Aware Training for Free",
    paper="Du et al., 2022, arXiv 2205.14083",
    family="classification",
    acts_on=("loss",),
    api=(
        "coloss.classification.TrajectoryDistillation",
        "coloss.classification.EMADistillation",
        "coloss.classification.TrajectoryLoss",
        "coloss.classification.EMATeacherLoss",
        "coloss.classification.trajectory_loss",
        "coloss.classification.LogitHistory",
        "coloss.classification.NumberedDataset",
        "coloss.classification.sharpness",
    ),
    method="coloss.classification.TrajectoryDistillation",
    kinds=("classification",),
)


_ARMS: dict[str, Callable[[], list[Method]]] = {
    "sgd": lambda: [],
    "saf": lambda: [TrajectoryDistillation()],
    "mesa": lambda: [EMADistillation(decay=0.995)],
    "sam": lambda: [SharpnessAwareMinimization()],
}

CLAIM = Claim(
    statement="Trained on 540 digits, a perceptron is more accurate on test images with SAF than with plain SGD, at the same number of "
    "steps, the learning rate of each chosen on validation images.",
    metric="accuracy",
    baseline="sgd",
    method="saf",
    task=Task(
        name="digits-540",
        kind="classification",
        title="540 digits, a perceptron with two layers of 128",
        load=few_digits,
        model=lambda splits: MLP(64, (128, 128), 10, norm=None),
        objective=F.cross_entropy,
        objective_name="cross-entropy",
        validate=lambda model, splits: evaluate_classifier(model, splits.validation),
        test=lambda model, splits: evaluate_classifier(model, splits.test),
        metric="accuracy",
        budget=Budget(epochs=120),
        learning_rate_schedule=cosine(),
    ),
    seeds=10,
    trial=partial(measure_arms, arms=_ARMS),
)
