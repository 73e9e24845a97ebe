"""Made-up text that a network can be trained through: hard tokens with soft gradients, and losses of what two classifiers read in it."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .distillation_losses import distillation_kl_loss
from .distributed import all_reduce_mean
from .divergence import check_logits, js_divergence_loss
from .gradients import straight_through
from .precision import full_precision

DisagreementKind = Literal["kl", "l1", "js"]


def gumbel_noise(
    like: Float[Tensor, "*shape"], generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    r"""Noise that turns an argmax into a draw: $\arg\max_v (o_v + g_v)$ is $v$ with probability $\mathrm{softmax}(o)_v$.

    $g = -\log E$ with $E$ exponentially distributed.

    Args:
        like: gives shape and device, and the type, which is float32 at least.
        generator: of the draw.

    Source:
        Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030.

    Examples:
        >>> logits = torch.tensor([0.0, 0.0, 3.0]).expand(10_000, 3)
        >>> drawn = (logits + gumbel_noise(logits, torch.Generator().manual_seed(0))).argmax(1)
        >>> [round(share, 2) for share in (drawn.bincount() / 10_000).tolist()], logits[0].softmax(0)
        ([0.04, 0.04, 0.91], tensor([0.0453, 0.0453, 0.9094]))
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    drawn = torch.empty(like.shape, dtype=dtype, device="cpu" if generator is None else generator.device)
    # An exponential variable of exactly 0 would give infinite noise.
    drawn = drawn.exponential_(generator=generator).clamp(min=torch.finfo(dtype).tiny)
    return -drawn.log().to(like.device)


def straight_through_tokens(
    logits: Float[Tensor, "*batch vocabulary"],
    temperature: float = 1.0,
    *,
    noise: Float[Tensor, "*batch vocabulary"] | None = None,
    ids: Int[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch vocabulary"]:
    r"""Exactly one-hot tokens whose gradient is that of a soft choice.

    Forward: one-hot of $\arg\max (o + g)$, or of the `ids`. Backward: as if the value were $\mathrm{softmax}((o + g)/\tau)$.

    Args:
        logits: $o$; $-\infty$ for tokens that cannot be chosen.
        temperature: $\tau > 0$ of the soft choice; low values are closer to the hard one, with gradients that are larger and rarer.
        noise: $g$, of `gumbel_noise` for a random choice; None takes the likeliest token.
        ids: tokens chosen before, in place of the argmax.

    Returns:
        Same shape, at least float32: a 1 in each row, else 0.

    Raises:
        ValueError: if the temperature is not above 0, the shapes do not fit, or there is no token.

    Source:
        Jang, Gu, Poole 2017, arXiv 1611.01144, section 2.2.

    Examples:
        >>> logits = torch.tensor([[1.0, 3.0, 2.0]], requires_grad=True)
        >>> tokens = straight_through_tokens(logits)
        >>> tokens
        tensor([[0., 1., 0.]], grad_fn=<_StraightThroughBackward>)
        >>> tokens[0, 0].backward()
        >>> bool(logits.grad[0, 0] > 0 > logits.grad[0, 1])
        True
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must have at least one token in the last dimension, got {tuple(logits.shape)}"
        )
    for name, given, shape in (("noise", noise, logits.shape), ("ids", ids, logits.shape[:-1])):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(given.shape)}")
    scores = full_precision(logits)
    scores = scores if noise is None else scores + noise
    chosen = scores.argmax(-1) if ids is None else ids.long()
    soft = (scores / temperature).softmax(-1)
    return straight_through(F.one_hot(chosen, logits.shape[-1]).to(soft.dtype), soft)


def soft_embed(
    tokens: Float[Tensor, "*batch vocabulary"], embedding: Float[Tensor, "vocabulary dim"]
) -> Float[Tensor, "*batch dim"]:
    r"""Vectors of tokens given as weights over the vocabulary: $w E$, which for a one-hot $w$ is the row of its token.

    Args:
        tokens: $w$, such as of `straight_through_tokens`.
        embedding: $E$, the `weight` of an `nn.Embedding`.

    Raises:
        ValueError: if the sizes of the vocabulary differ.

    Examples:
        >>> table = torch.nn.Embedding(5, 3)
        >>> ids = torch.tensor([[4, 0]])
        >>> torch.equal(soft_embed(torch.nn.functional.one_hot(ids, 5).float(), table.weight), table(ids))
        True
    """
    if tokens.shape[-1] != len(embedding):
        raise ValueError(
            f"tokens must weigh the {len(embedding)} rows of embedding, got {tokens.shape[-1]} weights"
        )
    return tokens.to(embedding.dtype) @ embedding


def batch_label_entropy(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, ""]:
    r"""Entropy of the labels that a batch is given, all samples together: log of the number of classes when they are balanced.

    $H(\frac{1}{B} \sum_b \mathrm{softmax}(t_b))$. Maximised, it keeps a generator from making one class alone. Unlike the mean entropy of
    the samples it is large for certain predictions of different classes.

    Args:
        logits: $t$, of a teacher for made-up samples; not detached. Under several processes, which hold as many samples each, the batch is
            that of all.

    Returns:
        In nats, at least float32; 0 where all samples have one certain label.

    Raises:
        ValueError: for an empty batch, or no class.

    Source:
        The information entropy loss of Chen et al. 2019 (DAFL), arXiv 1904.01186, section 3.

    Examples:
        >>> balanced, collapsed = torch.tensor([[99.0, 0.0], [0.0, 99.0]]), torch.tensor([[999.0, 0.0]])
        >>> batch_label_entropy(balanced), batch_label_entropy(collapsed)
        (tensor(0.6931), tensor(0.))
    """
    if 0 in logits.shape:
        raise ValueError(f"logits must hold a sample and a class at least, got {tuple(logits.shape)}")
    mean = all_reduce_mean(full_precision(logits).softmax(-1).mean(0))
    # A class of mean 0 has an infinite pull; the smallest positive number instead keeps it finite and its sign right.
    logarithm = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    return (mean * -logarithm).sum()


def disagreement(
    teacher_logits: Float[Tensor, "*batch classes"],
    student_logits: Float[Tensor, "*batch classes"],
    kind: DisagreementKind = "kl",
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    r"""How far a student is from its teacher, with gradients to both: what an adversarial generator looks for.

    - `"kl"`: $T^2 \mathrm{KL}(\mathrm{softmax}(t/T) \,\|\, \mathrm{softmax}(z/T))$, unbounded;
    - `"js"`: their Jensen-Shannon divergence, at most $T^2 \log 2$;
    - `"l1"`: mean absolute difference of the logits over samples and classes.

    Args:
        teacher_logits: $t$.
        student_logits: $z$, same shape.
        kind: of the three.
        temperature: $T > 0$; not used by `"l1"`.

    Returns:
        Mean over the batch, 0 for an empty one; 0 with zero gradients where student and teacher agree.

    Raises:
        ValueError: on unequal shapes, a temperature not above 0, or an unknown kind.

    Source:
        `"kl"` and `"js"`: Micaelli, Storkey 2019, arXiv 1905.09768; Yin et al. 2020, arXiv 1912.08795. `"l1"`: Fang et al. 2019,
        arXiv 1912.11006.

    Examples:
        >>> teacher, student = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> [round(disagreement(teacher, student, kind).item(), 3) for kind in ("kl", "js", "l1")]
        [0.328, 0.09, 1.0]
    """
    if kind == "kl":
        return distillation_kl_loss(student_logits, teacher_logits, temperature)
    if kind == "js":
        return js_divergence_loss(teacher_logits, student_logits, temperature)
    if kind != "l1":
        raise ValueError(f'kind must be "kl", "l1" or "js", got {kind!r}')
    check_logits(student_logits, teacher_logits, temperature)
    gap = full_precision(teacher_logits) - full_precision(student_logits)
    return gap.abs().sum() / max(gap.numel(), 1)
