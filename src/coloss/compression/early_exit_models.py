"""Models whose tokens leave early: a plain vision transformer that segments, and a causal language model.

Each has its `TokenEarlyExit` as `early_exit`, and `read_out(stage)`, which makes of a stage what the model's `forward` gives. With a threshold
of 1 nothing leaves, and the model is the plain one.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.compression.token_early_exit import EarlyExitOutputs, TokenEarlyExit, spread_exits
from coloss.metrics import predict
from coloss.nn import (
    CausalLanguageModel,
    ImagePatches,
    KeyValueCache,
    KeyValues,
    LinearTokenHead,
    SegmentationQueryHead,
    TokenLogits,
    Transformer,
    rotary_alibi_bias,
)
from coloss.nn.transformer import SelfAttention
from coloss.ops import query_mask_loss, token_probabilities
from coloss.ops.distributed import all_reduce_mean, world_size
from coloss.ops.precision import full_precision


class QueryMasks(NamedTuple):
    """What a segmenter with query heads gives.

    Attributes:
        mask_logits: of each class, on the grid of patches.
        presence: logits of "this class is in the image" and "it is not".
    """

    mask_logits: Float[Tensor, "batch classes rows columns"]
    presence: Float[Tensor, "batch classes 2"]


class EarlyExitSegmenter(nn.Module):
    """A plain vision transformer that gives each pixel a class, with heads on the way at which confident patches stop.

    Patches with learned positions, pre-norm blocks, no class token, one scale; logits of patches are brought to the image by bilinear
    interpolation.

    Args:
        image_size: height and width in pixels.
        patch_size: of a patch, one number or height and width; divides the image.
        num_classes: number of classes.
        dim: size of a token.
        depth: number of blocks.
        heads: attention heads, of blocks and query heads; divides `dim`.
        exit_after: blocks done before each head, the last one `depth`; default: three stages.
        head: "linear", or "query" for a `SegmentationQueryHead` of its own at each stage.
        threshold, keep_per_class: see `TokenEarlyExit`.
        channels: of an image.
        mlp_ratio: of the blocks.
        dropout: in the blocks.

    Returns:
        From `forward(images)`: logits (batch, classes, height, width) with linear heads, `QueryMasks` with query heads. Either goes into
        `segmentation_loss` and `class_maps`.

    Raises:
        ValueError: for sizes that do not fit.

    Examples:
        >>> model = EarlyExitSegmenter((12, 16), 4, num_classes=3, dim=8, depth=3, heads=2)
        >>> model(torch.rand(2, 3, 12, 16)).shape, model.early_exit.exit_after
        (torch.Size([2, 3, 12, 16]), (1, 2, 3))
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        *,
        dim: int = 64,
        depth: int = 6,
        heads: int = 4,
        exit_after: Sequence[int] | None = None,
        head: Literal["linear", "query"] = "linear",
        threshold: float = 1.0,
        keep_per_class: int = 5,
        channels: int = 3,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if head not in ("linear", "query"):
            raise ValueError(f'head must be "linear" or "query", got {head!r}')
        self.tokenizer = ImagePatches(image_size, patch_size, channels, dim)
        exits = spread_exits(depth) if exit_after is None else exit_after
        blocks = Transformer(dim, depth, heads, mlp_ratio=mlp_ratio, dropout=dropout).blocks
        new_head = LinearTokenHead if head == "linear" else partial(SegmentationQueryHead, heads=heads)
        self.early_exit = TokenEarlyExit(
            blocks, [new_head(dim, num_classes) for _ in exits], exits, threshold, keep_per_class
        )
        self.num_classes, self.dim, self.mlp_ratio = num_classes, dim, mlp_ratio
        self.image_size = tuple(image_size)

    def stages(self, images: Float[Tensor, "batch channels height width"]) -> EarlyExitOutputs:
        """Everything that early exit has to say: logits of all heads, active tokens of each layer."""
        return self.early_exit(self.tokenizer(images))

    def read_out(self, stage: TokenLogits) -> Tensor | QueryMasks:
        """What `forward` gives, of one stage."""
        maps = stage.logits.unflatten(2, self.tokenizer.grid)
        if stage.presence is not None:
            return QueryMasks(maps, stage.presence)
        return F.interpolate(maps, self.image_size, mode="bilinear", align_corners=False)

    def class_maps(
        self, outputs: Tensor | QueryMasks | tuple[Tensor, ...]
    ) -> Int[Tensor, "batch height width"]:
        """The likeliest class of each pixel, of what `forward` gave."""
        if isinstance(outputs, Tensor):
            return outputs.argmax(1)
        masks, presence = outputs
        scores = token_probabilities(masks.flatten(2), presence).unflatten(2, self.tokenizer.grid)
        return F.interpolate(scores, self.image_size, mode="bilinear", align_corners=False).argmax(1)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Tensor | QueryMasks:
        return self.read_out(self.stages(images).final)


def segmentation_loss(
    outputs: Float[Tensor, "batch classes height width"] | tuple[Tensor, ...],
    targets: Int[Tensor, "batch height width"],
) -> Float[Tensor, ""]:
    """Cross-entropy of pixels for logits, `coloss.ops.query_mask_loss` for `QueryMasks`; pixels with target -100 do not count.

    With a batch of unlabelled pixels alone, 0. The number of labelled pixels is averaged over processes, so that data-parallel training takes
    the steps of one process with the joined batch.

    Examples:
        >>> segmentation_loss(torch.zeros(1, 4, 2, 2), torch.tensor([[[0, 1], [3, -100]]]))  # log 4
        tensor(1.3863)
    """
    if not isinstance(outputs, Tensor):
        return query_mask_loss(outputs[0], outputs[1], targets)
    total = F.cross_entropy(full_precision(outputs), targets, reduction="sum")
    labelled = all_reduce_mean((targets != -100).sum().to(total.dtype))
    return total / labelled.clamp(min=1 / world_size())


def evaluate_segmenter(model: EarlyExitSegmenter, data: Any, batch_size: int = 50) -> dict[str, float]:
    """Mean intersection over union of the classes, and the share of pixels with the right class, in one confusion matrix of all images.

    Classes that appear neither in the targets nor in the predictions are left out of the mean; so are pixels with target -100. Where all
    pixels have it, both are NaN.

    Examples:
        >>> model = EarlyExitSegmenter((4, 4), 2, num_classes=2, dim=8, depth=1, heads=2)
        >>> data = (torch.rand(3, 3, 4, 4), torch.ones(3, 4, 4, dtype=torch.int64))
        >>> from coloss.data import IndexedDataset
        >>> sorted(evaluate_segmenter(model, IndexedDataset(*data)))
        ['mean_iou', 'pixel_accuracy']
    """
    from torchmetrics.functional.classification import multiclass_jaccard_index

    maps, targets = predict(model, data, batch_size, call=lambda images: model.class_maps(model(images)))
    counted = targets != -100
    num_classes = max(model.num_classes, 2)  # torchmetrics wants two; one that is nowhere does not count
    return {
        "mean_iou": multiclass_jaccard_index(maps, targets, num_classes, ignore_index=-100).item(),
        "pixel_accuracy": (maps == targets)[counted].double().mean().item(),
    }


class EarlyExitLanguageModel(CausalLanguageModel):
    """A causal language model whose tokens stop at a head on the way where that is sure enough of the next one.

    A token that stopped keeps the prediction of its exit, and later layers' attention does not see it. Whether a token stops depends on
    itself and the tokens before it alone, so that no prediction knows what follows: no token is kept for its class
    (`keep_per_class` is 0).

    Args:
        vocabulary_size, dim, depth, heads: as `CausalLanguageModel`.
        exit_after: layers done before each head, the last one `depth`; default: three stages. The last head is the model's own output.
        threshold: probability of the likeliest next token above which a token stops; 1 for never.
        options: of `CausalLanguageModel`, without `causal_attention`: one that knows whole texts alone cannot serve those with tokens left out.

    Returns:
        From `forward(ids, valid=None)`: next-token logits (batch, tokens, vocabulary). With `cache`, `given` or `last_only`, which
        `generate` uses, all tokens go through all layers.

    Raises:
        ValueError: as `CausalLanguageModel` and `TokenEarlyExit`.

    Examples:
        >>> model = EarlyExitLanguageModel(20, dim=16, depth=3, heads=2, threshold=0.1)
        >>> ids = torch.randint(20, (2, 9))
        >>> model(ids).shape, list(model.stages(ids).active_counts.shape)
        (torch.Size([2, 9, 20]), [3, 2])
    """

    early_exit: TokenEarlyExit

    def __init__(
        self,
        vocabulary_size: int,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        *,
        exit_after: Sequence[int] | None = None,
        threshold: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(vocabulary_size, dim, depth, heads, **options)
        self.early_exit = _early_exit(self, exit_after, threshold)

    @classmethod
    def adopt(
        cls, model: CausalLanguageModel, exit_after: Sequence[int] | None = None, threshold: float = 1.0
    ) -> "EarlyExitLanguageModel":
        """Make a language model itself one of these: the same object, weights and paths, with new heads.

        Raises:
            ValueError: for a model of another class or with `causal_attention`, or exits that do not fit.

        Examples:
            >>> model = CausalLanguageModel(20, dim=16, depth=3, heads=2)
            >>> ids = torch.randint(20, (2, 9))
            >>> before = model(ids)
            >>> EarlyExitLanguageModel.adopt(model) is model, torch.equal(model(ids), before)
            (True, True)
        """
        if type(model) is not CausalLanguageModel:
            raise ValueError(f"model must be a CausalLanguageModel, got {type(model).__name__}")
        exits = _early_exit(model, exit_after, threshold)
        model.__class__ = cls
        model.early_exit = exits
        assert isinstance(model, cls)
        return model

    @property
    def dim(self) -> int:
        """Size of a token."""
        return self.embedding.embedding_dim

    @property
    def mlp_ratio(self) -> float:
        """Width of the blocks' two-layer networks in multiples of `dim`."""
        return self.transformer.blocks[0].mlp[0].out_features / self.dim  # type: ignore[union-attr, index, operator]

    @property
    def key_value_share(self) -> float:
        """Heads of keys and values over heads of queries."""
        attention = self.transformer.blocks[0].attention
        assert isinstance(attention, SelfAttention)
        return attention.key_value_heads / attention.heads

    def stages(
        self, ids: Int[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"] | None = None
    ) -> EarlyExitOutputs:
        """Everything that early exit has to say: logits of all heads, active tokens of each layer."""
        positions, _, _ = self._places(ids, valid, None)
        return self.early_exit(
            self._embed(ids, positions), None if valid is None else ~valid, positions.expand_as(ids)
        )

    def read_out(self, stage: TokenLogits) -> Float[Tensor, "batch tokens vocabulary"]:
        """What `forward` gives, of one stage."""
        return stage.logits.transpose(1, 2)

    def forward(
        self,
        ids: Int[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        *,
        cache: KeyValueCache | None = None,
        given: Sequence[KeyValues] | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "batch predicted vocabulary"]:
        if cache is not None or given is not None or last_only:
            return super().forward(ids, valid, cache=cache, given=given, last_only=last_only)
        return self.read_out(self.stages(ids, valid).final)


def _early_exit(
    model: CausalLanguageModel, exit_after: Sequence[int] | None, threshold: float
) -> TokenEarlyExit:
    if model.causal_attention is not None:
        raise ValueError(
            f"causal_attention must be None for early exit, got {type(model.causal_attention).__name__}"
        )
    exits = spread_exits(model.depth) if exit_after is None else exit_after
    vocabulary, dim = model.embedding.weight.shape
    heads = [LinearTokenHead(dim, vocabulary).to(model.embedding.weight) for _ in exits[:-1]]
    layers = [_CausalLayer(model, layer) for layer in range(model.depth)]
    return TokenEarlyExit(layers, [*heads, _OwnLogits(model)], exits, threshold, keep_per_class=0)


class _CausalLayer(nn.Module):
    """One layer of a language model, for tokens of which some were left out. It has no parameters: they stay the model's."""

    takes_positions = True

    def __init__(self, model: CausalLanguageModel, layer: int) -> None:
        super().__init__()
        self._model, self.layer = (model,), layer

    def forward(self, tokens: Tensor, padding: Tensor | None, positions: Tensor) -> Tensor:
        (model,) = self._model
        allowed = None
        if padding is not None or model.distance is not None:
            # Tokens that are left keep their order: causal in their places here, whatever their positions are.
            count = tokens.shape[1]
            allowed = torch.ones(1, count, count, dtype=torch.bool, device=tokens.device).tril()
            if padding is not None:
                # A token of padding attends to itself, or its softmax over nothing would be NaN.
                itself = torch.eye(count, dtype=torch.bool, device=tokens.device)
                allowed = allowed & (~padding[:, None] | itself)
            allowed = allowed[:, None]
            if model.distance is not None and model.distance_slopes is not None:
                allowed = rotary_alibi_bias(
                    positions, positions, model.distance_slopes, distance=model.distance, allowed=allowed
                )
        attend = model._attention(self.layer, positions, allowed, None, None)
        return model.transformer.blocks[self.layer](tokens, attend=attend)


class _OwnLogits(nn.Module):
    """The output of a language model as its last head, without parameters of its own."""

    def __init__(self, model: CausalLanguageModel) -> None:
        super().__init__()
        self._model = (model,)

    def multiply_adds(self, tokens: int) -> int:
        return tokens * self._model[0].embedding.weight.numel()

    def forward(self, tokens: Tensor, padding: Tensor | None) -> TokenLogits:
        return TokenLogits(self._model[0].logits(tokens).transpose(1, 2))


@torch.no_grad()
def early_exit_cost(
    model: EarlyExitSegmenter | EarlyExitLanguageModel, inputs: Any, batch_size: int = 64
) -> dict[str, float]:
    """What early exit saves of a model on some inputs, as the threshold stands.

    Args:
        model: left as it was.
        inputs: images or ids, samples in the first dimension.
        batch_size: samples in one pass.

    Returns:
        `multiply_adds` of blocks and heads for one sample in the mean, `multiply_adds_share` of those with a threshold of 1
        (above 1 where nothing leaves, for then the heads on the way come on top), and
        `token_layer_share`, the share of (token, layer) pairs that were computed. Counted by formula, see `token_multiply_adds`: no time
        is measured, and padding of batches is left out.

    Examples:
        >>> model = EarlyExitLanguageModel(20, dim=16, depth=3, heads=2)
        >>> early_exit_cost(model, torch.randint(20, (2, 9)))["multiply_adds_share"]
        1.0
    """
    found = predict(
        model,
        inputs,
        batch_size,
        call=lambda part: model.stages(*part if isinstance(part, tuple) else (part,)).active_counts.T,
    )
    counts = found.outputs.T
    exits = model.early_exit
    sizes = model.dim, model.mlp_ratio, getattr(model, "key_value_share", 1.0)
    cost = exits.multiply_adds(counts, *sizes).mean().item()
    threshold, select = exits.threshold, exits.select
    try:
        exits.threshold, exits.select = 1.0, None
        whole = exits.multiply_adds(counts[:1].expand_as(counts), *sizes).mean().item()
    finally:
        exits.threshold, exits.select = threshold, select
    return {
        "multiply_adds": cost,
        "multiply_adds_share": cost / whole,
        "token_layer_share": counts.sum().item() / (counts[0].sum().item() * len(counts)),
    }
