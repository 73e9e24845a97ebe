r"""Contrastive training that works with small batches, and learns a temperature for each sample: iSogCLR.

Zi-Hao Qiu, Quanqi Hu, Zhuoning Yuan, Denny Zhou, Lijun Zhang, Tianbao Yang 2023, "Not All Semantics are Created Equal:
Contrastive Self-supervised Learning with Automatic Temperature Individualization", ICML 2023, arXiv 2305.11965. With one temperature
for all it is SogCLR (Yuan et al. 2022, arXiv 2202.12387).

For sample i with its positive, h_ik = s_ik - s_i+ is how much the cosine with negative k exceeds that with the positive:

    objective       F = mean_i [ tau_i log E_k exp(h_ik / tau_i) + tau_i rho ]       E over the whole data set, tau_i in [low, high]
    estimate        s_i <- (1 - gamma) s_i + gamma g_i                               g_i: the mean over the batch's negatives
    gradient        sum_k w_ik grad h_ik / m,   w_ik = exp(h_ik / tau_i) / s_i       m negatives; a constant
    temperature     grad_i = log s_i + rho - sum_k w_ik (h_ik / tau_i) / m
                    u_i <- (1 - beta) u_i + beta grad_i,   tau_i <- clip(tau_i - eta u_i, low, high)

gamma, rho and low, high = `temperature_bounds` are arguments; beta is `temperature_gradient_share`, eta `temperature_learning_rate`. F is
the dual of a robust loss: the worst weighting of the negatives within a KL ball of radius rho. At gamma = 1 all of it is the
mini-batch loss and its exact gradient. s_i is kept as log s_i, so the running shift of the authors' bimodal code is not needed;
negatives are masked by id, the diagonal included; s_i begins with g_i at a sample's first visit. Published variants that are left
out: a squared hinge in place of h, and one learned temperature for all.

When it helps: batches must be small, or you want to know which samples are common and which are rare. Measured (`coloss verify isogclr`:
386 digits with a tail, 100 images of the most frequent class and 8 of the rarest, which digit is which drawn by the seed; batches of 64,
50 epochs, 5 seeds): the rank correlation between the frequency of a class and the mean temperature of its samples is 0.38, against 0.09
where the same classes have no tail; so frequent semantics do get higher temperatures, as the paper says, though not in every seed.

When not: for accuracy on data like these. In the same measurement a probe with the training labels reaches a balanced accuracy of 89.5%,
89.0% with one temperature, 89.6% with NT-Xent at 0.1 and 88.8% at 0.5; on the five rarest classes 83.2, 82.9, 83.3 and 82.3%. The
temperatures need many visits of each sample to move away from where they begin (raise `temperature_learning_rate` in short runs), and
44% of them ended at the lower bound: look at `temperature_at_bounds`, and lower `rho` where it is high. Strong augmentation changes
h from visit to visit, so gamma much below 0.5 averages over what no longer holds.

Distributed: rows of all processes are negatives and every process keeps the state of all samples, so two processes take the steps of one.
The state of a sample that occurs twice in a batch is the mean. Call the loss once for each optimizer step: under `fit(accumulate=...)`
micro-batches are joined. Checkpoints hold the tables, by sample id.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.contrastive.global_contrastive import GammaSchedule, GlobalContrastiveLoss
from coloss.contrastive.long_tail_trial import long_tailed_digits, measure_arms
from coloss.contrastive.nt_xent import NTXent
from coloss.data import View
from coloss.errors import InputError
from coloss.nn import MLP
from coloss.train import Budget, Claim, Method, Schedule, Setting, State, System, ViewMethod
from coloss.train.encoder_task import encoder_task


class GlobalContrastive(ViewMethod):
    """Self-supervised training on two views by the global contrastive loss, each sample with a temperature of its own.

    Adds the term `global_contrastive`; reports the batch's `temperature_mean` and `temperature_at_bounds`. See `ViewMethod` for how views are
    made and what happens beside an objective, `GlobalContrastiveLoss` for the loss. The data must have sample ids, as
    `IndexedDataset` gives them.

    Args:
        temperature: of all samples, or where they begin, > 0.
        gamma: weight of the new batch in the moving average, in (0, 1].
        gamma_schedule: `"constant"`, or `"cosine"` from 1 to gamma over the first half of training.
        individual: learn a temperature for each sample; False is SogCLR.
        rho: radius of the robust weighting, >= 0: larger means lower temperatures.
        temperature_learning_rate: step of the temperatures, >= 0.
        temperature_gradient_share: weight of the newest gradient in its moving average, in (0, 1].
        temperature_bounds: lowest and highest temperature.
        largest_gradient: the gradient of a temperature is clamped to this size.
        num_samples: of the data set, where ids count its samples from 0; None takes any ids.
        weight: of the term: a number >= 0, or a schedule.
        projector, view, tap, in_features: as for `ViewMethod`; a view function must give two views.

    Attributes:
        loss: the `GlobalContrastiveLoss`; `loss.stats()` and `loss.temperatures(ids)` show what was learnt.

    Raises:
        InputError: for a value out of range; in a run, if there are no sample ids or not two views.

    Cost:
        That of NT-Xent, with individual temperatures two more products of the similarity matrix; three numbers for each sample.

    Source:
        Qiu et al. 2023, arXiv 2305.11965; defaults of LibAUC's implementation.

    Examples:
        >>> import coloss
        >>> from coloss.nn import MLP
        >>> images = torch.rand(64, 1, 8, 8)
        >>> method = GlobalContrastive()
        >>> run = coloss.fit(MLP(64, [32]), (images,), methods=[method], budget=coloss.Budget(epochs=2))
        >>> sorted(run.history[-1].terms), len(method.loss.tables[0])
        (['global_contrastive'], 64)
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        gamma: float = 0.9,
        gamma_schedule: GammaSchedule = "constant",
        individual: bool = True,
        rho: float = 0.3,
        temperature_learning_rate: float = 0.01,
        temperature_gradient_share: float = 0.9,
        temperature_bounds: tuple[float, float] = (0.05, 0.7),
        largest_gradient: float = 3.0,
        num_samples: int | None = None,
        weight: Schedule = 1.0,
        projector: Sequence[int] = (128, 64),
        view: View | None = None,
        tap: str | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__(views=2, projector=projector, view=view, tap=tap, in_features=in_features)
        self.loss = GlobalContrastiveLoss(
            temperature,
            gamma,
            gamma_schedule=gamma_schedule,
            individual=individual,
            rho=rho,
            temperature_learning_rate=temperature_learning_rate,
            temperature_gradient_share=temperature_gradient_share,
            temperature_bounds=temperature_bounds,
            largest_gradient=largest_gradient,
            num_samples=num_samples,
        )
        self.term_weights = _weights(weight)

    def check_views(self, views: Tensor) -> None:
        if len(views) != 2:
            raise InputError(f"view must give two views, got {len(views)}")

    def view_terms(self, embeddings: Float[Tensor, "views samples dim"], state: State) -> dict[str, Tensor]:
        if len(embeddings) != 2:
            raise InputError(f"the global contrastive loss compares two views, got {len(embeddings)}")
        return _terms(self.loss, embeddings[0], embeddings[1], self.sample_ids(state), state)

    @classmethod
    def for_setting(cls, setting: Setting, **parameters: Any) -> Method:
        """Build it for a task of the lab: for pairs (retrieval) the form for two encoders."""
        form = BimodalGlobalContrastive if setting.task.kind == "retrieval" else cls
        return form(**parameters)


class BimodalGlobalContrastive(Method):
    """Train two encoders (images and texts, queries and documents) by the global contrastive loss, each side with temperatures of its own.

    The model must give a pair of embeddings, as `coloss.nn.DualEncoder`; lengths do not count. Each image contrasts with the texts of other
    ids and each text with the images. Adds the term `global_contrastive`; reports `temperature_mean` and `temperature_at_bounds`.

    Args:
        temperature, gamma, gamma_schedule, individual, rho, temperature_learning_rate, temperature_gradient_share, temperature_bounds,
            largest_gradient, num_samples: as for `GlobalContrastive`. The paper's values for images and captions, with gaps between
            modalities, are far from those for views: low temperatures, and a rho of 6 to 8.
        replace_objective: train on this loss alone; False adds it to the run's objective.
        weight: of the term: a number >= 0, or a schedule.

    Attributes:
        loss: the `GlobalContrastiveLoss`.

    Raises:
        InputError: for a value out of range; in a run, if there are no sample ids, or the model gives no pair of embeddings.

    Cost:
        That of a CLIP loss, with individual temperatures twice that; six numbers for each pair.

    Source:
        Qiu et al. 2023, arXiv 2305.11965, section 4.2; defaults of the authors' script for CC3M.

    Examples:
        >>> import coloss
        >>> from coloss.nn import MLP, DualEncoder
        >>> pairs = coloss.data.IndexedDataset((torch.randn(32, 6), torch.randn(32, 6)))
        >>> model = DualEncoder(MLP(6, [16], 4), MLP(6, [16], 4))
        >>> run = coloss.fit(
        ...     model, pairs, methods=[BimodalGlobalContrastive()], budget=coloss.Budget(epochs=2)
        ... )
        >>> sorted(run.history[-1].terms)
        ['global_contrastive']
    """

    batch_statistic = True

    def __init__(
        self,
        *,
        temperature: float = 0.01,
        gamma: float = 0.8,
        gamma_schedule: GammaSchedule = "constant",
        individual: bool = True,
        rho: float = 6.0,
        temperature_learning_rate: float = 0.03,
        temperature_gradient_share: float = 0.9,
        temperature_bounds: tuple[float, float] = (0.005, 1.0),
        largest_gradient: float = 5.0,
        num_samples: int | None = None,
        replace_objective: bool = True,
        weight: Schedule = 1.0,
    ) -> None:
        super().__init__()
        self.loss = GlobalContrastiveLoss(
            temperature,
            gamma,
            gamma_schedule=gamma_schedule,
            individual=individual,
            rho=rho,
            temperature_learning_rate=temperature_learning_rate,
            temperature_gradient_share=temperature_gradient_share,
            temperature_bounds=temperature_bounds,
            largest_gradient=largest_gradient,
            bimodal=True,
            num_samples=num_samples,
        )
        self.replaces_objective = replace_objective
        self.term_weights = _weights(weight)

    def terms(self, state: State) -> dict[str, Tensor]:
        pair = state.outputs
        if not isinstance(pair, tuple | list) or len(pair) != 2 or any(part.ndim != 2 for part in pair):
            raise InputError(f"the model must give a pair of embeddings, got {type(pair).__name__}")
        return _terms(self.loss, pair[0], pair[1], state.batch.ids, state)


def _terms(
    loss: GlobalContrastiveLoss, first: Tensor, second: Tensor, ids: Tensor | None, state: State
) -> dict[str, Tensor]:
    if ids is None:
        raise InputError(
            "the data must give sample ids, which the state of each sample is kept by: use IndexedDataset"
        )
    loss.set_progress(state.progress)
    found = loss(first, second, ids)
    if loss.individual:
        temperatures = torch.stack([loss.temperatures(ids, side) for side in range(len(loss.tables))])
        low, high = loss.temperature_bounds
        at_bounds = (temperatures <= low) | (temperatures >= high)
        state.log(
            {"temperature_mean": temperatures.mean(), "temperature_at_bounds": at_bounds.float().mean()}
        )
    return {"global_contrastive": found}


def _weights(weight: Schedule) -> Mapping[str, Schedule]:
    if not callable(weight) and not 0 <= weight < math.inf:
        raise InputError(f"weight must be >= 0 and finite, or a schedule, got {weight}")
    return {"global_contrastive": weight}


SYSTEM = System(
    slug="isogclr",
    title="Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic Temperature Individualization",
    paper="Qiu et al. 2023, arXiv 2305.11965",
    family="contrastive",
    acts_on=("loss",),
    api=(
        "coloss.contrastive.GlobalContrastive",
        "coloss.contrastive.BimodalGlobalContrastive",
        "coloss.contrastive.GlobalContrastiveLoss",
        "coloss.contrastive.log_mean_contrast",
        "coloss.contrastive.decaying_gamma",
        "coloss.ops.negative_logsumexp",
        "coloss.train.SampleTable",
    ),
    method="coloss.contrastive.GlobalContrastive",
    kinds=("self-supervised", "classification", "retrieval"),
)

CLAIM = Claim(
    statement="On digits with a long tail, samples of frequent classes end with higher temperatures: Spearman's correlation between the "
    "frequency of a class and the mean temperature of its samples is higher than for the same digits without a tail.",
    metric="frequency_correlation",
    baseline="no tail",
    method="long tail",
    task=encoder_task(
        "digits-long-tailed",
        long_tailed_digits,
        lambda splits: MLP(64, (256, 256), 64),
        Budget(epochs=50),
        title="an encoder for 386 digits with a long tail, judged by a probe with their labels",
        batch_size=64,
    ),
    trial=partial(
        measure_arms,
        arms={
            "long tail": partial(GlobalContrastive, temperature_learning_rate=0.03),
            "long tail, one temperature": partial(GlobalContrastive, individual=False),
            "long tail, NT-Xent at 0.1": partial(NTXent, temperature=0.1),
            "long tail, NT-Xent at 0.5": partial(NTXent, temperature=0.5),
        },
        balanced={"no tail": partial(GlobalContrastive, temperature_learning_rate=0.03)},
    ),
)
