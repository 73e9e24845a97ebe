r"""An output layer for very many classes, whose exact SGD step costs the same for any number of them.

Pascal Vincent, Alexandre de Brebisson, Xavier Bouthillier 2015, "Efficient exact gradient update for training deep networks with
very large sparse targets", NIPS 2015, arXiv 1412.7091.

The weight W of D classes and d features is never written out. It is held as

    W = V U + 1 omega^T        V (D, d), U (d, d), omega (d)
    Q = W^T W (d, d),  r = W^T 1 (d)

A loss of the spherical family needs of the logits o = W h only o_c = v_c . (U h) + omega . h, the sum s = r . h and the square sum
q = h . (Q h). From the gradients of a batch with respect to o_c, s and q follow three sums over its samples

    S = 2 sum (dL/dq) h h^T (d, d)      p = sum (dL/ds) h (d)      B_c = sum over samples with target c of (dL/do_c) h

and with them the gradient of the weight, dL/dW = W S + 1 p^T + B, where B has as many rows that are not 0 as the batch has
different targets. A step W - lr dL/dW therefore is

    U <- U - lr U S        omega <- omega - lr (S omega + p)        V_c <- V_c - lr B_c U^{-1} with the new U
    Q <- Q - lr (W^T dL/dW + transposed) + lr^2 (dL/dW)^T (dL/dW)        r <- r - lr (S r + D p + sum_c B_c)

in which W^T dL/dW = Q S + r p^T + W^T B, and all else that is needed, comes from Q, r and the rows of W that are targets.
Everything but V is of size d x d and kept in float64, because the variance q/D - (s/D)^2 cancels.
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.classification.logit_sums import SphericalLoss, SphericalStatistics, z_from_statistics
from coloss.nn import linear_layer
from coloss.ops import accumulation_dtype, gather_with_gradient

# A mixing matrix whose pivots are further apart than this is folded into V rather than inverted.
_WORST_PIVOT_RATIO = 1e-8


class FactoredSphericalLinear(nn.Module):
    """Linear output layer and loss in one, which is its own optimizer: exact plain SGD, at a cost free of the number of classes.

    Call it with features and targets for the loss, call `backward`, then `step`:

        loss = layer(encoder(inputs), target)
        loss.backward()
        layer.step()
        optimizer.step()          # of the encoder

    Its state is in buffers, so no optimizer touches it. Gradients of several backward passes before one `step` add up (gradient
    accumulation). With several processes each gathers all rows and takes the same step. Momentum, Adam and clipping of W are
    impossible; features get their true gradient, so any optimizer may train what is below.

    Args:
        in_features: d, size of a feature vector.
        num_classes: D, padding rows included.
        learning_rate: of the step, >= 0; may be changed between steps.
        loss: function of the statistics, see `spherical_loss`; or any differentiable one of your own.
        bias: whether a constant feature of 1 is appended.
        weight_decay: as in `torch.optim.SGD`, >= 0.
        stabilize_every: steps between checks that U is well conditioned, >= 1.
        dtype: of V, the one part that grows with the classes.
        generator: of the initial V, uniform in +-1/sqrt(d) as in `nn.Linear`.

    Attributes:
        learning_rate, weight_decay: used by `step`.
        steps: steps taken, an int64 buffer.

    Returns:
        From `forward`: the mean loss over all target logits, or their sum; see there.

    Raises:
        ValueError: for a value out of range.

    Cost:
        O(d^2 m + d^3) a step for m samples, whatever the number of classes; memory O(D d + d^2). Every `stabilize_every` steps a
        singular value decomposition of U, and O(D d) for each singular value out of range, which is rare.

    Source:
        Vincent, de Brebisson, Bouthillier 2015, arXiv 1412.7091.

    Examples:
        >>> layer = FactoredSphericalLinear(8, 1000, learning_rate=0.1)
        >>> features, target = torch.randn(16, 8), torch.randint(1000, (16,))
        >>> before = layer(features, target)
        >>> before.backward()
        >>> layer.step()
        >>> bool(layer(features, target) < before), layer.scores(features).shape
        (True, torch.Size([16, 1000]))
    """

    rows: Tensor
    mixing: Tensor
    offset: Tensor
    gram: Tensor
    row_sum: Tensor
    steps: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        learning_rate: float,
        loss: SphericalLoss = z_from_statistics,
        *,
        bias: bool = True,
        weight_decay: float = 0.0,
        stabilize_every: int = 100,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, count in (
            ("in_features", in_features),
            ("num_classes", num_classes),
            ("stabilize_every", stabilize_every),
        ):
            if count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        self.in_features, self.num_classes, self.bias = in_features, num_classes, bias
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.loss, self.stabilize_every = loss, stabilize_every
        width = in_features + bias
        bound = 1 / math.sqrt(in_features)
        rows = torch.empty(num_classes, width, dtype=dtype).uniform_(-bound, bound, generator=generator)
        wide = accumulation_dtype(rows.device)
        self.register_buffer("rows", rows)
        self.register_buffer("mixing", torch.eye(width, dtype=wide))
        self.register_buffer("offset", torch.zeros(width, dtype=wide))
        self.register_buffer("gram", torch.zeros(width, width, dtype=wide))
        self.register_buffer("row_sum", torch.zeros(width, dtype=wide))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._version = 0
        self._count_anew()

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass has been made since the last step."""
        return any(collector.grad is not None for _, _, collector in self._pending)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, learning_rate: float, loss: SphericalLoss = z_from_statistics, **options: Any
    ) -> "FactoredSphericalLinear":
        """Take over the weights of a dense layer.

        Args:
            linear: the layer; it is left as it is.
            learning_rate: of the step.
            loss: function of the statistics.
            options: `weight_decay`, `stabilize_every`.

        Examples:
            >>> linear = nn.Linear(4, 10)
            >>> layer = FactoredSphericalLinear.from_linear(linear, 0.1)
            >>> features = torch.randn(3, 4)
            >>> torch.allclose(layer.scores(features), linear(features), atol=1e-6)
            True
        """
        bias = linear.bias is not None
        layer = cls(
            linear.in_features,
            linear.out_features,
            learning_rate,
            loss,
            bias=bias,
            dtype=linear.weight.dtype,
            **options,
        )
        weight = linear.weight.detach()
        if linear.bias is not None:
            weight = torch.cat([weight, linear.bias.detach()[:, None]], dim=1)
        layer = layer.to(weight.device)
        layer.rows.copy_(weight)
        layer._count_anew()
        return layer

    def statistics(
        self, features: Float[Tensor, "batch features"], target: Int[Tensor, "batch *targets"]
    ) -> SphericalStatistics:
        """What a loss sees of the logits, with a graph; `step` needs a backward pass through it.

        Args:
            features: h, one row for each sample.
            target: class of each sample, or (batch, targets) classes of each.

        Returns:
            Statistics of the shape of `target`, in float64 where the device has it; rows of all processes.

        Raises:
            ValueError: for other shapes or a target out of range.
        """
        if features.ndim != 2 or features.shape[1] != self.in_features:
            raise ValueError(
                f"features must have shape (batch, {self.in_features}), got {tuple(features.shape)}"
            )
        if target.ndim not in (1, 2) or len(target) != len(features):
            raise ValueError(
                f"target must have shape ({len(features)},) or ({len(features)}, targets), got {tuple(target.shape)}"
            )
        if target.device.type == "cpu" and target.numel():
            low, high = target.min().item(), target.max().item()
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"target must be in [0, {self.num_classes}), got {low if low < 0 else high}")
        hidden = gather_with_gradient(features.to(self.gram.dtype))
        target = gather_with_gradient(target)
        if self.bias:
            hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)
        many = target[:, None] if target.ndim == 1 else target
        # A leaf that only `backward` fills: gradients which somebody merely looks at (autograd.grad) leave no trace.
        collector = hidden.new_zeros(len(hidden), many.shape[1] + 2)
        if torch.is_grad_enabled():
            collector.requires_grad_()
            self._pending.append((hidden.detach(), many, collector))
        chosen, total, squares = _Statistics.apply(hidden, collector, many, self)
        if target.ndim == 1:
            chosen = chosen[:, 0]
        else:
            total, squares = (value[:, None].expand_as(chosen) for value in (total, squares))
        return SphericalStatistics(chosen, total, squares, self.num_classes)

    def forward(
        self,
        features: Float[Tensor, "batch features"],
        target: Int[Tensor, "batch *targets"],
        reduction: Literal["mean", "sum"] = "mean",
    ) -> Float[Tensor, ""]:
        """The loss of a batch, over the rows of all processes.

        Args:
            features: one row for each sample.
            target: class of each sample, or (batch, targets) classes of each.
            reduction: "mean" or "sum" over all target logits.

        Returns:
            A scalar, at least float32; the mean of no sample is 0.

        Raises:
            ValueError: for other shapes, a target out of range, or another reduction.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
        losses = self.loss(self.statistics(features, target))
        total = losses.sum() if reduction == "sum" else losses.sum() / max(losses.numel(), 1)
        return total.to(torch.promote_types(features.dtype, torch.float32))

    @torch.no_grad()
    def step(self, gradient_scale: float | None = None) -> None:
        """Take the SGD step of every backward pass since the last one.

        Args:
            gradient_scale: of a gradient scaler (`scaler.get_scale()`): gradients are divided by it, and if they are not finite
                the step is left out, as the scaler leaves out the optimizer's.

        Raises:
            ValueError: if a gradient is not finite and no scale was given.
        """
        seen = [(h, c, collector.grad) for h, c, collector in self._pending if collector.grad is not None]
        self._pending = []
        if not seen:
            return
        hidden, target, gradient = seen[0]
        if len(seen) > 1:
            hidden, target, gradient = _joined(seen)
        if gradient_scale is not None:
            gradient = gradient / gradient_scale
        if not bool(gradient.isfinite().all()):
            if gradient_scale is not None:
                return
            raise ValueError("gradients of the output layer must be finite, got NaN or infinity")
        self._update(hidden, target, gradient)
        self.steps += 1
        if int(self.steps) % self.stabilize_every == 0:
            self.stabilize()

    @torch.no_grad()
    def stabilize(self) -> None:
        """Bring singular values of U that left [1/2, 2] back to 1; W stays the same up to rounding."""
        left, values, _ = torch.linalg.svd(self.mixing)
        off = (values < 0.5) | (values > 2)
        if not bool(off.any()):
            return
        self._version += 1
        if int(off.sum()) * 3 > len(values):
            self.unfactorize()
            return
        vectors = left[:, off]
        grow = 1 / values[off] - 1
        self.mixing += (vectors * grow) @ (vectors.T @ self.mixing)
        shrink = -grow / (1 + grow)
        change = vectors.to(self.rows.dtype)
        self.rows += (self.rows @ change * shrink.to(self.rows.dtype)) @ change.T

    @torch.no_grad()
    def unfactorize(self) -> None:
        """Fold U and omega into V, in O(D d^2): V becomes W, and the bookkeeping is counted anew."""
        self._version += 1
        self.rows.copy_(self._whole())
        self.mixing.copy_(torch.eye(len(self.mixing)))
        self.offset.zero_()
        self._count_anew()

    @torch.no_grad()
    def weight(self) -> Float[Tensor, "classes width"]:
        """W written out in O(D d^2), with the biases as last column if there are any."""
        return self._whole().to(self.rows.dtype)

    @torch.no_grad()
    def scores(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Logits of every class, in O(D d) a sample, without a graph: for ranking, they are no log-probabilities.

        Args:
            features: one row for each sample.

        Returns:
            In the precision of V.
        """
        hidden = features.to(self.gram.dtype)
        if self.bias:
            hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)
        mixed = (hidden @ self.mixing.T).to(self.rows.dtype)
        return mixed @ self.rows.T + (hidden @ self.offset).to(self.rows.dtype)[:, None]

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same weights, to ship.

        Examples:
            >>> FactoredSphericalLinear(4, 10, 0.1).to_linear()
            Linear(in_features=4, out_features=10, bias=True)
        """
        weight = self.weight()
        return linear_layer(weight[:, : self.in_features], weight[:, -1] if self.bias else None)

    @torch.no_grad()
    def bookkeeping_error(self) -> float:
        """Largest difference of Q and r from W^T W and W^T 1, over the largest entry of either; O(D d^2)."""
        whole = self._whole()
        pairs = ((self.gram, whole.T @ whole), (self.row_sum, whole.sum(0)))
        tiny = torch.finfo(whole.dtype).tiny
        return max(
            float((kept - true).abs().max() / true.abs().max().clamp(min=tiny)) for kept, true in pairs
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.bias}"

    def _apply(self, fn: Any, recurse: bool = True) -> "FactoredSphericalLinear":
        super()._apply(fn, recurse)
        self._pending = []
        wide = accumulation_dtype(self.rows.device)
        if self.gram.dtype != wide and not self.rows.is_meta:
            # `.float()` or `.half()` is meant for V; the bookkeeping must stay wide, and true to what V has become.
            for name in ("mixing", "offset", "gram", "row_sum"):
                setattr(self, name, getattr(self, name).to(wide))
            self._count_anew()
        return self

    def _whole(self) -> Tensor:
        return self.rows.to(self.mixing.dtype) @ self.mixing + self.offset

    @torch.no_grad()
    def _count_anew(self) -> None:
        whole = self._whole()
        self.gram.copy_(whole.T @ whole)
        self.row_sum.copy_(whole.sum(0))

    def _update(self, hidden: Tensor, target: Tensor, gradient: Tensor) -> None:
        """The step of the module's text, samples as rows; `gradient` holds the targets' columns, then those of s and q."""
        rate, keep = self.learning_rate, 1 - self.learning_rate * self.weight_decay
        moment = hidden.T @ (2 * gradient[:, -1:] * hidden)
        common = hidden.T @ gradient[:, -2]
        # Classes that are a target more than once in the batch add up.
        classes, place = target.flatten().unique(return_inverse=True)
        parts = (gradient[:, :-2, None] * hidden[:, None]).flatten(0, 1)
        sparse = parts.new_zeros(len(classes), parts.shape[1]).index_add_(0, place, parts)
        sparse_sum = sparse.sum(0)
        weight = torch.addmm(self.offset, self.rows[classes].to(sparse.dtype), self.mixing)
        linear = torch.addr(weight.T @ sparse, self.row_sum, common)
        squared = self.gram @ moment
        cross = torch.addr(moment @ linear, common, sparse_sum + self.num_classes / 2 * common)
        half = rate**2 * cross - rate * keep * (linear + squared)
        gram = torch.addmm(self.gram, sparse.T, sparse, beta=keep**2, alpha=rate**2)
        gram.addmm_(moment, squared, alpha=rate**2).add_(half).add_(half.T)
        row_sum = keep * self.row_sum - rate * (
            sparse_sum + self.num_classes * common + moment @ self.row_sum
        )
        offset = keep * self.offset - rate * (common + moment @ self.offset)
        mixing = torch.addmm(self.mixing, self.mixing, moment, beta=keep, alpha=-rate)
        self._version += 1
        self.gram.copy_(gram)
        self.row_sum.copy_(row_sum)
        self.offset.copy_(offset)
        factors, pivots, _ = torch.linalg.lu_factor_ex(mixing)
        diagonal = factors.diagonal().abs()
        if bool(diagonal.min() <= _WORST_PIVOT_RATIO * diagonal.max()):
            # The step takes a direction out of W altogether, which U can hold but not undo: fold it into V.
            self.rows.copy_(self.rows.to(mixing.dtype) @ mixing + self.offset)
            self.mixing.copy_(torch.eye(len(mixing)))
            self.offset.zero_()
        else:
            self.mixing.copy_(mixing)
            sparse = torch.linalg.lu_solve(factors, pivots, sparse, left=False)
        self.rows.index_add_(0, classes, sparse.to(self.rows.dtype), alpha=-rate)


def _joined(seen: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Several backward passes as one batch; where they differ in the number of targets, some of gradient 0 fill up."""
    most = max(target.shape[1] for _, target, _ in seen)
    pad = nn.functional.pad
    hidden = torch.cat([h for h, _, _ in seen])
    target = torch.cat([pad(target, (most - target.shape[1], 0)) for _, target, _ in seen])
    gradient = torch.cat([pad(g, (most + 2 - g.shape[1], 0)) for _, _, g in seen])
    return hidden, target, gradient


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, collector: Tensor, target: Tensor, layer: FactoredSphericalLinear
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.layer, ctx.version = layer, layer._version
        ctx.set_materialize_grads(True)
        projected = hidden @ layer.gram
        weight = layer.rows[target].to(hidden.dtype) @ layer.mixing + layer.offset
        ctx.save_for_backward(projected, weight)
        chosen = (weight @ hidden[..., None])[..., 0]
        return chosen, hidden @ layer.row_sum, (hidden * projected).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, by_target: Tensor, by_sum: Tensor, by_squares: Tensor
    ) -> tuple[Tensor | None, Tensor, None, None]:
        layer = ctx.layer
        if layer._version != ctx.version:
            raise RuntimeError(
                "the output layer took a step between this forward pass and its backward pass: call backward first"
            )
        for_hidden = None
        if ctx.needs_input_grad[0]:
            projected, weight = ctx.saved_tensors
            for_hidden = torch.addr(2 * by_squares[:, None] * projected, by_sum, layer.row_sum)
            for_hidden += (by_target[:, None] @ weight)[:, 0]
        return for_hidden, torch.cat([by_target, by_sum[:, None], by_squares[:, None]], 1), None, None
