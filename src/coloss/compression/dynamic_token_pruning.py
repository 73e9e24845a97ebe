"""Trains a network whose easy tokens stop early: heads on the way learn with it, then it is fine-tuned with confident tokens left out.

DToP: Tang, Zhang, Xu, Liu, 2023, arXiv 2308.01045, "Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation".

A head stands after some of the layers. After each but the last, tokens with confidence above a threshold keep that head's prediction and take
no part in the layers after it, except for the most confident few of each class, which stay as context:

    final = {n : v_n > threshold} without the keep_per_class largest v of each predicted class,   v_n = max over classes of P(class, n)

    loss = sum over heads of objective(logits of all tokens as they stand after that head)

Each token's logits there are those of the last head that saw it, so gradients reach all heads. The choice itself has no gradient.

Tokens that leave are gathered out, so layers cost what the others cost; in a batch, what the fullest sample costs. Batches of one are packed
tightly. Each head's tokens can be any that a classifier reads: patches (`EarlyExitSegmenter`) or characters (`EarlyExitLanguageModel`).

When it helps: many tokens are easy and known as such early, sequences are long enough that fewer tokens are less time, and inputs come one by
one or in batches of equal difficulty. When not: few tokens, where gathering costs what it saves; step-by-step writing with a cache, where all
tokens go through all layers; confidence that means little, for the threshold is on a probability that nobody calibrated: tune it for each kind of
head and each model on validation data. Where depth pays little, a shallower network is the simpler way to the same cost.

Measured on CamVid at 30 x 40 pixels (48 patches, six blocks of width 64, 250 + 80 steps, five seeds, test images; threshold 0.75): a quarter of
the multiply-adds saved (share 0.73 to 0.77, heads included) at a mean IoU of 22.2 %, against 22.3 % of the same network trained on with all patches
(differences of single seeds -0.6 to +0.5 points). But leaving out as many random patches of each image gives 22.4 % (difference -0.7 to +0.2,
inconclusive), and a network of four blocks 22.4 % for a share of 0.67: with so little training depth pays nothing, and which patches stop does not
show in mean IoU. What the rule does show: more patches with a boundary between classes go through all blocks than patches without (73 % against
68 %; random: 71 % each), and over images boundaries and computation rise together (rank correlation 0.21 in the mean, -0.01 to 0.39). With no patch
of a class spared half of the computation goes, and 0.5 points of mean IoU.

Less computation is not less time by itself (`coloss bench token-exit`, one image on a CPU): with half of the patches leaving after the first
block, 48 patches of width 64, the claim's size, take about 1.3 times as long as without exits, and 432 patches of width 192 take 0.6 times as
long. Where patches that leave are hidden by masks in place of gathered out, hardly any time is saved.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from coloss.compression.early_exit_models import EarlyExitLanguageModel, early_exit_cost
from coloss.compression.token_early_exit import TokenEarlyExit
from coloss.errors import InputError
from coloss.nn import CausalLanguageModel
from coloss.train import Claim, Method, State, System

if TYPE_CHECKING:
    from coloss.train import Setting
    from coloss.train.step import Objective


class DynamicTokenPruning(Method):
    """Heads on the way learn beside the network; in the last part of the run confident tokens leave at them.

    For an `EarlyExitSegmenter`, an `EarlyExitLanguageModel`, any model of your own with `early_exit` (a `TokenEarlyExit`) and
    `read_out(stage)`, or a `CausalLanguageModel`, which becomes an `EarlyExitLanguageModel` (the same object, weights and paths, and new heads).
    The run's objective is applied to what the model gives, and to the same read out at each head on the way (terms
    `exit_<layers>`).

    Args:
        exit_after: layers done before each head, the last one the depth; default: three stages, or those of the model. Only where heads are
            still to be made.
        threshold: confidence above which a token is final, in [0, 1].
        keep_per_class: candidates of each class that go on; default: the model's own, which in a language model must be 0, for its tokens must
            not depend on later ones.
        prune_from: share of the run after which tokens leave, in [0, 1]: 0 for fine-tuning a model trained with all tokens, 1 for never (heads
            learn, and tokens leave after training only). In a plain loop without `total_steps` the share stays 0. A model whose `early_exit`
            has a rule of its own (`select`) follows that from the first step: it must be 0 then.
        objective: applied at the heads on the way; default: the run's own. Lightning's `training_step` keeps its own to itself: give it here.

    Raises:
        InputError: for values out of range; in `setup`, for a model that it does not fit, exits for a model that has its own, or a run without
            objective.

    The model that ships holds the heads and leaves tokens out at `threshold` by itself; this is code of coloss, no format of plain layers can
    say it. The method has no state: pruning follows from the progress of the run. Data-parallel training takes the steps of one process with
    the joined batch where the objective does.

    Examples:
        >>> import torch, coloss
        >>> from coloss.nn import next_token_loss
        >>> ids = torch.randint(20, (32, 9))
        >>> run = coloss.fit(
        ...     CausalLanguageModel(20, dim=16, depth=3, heads=2),
        ...     (ids[:, :-1], ids[:, 1:]),
        ...     next_token_loss,
        ...     [DynamicTokenPruning(threshold=0.2, prune_from=0.5)],
        ...     budget=coloss.Budget(steps=4),
        ... )
        >>> sorted(run.history[-1].terms)
        ['exit_1', 'exit_2', 'next_token']
        >>> type(run.model).__name__, run.model.early_exit.threshold
        ('EarlyExitLanguageModel', 0.2)
    """

    def __init__(
        self,
        *,
        exit_after: Sequence[int] | None = None,
        threshold: float = 0.9,
        keep_per_class: int | None = None,
        prune_from: float = 0.75,
        objective: "Objective | None" = None,
    ) -> None:
        super().__init__()
        for name, value in (("threshold", threshold), ("prune_from", prune_from)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} must be in [0, 1], got {value}")
        if keep_per_class is not None and keep_per_class < 0:
            raise InputError(f"keep_per_class must be >= 0, got {keep_per_class}")
        self.exit_after = None if exit_after is None else tuple(exit_after)
        self.threshold, self.keep_per_class, self.prune_from = threshold, keep_per_class, prune_from
        self.objective = objective

    def setup(self, state: State) -> None:
        if self.objective is None and state.objective is None:
            raise InputError("dynamic token pruning needs an objective: it is applied at every head")
        model: Any = state.model
        if type(model) is CausalLanguageModel:
            try:
                EarlyExitLanguageModel.adopt(model, self.exit_after)
            except ValueError as error:
                raise InputError(str(error)) from error
        elif not isinstance(getattr(model, "early_exit", None), TokenEarlyExit) or not hasattr(
            model, "read_out"
        ):
            raise InputError(
                "model must be a CausalLanguageModel or have early_exit (a TokenEarlyExit) and read_out(stage), got "
                f"{type(model).__name__}"
            )
        elif self.exit_after is not None and self.exit_after != model.early_exit.exit_after:
            raise InputError(
                f"exit_after must be left out for a model that has its heads, after {model.early_exit.exit_after}"
            )
        exits = model.early_exit
        if exits.select is not None and self.prune_from > 0:
            raise InputError(
                "prune_from must be 0 for a model whose early_exit has a rule of its own (select), got "
                f"{self.prune_from}"
            )
        keep = exits.keep_per_class if self.keep_per_class is None else self.keep_per_class
        if keep and isinstance(model, CausalLanguageModel):
            raise InputError(
                f"keep_per_class must be 0 in a language model, where it would show tokens what follows, got {keep}"
            )
        exits.keep_per_class, exits.threshold = keep, 1.0
        state.tap("early_exit", "early_exit")

    def on_batch(self, state: State) -> None:
        pruning = state.progress >= self.prune_from and self.prune_from < 1
        _exits(state).threshold = self.threshold if pruning else 1.0

    def terms(self, state: State) -> dict[str, Tensor]:
        model: Any = state.model
        found = state.features["early_exit"]
        exits = _exits(state)
        if exits.select is not None or exits.threshold < 1:
            counts = found.active_counts
            state.log({"token_layer_share": counts.sum() / (counts[0].sum() * len(counts)).clamp(min=1)})
        terms, objective = {}, self.objective or state.objective
        for layers, stage in zip(model.early_exit.exit_after[:-1], found.stages, strict=False):
            loss = objective(model.read_out(stage), state.batch.targets)
            terms[f"exit_{layers}"] = state.combine(state, loss) if isinstance(loss, Mapping) else loss
        return terms

    def finish(self, state: State) -> None:
        _exits(state).threshold = self.threshold

    def report(self, model: nn.Module, data: Any) -> dict[str, float]:
        """What early exit saves on the first 256 samples of the training data, see `early_exit_cost`."""
        inputs = getattr(data, "inputs", None)
        if inputs is None:
            return {}
        some = tuple(part[:256] for part in inputs) if isinstance(inputs, tuple) else inputs[:256]
        return early_exit_cost(model, some)  # type: ignore[arg-type]


def _exits(state: State) -> TokenEarlyExit:
    exits = state.model.early_exit
    assert isinstance(exits, TokenEarlyExit)
    return exits


SYSTEM = System(
    slug="dtop",
    title="DToP: Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
    paper="Tang, Zhang, Xu, Liu, 2023, arXiv 2308.01045",
    family="compression",
    acts_on=("model", "loss", "evaluation"),
    api=(
        "coloss.compression.DynamicTokenPruning",
        "coloss.compression.TokenEarlyExit",
        "coloss.ops.select_confident_tokens",
        "coloss.compression.EarlyExitSegmenter",
        "coloss.compression.EarlyExitLanguageModel",
        "coloss.compression.early_exit_cost",
        "coloss.compression.token_multiply_adds",
        "coloss.compression.segmentation_loss",
        "coloss.compression.evaluate_segmenter",
        "coloss.nn.SegmentationQueryHead",
        "coloss.nn.LinearTokenHead",
        "coloss.ops.query_mask_loss",
        "coloss.ops.drop_tokens",
        "coloss.ops.restore_tokens",
        "coloss.data.load_segmentation",
        "coloss.compression.train_token_pruning",
        "coloss.compression.load_token_pruning",
    ),
    method="coloss.compression.DynamicTokenPruning",
    kinds=("next-token",),
    recipe="coloss.compression.train_token_pruning",
)


def _trial(setting: "Setting") -> Mapping[str, Mapping[str, float]]:
    from coloss.compression.dynamic_token_pruning_trial import early_exit_against_others

    return early_exit_against_others(setting)


CLAIM = Claim(
    statement="On street scenes (CamVid at 30 x 40 pixels) a six-block vision transformer whose confident patches leave after blocks 1 and 3 "
    "(threshold 0.75, five of each predicted class spared) has a higher mean intersection over union on test images than the same network, "
    "trained on for the same steps, from which random patches leave: as many of each image at the same blocks, so at equal multiply-adds.",
    metric="mean_iou",
    baseline="random exit",
    method="early exit",
    trial=_trial,
    tried="Chosen on validation images with seeds 100 and 101, one seed at a time: learning rates 5e-4 and 1.5e-3 of the further steps for "
    "early exit, random exit and no exit after 200 steps (the higher one was better for all three but random exit with seed 101; at the lower one random exit was ahead "
    "of early exit by 0.2 points with seed 100 and level with seed 101), 2e-3 and 4e-3 of the base; heads after blocks 2, 4, 6 and 1, 3, 6 (the "
    "latter by the very gap that is claimed: random and early exit lie further apart there); thresholds 0.6 to 0.98. A network of two blocks alone was as good as one of six after 300 steps, so depth pays "
    "little at this size and a shallower network is the harder opponent: it is an arm, and not the one of the claim.",
)
