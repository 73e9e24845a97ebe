"""What the stages of LaMP's training add to a plain run: sentences drawn in each step, a term for turns, a rival's text features."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from coloss.data import Batch
from coloss.motion.generic_text import GenericTextEncoder
from coloss.motion.language_motion import drawn_captions
from coloss.ops import latent_prediction_loss
from coloss.train.method import Method
from coloss.train.state import State


class DrawnCaption(Method):
    """One sentence of each clip, drawn anew in every step and put where the model looks for it.

    The batch must have the extras `words` (clips, captions, words) and `caption_counts`, as `TextMotion.dataset` makes them.

    Args:
        arrange: the batch and the words (clips, words) to the batch that the model gets.

    Each process draws for its own clips.

    Examples:
        >>> import coloss
        >>> from dataclasses import replace
        >>> from coloss.data import IndexedDataset
        >>> extras = {"words": torch.randint(9, (8, 2, 3)), "caption_counts": torch.full((8,), 2)}
        >>> data = IndexedDataset(torch.randn(8, 4), extras=extras)
        >>> draw = DrawnCaption(lambda batch, words: replace(batch, targets=words[:, 0]))
        >>> run = coloss.fit(
        ...     nn.Linear(4, 9), data, nn.functional.cross_entropy, [draw], budget=coloss.Budget(steps=1)
        ... )
        >>> list(run.history[-1].terms)
        ['cross_entropy']
    """

    reads_outputs = False

    def __init__(self, arrange: Callable[[Batch, Tensor], Batch]) -> None:
        super().__init__()
        self.arrange = arrange

    def on_batch(self, state: State) -> None:
        words, counts = state.batch.extras["words"], state.batch.extras["caption_counts"]
        generator = state.local_generator
        drawn = torch.rand(len(words), generator=generator, device=generator.device)
        state.batch = self.arrange(state.batch, drawn_captions(words, counts, drawn))


class TurnTerm(Method):
    """Adds the smooth L1 error of how a motion turns to a tokenizer's loss, as the term `turn`.

    Args:
        weight: of the term, >= 0.

    Raises:
        ValueError: for a negative weight.

    Examples:
        >>> TurnTerm(0.5).term_weights
        {'turn': 0.5}
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight must be >= 0, got {weight}")
        self.term_weights = {"turn": weight}

    def terms(self, state: State) -> dict[str, Tensor]:
        features, decoded = state.batch.inputs[0][..., :1], state.outputs.features[..., :1]
        return {"turn": latent_prediction_loss(decoded, features, "smooth_l1", valid=state.outputs.valid)}


class GenericCondition(nn.Module):
    """The rival of LaMP's text features: a frozen text encoder that never saw a motion, and a trained linear layer.

    Args:
        encoder: frozen in place.
        dim: of the condition.

    Returns:
        From `forward(words)`: (batch, dim).

    Examples:
        >>> GenericCondition(GenericTextEncoder(30, dim=8, depth=1, heads=2), 5)(
        ...     torch.randint(1, 30, (3, 4))
        ... ).shape
        torch.Size([3, 5])
    """

    def __init__(self, encoder: GenericTextEncoder, dim: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.output = nn.Linear(encoder.out_features, dim)
        self.train(self.training)

    def train(self, mode: bool = True) -> "GenericCondition":
        """The encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, words: Tensor) -> Tensor:
        with torch.no_grad():
            text = self.encoder(words)
        return self.output(text)


class OfDrawnCaption(nn.Module):
    """A condition of the words that `DrawnCaption` left in the batch's extra `drawn`.

    Args:
        condition: from words (batch, words) to vectors; its parameters are trained along.

    Returns:
        From `forward(batch)`: (batch, dim).

    Examples:
        >>> words = torch.tensor([[4, 2], [7, 1]])
        >>> OfDrawnCaption(nn.Embedding(9, 3))(Batch(words, extras={"drawn": words})).shape
        torch.Size([2, 2, 3])
    """

    def __init__(self, condition: nn.Module) -> None:
        super().__init__()
        self.condition = condition

    def forward(self, batch: Batch) -> Tensor:
        return self.condition(batch.extras["drawn"])
