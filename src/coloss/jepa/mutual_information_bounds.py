"""Lower bounds on mutual information from a trained critic: InfoNCE, Donsker-Varadhan (MINE) and NWJ."""

import math
from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.jepa.mutual_information_estimators import MIEstimator
from coloss.nn import MLP
from coloss.ops import full_precision, without_autocast

Scores = Float[Tensor, "samples samples"]


def info_nce_bound(scores: Scores) -> Float[Tensor, ""]:
    """How much better than chance a critic finds the partner of each sample among n: `log n - cross-entropy`, at most log n.

        log n + mean_i ( T_ii - log sum_j exp T_ij )

    Args:
        scores: T_ij, the critic at x_i and y_j; pairs that belong together on the diagonal.

    Raises:
        ValueError: for scores that are not square, or of fewer than 2 samples.

    Source:
        van den Oord, Li, Vinyals 2018, arXiv 1807.03748.

    Examples:
        >>> info_nce_bound(100 * torch.eye(4)), math.log(4)
        (tensor(1.3863), 1.3862943611198906)
    """
    joint, _ = _parts(scores)
    return math.log(len(joint)) + (joint - full_precision(scores).logsumexp(1)).mean()


def donsker_varadhan_bound(scores: Scores) -> Float[Tensor, ""]:
    """`mean T(joint) - log mean exp T(product)`: pairs off the diagonal stand for independent ones.

    In expectation no lower bound any more where the mean of exponentials is taken over few pairs.

    Args:
        scores: as for `info_nce_bound`.

    Raises:
        ValueError: as `info_nce_bound`.

    Source:
        Donsker, Varadhan 1983; Belghazi et al. 2018 (MINE), arXiv 1801.04062.

    Examples:
        >>> donsker_varadhan_bound(torch.zeros(3, 3))
        tensor(0.)
    """
    joint, product = _parts(scores)
    return joint.mean() - (product.logsumexp(0) - math.log(len(product)))


def nwj_bound(scores: Scores) -> Float[Tensor, ""]:
    """`mean T(joint) - mean exp(T(product) - 1)`: unbiased as a bound, with a variance that grows like e^I.

    Args:
        scores: as for `info_nce_bound`.

    Raises:
        ValueError: as `info_nce_bound`.

    Source:
        Nguyen, Wainwright, Jordan 2010, arXiv 0809.0853.

    Examples:
        >>> nwj_bound(torch.ones(3, 3))
        tensor(0.)
    """
    joint, product = _parts(scores)
    return joint.mean() - (product.logsumexp(0) - math.log(len(product)) - 1).exp()


def _parts(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of pairs that belong together, and of all others."""
    count = len(scores)
    if scores.shape != (count, count) or count < 2:
        raise ValueError(f"scores must be square, of at least 2 samples, got shape {tuple(scores.shape)}")
    wide = full_precision(scores)
    others = ~torch.eye(count, dtype=torch.bool, device=scores.device)
    return wide.diagonal(), wide[others]


class VariationalBound(MIEstimator):
    """Trains a critic on half of the samples and reads the bound off the other half, both ways round.

    The critic is `T(x, y) = f(x) . g(y)` with two perceptrons, and every step sees all samples of its half with all their wrong partners.
    It stops where the bound on the samples that were not trained on, averaged over both halves, is highest; taking the highest of a
    curve leaves the result a little too high.

    Args:
        steps: of training for each half, >= 1.
        width: of the perceptrons' hidden layers and embeddings, >= 1.
        rate: of learning, > 0.
        gaussianise: as for `MIEstimator`; without it columns are centred and scaled.

    Raises:
        InputError: for a value out of range; from `estimate`, for fewer than 8 samples.

    Cost:
        `steps` steps of two critics on n / 2 samples each: seconds, where the other estimators take milliseconds. No gradient.

    Source:
        Poole et al. 2019, arXiv 1905.06922, for the family; halves and stopping are ours.

    Examples:
        >>> from coloss.jepa import InfoNCE
        >>> x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
        >>> bool(InfoNCE(steps=50).estimate(x, x) > 1)
        True
    """

    def __init__(
        self, *, steps: int = 300, width: int = 64, rate: float = 2e-3, gaussianise: bool = True
    ) -> None:
        super().__init__(gaussianise=gaussianise)
        for name, value in (("steps", steps), ("width", width)):
            if value < 1:
                raise InputError(f"{name} must be >= 1, got {value}")
        if not rate > 0:
            raise InputError(f"rate must be > 0, got {rate}")
        self.steps, self.width, self.rate = steps, width, rate

    @abstractmethod
    def bound(self, scores: Scores) -> Float[Tensor, ""]:
        """The bound for a matrix of scores."""

    def _estimate(self, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
        if len(x) < 8:
            raise InputError(f"x and y must have at least 8 samples, got {len(x)}")
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        x, y = (_standardised(side.detach()) for side in (x, y))
        order = torch.randperm(len(x), generator=generator).to(x.device)
        halves = order.tensor_split(2)
        # Autocast keeps the cast weights of the first step, and training would not move them.
        with without_autocast(x.device), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it would reseed every GPU, of which none is put back.
            torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            curves = [
                self._held_out((x[here], y[here]), (x[there], y[there]))
                for here, there in (halves, halves[::-1])
            ]
        curve = torch.stack(curves).mean(0)
        return curve[curve.isfinite()].amax()  # a critic may overflow; the first entry is 0

    def _held_out(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Tensor:
        """The bound on test samples along the training, at every tenth step; 0 before it."""
        towers = nn.ModuleList(
            MLP(side.shape[1], [self.width], self.width, norm=None).to(side) for side in train
        )
        optimizer = torch.optim.AdamW(towers.parameters(), lr=self.rate, weight_decay=1e-2, fused=True)

        def scores(pair: tuple[Tensor, Tensor]) -> Tensor:
            first, second = (tower(side) for tower, side in zip(towers, pair))
            return first @ second.T / math.sqrt(self.width)

        curve = [train[0].new_zeros(())]
        for step in range(1, self.steps + 1):
            optimizer.zero_grad()
            (-self.bound(scores(train))).backward()
            nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
            optimizer.step()
            if step % 10 == 0 or step == self.steps:
                with torch.no_grad():
                    curve.append(self.bound(scores(test)))
        return torch.stack(curve)


class InfoNCE(VariationalBound):
    """The contrastive bound, of low variance; with n samples it cannot exceed log(n / 2), since half of them are held out.

    Args, cost and source as for `VariationalBound` and `info_nce_bound`.

    Examples:
        >>> x = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
        >>> bool(InfoNCE(steps=20).estimate(x, x) <= math.log(20))
        True
    """

    def bound(self, scores: Scores) -> Float[Tensor, ""]:
        return info_nce_bound(scores)


class DonskerVaradhan(VariationalBound):
    """The bound behind MINE, tight for the best critic. All samples are in every step, so its gradient needs no moving average.

    Args, cost and source as for `VariationalBound` and `donsker_varadhan_bound`.

    Examples:
        >>> x = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
        >>> bool(DonskerVaradhan(steps=50).estimate(x, x) > 0.5)
        True
    """

    def bound(self, scores: Scores) -> Float[Tensor, ""]:
        return donsker_varadhan_bound(scores)


class NWJ(VariationalBound):
    """The bound of Nguyen, Wainwright and Jordan: no logarithm of a mean, more variance.

    Args, cost and source as for `VariationalBound` and `nwj_bound`.

    Examples:
        >>> x = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
        >>> bool(NWJ(steps=50).estimate(x, x) > 0.5)
        True
    """

    def bound(self, scores: Scores) -> Float[Tensor, ""]:
        return nwj_bound(scores)


def _standardised(values: Tensor) -> Tensor:
    scale = values.std(0)
    return (values - values.mean(0)) / torch.where(scale > 0, scale, 1.0)
