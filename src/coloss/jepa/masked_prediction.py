"""Trains an encoder of tokens without labels: it sees a part of each sample, and must predict what a slow copy of it makes of the rest.

I-JEPA: Assran, Duval, Misra, Bojanowski, Vincent, Rabbat, LeCun, Ballas, 2023, arXiv 2301.08243, "Self-Supervised Learning from Images
with a Joint-Embedding Predictive Architecture". The same skeleton, with other masks and distances, serves series and table columns.

With tokens x_1..x_n of a sample, an encoder f, its exponential moving average g, a predictor h and, for each sample, visible tokens C
and M sets T_k of hidden ones:

    targets      y = g(x_1, ..., x_n)                               all tokens, no gradient
    context      z = f(x_i : i in C)                                the visible ones alone
    predictions  p_k = h(z, C, T_k)                                 mask tokens at the positions T_k
    loss         mean over k, samples, j in T_k of  distance(p_kj, norm(y_j))
    after a step g <- m g + (1 - m) f,   m rising over training

Nothing is reconstructed, so detail that cannot be predicted need not be kept; and no views are needed, so nobody must say which
changes do not matter. When it helps: much data of a kind that has no good augmentations. When not: small data, and images for
which views are known; try `coloss.jepa.LeJEPA` there first. On 400 to 500 steps with small images (one seed, an encoder of two blocks,
probes with 100 labels on mean features) it does not beat the untrained encoder: MNIST, 5 nearest neighbours 0.39 after and 0.42 before, linear
probe 0.40 and 0.42, `target_std` 0.40 and 0.55; digits with learned positions and pixels in [0, 1] collapse (0.02 after
0.22). Nothing in the loss forbids collapse: the slow copy and the
predictor prevent it in practice, not always. Watch `target_std`, which is logged; a loss that falls to 0 together with it is collapse.

Distributed: sizes of masks are equal on all processes, positions each process's own. All losses are means over tokens, so with the same masks two
processes take the steps of one. A checkpoint holds predictor, slow copy and generators.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.data import BlockMask1d, Masker, MaskRequest, Masks, MultiBlock2d, RandomColumns
from coloss.errors import InputError
from coloss.nn import MaskTokenPredictor, ModuleEMA, TableColumns, TokenEncoder
from coloss.ops import LatentDistance, TargetNorm, full_precision, gather_tokens, latent_prediction_loss
from coloss.train.feature_source import second_look
from coloss.train.method import Method
from coloss.train.schedules import Schedule, linear, value_at
from coloss.train.state import State


def between_sample_std(tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, ""]:
    """Standard deviation between samples of each token's entries, averaged: 0 where all samples are encoded alike.

        mean over tokens j and dimensions d of std over samples b of x[b, j, d],    n in the denominator

    It sees a scale, as ranks and cosines do not: tokens that differ by position alone, or shrink to a point, are seen as collapse.

    Args:
        tokens: encoded tokens of a batch.

    Returns:
        A scalar >= 0, at least float32; 0 for fewer than two samples or no tokens. About 1 for layer-normalised tokens that share nothing.

    Examples:
        >>> between_sample_std(torch.tensor([[[0.0, 1.0]], [[2.0, 1.0]]]))
        tensor(0.5000)
    """
    values = full_precision(tokens.detach())
    return values.std(0, correction=0).mean() if values.numel() else values.sum()


@dataclass(frozen=True, eq=False)
class LatentPass:
    """What one step of masked prediction works with, for the hooks of `MaskedPrediction`.

    Attributes:
        inputs: of the batch.
        encoder: f, the one that is trained.
        tokens: its tokenizer's tokens, positions included.
        encoded: what the slow copy makes of all tokens, without gradient.
        masks: visible and hidden tokens; padding counts as not valid.
    """

    inputs: Any
    encoder: TokenEncoder
    tokens: Float[Tensor, "batch tokens dim"]
    encoded: Float[Tensor, "batch tokens dim"]
    masks: Masks


class MaskedPrediction(Method):
    """Masked latent prediction on a `TokenEncoder`, without an objective or beside one; by default I-JEPA.

    The encoder is the run's model, or a part of it (a classifier's backbone). Predictor and slow copy belong to the method, so the
    model ships as it was built. The passes of this method leave no trace in the outputs and features that other methods see; these
    are of a whole, unmasked pass.

    A subclass changes one of the hooks, each of which is documented below: `new_masker`, `new_predictor`, `choose_masks`,
    `form_targets`, `form_context`, `form_predictions`, `extra_terms`.

    Args:
        masker: answers a `coloss.data.MaskRequest`; None for what suits the tokenizer (`MultiBlock2d` for a grid, `RandomColumns` for a
            table, else `BlockMask1d`).
        kind: distance of predictions, see `latent_prediction_loss`.
        target_norm: "layer" or None, likewise.
        momentum: m in [0, 1], a number or a schedule of progress.
        predictor_width: size of a token in the predictor; None for half the encoder's, rounded up to what heads and positions need.
        predictor_depth: its blocks, >= 0.
        predictor_heads: its attention heads, >= 1; they divide its width.
        predictor_positions: "sinusoidal" or "learned".
        weight: of the loss term, a number >= 0 or a schedule.
        ships: which weights the model is left with: "target" for the slow copy's, "online" for the trained ones; None for "target" in
            a run without objective, and "online" beside one, whose head knows these.
        encoder: module path of the `TokenEncoder`; None where the model is one, or holds just one.
        meter_every: steps between values of `target_std` (see `between_sample_std`) in the log, >= 1.

    Attributes:
        target: the slow copy, a `ModuleEMA`; `predictor`: both from `setup` on.

    Raises:
        InputError: for a value out of range; in a run, for a model without a `TokenEncoder`, or a predictor whose sizes do not fit.

    Cost:
        For each sample a pass of the slow copy over all tokens, a forward and backward pass of the encoder over the visible ones and M
        of the predictor; and the run's own forward pass, where an objective, another method or a batch norm needs it.

    Source:
        I-JEPA, arXiv 2301.08243.

    Examples:
        >>> import coloss
        >>> from coloss.nn import token_encoder_for_shape
        >>> images, encoder = torch.rand(64, 1, 8, 8), token_encoder_for_shape((1, 8, 8), dim=16, depth=1)
        >>> run = coloss.fit(encoder, (images,), methods=[MaskedPrediction()], budget=coloss.Budget(epochs=2))
        >>> sorted(run.history[-1].terms), run.model(images).shape
        (['latent_prediction'], torch.Size([64, 16]))
    """

    target: ModuleEMA
    predictor: nn.Module

    def __init__(
        self,
        masker: Masker | None = None,
        *,
        kind: LatentDistance = "smooth_l1",
        target_norm: TargetNorm = "layer",
        momentum: Schedule = linear(0.996, 1.0),
        predictor_width: int | None = None,
        predictor_depth: int = 2,
        predictor_heads: int = 4,
        predictor_positions: Literal["sinusoidal", "learned"] = "sinusoidal",
        weight: Schedule = 1.0,
        ships: Literal["target", "online"] | None = None,
        encoder: str | None = None,
        meter_every: int = 10,
    ) -> None:
        super().__init__()
        try:
            latent_prediction_loss(torch.zeros(1, 1), torch.zeros(1, 1), kind, target_norm)
        except ValueError as error:
            raise InputError(str(error)) from error
        if not callable(momentum) and not 0 <= momentum <= 1:
            raise InputError(f"momentum must be in [0, 1], or a schedule, got {momentum}")
        if not callable(weight) and not weight >= 0:
            raise InputError(f"weight must be >= 0, or a schedule, got {weight}")
        if ships not in ("target", "online", None):
            raise InputError(f'ships must be "target", "online" or None, got {ships!r}')
        if predictor_width is not None and predictor_width < 1:
            raise InputError(f"predictor_width must be >= 1, or None, got {predictor_width}")
        if predictor_depth < 0:
            raise InputError(f"predictor_depth must be >= 0, got {predictor_depth}")
        if predictor_positions not in ("sinusoidal", "learned"):
            raise InputError(
                f'predictor_positions must be "sinusoidal" or "learned", got {predictor_positions!r}'
            )
        for name, value in (("predictor_heads", predictor_heads), ("meter_every", meter_every)):
            if value < 1:
                raise InputError(f"{name} must be >= 1, got {value}")
        self.masker, self.kind, self.target_norm = masker, kind, target_norm
        self.momentum, self.ships, self.meter_every = momentum, ships, meter_every
        self.predictor_width, self.predictor_depth = predictor_width, predictor_depth
        self.predictor_heads, self.predictor_positions = predictor_heads, predictor_positions
        self.encoder_path = encoder
        self.term_weights = {"latent_prediction": weight}

    def new_masker(self, encoder: TokenEncoder) -> Masker:
        """The masker of a run for which none was given."""
        if len(encoder.tokenizer.grid) == 2:
            return MultiBlock2d()
        return RandomColumns() if isinstance(encoder.tokenizer, TableColumns) else BlockMask1d()

    def new_predictor(self, encoder: TokenEncoder) -> nn.Module:
        """The predictor, called as `MaskTokenPredictor` is; one of another class is welcome."""
        grid, heads = encoder.tokenizer.grid, self.predictor_heads
        unit = math.lcm(heads, 2 * len(grid))
        width = self.predictor_width
        if width is None:
            width = unit * math.ceil(encoder.out_features / 2 / unit)
        return MaskTokenPredictor(
            encoder.out_features,
            grid,
            width=width,
            depth=self.predictor_depth,
            heads=heads,
            positions=self.predictor_positions,
        )

    def choose_masks(self, request: MaskRequest, state: State) -> Masks:
        """Visible and hidden tokens of the batch."""
        assert self.masker is not None
        return self.masker(request)

    def form_targets(self, found: LatentPass) -> Float[Tensor, "sets batch hidden out"]:
        """What is to be predicted, without gradient; called under `torch.no_grad()`."""
        return gather_tokens(found.encoded, found.masks.targets)

    def form_context(self, found: LatentPass) -> Float[Tensor, "contexts batch visible dim"]:
        """The encoded visible tokens."""
        masks = found.masks
        contexts, batch = masks.context.shape[:2]
        encoded = found.encoder.forward_tokens(
            found.tokens.repeat(contexts, 1, 1),
            masks.context.flatten(0, 1),
            valid=None if masks.context_valid is None else masks.context_valid.flatten(0, 1),
        )
        return encoded.unflatten(0, (contexts, batch))

    def form_predictions(
        self, context: Float[Tensor, "contexts batch visible dim"], found: LatentPass
    ) -> Float[Tensor, "sets batch hidden out"]:
        """What the predictor makes of the context, for each set of targets: all sets in one pass, independent of one another."""
        masks = found.masks
        sets, batch = masks.targets.shape[:2]

        def rows(part: Any) -> Any:
            return None if part is None else part.expand(sets, *part.shape[1:]).flatten(0, 1)

        predictions = self.predictor(
            rows(context),
            rows(masks.context),
            rows(masks.targets),
            context_valid=rows(masks.context_valid),
            target_valid=rows(masks.target_valid),
        )
        return predictions.unflatten(0, (sets, batch))

    def extra_terms(
        self,
        predictions: Float[Tensor, "sets batch hidden out"],
        targets: Float[Tensor, "sets batch hidden out"],
        found: LatentPass,
        state: State,
    ) -> dict[str, Tensor]:
        """Further named loss terms; weights go into `self.term_weights`."""
        return {}

    def setup(self, state: State) -> None:
        # The passes of this method leave batch norms as they are; only the run's own pass would move their statistics.
        self.reads_outputs = any(
            isinstance(module, nn.modules.batchnorm._NormBase) for module in state.model.modules()
        )
        encoder = self._encoder(state)
        if self.masker is None:
            self.masker = self.new_masker(encoder)
        self.target = ModuleEMA(encoder)
        try:
            predictor = self.new_predictor(encoder)
        except ValueError as error:
            raise InputError(f"the predictor cannot be built: {error}") from error
        self.predictor = state.like_model(predictor)

    def terms(self, state: State) -> dict[str, Tensor]:
        with second_look(state):
            found = self._look(state)
            with torch.no_grad():
                targets = self.form_targets(found)
            predictions = self.form_predictions(self.form_context(found), found)
        loss = latent_prediction_loss(
            predictions, targets, self.kind, self.target_norm, found.masks.target_valid
        )
        if state.step % self.meter_every == 0:
            state.log({"target_std": between_sample_std(found.encoded)})
        return {"latent_prediction": loss, **self.extra_terms(predictions, targets, found, state)}

    def on_step(self, state: State) -> None:
        self.target.decay = value_at(self.momentum, state.progress)
        self.target.update()

    def finish(self, state: State) -> None:
        ships = self.ships or ("target" if state.objective is None else "online")
        if ships == "target":
            self._encoder(state).load_state_dict(self.target.module.state_dict())

    def _look(self, state: State) -> LatentPass:
        encoder, inputs = self._encoder(state), state.batch.inputs
        tokens = encoder.tokenizer(inputs)
        padding = encoder.tokenizer.padding(inputs)
        target = find_token_encoder(self.target.module)
        with torch.no_grad():
            encoded = target.encode(inputs)
        batch, count = tokens.shape[:2]
        grid = encoder.tokenizer.grid
        request = MaskRequest(
            batch,
            grid if len(grid) > 1 else (count,),
            generator=state.local_generator,
            shared_generator=state.generator,
            progress=state.progress,
            tokens=encoded,
            inputs=inputs,
            encoder=target,
        )
        masks = self.choose_masks(request, state).to(tokens.device)
        if padding is not None:
            masks = replace(
                masks,
                context_valid=_not_padding(masks.context, masks.context_valid, padding),
                target_valid=_not_padding(masks.targets, masks.target_valid, padding),
            )
        return LatentPass(inputs, encoder, tokens, encoded, masks)

    def _encoder(self, state: State) -> TokenEncoder:
        return find_token_encoder(state.model, self.encoder_path)


def find_token_encoder(model: nn.Module, path: str | None = None) -> TokenEncoder:
    """The token encoder that a model is or holds.

    Args:
        model: any network.
        path: of the module, where there are several; None to look for the only one.

    Raises:
        InputError: if there is none, or more than one.

    Examples:
        >>> from coloss.nn import Classifier, token_encoder_for_shape
        >>> encoder = token_encoder_for_shape((6,), dim=8, depth=1, heads=2)
        >>> find_token_encoder(Classifier(encoder, 3)) is encoder
        True
    """
    if path is not None:
        try:
            named = model.get_submodule(path)
        except AttributeError as error:
            raise InputError(f"encoder must name a module of the model, got {path!r}") from error
        if not isinstance(named, TokenEncoder):
            raise InputError(
                f"encoder must name a coloss.nn.TokenEncoder, got {type(named).__name__} at {path!r}"
            )
        return named
    found = {name: module for name, module in model.named_modules() if isinstance(module, TokenEncoder)}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise InputError(f"the model holds several token encoders: set encoder to one of {', '.join(found)}")
    raise InputError(
        f"the model must be a coloss.nn.TokenEncoder, or hold one, got {type(model).__name__}: "
        "coloss.nn.token_encoder_for_shape builds one for the shape of your data"
    )


def _not_padding(
    indices: Int[Tensor, "sets batch kept"],
    valid: Bool[Tensor, "sets batch kept"] | None,
    padding: Bool[Tensor, "batch tokens"],
) -> Bool[Tensor, "sets batch kept"]:
    real = (~padding).expand(len(indices), -1, -1).gather(-1, indices)
    return real if valid is None else valid & real
