"""Turns motion features into a few discrete tokens and back: the convolutional VQ-VAE below LaMP's and MoMask's generators.

First stage of LaMP (Li et al. 2024, arXiv 2410.07093); the network is that of T2M-GPT (Zhang et al. 2023, arXiv 2301.06052) and MoMask
(Guo et al. 2024, arXiv 2312.00063). With features x, encoder output m, nearest codes z and reconstruction x^:

    loss = smooth_l1(x^, x) + 0.5 smooth_l1(x^, x on the local joints) + 0.02 |m - z|^2 / dim

and the codes follow m as a moving average (`coloss.nn.VectorQuantizerEMA`). LaMP uses one codebook; `levels > 1` gives MoMask's residual ones.

Clips of different length stand in one batch: whatever fills up a shorter one (zeros, NaN) reaches neither tokens nor losses nor the codebook, and
the tokens of a clip are those it has alone. The released code encodes the filling, and trains on its tokens.

Measured once by a script, on 1,047 training clips of Bandai-Namco (64 frames, 131 numbers; `SMALL_TOKENIZER`, 200 steps of 64 clips, seeds 0 to
2; AdamW at 1e-3 for all, not searched) and the given split's 210 test clips, whose pairs of action and style training has seen. Codes used of
128, perplexity of their use, and mean distance of local joints after decoding, one number for each seed:

    codes from data, dead ones reset    109, 110, 98    61, 78, 63    41.3, 40.4, 43.9 mm
    codes from data, no reset           34, 27, 28      23, 17, 21    47.9, 48.0, 47.8 mm
    normal codes, no reset              22, 24, 9       14, 14, 8     53.5, 50.3, 68.5 mm

Single numbers are not to be relied on: a first weight that is larger by 1e-6 leads to another tokenizer. An
earlier measurement of the same had 95 to 105 codes and 42.3 to 44.0 mm with reset, 15 to 20 and 54.0 to 62.0 mm with normal codes without, in it
normal codes with reset 94 and 44.2 mm, and codes from data with reset after 400 steps 127 and 32.9 mm (seed 0). Pairs that training has not seen
were not measured.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.nn.vector_quantizer import Quantized, ResidualVectorQuantizer, VectorQuantizerEMA
from coloss.ops import latent_prediction_loss
from coloss.train.method import Method
from coloss.train.state import State

PAPER_TOKENIZER: Mapping[str, Any] = {
    "width": 512,
    "depth": 3,
    "down": 2,
    "codes": 512,
    "code_dim": 512,
    "dropout": 0.2,
}
"""The authors' sizes: 196 frames of 263 numbers become 49 tokens of 512 kinds. Train with AdamW at 5e-4, betas (0.9, 0.99)."""

SMALL_TOKENIZER: Mapping[str, Any] = {
    "width": 96,
    "depth": 2,
    "down": 2,
    "codes": 128,
    "code_dim": 32,
    "dropout": 0.0,
}
"""Sizes for about a thousand clips and a CPU: 64 frames become 16 tokens of 128 kinds. AdamW at 1e-3, 400 steps of 64 clips."""


class MotionReconstruction(NamedTuple):
    """What a tokenizer makes of a batch of clips.

    Attributes:
        features: (clips, frames, numbers) decoded again; 0 where a clip has ended.
        tokens: int64 (clips, tokens), or (clips, tokens, levels); -1 where a clip has ended.
        commitment, perplexity: see `coloss.nn.Quantized`.
        valid: bool (clips, frames), False where a clip has ended.
    """

    features: Tensor
    tokens: Tensor
    commitment: Tensor
    perplexity: Tensor
    valid: Tensor


class MotionVQVAE(nn.Module):
    """A convolutional encoder, a quantiser and a mirrored decoder for sequences of feature vectors, of motion or anything else in time.

    Encoder: a convolution of 3 frames; `down` times a halving of the frame rate (4 frames, stride 2) and `depth` residual blocks whose
    convolutions reach 3^(depth-1), ..., 3, 1 frames to each side; a convolution of 3 to `code_dim`. The decoder goes back by doubling frames.

    Args:
        in_dim: numbers of a frame, normalised.
        width: channels.
        depth: residual blocks at each frame rate, >= 0.
        down: halvings of the frame rate: a token stands for 2^down frames.
        codes: entries of the codebook (of each one with `levels > 1`).
        code_dim: size of a code.
        dropout: probability in [0, 1) at the end of each residual block.
        levels: codebooks; more than 1 for `ResidualVectorQuantizer`.
        quantizer: further arguments of the quantiser: decay, reset_below, start, seed; for several levels also dropout.

    Attributes:
        quantizer: `VectorQuantizerEMA` or `ResidualVectorQuantizer`.
        frames_per_token: 2^down.

    Returns:
        From `forward(features, lengths=None)` or `forward((features, lengths))`: `MotionReconstruction`. `lengths` are frames of each
        clip; frames after the last whole token of a clip count as filling.

    Raises:
        ValueError: for a size out of range; for a number of frames that is no multiple of `frames_per_token`; for other than one length for
            each clip, one shorter than a token or more than there is; for features that are not finite within the lengths.

    Examples:
        >>> model = MotionVQVAE(131, **SMALL_TOKENIZER)
        >>> found = model(torch.randn(2, 64, 131), torch.tensor([64, 40]))
        >>> found.features.shape, found.tokens.shape, (found.tokens[1] >= 0).sum()
        (torch.Size([2, 64, 131]), torch.Size([2, 16]), tensor(10))
    """

    quantizer: VectorQuantizerEMA | ResidualVectorQuantizer

    def __init__(
        self,
        in_dim: int,
        width: int = 512,
        depth: int = 3,
        down: int = 2,
        codes: int = 512,
        code_dim: int = 512,
        *,
        dropout: float = 0.0,
        levels: int = 1,
        quantizer: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("in_dim", in_dim, 1),
            ("width", width, 1),
            ("depth", depth, 0),
            ("down", down, 0),
            ("levels", levels, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.in_dim, self.codes, self.code_dim, self.levels = in_dim, codes, code_dim, levels
        self.frames_per_token = 2**down
        reach = [3**step for step in reversed(range(depth))]

        def blocks() -> list[nn.Module]:
            return [_ResidualBlock(width, dilation, dropout) for dilation in reach]

        self.encoder_in = nn.Conv1d(in_dim, width, 3, padding=1)
        self.encoder_stages = nn.ModuleList(
            nn.ModuleList([nn.Conv1d(width, width, 4, stride=2, padding=1), *blocks()]) for _ in range(down)
        )
        self.encoder_out = nn.Conv1d(width, code_dim, 3, padding=1)
        self.decoder_in = nn.Conv1d(code_dim, width, 3, padding=1)
        self.decoder_stages = nn.ModuleList(
            nn.ModuleList([*blocks(), nn.Conv1d(width, width, 3, padding=1)]) for _ in range(down)
        )
        self.decoder_middle = nn.Conv1d(width, width, 3, padding=1)
        self.decoder_out = nn.Conv1d(width, in_dim, 3, padding=1)
        options = dict(quantizer or {})
        self.quantizer = (
            VectorQuantizerEMA(codes, code_dim, **options)
            if levels == 1
            else ResidualVectorQuantizer(codes, code_dim, levels, **options)
        )

    def forward(
        self,
        features: Float[Tensor, "clips frames numbers"] | Sequence[Tensor],
        lengths: Int[Tensor, " clips"] | None = None,
    ) -> MotionReconstruction:
        if not isinstance(features, Tensor):
            features, lengths = features
        latents = self.encode(features, lengths)
        valid = token_mask(lengths, latents.shape[1], self.frames_per_token, latents)
        found: Quantized = self.quantizer(latents, valid)
        decoded = self._decode(found.quantized, valid)
        return MotionReconstruction(
            decoded,
            found.indices,
            found.commitment,
            found.perplexity,
            valid.repeat_interleave(self.frames_per_token, 1),
        )

    def encode(
        self, features: Float[Tensor, "clips frames numbers"], lengths: Int[Tensor, " clips"] | None = None
    ) -> Float[Tensor, "clips tokens code_dim"]:
        """What the quantiser gets: one vector for each token, 0 where a clip has ended."""
        self._check(features, lengths)
        tokens = features.shape[1] // self.frames_per_token
        valid = token_mask(lengths, tokens, self.frames_per_token, features)
        mask = _Mask(valid)
        stages = len(self.encoder_stages)
        # Chosen, not multiplied: what fills up a clip may be NaN.
        clean = torch.where(mask.frames(2**stages)[..., None], features, 0.0)
        finite = clean.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            clip = int(finite.int().argmin())
            raise ValueError(f"features must be finite within lengths, got NaN or infinity in clip {clip}")
        x = mask(F.relu(self.encoder_in(clean.transpose(1, 2))), 2**stages)
        for number, stage in enumerate(self.encoder_stages, 1):
            for layer in stage.children():
                x = mask(layer(x), 2 ** (stages - number))
        return mask(self.encoder_out(x), 1).transpose(1, 2)

    @torch.no_grad()
    def tokens(
        self, features: Float[Tensor, "clips frames numbers"], lengths: Int[Tensor, " clips"] | None = None
    ) -> Int[Tensor, "clips tokens *levels"]:
        """Numbers of the codes, -1 where a clip has ended; nothing is updated, whatever the mode. Call it in evaluation mode.

        Examples:
            >>> model = MotionVQVAE(5, 8, 1, codes=16, code_dim=4).eval()
            >>> tokens = model.tokens(torch.randn(2, 12, 5))
            >>> tokens.shape, model.decode(tokens).shape
            (torch.Size([2, 3]), torch.Size([2, 12, 5]))
        """
        latents = self.encode(features, lengths)
        valid = token_mask(lengths, latents.shape[1], self.frames_per_token, latents)
        training = self.quantizer.training
        try:
            return self.quantizer.eval()(latents, valid).indices
        finally:
            self.quantizer.train(training)

    def decode(self, tokens: Int[Tensor, "clips tokens *levels"]) -> Float[Tensor, "clips frames numbers"]:
        """Features of tokens, 0 where the tokens are -1 (of all levels).

        Raises:
            ValueError: for a token outside [-1, codes).
        """
        valid = tokens >= 0 if tokens.ndim == 2 else (tokens >= 0).any(2)
        return self._decode(self.quantizer.lookup(tokens), valid)

    def _decode(self, codes: Tensor, valid: Tensor) -> Tensor:
        mask = _Mask(valid)
        x = mask(F.relu(self.decoder_in(codes.transpose(1, 2))), 1)
        rate = 1
        for stage in self.decoder_stages:
            *blocks, smooth = stage.children()
            for block in blocks:
                x = mask(block(x), rate)
            rate *= 2
            x = mask(smooth(x.repeat_interleave(2, 2)), rate)
        x = mask(F.relu(self.decoder_middle(x)), rate)
        return mask(self.decoder_out(x), rate).transpose(1, 2)

    def _check(self, features: Tensor, lengths: Tensor | None) -> None:
        frames, per_token = features.shape[1], self.frames_per_token
        if features.shape[2] != self.in_dim:
            raise ValueError(f"features must have {self.in_dim} numbers a frame, got {features.shape[2]}")
        if not frames or frames % per_token:
            raise ValueError(f"features must have a multiple of {per_token} frames, got {frames}")
        if lengths is not None and lengths.shape != features.shape[:1]:
            raise ValueError(f"lengths must have shape ({len(features)},), got {tuple(lengths.shape)}")
        if lengths is not None and len(lengths):
            shortest, longest = int(lengths.min()), int(lengths.max())
            if shortest < per_token or longest > frames:
                raise ValueError(f"lengths must be in [{per_token}, {frames}], got {shortest} to {longest}")


def token_mask(
    lengths: Int[Tensor, " clips"] | None,
    tokens: int,
    frames_per_token: int,
    like: Float[Tensor, "clips ..."],
) -> Bool[Tensor, "clips tokens"]:
    """Which tokens of a batch are whole within their clips.

    Args:
        lengths: frames of each clip; None where all are full.
        tokens: of the longest clip.
        frames_per_token: > 0.
        like: any tensor with the clips in its first dimension, for their number and the device.

    Examples:
        >>> token_mask(torch.tensor([4, 11]), 3, 4, torch.zeros(2, 12, 5))
        tensor([[ True, False, False],
                [ True,  True, False]])
    """
    if lengths is None:
        return torch.ones(len(like), tokens, dtype=torch.bool, device=like.device)
    whole = torch.div(lengths.to(like.device), frames_per_token, rounding_mode="floor")
    return torch.arange(tokens, device=like.device) < whole[:, None]


def motion_tokenizer_terms(
    reconstruction: MotionReconstruction,
    features: Float[Tensor, "clips frames numbers"],
    joints: tuple[int, int] | None,
) -> dict[str, Tensor]:
    """The parts of a tokenizer's loss, each by itself: `reconstruction`, `joints` and `commitment`.

    Args:
        reconstruction: what the tokenizer gave for these features.
        features: x, normalised.
        joints: first and last + 1 of the numbers that are local joint positions ((4, 67) of the 263 for 22 joints); None for no such term.

    Returns:
        Scalars: means of smooth L1 over the frames and numbers that count, of all processes; and the commitment.

    Raises:
        ValueError: for joints outside the features.

    Examples:
        >>> x = torch.zeros(1, 4, 6)
        >>> found = MotionReconstruction(
        ...     x + 1, torch.zeros(1, 1), torch.tensor(0.5), torch.tensor(1.0), torch.ones(1, 4).bool()
        ... )
        >>> motion_tokenizer_terms(found, x, joints=(2, 5))
        {'reconstruction': tensor(0.5000), 'joints': tensor(0.5000), 'commitment': tensor(0.5000)}
    """
    numbers = features.shape[2]
    terms = {}
    parts = {"reconstruction": (0, numbers)} | ({} if joints is None else {"joints": joints})
    for name, (start, stop) in parts.items():
        if not 0 <= start < stop <= numbers:
            raise ValueError(f"joints must lie within the {numbers} numbers of a frame, got {joints}")
        decoded, target = reconstruction.features[..., start:stop], features[..., start:stop]
        terms[name] = latent_prediction_loss(decoded, target, "smooth_l1", valid=reconstruction.valid)
    return terms | {"commitment": reconstruction.commitment}


def motion_tokenizer_loss(
    reconstruction: MotionReconstruction,
    features: Float[Tensor, "clips frames numbers"],
    joints: tuple[int, int] | None = None,
    *,
    joint_weight: float = 0.5,
    commitment_weight: float = 0.02,
) -> Float[Tensor, ""]:
    """Cost of a motion reconstructed from its tokens, local joints counted again, and of encoder outputs far from their codes.

    `smooth_l1 + joint_weight * smooth_l1 of the joints + commitment_weight * commitment`, see `motion_tokenizer_terms` for arguments.

    Raises:
        ValueError: for joints outside the features.

    Source: Li et al. 2024, arXiv 2410.07093; weights of its code.

    Examples:
        >>> model, features = MotionVQVAE(9, 8, 1, codes=16, code_dim=4), torch.randn(2, 8, 9)
        >>> motion_tokenizer_loss(model(features), features, joints=(4, 7)).ndim
        0
    """
    terms = motion_tokenizer_terms(reconstruction, features, joints)
    weights = {"reconstruction": 1.0, "joints": joint_weight, "commitment": commitment_weight}
    return sum((weights[name] * term for name, term in terms.items()), torch.zeros_like(terms["commitment"]))


class MotionTokenizerTraining(Method):
    """Trains a `MotionVQVAE` in `fit`, on inputs that are features, or pairs of features and lengths; no targets are needed.

    Terms `reconstruction`, `joints` and `commitment` in place of an objective; logs `perplexity` (of the first level).

    Args:
        joints: first and last + 1 of the numbers that are local joint positions; None for no such term.
        joint_weight, commitment_weight: >= 0.

    Raises:
        ValueError: for a negative weight.

    Under several processes the run is that of one with the joined batch, but for dropout. Under gradient accumulation it is not: micro-batches
    weigh alike, whatever their numbers of frames, and each is a batch of its own for the codebook.

    Examples:
        >>> import coloss
        >>> from coloss.data import IndexedDataset
        >>> clips = IndexedDataset((torch.randn(16, 8, 9), torch.full((16,), 8)))
        >>> model = MotionVQVAE(9, 8, 1, codes=4, code_dim=4)
        >>> run = coloss.fit(
        ...     model, clips, None, [MotionTokenizerTraining((4, 7))], budget=coloss.Budget(steps=2)
        ... )
        >>> sorted(run.history[-1].terms), 1 <= run.history[-1].metrics["perplexity"] <= 4
        (['commitment', 'joints', 'reconstruction'], True)
    """

    replaces_objective = True

    def __init__(
        self,
        joints: tuple[int, int] | None = None,
        *,
        joint_weight: float = 0.5,
        commitment_weight: float = 0.02,
    ) -> None:
        super().__init__()
        for name, value in (("joint_weight", joint_weight), ("commitment_weight", commitment_weight)):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        self.joints = joints
        self.term_weights = {"joints": joint_weight, "commitment": commitment_weight}

    def terms(self, state: State) -> dict[str, Tensor]:
        inputs = state.batch.inputs
        features = inputs if isinstance(inputs, Tensor) else inputs[0]
        state.log({"perplexity": state.outputs.perplexity.flatten()[0]})
        return motion_tokenizer_terms(state.outputs, features, self.joints)


class _ResidualBlock(nn.Module):
    def __init__(self, width: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.wide = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.narrow = nn.Conv1d(width, width, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.narrow(F.relu(self.wide(F.relu(x)))))


class _Mask:
    """Sets what comes after a clip's end to zero, as if the clip stood alone, at any frame rate."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def frames(self, rate: int) -> Tensor:
        return self.tokens.repeat_interleave(rate, 1)

    def __call__(self, x: Tensor, rate: int) -> Tensor:
        return x * self.frames(rate)[:, None]
