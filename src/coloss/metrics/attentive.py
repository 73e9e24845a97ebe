"""How much the tokens of a frozen encoder know: a probe that learns where to look."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from coloss.nn.attentive_pool import AttentivePool
from coloss.ops import without_autocast

from .probes import ProbeResult, label_budget


def attentive_probe(
    train_tokens: Float[Tensor, "train tokens dim"],
    train_targets: Int[Tensor, " train"],
    test_tokens: Float[Tensor, "test tokens dim"],
    test_targets: Int[Tensor, " test"],
    *,
    heads: int = 4,
    steps: int = 300,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.1,
    batch_size: int = 256,
    labels: int | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Test accuracy of one learned query that attends to frozen tokens, with one linear layer behind.

    Tokens are shifted and scaled by mean and variance of each dimension over the tokens of the training samples used. The `AttentivePool` learns by AdamW
    on cross-entropy, with a cosine learning rate and gradients clipped to norm 1.

    Args:
        train_tokens: encoded tokens of each training sample, such as `TokenEncoder.encode` gives.
        train_targets: class of each training sample, any integers.
        test_tokens: of each test sample, as many tokens or others.
        test_targets: class of each test sample; one that is absent in training counts as wrong.
        heads: attention heads, divides dim.
        steps: optimizer steps, >= 1.
        learning_rate: at the start, > 0.
        weight_decay: >= 0.
        batch_size: training samples in a step, drawn with replacement where there are more.
        labels: budget of training labels, drawn by `label_budget`; None uses all.
        seed: of labels, weights and batches. The global random state is left as it was.

    Returns:
        Accuracy, labels used and predictions.

    Raises:
        ValueError: if sizes disagree, tokens are not finite, a set is empty or an option is out of range.

    Source:
        Weimann and Conrad, 2024 (ECG-JEPA), arXiv 2410.13867, linear evaluation; the settings are our own, for small sets.

    Examples:
        >>> tokens = torch.zeros(8, 3, 4)
        >>> tokens[:4, 1] = 1.0
        >>> classes = torch.tensor([0] * 4 + [1] * 4)
        >>> attentive_probe(tokens, classes, tokens, classes, steps=30).accuracy
        1.0
    """
    for name, tokens, targets in (
        ("train", train_tokens, train_targets),
        ("test", test_tokens, test_targets),
    ):
        if len(tokens) == 0 or len(tokens) != len(targets):
            raise ValueError(
                f"{name}_tokens and {name}_targets must hold the same samples, at least one, "
                f"got {len(tokens)} and {len(targets)}"
            )
        if not bool(tokens.isfinite().all()):
            raise ValueError(f"{name}_tokens must be finite, got NaN or infinity")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be > 0, got {learning_rate}")
    chosen = torch.arange(len(train_tokens))
    if labels is not None:
        chosen = label_budget(train_targets, labels, seed)
    train, test = train_tokens[chosen].detach().float(), test_tokens.detach().float()
    mean, std = train.mean((0, 1)), train.std((0, 1), correction=0)
    std = torch.where(std > 0, std, 1.0)
    train, test = (train - mean) / std, (test - mean) / std
    classes, targets = train_targets[chosen].to(train.device).unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    # Autocast keeps the cast weights of the first step, and training would not move them.
    with without_autocast(train.device), torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        pool = AttentivePool(train.shape[2], heads, out=len(classes)).to(train.device)
        optimizer = torch.optim.AdamW(pool.parameters(), lr=learning_rate, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.arange(len(train))
            if len(train) > batch_size:
                rows = torch.randint(len(train), (batch_size,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(pool(train[rows]), targets[rows]).backward()
            torch.nn.utils.clip_grad_norm_(pool.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    with without_autocast(train.device), torch.no_grad():
        logits = torch.cat([pool(part) for part in test.split(1024)])
    predictions = classes[logits.argmax(1)].long().cpu()
    accuracy = float((predictions == test_targets.cpu()).double().mean())
    return ProbeResult(accuracy, len(chosen), predictions)
