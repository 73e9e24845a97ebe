"""How long a motion should be, as a distribution over numbers of tokens given a sentence's embedding."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.nn import MLP
from coloss.ops import full_precision


class LengthPredictor(nn.Module):
    """A classifier of token counts from `shortest` to `longest`, from a condition vector.

    Args:
        condition_dim: size of the vector.
        longest: largest count.
        shortest: smallest count, >= 1.
        hidden: width of the two hidden layers.
        dropout: probability in [0, 1).

    Returns:
        From `forward(condition)`: logits (sequences, longest - shortest + 1), the first that of `shortest`. Train it with the cross-entropy
        of counts less `shortest`.

    Raises:
        ValueError: for a size out of range.

    Source:
        Guo et al. 2022 (the length sampler of T2M), CVPR 2022; as in MoMask, arXiv 2312.00063.

    Examples:
        >>> predictor = LengthPredictor(condition_dim=4, longest=16, shortest=6)
        >>> condition = torch.randn(3, 4)
        >>> lengths = predictor.sample(condition)
        >>> predictor(condition).shape, bool((lengths >= 6).all() and (lengths <= 16).all())
        (torch.Size([3, 11]), True)
    """

    def __init__(
        self, condition_dim: int, longest: int, shortest: int = 1, *, hidden: int = 128, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if longest < 1:
            raise ValueError(f"longest must be >= 1, got {longest}")
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest must be in [1, {longest}], got {shortest}")
        self.shortest, self.longest = shortest, longest
        self.network = MLP(
            condition_dim, [hidden, hidden], longest - shortest + 1, norm="layer", dropout=dropout
        )

    def forward(self, condition: Float[Tensor, "sequences condition"]) -> Float[Tensor, "sequences counts"]:
        return self.network(condition)

    @torch.no_grad()
    def sample(
        self,
        condition: Float[Tensor, "sequences condition"],
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, " sequences"]:
        """Token counts drawn by the predicted distribution; the likeliest at temperature 0. Call it in evaluation mode.

        Args:
            condition: one vector for each sequence.
            temperature: >= 0.
            generator: of the draws.

        Raises:
            ValueError: for a negative temperature.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        logits = full_precision(self(condition))
        if temperature == 0:
            return logits.argmax(1) + self.shortest
        device = logits.device if generator is None else generator.device
        shares = (logits / temperature).softmax(1).to(device)
        return torch.multinomial(shares, 1, generator=generator).squeeze(1).to(logits.device) + self.shortest
