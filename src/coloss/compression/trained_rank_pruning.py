r"""Trains a network whose layers are of low rank at the end, so that each becomes two thin layers without fine-tuning.

Yuhui Xu, Yuxi Li, Shuai Zhang, Wei Wen, Botao Wang, Yingyong Qi, Yiran Chen, Weiyao Lin, Hongkai Xiong 2020, "TRP:
Trained Rank Pruning for Efficient Deep Neural Networks", IJCAI 2020, arXiv 2004.14566 (first version 1812.02402).

With M_l the weight of layer l as a matrix (`matricize`) and U diag(s) V^T its singular value decomposition:

    objective     min  L(W) + lambda * sum_l ||M_l||_*            ||M||_* = sum_i s_i, the nuclear norm
    every m steps k = min{k : sum_{i<=k} s_i^2 >= e * sum_i s_i^2}
                  M <- U_k diag(s_k) V_k^T                        before the forward pass
                  grad M += lambda * U_k V_k^T                    after the backward pass of the same step
    between       ordinary steps, in which the rank may rise again

e is `energy`, m is `every`, lambda is `nuclear_weight`. As in the authors' code the pull of the nuclear norm is added
only on projection steps, so over time it is lambda / m; `scale_nuclear_by_every` makes it lambda. Steps are counted
over the whole run. A projection at energy e is not idempotent: it removes up to 1 - e of what energy is left, so
ranks ratchet down until the loss pushes back as much.

When it helps: you mean to factorise a convolutional network and cannot, or do not want to, fine-tune it afterwards.
What training leaves has exactly the logged ranks, so there is no rank to choose and the factorised network computes
the same outputs. Measured (`coloss verify trp`: digits, three convolutions of 32 channels, the last two cut to rank 8):
98.0 % test accuracy, where the plainly trained network keeps 48 %, or 88 % after `refresh_batch_norm`; before the cut it
has 98.3 %. That leaves 34 % of the network's multiply-adds and 31 % of its parameters.

When not: in short runs. Each projection costs accuracy that the steps after it must win back, and ranks take some
twenty projections to settle: with 12 epochs in place of 24 accuracy was three points below the plain network's.
Below the rank at which training settles a cut is as harmful as to a plain network. Embedding networks may need the
rank that this takes; raise `energy` there. The nuclear norm by itself changed nothing at its default weight; the
projection does the work. Fewer multiply-adds are not always less time, see `coloss.compression.low_rank`.

To go on afterwards: the factorised network is an ordinary one, `coloss.fit` without methods fine-tunes it (the paper's code does so for
four epochs, if at all). To keep the original class, train with `decompose=False` and give `stored_weights` to `compress_model`: the file
then holds the factors, and loads into a fresh network of the class.

Distributed: every process projects the same averaged weights, so weights stay equal without communication, as long
as all processes run the same device type and libraries. Sharded weights (FSDP) are refused. Checkpoints need nothing
but the weights, and the log of ranks: what a projection step computes is used within that step. Half-precision
weights are decomposed in float32 and rounded when stored; keep float32 weights ("bf16-mixed") for exact ranks.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.compression.cost import multiply_adds
from coloss.compression.low_rank import (
    check_decomposable,
    decompose_model,
    refresh_batch_norm,
    select_layers,
)
from coloss.compression.projection import (
    low_rank_matrix,
    low_rank_weight,
    nuclear_subgradient,
    tangent_component,
)
from coloss.compression.stored_factors import store_low_rank
from coloss.compression.stored_weights import StoredWeight, store_exactly
from coloss.data import load
from coloss.errors import InputError
from coloss.metrics import evaluate_classifier
from coloss.nn import Classifier, ConvNet
from coloss.ops import TruncatedSVD, matricize, nuclear_norm, truncated_svd
from coloss.ops.spectral import Scheme
from coloss.train import Arm, Budget, Claim, Fit, Method, Setting, State, System, Task, cosine
from coloss.train.loop import NonFiniteLossError


def nuclear_norm_loss(
    model: nn.Module, scheme: Scheme = "channel", layers: str | Sequence[str] | None = None
) -> Float[Tensor, ""]:
    """Sum of the nuclear norms of a model's layers: the penalty of the objective, for every step of your own loop.

    Args:
        model: any network.
        scheme: how weights are laid out as matrices.
        layers: paths; default: `select_layers`.

    Returns:
        A differentiable scalar, at least float32, unweighted.

    Raises:
        InputError: as `select_layers`.

    Cost:
        One SVD for each layer and call.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.diag(torch.tensor([3.0, 1.0])))
        >>> nuclear_norm_loss(model, layers="0").item()
        4.0
    """
    chosen = select_layers(model, scheme, layers)
    return torch.stack(
        [nuclear_norm(matricize(layer.weight, scheme)[0]).sum() for layer in chosen.values()]
    ).sum()


class TrainedRankPruning(Method):
    """Keeps layers at low rank while they train, and ships them factorised.

    Args:
        scheme: "channel", "spatial" or "decoupled" factorisation, see `coloss.compression.low_rank`.
        energy: share of the squared singular values that a projection keeps, in (0, 1]; lower is thinner.
        every: steps between projections, >= 1; the first is at step 0.
        nuclear_weight: weight of the nuclear norm's sub-gradient on projection steps, >= 0.
        layers: paths of the layers, or of blocks of them; default: convolutions with a kernel larger than 1 x 1 except the first, or, where
            there are none, linear layers except the first and the last; frozen layers are left alone.
        project: False leaves only the nuclear norm.
        project_momentum: also take out of the optimizer's momentum what points away from the projected matrix'
            tangent space; an extension, the paper leaves the momentum as it is.
        scale_nuclear_by_every: multiply the sub-gradient by `every`, so that it counts as if added at each step.
        decompose: at the end put two thin layers in place of each layer where they take fewer multiply-adds. Outputs
            stay equal up to rounding.
        final_projection: after the last step, cut each layer back to its rank at the last projection.

    Attributes:
        rank_history: (step, {path: rank}) of each projection that changed a rank.

    Raises:
        InputError: for values out of range; `decompose=True` without a final projection, since weights of full rank have
            nothing to gain; in `setup`, for layers that do not exist, cannot be factorised or are frozen; in `setup` with
            `decompose=True`, for layers that no pair can replace, as `decompose_model`.

    Cost:
        One SVD for each layer every `every` steps, O(min(r, c)^2 max(r, c)) for an r x c matrix: milliseconds for
        64 x 576 on a CPU.

    Source:
        Xu et al. 2020, arXiv 2004.14566, algorithm 1.

    Examples:
        >>> import coloss
        >>> from coloss.nn import MLP
        >>> inputs = torch.randn(64, 8)
        >>> method = TrainedRankPruning(energy=0.5, every=5)
        >>> run = coloss.fit(
        ...     MLP(8, (32, 32), 2),
        ...     (inputs, (inputs[:, 0] > 0).long()),
        ...     nn.functional.cross_entropy,
        ...     [method],
        ...     budget=coloss.Budget(steps=20),
        ... )
        >>> rank = method.ranks()["layers.3"]
        >>> [tuple(layer.weight.shape) for layer in run.model.layers[3]] == [(rank, 32), (32, rank)]
        True
    """

    def __init__(
        self,
        *,
        scheme: Scheme = "channel",
        energy: float = 0.9,
        every: int = 20,
        nuclear_weight: float = 3e-4,
        layers: str | Sequence[str] | None = None,
        project: bool = True,
        project_momentum: bool = False,
        scale_nuclear_by_every: bool = False,
        decompose: bool = True,
        final_projection: bool = True,
    ):
        super().__init__()
        if scheme not in ("channel", "spatial", "decoupled"):
            raise InputError(f'scheme must be "channel", "spatial" or "decoupled", got {scheme!r}')
        if not 0 < energy <= 1:
            raise InputError(f"energy must be in (0, 1], got {energy}")
        if every < 1:
            raise InputError(f"every must be >= 1, got {every}")
        if not nuclear_weight >= 0:
            raise InputError(f"nuclear_weight must be >= 0, got {nuclear_weight}")
        if decompose and not (project and final_projection):
            raise InputError(
                "decompose=True needs project and final_projection: say decompose=False without them"
            )
        self.scheme, self.energy, self.every, self.nuclear_weight = scheme, energy, every, nuclear_weight
        self.layers, self.project, self.project_momentum = layers, project, project_momentum
        self.scale_nuclear_by_every = scale_nuclear_by_every
        self.decompose, self.final_projection = decompose, final_projection
        self.rank_history: list[tuple[int, dict[str, int]]] = []
        self._shapes: dict[str, torch.Size] = {}
        self._pulls: dict[str, Tensor] = {}
        self._projected_at = -1

    def ranks(self) -> dict[str, int]:
        """Rank of each layer after the last projection (the highest of its filters, for "decoupled"); empty before."""
        return dict(self.rank_history[-1][1]) if self.rank_history else {}

    def stored_weights(self, model: nn.Module) -> dict[str, StoredWeight]:
        """The factors of layers that shipped whole (`decompose=False`), for the file of the network in its original class.

        Args:
            model: as `finish` left it.

        Returns:
            Name in the state dict -> factors, for `compress_model(model, given=...)`: float32 and float64 weights whose factors take
            fewer bytes than any exact form. Empty where nothing was projected at the end.

        Examples:
            >>> TrainedRankPruning(decompose=False).stored_weights(nn.Linear(4, 4))
            {}
        """
        if not (self.project and self.final_projection):
            return {}
        parts = dict(model.named_modules())
        found: dict[str, StoredWeight] = {}
        for path, rank in self.ranks().items():
            weight: Any = getattr(parts.get(path), "weight", None)
            # Layers that were factorised are dense pairs by now.
            if weight is None or weight.dtype not in (torch.float32, torch.float64):
                continue
            stored = store_low_rank(weight, rank, self.scheme)
            if stored.nbytes < store_exactly(weight).nbytes:
                found[".".join(filter(None, (path, "weight")))] = stored
        return found

    def setup(self, state: State) -> None:
        chosen = select_layers(state.model, self.scheme, self.layers)
        frozen = [path for path, layer in chosen.items() if not layer.weight.requires_grad]
        if frozen and (self.layers is not None or len(frozen) == len(chosen)):
            raise InputError(f"layers must be trainable to be kept low-rank, got frozen {', '.join(frozen)}")
        self._shapes = {path: layer.weight.shape for path, layer in chosen.items() if path not in frozen}
        if self.decompose:
            check_decomposable(state.model, self._shapes)

    def on_batch(self, state: State) -> None:
        # Once per optimizer step, however many batches it accumulates: a second projection would cut more.
        if state.step % self.every == 0 and state.step != self._projected_at:
            self._projected_at = state.step
            self._pulls = self._visit(state)

    def on_gradients(self, state: State) -> None:
        weight_of_norm = self.nuclear_weight * (self.every if self.scale_nuclear_by_every else 1)
        for path, pull in self._pulls.items():
            weight = self._weight(state, path)
            pull = (weight_of_norm * pull).to(weight.dtype)
            weight.grad = pull if weight.grad is None else weight.grad + pull
        self._pulls = {}

    @torch.no_grad()
    def finish(self, state: State) -> None:
        ranks = self.ranks()
        if self.project and self.final_projection and ranks:
            # Back to the ranks of the last projection: a cut at `energy` here would cost what no step makes good.
            for path, rank in ranks.items():
                weight = self._weight(state, path)
                weight.copy_(low_rank_weight(weight, self.scheme, rank=rank))
            if self.decompose:
                decompose_model(state.model, self.scheme, rank=ranks, layers=list(ranks))

    def get_extra_state(self) -> dict[str, Any]:
        return {"rank_history": [[step, ranks] for step, ranks in self.rank_history]}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self.rank_history = [(step, dict(ranks)) for step, ranks in state["rank_history"]]

    @torch.no_grad()
    def _visit(self, state: State) -> dict[str, Tensor]:
        """Decompose every layer, project it if asked to, log ranks; gives the nuclear norm's sub-gradients."""
        ranks, pulls = {}, {}
        for path in self._shapes:
            weight = self._weight(state, path)
            matrix, restore = matricize(weight, self.scheme)
            svd = truncated_svd(matrix, energy=self.energy)
            ranks[path] = svd.rank
            if self.nuclear_weight > 0:
                pulls[path] = restore(nuclear_subgradient(svd))
            if self.project:
                weight.copy_(restore(low_rank_matrix(svd)))
            if self.project_momentum:
                self._project_momentum(state, weight, svd)
        if ranks != self.ranks():
            self.rank_history.append((state.step, ranks))
        return pulls

    def _project_momentum(self, state: State, weight: Tensor, svd: TruncatedSVD) -> None:
        if state.optimizer is None:
            raise InputError("project_momentum needs the optimizer: set state.optimizer of the training step")
        for name in ("momentum_buffer", "exp_avg"):
            momentum = state.optimizer.state.get(weight, {}).get(name)
            if momentum is not None:
                matrix, restore = matricize(momentum, self.scheme)
                momentum.copy_(restore(tangent_component(matrix, svd)))

    def _weight(self, state: State, path: str) -> nn.Parameter:
        weight: Any = state.model.get_submodule(path).weight
        if weight.shape != self._shapes[path] or hasattr(weight, "placements"):
            raise InputError(
                f"the weight of {path} is sharded: low rank needs whole weights, use strategy ddp"
            )
        if not weight.isfinite().all():
            raise NonFiniteLossError(f"weight {path} is not finite at step {state.step}: it has no rank")
        return weight


SYSTEM = System(
    slug="trp",
    title="TRP: Trained Rank Pruning for Efficient Deep Neural Networks",
    paper="Xu et al. 2020, arXiv 2004.14566",
    family="compression",
    acts_on=("weights", "gradients"),
    api=(
        "coloss.compression.TrainedRankPruning",
        "coloss.compression.decompose_model",
        "coloss.compression.decompose",
        "coloss.compression.low_rank_weight",
        "coloss.compression.nuclear_norm_loss",
        "coloss.compression.refresh_batch_norm",
        "coloss.compression.store_low_rank",
        "coloss.compression.multiply_adds",
    ),
    method="coloss.compression.TrainedRankPruning",
    kinds=("classification", "regression", "multilabel", "retrieval", "self-supervised", "next-token"),
)

RANK = 8


def _digits() -> Task:
    return Task(
        name="digits-low-rank",
        kind="classification",
        title="digits with three convolutions of 32 channels, the last two cut to rank 8 after training",
        load=lambda seed: load("digits", seed=seed),
        model=lambda splits: Classifier(ConvNet(1, (32, 32, 32)), splits.num_classes),
        objective=nn.functional.cross_entropy,
        objective_name="cross-entropy",
        validate=lambda model, splits: evaluate_classifier(model, splits.validation),
        test=lambda model, splits: evaluate_classifier(model, splits.test),
        metric="accuracy",
        budget=Budget(epochs=24),
        batch_size=64,
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4),
        learning_rate_schedule=cosine(),
    )


def _cut_and_judge(run: Fit, setting: Setting) -> dict[str, float]:
    """What the network is worth after the same cut in every arm, without fine-tuning."""
    splits = setting.splits

    def cut(**criterion: Any) -> tuple[nn.Module, list[Any]]:
        model = copy.deepcopy(run.model)
        return model, decompose_model(model, **criterion)

    def accuracy(model: nn.Module) -> float:
        return evaluate_classifier(model, splits.test)["accuracy"]

    at_rank, _ = cut(rank=RANK, only_if_smaller=False)
    smaller, report = cut(energy=0.95)
    found = {"accuracy_at_rank_8": accuracy(at_rank)}
    refresh_batch_norm(at_rank, splits.train)
    cost = {
        name: [multiply_adds(model, splits.test.inputs[:1]), sum(p.numel() for p in model.parameters())]
        for name, model in {"dense": run.model, "at_rank_8": at_rank, "at_95_energy": smaller}.items()
    }
    found |= {
        "accuracy_at_rank_8_norms_refreshed": accuracy(at_rank),
        "accuracy_at_95_energy": accuracy(smaller),
    }
    for name in ("at_rank_8", "at_95_energy"):
        found[f"multiply_adds_share_{name}"], found[f"parameters_share_{name}"] = (
            after / before for after, before in zip(cost[name], cost["dense"], strict=True)
        )
    return found | {"rank_at_95_energy": sum(layer.rank for layer in report) / len(report)}


def _trp(setting: Setting, **parameters: Any) -> list[Method]:
    # Left whole, so that every arm is cut by the same function.
    return [TrainedRankPruning(energy=0.9, every=20, decompose=False, **parameters)]


CLAIM = Claim(
    statement=(
        "Cut to rank 8 after training, without fine-tuning, a network trained with TRP keeps more test accuracy than the "
        "same network trained plainly."
    ),
    metric="accuracy_at_rank_8",
    baseline="plain",
    method="trp",
    task=_digits(),
    arms=(
        Arm("plain"),
        Arm("trp", _trp),
        Arm("nuclear norm only", partial(_trp, project=False)),
    ),
    measure=_cut_and_judge,
)
