r"""Trains a recommender on another one's ranked lists: to make it smaller, or to see how well it can be imitated.

With z the student's scores and c_1 .. c_k the list that another recommender answered with, best first:

    list   = mean_t max(0, m - (z_{c_t} - z_{c_{t+1}})) + mean_{t, n not listed} max(0, m' - (z_{c_t} - z_n))
    repair = mean over missing i of softplus(theta - z_i) + mean over spurious j of softplus(z_j - theta)

where missing items are listed and not among the student's own first k, spurious ones the reverse, and theta is the student's k-th largest
score, taken as fixed. The first is the ranking distillation of Yue et al. 2021, arXiv 2109.01165, with items drawn by an exact mask; the
second is a reading of the "bidirectional repair loss" of arXiv 2411.11677, 2024, whose formula could not be confirmed.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.nn import Frozen, next_item_scores
from coloss.ops import full_precision, top_items
from coloss.train import Method, Schedule, Setting, State

RepairForm = Literal["threshold", "pairwise"]


def list_distillation_loss(
    logits: Float[Tensor, "batch items"],
    ranked_items: Int[Tensor, "batch k"],
    *,
    margin_order: float | int = 0.5,
    margin_negative: float | int = 0.5,
    num_negatives: int | None = None,
    ignore: Bool[Tensor, "#batch items"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Hinge cost of listed items in the wrong order, and of listed items that do not stand clear of those not listed.

    The equation is `list` at the head of this module, averaged over rows.

    Args:
        logits: z, of all items; minus infinity is allowed for items that are not listed.
        ranked_items: c, best first, without repeats.
        margin_order: m >= 0, by which an item should outscore the next one.
        margin_negative: m' >= 0, by which a listed item should outscore one that is not.
        num_negatives: items to draw for each listed one, evenly among those neither listed nor ignored, >= 1; None takes all of them.
        ignore: items that are neither listed nor wrong: padding, what the user has seen.
        generator: of the draw.

    Returns:
        A scalar, at least float32; 0 for no rows. The second part is 0 where every item is listed or ignored.

    Raises:
        ValueError: if shapes disagree, an option is out of range, or a listed item does not exist or is ignored.

    Cost:
        O(batch * items), and batch * k * items with all negatives, which are held at once; batch * k * num_negatives with drawn ones.

    Source:
        Yue, He, Zeng, McAuley 2021, arXiv 2109.01165, section 4.2.

    Examples:
        >>> logits = torch.tensor([[0.0, 2.0, 1.0, -5.0]])
        >>> list_distillation_loss(logits, torch.tensor([[1, 2, 0]])).item()  # every gap is 1 or more
        0.0
        >>> list_distillation_loss(logits, torch.tensor([[2, 1]])).item()  # 0.5 + 1 in the wrong order
        1.5
    """
    for name, margin in (("margin_order", margin_order), ("margin_negative", margin_negative)):
        if not 0 <= margin < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {margin}")
    if num_negatives is not None and num_negatives < 1:
        raise ValueError(f"num_negatives must be >= 1, got {num_negatives}")
    unlisted = _unlisted(logits, ranked_items, ignore)
    if not len(logits):
        return full_precision(logits).sum()
    scores = full_precision(logits).masked_fill(~unlisted, 0.0)
    listed = full_precision(logits).gather(1, ranked_items)
    order = F.relu(margin_order - (listed[:, :-1] - listed[:, 1:]))
    k = ranked_items.shape[1]
    some = unlisted.any(1)
    if num_negatives is None:
        gaps = F.relu(margin_negative - (listed[:, :, None] - scores[:, None, :]))
        counted = unlisted[:, None, :].expand_as(gaps)
        by_row = torch.where(counted, gaps, 0.0).sum((1, 2)) / (k * unlisted.sum(1).clamp(min=1))
    else:
        device = logits.device if generator is None else generator.device
        weights = (unlisted | ~some[:, None]).float().to(device)
        drawn = torch.multinomial(weights, k * num_negatives, replacement=True, generator=generator)
        negatives = scores.gather(1, drawn.to(logits.device)).view(len(logits), k, num_negatives)
        by_row = F.relu(margin_negative - (listed[:, :, None] - negatives)).mean((1, 2))
    cost = torch.where(some, by_row, 0.0).mean()
    return cost + order.mean() if k > 1 else cost


def bidirectional_repair_loss(
    logits: Float[Tensor, "batch items"],
    ranked_items: Int[Tensor, "batch listed"],
    k: int | None = None,
    form: RepairForm = "threshold",
    *,
    ignore: Bool[Tensor, "#batch items"] | None = None,
) -> Float[Tensor, ""]:
    """Cost of the items by which a recommender's own first k differ from a given list, in both directions.

    `"threshold"` is `repair` at the head of this module; `"pairwise"` is mean over missing i and spurious j of softplus(z_j - z_i). Both are
    averaged over rows; a row whose sets agree adds 0. The order within the list does not matter.

    Args:
        logits: z, of all items; finite for those listed.
        ranked_items: the list, best first.
        k: compare the first k, >= 1; None: the whole list.
        form: `"threshold"` or `"pairwise"`.
        ignore: items that may not be recommended: padding, what the user has seen.

    Returns:
        A scalar, at least float32. The sets and the threshold carry no gradient.

    Raises:
        ValueError: if shapes disagree, k or form is out of range, or a listed item does not exist or is ignored.

    Cost:
        Sorting the scores, and O(batch * k^2).

    Source:
        arXiv 2411.11677, 2024: a reading of its description.

    Examples:
        >>> logits = torch.tensor([[3.0, 2.0, 1.0]])
        >>> bidirectional_repair_loss(logits, torch.tensor([[1, 0]])).item()
        0.0
        >>> loss = bidirectional_repair_loss(logits, torch.tensor([[0, 2]]))
        >>> round(loss.item(), 4)  # item 2 is missing, 1 spurious, the threshold is 2
        2.0064
    """
    if form not in ("threshold", "pairwise"):
        raise ValueError(f'form must be "threshold" or "pairwise", got {form!r}')
    k = ranked_items.shape[1] if k is None else k
    if not 1 <= k <= ranked_items.shape[1]:
        raise ValueError(f"k must be in [1, {ranked_items.shape[1]}], the length of the lists, got {k}")
    _unlisted(logits, ranked_items, ignore)
    scores = full_precision(logits)
    if not len(logits):
        return scores.sum()
    own = top_items(scores.detach(), k, ignore)
    given = ranked_items[:, :k]
    same = given[:, :, None] == own[:, None, :]
    missing, spurious = ~same.any(2), ~same.any(1)
    wanted, unwanted = scores.gather(1, given), scores.gather(1, own)
    count = missing.sum(1).clamp(min=1)
    if form == "threshold":
        threshold = unwanted[:, -1:].detach()
        up = torch.where(missing, F.softplus(threshold - wanted), 0.0)
        down = torch.where(spurious, F.softplus(unwanted - threshold), 0.0)
        return ((up.sum(1) + down.sum(1)) / count).mean()
    pairs = F.softplus(unwanted[:, None, :] - wanted[:, :, None])
    differ = missing[:, :, None] & spurious[:, None, :]
    return (torch.where(differ, pairs, 0.0).sum((1, 2)) / count**2).mean()


class ListDistillation(Method):
    """Distils the lists of one recommender into another; needs no scores of it.

    Adds the terms `list` and `repair` (see the head of this module) on the scores after the last item of each history. The student
    returns scores of all items (batch, items), or `NextItemOutputs` as `coloss.nn.SequentialRecommender` does.

    Args:
        target: recommender to imitate, with `recommend(histories, k)`, asked with `exclude_seen=False` besides where that is said here:
            frozen in place, in evaluation mode whatever happens around it. None: the lists come with the batch, as
            `extras["ranked_items"]` (batch, k).
        k: length of the target's lists, at most the items that a history leaves to be listed.
        repair: weight of the term `repair`: a number >= 0, or a schedule; the number 0 leaves it out.
        form: of the repair loss.
        num_negatives: as for `list_distillation_loss`.
        exclude_seen: leave the items of the history out of both sides; must be what the lists do.
        replace_objective: train on the lists alone.

    Raises:
        InputError: for a value out of range, a target without `recommend`; in a run, if there are no lists, or they do not fit.

    Cost: with a target, its forward pass.

    Source:
        Yue et al. 2021, arXiv 2109.01165; arXiv 2411.11677, 2024.

    Examples:
        >>> import coloss
        >>> from coloss.nn import SequentialRecommender
        >>> large, small = SequentialRecommender(30, 32), SequentialRecommender(30, 8)
        >>> histories = torch.randint(1, 31, (64, 6))
        >>> method = ListDistillation(large, k=5)
        >>> run = coloss.fit(small, (histories,), methods=[method], budget=coloss.Budget(steps=2))
        >>> sorted(run.history[-1].terms)
        ['list', 'repair']
    """

    def __init__(
        self,
        target: nn.Module | None = None,
        *,
        k: int = 10,
        repair: Schedule = 1.0,
        form: RepairForm = "threshold",
        num_negatives: int | None = 1,
        exclude_seen: bool = True,
        replace_objective: bool = True,
    ) -> None:
        super().__init__()
        if target is not None and not callable(getattr(target, "recommend", None)):
            raise InputError(
                f"target must have a method recommend(histories, k), got {type(target).__name__}"
            )
        if not callable(repair) and not 0 <= repair < math.inf:
            raise InputError(f"repair must be >= 0 and finite, or a schedule, got {repair}")
        if k < 1:
            raise InputError(f"k must be >= 1, got {k}")
        if form not in ("threshold", "pairwise"):
            raise InputError(f'form must be "threshold" or "pairwise", got {form!r}')
        if num_negatives is not None and num_negatives < 1:
            raise InputError(f"num_negatives must be >= 1, got {num_negatives}")
        self.target = None if target is None else Frozen(target)
        self.k, self.repair, self.form = k, repair, form
        self.num_negatives, self.exclude_seen = num_negatives, exclude_seen
        self.replaces_objective = replace_objective
        self.term_weights = {"repair": repair}

    @classmethod
    def for_setting(
        cls, setting: Setting, *, replace_objective: bool = False, **parameters: Any
    ) -> "ListDistillation":
        """Make one's own recommender smaller: a larger one is trained on the task's data first, and its lists are learnt beside the task's loss."""
        return cls(setting.new_teacher(), replace_objective=replace_objective, **parameters)

    def setup(self, state: State) -> None:
        own = set(state.model.parameters())
        if self.target is not None and any(parameter in own for parameter in self.target.parameters()):
            raise InputError("target must not share parameters with the student: pass a copy.deepcopy of it")

    def terms(self, state: State) -> dict[str, Tensor]:
        histories = state.batch.inputs
        logits = _last_scores(state.outputs)
        ignore = logits.detach() == -math.inf
        if self.exclude_seen:
            ignore = ignore.scatter(1, histories, True)
        lists = self._lists(state, histories)
        try:
            terms = {
                "list": list_distillation_loss(
                    logits,
                    lists,
                    num_negatives=self.num_negatives,
                    ignore=ignore,
                    generator=state.local_generator,
                )
            }
            if callable(self.repair) or self.repair > 0:
                terms["repair"] = bidirectional_repair_loss(logits, lists, form=self.form, ignore=ignore)
        except ValueError as error:
            raise InputError(f"the lists do not fit the student: {error}") from error
        return terms

    def _lists(self, state: State, histories: Tensor) -> Tensor:
        if self.target is not None:
            options = {} if self.exclude_seen else {"exclude_seen": False}
            try:
                with torch.no_grad():
                    return self.target.module.recommend(histories, self.k, **options)  # type: ignore[operator]
            except ValueError as error:
                raise InputError(f"the target has no lists of k = {self.k} items: {error}") from error
        lists = state.batch.extras.get("ranked_items")
        if not isinstance(lists, Tensor) or lists.ndim != 2 or len(lists) != len(histories):
            found = tuple(lists.shape) if isinstance(lists, Tensor) else type(lists).__name__
            raise InputError(
                f"batch.extras['ranked_items'] must hold a list for each of {len(histories)} histories, got {found}; "
                "or give a target"
            )
        return lists


def _last_scores(outputs: Any) -> Tensor:
    """Scores of all items after the last position."""
    if isinstance(outputs, tuple) and len(outputs) == 2:
        return next_item_scores(outputs[0][:, -1], outputs[1])
    if isinstance(outputs, Tensor) and outputs.ndim == 2:
        return outputs
    found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    raise InputError(f"the model must return scores (batch, items) or NextItemOutputs, got {found}")


def _unlisted(logits: Tensor, ranked_items: Tensor, ignore: Tensor | None) -> Tensor:
    """True for items that are neither listed nor ignored."""
    if len(ranked_items) != len(logits):
        raise ValueError(f"ranked_items must have {len(logits)} rows, got {len(ranked_items)}")
    if ranked_items.shape[1] < 1:
        raise ValueError("ranked_items must hold at least one item in each row, got none")
    if ignore is not None and ignore.shape[1:] != logits.shape[1:]:
        raise ValueError(f"ignore must have {logits.shape[1]} columns, got {tuple(ignore.shape)}")
    low, high = (int(ranked_items.min()), int(ranked_items.max())) if len(logits) else (0, 0)
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"ranked_items must be in [0, {logits.shape[1]}), got {low if low < 0 else high}")
    candidates = torch.ones_like(logits, dtype=torch.bool)
    if ignore is not None:
        candidates &= ~ignore
    if not bool(candidates.gather(1, ranked_items).all()):
        raise ValueError("ranked_items must not hold ignored items: both sides must leave out the same ones")
    return candidates.scatter(1, ranked_items, False)
