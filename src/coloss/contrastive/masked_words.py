"""Guessing masked words of a caption from the other words and the image, which enters the text encoder in training only."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.nn import TokenEncoder, Words
from coloss.ops import full_precision, is_distributed
from coloss.ops.loss_arguments import reduced_total

IGNORED = -100
"""Target of a word that is not to be guessed."""


def mask_tokens(
    ids: Int[Tensor, "texts words"],
    vocabulary_size: int,
    *,
    mask_id: int = 2,
    special_ids: int = 3,
    probability: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "texts words"], Int[Tensor, "texts words"]]:
    """Hide some words of each text: of the chosen ones 80 % become the mask, 10 % another word, 10 % stay as they are.

    Args:
        ids: of words.
        vocabulary_size: number of ids.
        mask_id: the id that stands for a hidden word.
        special_ids: ids below this number (padding, unknown, mask) are neither chosen nor put in place of a word.
        probability: of a word to be chosen, in [0, 1].
        generator: of randomness.

    Returns:
        The ids with hidden words, in new memory; and the targets: the chosen words' ids, -100 elsewhere.

    Raises:
        ValueError: for a value out of range, or a vocabulary without words.

    Source:
        Devlin et al. 2019 (BERT), arXiv 1810.04805, section 3.1.

    Examples:
        >>> hidden, targets = mask_tokens(torch.tensor([[7, 8, 0]]), 10, probability=1.0)
        >>> targets.tolist(), hidden[0, 2].item()
        ([[7, 8, -100]], 0)
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
    if vocabulary_size <= special_ids:
        raise ValueError(f"vocabulary_size must be > {special_ids}, got {vocabulary_size}")
    device = "cpu" if generator is None else generator.device
    draws = torch.rand(2, *ids.shape, generator=generator, device=device).to(ids.device)
    other = torch.randint(special_ids, vocabulary_size, ids.shape, generator=generator, device=device).to(
        ids.device
    )
    chosen = (draws[0] < probability) & (ids >= special_ids)
    hidden = torch.where(chosen & (draws[1] < 0.8), mask_id, ids)
    hidden = torch.where(chosen & (draws[1] >= 0.9), other, hidden)
    return hidden, torch.where(chosen, ids, IGNORED)


class ImageFusion(nn.Module):
    """Adds to each word token what it finds in the image: `e + out(attention(norm(e), image, image))`, at first nothing.

    Args:
        dim: of a word token.
        image_dim: of an image token.
        heads: of attention; divides `dim`.

    Attributes:
        out: linear, zero at first: the layer begins as the identity.

    Raises:
        ValueError: if `heads` does not divide `dim`.

    Examples:
        >>> tokens = torch.randn(2, 5, 8)
        >>> bool((ImageFusion(8, 3, heads=2)(tokens, torch.randn(2, 4, 3)) == tokens).all())
        True
    """

    def __init__(self, dim: int, image_dim: int, heads: int = 1) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim {dim}, got {heads}")
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, kdim=image_dim, vdim=image_dim, batch_first=True)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, tokens: Float[Tensor, "batch words dim"], image: Float[Tensor, "batch patches image_dim"]
    ) -> Float[Tensor, "batch words dim"]:
        found, _ = self.attention(self.norm(tokens), image, image, need_weights=False)
        return tokens + self.out(found)


class FusedMaskedLM(nn.Module):
    """Masked language modelling by a text encoder into which the image is fused at some of its layers.

    The encoder itself belongs to the model: it is called, not registered, and holds none of these parameters. It must let words see both
    ways. With the fusion layers at zero, as they begin, it is plain masked language modelling.

    Args:
        text_encoder: over `coloss.nn.Words`, not causal.
        image_dim: of an image token.
        layers: numbers of the blocks after which the image is fused, from 0; None: after each third of the blocks.
        tied: give logits by the encoder's own word embeddings, plus a bias; False learns another matrix.

    Attributes:
        fusions: an `ImageFusion` for each layer.

    Returns:
        From `forward(masked_ids, image_tokens, targets)`: the mean cross-entropy over targets that are not -100, in at least float32; 0
        if there are none. `image_tokens`: (batch, patches, image_dim), or one such tensor for each layer; None leaves the fusion out.

    Raises:
        ValueError: for a causal encoder, one without words, layers that it does not have, or another number of image tokens.

    Cost:
        One pass of the text encoder and its attention to the image. Over several processes the mean is over all their words.

    Source:
        The idea: Nie et al. 2023 (LightCLIP), arXiv 2312.00674; layers and attention are reconstructed.

    Examples:
        >>> encoder = TokenEncoder(Words(20, 8, max_length=6), 8, depth=3, heads=2)
        >>> model = FusedMaskedLM(encoder, image_dim=5)
        >>> hidden, targets = mask_tokens(torch.randint(3, 20, (4, 6)), 20, probability=0.5)
        >>> model(hidden, torch.randn(4, 9, 5), targets).shape, len(model.fusions)
        (torch.Size([]), 3)
    """

    def __init__(
        self,
        text_encoder: TokenEncoder,
        image_dim: int,
        layers: Sequence[int] | None = None,
        *,
        tied: bool = True,
    ) -> None:
        super().__init__()
        words = text_encoder.tokenizer
        if text_encoder.causal:
            raise ValueError("text_encoder must not be causal: masked words are guessed from both sides")
        if not isinstance(words, Words):
            raise ValueError(f"text_encoder must be over Words, got {type(words).__name__}")
        depth = len(text_encoder.transformer.blocks)
        if layers is None:
            layers = sorted({-(-depth * part // 3) - 1 for part in (1, 2, 3)}) if depth else ()
        if any(not 0 <= layer < depth for layer in layers) or len(set(layers)) < len(layers):
            raise ValueError(f"layers must be different ones of 0 .. {depth - 1}, got {list(layers)}")
        dim = text_encoder.out_features
        blocks: Any = text_encoder.transformer.blocks
        heads = blocks[0].attention.heads if depth else 1
        self._encoder = (text_encoder,)  # in a tuple it is no submodule
        self.layers = tuple(layers)
        self.fusions = nn.ModuleList(ImageFusion(dim, image_dim, heads) for _ in self.layers)
        vocabulary = words.embedding.num_embeddings
        self.untied = None if tied else nn.Linear(dim, vocabulary, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    @property
    def text_encoder(self) -> TokenEncoder:
        """The encoder that is called."""
        return self._encoder[0]

    def encode(
        self, ids: Int[Tensor, "batch words"], image_tokens: Tensor | Sequence[Tensor] | None
    ) -> Float[Tensor, "batch words dim"]:
        """Word tokens of the encoder, with the image fused in."""
        encoder = self.text_encoder
        if image_tokens is None:
            return encoder.encode(ids)
        stages = [image_tokens] * len(self.layers) if isinstance(image_tokens, Tensor) else list(image_tokens)
        if len(stages) != len(self.layers):
            raise ValueError(
                f"image_tokens must be one tensor or one for each of {len(self.layers)} layers, got {len(stages)}"
            )
        handles = [
            encoder.transformer.blocks[layer].register_forward_hook(
                lambda module, given, out, fusion=fusion, stage=stage: fusion(out, stage)
            )
            for layer, fusion, stage in zip(self.layers, self.fusions, stages, strict=True)
        ]
        try:
            return encoder.encode(ids)
        finally:
            for handle in handles:
                handle.remove()

    def forward(
        self,
        masked_ids: Int[Tensor, "batch words"],
        image_tokens: Tensor | Sequence[Tensor] | None,
        targets: Int[Tensor, "batch words"],
    ) -> Float[Tensor, ""]:
        wanted = targets != IGNORED
        tokens = self.encode(masked_ids, image_tokens)[wanted]
        words = self.text_encoder.tokenizer
        assert isinstance(words, Words)
        weight = words.embedding.weight if self.untied is None else self.untied.weight
        logits = full_precision(F.linear(tokens, weight, self.bias.to(tokens.dtype)))
        total = F.cross_entropy(logits, targets[wanted], reduction="sum")
        return reduced_total(total, wanted.sum().to(total.dtype), "mean", is_distributed())
