"""Masked latent prediction in which each group of target channels is predicted from few latent dimensions: a predictor that can be read.

SparseJEPA: Hartman, Varshney, 2025, arXiv 2504.16140, "SparseJEPA: Sparse Representation Learning of Joint Embedding Predictive
Architectures". Its equations, groups and strengths could not be had; what stands here is a reconstruction from its summary (prediction,
KL and group lasso, after oi-VAE), with these choices:

    s_j = predictor(context, position j)          layer-normalised without learned scale, so that zeros do not depend on a scale
    y_gj = f_g(W_g s_j)                           channel group g of the target's embedding; `coloss.jepa.GroupSparseMap`
    loss = distance(y, target) + prior * sum ||theta_f||^2 / 2 + beta * KL(q(z | s) || N(0, I))        z in place of s where beta > 0
    W   <- prox( W - eta * gradient of that loss ),   threshold eta * strength for each column of W

W is not moved by the run's optimizer, so that neither Adam's steps nor weight decay reach it: with one step size (eta) for all entries those
columns vanish whose gradient is shorter than `strength`. `clip_norm` of `coloss.fit` does reach it: W's gradient counts in the norm and is
scaled with the others. In Lightning and in a loop of your own W's gradient is gone before you clip. The penalty stands in no loss, so it
counts once. All else, the encoder included, trains as in `MaskedPrediction`. The slow copy follows the encoder by averaging and takes no
proximal step.
`ActivationGroupSparsity` is the variant on activations: group lasso on the embedding of each sample, beside any training.

When it helps: you want to read which latent dimensions serve which group of outputs; on data with known groups (bars of one lit row, an
autoencoder with this map) each group ends with exactly one latent of its own, and with all of them without the proximal step. When not: as a
way to better features, or to the smallest map at equal error. Measured on digits, one quadrant predicted from the other three, 200 steps, 5
seeds, probes with 100 labels; error is the share of the latents' variance on test images that is not predicted:

                                               zero columns   error   linear probe   5 neighbours   multi-information (nats)
    strength 0.01                                      0.36    0.39           0.77           0.65                       36.7
    dense (strength 0)                                 0       0.33           0.77           0.65                       36.4
    dense, shortest columns cut afterwards             0.36    0.80           0.77           0.65                       36.4
    dense, cut at half-time and trained on             0.36    0.34           0.77           0.65                       36.8
    untrained                                                                 0.73           0.65                       21.3

So zeros that are learnt cost a fifth of the error, zeros cut into a dense map more than double it; but cutting at half-time and training on costs
less than either. The encoder's features are what they are without it, and their channel groups no less dependent: the paper's gains in
probes are not seen here.

Distributed: W's gradient is the processes' average, so all take one step; the noise of the KL's samples is each process's own. A checkpoint
holds predictor, map and slow copy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from coloss.data import Masker
from coloss.errors import InputError
from coloss.jepa.group_sparse import GroupSparseMap
from coloss.jepa.masked_prediction import LatentPass, MaskedPrediction
from coloss.jepa.sparse_activations import group_sizes
from coloss.nn import MaskTokenPredictor, TokenEncoder
from coloss.ops import all_reduce_mean, full_precision
from coloss.train.schedules import Schedule, value_at
from coloss.train.state import State
from coloss.train.system import Claim, System
from coloss.train.task import Setting


class GaussianLatents(nn.Module):
    """A normal distribution of latents for each code, and how far it is from a standard normal one.

        z = mu(s) + sigma(s) noise,    KL = 1/2 sum over dimensions of ( mu^2 + sigma^2 - 1 - log sigma^2 )

    Args:
        in_dim: size of a code s.
        latents: size of z.

    Returns:
        From `forward(codes, generator)`: z, in eval mode mu itself, and the KL of each code.

    Source:
        Kingma and Welling, 2014, arXiv 1312.6114, appendix B.

    Examples:
        >>> latents = GaussianLatents(6, 3)
        >>> z, divergence = latents(torch.rand(2, 5, 6))
        >>> z.shape, divergence.shape, bool((divergence >= 0).all())
        (torch.Size([2, 5, 3]), torch.Size([2, 5]), True)
    """

    def __init__(self, in_dim: int, latents: int) -> None:
        super().__init__()
        if in_dim < 1 or latents < 1:
            raise ValueError(f"in_dim and latents must be >= 1, got {in_dim} and {latents}")
        self.moments = nn.Linear(in_dim, 2 * latents)

    def forward(
        self, codes: Float[Tensor, "*batch codes"], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "*batch latents"], Float[Tensor, "*batch"]]:
        mean, log_variance = full_precision(self.moments(codes)).chunk(2, dim=-1)
        divergence = (mean.square() + log_variance.expm1() - log_variance).sum(-1) / 2
        if not self.training:
            return mean, divergence
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
        return mean + (log_variance / 2).exp() * noise, divergence


class SparseJEPA(MaskedPrediction):
    """Masked latent prediction with a `GroupSparseMap` behind the predictor, kept sparse by proximal steps.

    Args:
        masker, options: as for `MaskedPrediction`.
        groups: number of equal groups of the encoder's output channels, or the sizes of groups.
        strength: factor of the group lasso, a number >= 0 or a schedule; a column vanishes where the gradient of the loss on it is shorter.
            0 for a dense map, trained alike.
        prox_step: eta, of the gradient and proximal steps on W: a number > 0 or a schedule. Large ones diverge as with any gradient descent.
        map_width: p, rows of each W_g.
        map_hidden: hidden layers of each f_g.
        prior: weight of the prior on the f_g, >= 0 or a schedule.
        beta: weight of the KL of Gaussian latents, >= 0 or a schedule; 0 for latents without noise.

    Attributes:
        map: the `GroupSparseMap`, from `setup` on; `map.influence()` says which latent serves which group.
        latents: `GaussianLatents`; None where beta is 0.

    Logs `zero_columns`, the share of columns of W that are exactly zero, beside `target_std`, the meter of collapse.

    Raises:
        InputError: for a value out of range; in a run, for groups that do not fit the encoder.

    Cost:
        As `MaskedPrediction`; the map adds O(groups * map_width * predictor width) for each predicted token.

    Source:
        SparseJEPA, arXiv 2504.16140; oi-VAE, arXiv 1802.06765.

    Examples:
        >>> import coloss
        >>> from coloss.nn import token_encoder_for_shape
        >>> images, encoder = torch.rand(64, 1, 8, 8), token_encoder_for_shape((1, 8, 8), dim=16, depth=1)
        >>> method = SparseJEPA(groups=4, strength=10.0)
        >>> run = coloss.fit(encoder, (images,), methods=[method], budget=coloss.Budget(steps=5))
        >>> sorted(run.history[-1].terms), method.map.influence().shape, method.zero_columns()
        (['generator_prior', 'latent_prediction'], torch.Size([4, 8]), 1.0)
    """

    map: GroupSparseMap
    latents: GaussianLatents | None

    def __init__(
        self,
        masker: Masker | None = None,
        *,
        groups: int | Sequence[int] = 8,
        strength: Schedule = 1e-3,
        prox_step: Schedule = 0.5,
        map_width: int = 8,
        map_hidden: Sequence[int] = (),
        prior: Schedule = 1e-4,
        beta: Schedule = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(masker, **options)
        for name, value in (("strength", strength), ("prior", prior), ("beta", beta)):
            if not callable(value) and not value >= 0:
                raise InputError(f"{name} must be >= 0, or a schedule, got {value}")
        if not callable(prox_step) and not prox_step > 0:
            raise InputError(f"prox_step must be > 0, or a schedule, got {prox_step}")
        sizes = [groups] if isinstance(groups, int) else list(groups)
        for name, numbers in (
            ("groups", sizes or [0]),
            ("map_width", [map_width]),
            ("map_hidden", map_hidden),
        ):
            if any(number < 1 for number in numbers):
                raise InputError(f"{name} must be >= 1, got {list(numbers)}")
        self.groups, self.strength, self.prox_step = groups, strength, prox_step
        self.map_width, self.map_hidden = map_width, tuple(map_hidden)
        self.beta = beta
        self.term_weights = {**self.term_weights, "generator_prior": prior, "latent_kl": beta}
        self._gradient: Tensor | None = None
        self._before_optimizer: RemovableHandle | None = None
        self._divergence: Tensor | None = None

    def new_predictor(self, encoder: TokenEncoder) -> nn.Module:
        """A predictor of latents: its last norm has no learned scale, and `map` comes in place of its output layer."""
        predictor = super().new_predictor(encoder)
        assert isinstance(predictor, MaskTokenPredictor)
        width = len(predictor.mask_token)
        predictor.transformer.norm = nn.LayerNorm(width, elementwise_affine=False)
        predictor.output = nn.Identity()
        return predictor

    def setup(self, state: State) -> None:
        super().setup(state)
        self._gradient = self._before_optimizer = None
        encoder = self._encoder(state)
        width = len(self.predictor.get_parameter("mask_token"))
        sizes = group_sizes(self.groups, encoder.out_features)
        self.map = state.like_model(GroupSparseMap(width, sizes, self.map_width, self.map_hidden))
        random = callable(self.beta) or self.beta > 0
        self.latents = state.like_model(GaussianLatents(width, width)) if random else None
        self._generator = state.local_generator

    def form_predictions(
        self, context: Float[Tensor, "contexts batch visible dim"], found: LatentPass
    ) -> Float[Tensor, "sets batch hidden out"]:
        codes = super().form_predictions(context, found)
        if self.latents is not None:
            codes, self._divergence = self.latents(codes, self._generator)
        return self.map(codes)

    def extra_terms(
        self,
        predictions: Float[Tensor, "sets batch hidden out"],
        targets: Float[Tensor, "sets batch hidden out"],
        found: LatentPass,
        state: State,
    ) -> dict[str, Tensor]:
        terms = {
            **super().extra_terms(predictions, targets, found, state),
            "generator_prior": self.map.prior(),
        }
        if self._divergence is not None:
            terms["latent_kl"] = _mean_over(self._divergence, found.masks.target_valid)
            self._divergence = None
        return terms

    def on_gradients(self, state: State) -> None:
        """Takes the gradient of W away from the optimizer, in `fit` after clipping."""
        if state.fabric is None or state.optimizer is None:
            self._take_gradient()
        elif self._before_optimizer is None:
            self._before_optimizer = state.optimizer.register_step_pre_hook(
                lambda optimizer, args, kwargs: self._take_gradient()
            )

    def _take_gradient(self) -> None:
        """Without a gradient an optimizer leaves a parameter as it is, weight decay included."""
        self._gradient, self.map.weight.grad = self.map.weight.grad, None

    def on_step(self, state: State) -> None:
        size = value_at(self.prox_step, state.progress)
        if self._gradient is not None:
            with torch.no_grad():
                self.map.weight.sub_(self._gradient, alpha=size)
        self.map.prox_step(size, value_at(self.strength, state.progress))
        self._gradient = None
        if state.step % self.meter_every == 0:
            state.log({"zero_columns": self.zero_columns()})
        super().on_step(state)

    def finish(self, state: State) -> None:
        super().finish(state)
        if self._before_optimizer is not None:
            self._before_optimizer.remove()
            self._before_optimizer = None

    def zero_columns(self) -> float:
        """Share of the columns of W that are exactly zero: pairs of a latent and a group that ignores it."""
        return float((self.map.influence() == 0).double().mean())

    def report(self, model: nn.Module, data: Any) -> dict[str, float]:
        return {"zero_columns": self.zero_columns()}


def _mean_over(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the tokens that count, on all processes."""
    if valid is None:
        return values.sum() / max(values.numel(), 1)
    counted = all_reduce_mean(valid.sum().to(values.dtype))
    return torch.where(valid, values, 0).sum() / torch.where(counted > 0, counted, 1)


SYSTEM = System(
    slug="sparsejepa",
    title="SparseJEPA: Sparse Representation Learning of Joint Embedding Predictive Architectures",
    paper="Hartman, Varshney, 2025, arXiv 2504.16140",
    family="jepa",
    acts_on=("loss", "optimizer"),
    api=(
        "coloss.jepa.SparseJEPA",
        "coloss.jepa.GroupSparseMap",
        "coloss.jepa.group_lasso",
        "coloss.jepa.prox_group_lasso_",
        "coloss.jepa.group_l2_norms",
        "coloss.jepa.ProximalStep",
        "coloss.jepa.ActivationGroupSparsity",
        "coloss.jepa.activation_group_penalty",
        "coloss.jepa.multi_information_gaussian",
        "coloss.jepa.GaussianLatents",
    ),
    method="coloss.jepa.SparseJEPA",
    kinds=("self-supervised", "classification"),
    compare="digits-ssl --model coloss.nn:token_backbone --methods untrained,sparsejepa",
)


def _trial(setting: Setting) -> Mapping[str, Mapping[str, float]]:
    from coloss.jepa.sparse_map_trial import sparse_and_dense

    return sparse_and_dense(setting)


CLAIM = Claim(
    statement="On digits of which one quadrant is predicted from the other three, a map trained with proximal steps (strength 0.01) predicts "
    "the latents of test images with less error than a dense map whose shortest columns are set to zero at half-time, as many of them, and "
    "which is trained on: the same number of steps for both.",
    metric="error",
    baseline="pruned half-way",
    method="sparse",
    direction="lower",
    trial=_trial,
    tried="Baseline: first measured against a dense map cut after training (0.80), which the proximal steps beat by far (0.39; -0.41, -0.64 to -0.17); "
    "but that rival gets no step to recover in, so it is context now, and cutting at half-time, as cheap, is the baseline. Code: the proximal "
    "step solves its minimisation, zeros are exact, and on bars with known groups each group ends with one latent of its own. The "
    "remaining columns of a group lasso are shrunk, which costs error; nothing trains them without the penalty afterwards here.",
)
