"""Trains any sequential network in gradient-isolated blocks, so that only one block's activations are in memory at a time.

Every block but the last learns from a head of its own, on the features that it gives; the last learns from the run's objective, as usual:

    x_k = f_k(sg(x_{k-1}))        L_k = loss(a_k(x_k), targets)        sg: stop-gradient

The gradients of L_k are taken as soon as x_k is there, and the graph of block k is gone before block k + 1 runs. The network's own forward
pass does it: hooks at the cuts take the gradients and hand the features on without a graph, so every layer (and every batch norm) runs
once in a step, the network's code stays as it is, and the heads, which belong to the method, are gone when it ships. How good the
heads are decides: with a linear one (greedy training) early blocks throw away what later ones need; `AugmentedLocalLearning` and
`MomentumLocalLearning` show them some of what comes next.

Terms of other methods that read the network's output train the last block alone, as the objective does; features tapped from inside
a block lead to that block, at the price of its graph staying in memory. Other passes of theirs through the network in training mode are cut
without a loss; those on other inputs than the batch's that require gradients are left whole, so that methods can ask how the loss depends
on them. In several processes each block's gradients are averaged, so the
step is that of one process wherever the layers' own (batch norm) is. Precision "bf16-mixed" works; "16-mixed" is refused, as for every
method that takes gradients itself. A Lightning Trainer works too (give `loss`).
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from coloss.distillation.cut_hooks import CutHook, PassHook, remove_cuts
from coloss.distillation.cut_positions import balanced_ends
from coloss.distillation.cut_positions import block_ends as block_ends
from coloss.distillation.network_layers import Layer, LayerPaths, read_layers
from coloss.errors import InputError
from coloss.ops import without_autocast
from coloss.train.combine import WeightedSum
from coloss.train.method import Method
from coloss.train.schedules import value_at
from coloss.train.state import State
from coloss.train.task import Setting

HeadFactory = Callable[[Sequence[Layer], int], nn.Module]


class LocalHead(nn.Module):
    """Layers, the mean over positions, one linear layer: what a block is trained through.

    Args:
        layers: run on the features first, each with whatever further arguments the network's own layer was called with, if it
            `takes_arguments`.
        kind: of the features, as in `Layer`.
        in_features: width after those layers.
        output_shape: of the network's output; decides the number of outputs, and whether there is one for each token.
        norm: a batch norm before the linear layer.

    Raises:
        InputError: if the network's output is no (batch, outputs), (batch,) or (batch, tokens, outputs).

    Examples:
        >>> head = LocalHead([], "maps", 8, (2, 10))
        >>> head(torch.zeros(5, 8, 4, 4)).shape
        torch.Size([5, 10])
    """

    takes_arguments = True

    def __init__(
        self,
        layers: Sequence[nn.Module],
        kind: str,
        in_features: int,
        output_shape: tuple[int, ...],
        *,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.each_token = kind == "tokens" and len(output_shape) == 3
        if len(output_shape) not in (1, 2) and not self.each_token:
            raise InputError(
                f"the network's output must be (batch, outputs) for heads of this kind, got {output_shape}: "
                "LocalLearning(head=...) takes others"
            )
        self.kind, self.flat = kind, len(output_shape) == 1
        self.layers = nn.ModuleList(layers)
        self.norm = nn.BatchNorm1d(in_features) if norm and not self.each_token else nn.Identity()
        self.linear = nn.Linear(in_features, 1 if self.flat else output_shape[-1])

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            more = getattr(layer, "takes_arguments", False)
            features = layer(features, *args, **kwargs) if more else layer(features)
        if self.kind == "maps":
            features = features.flatten(2).mean(2)
        elif self.kind == "tokens" and not self.each_token:
            features = features.mean(1)
        logits = self.linear(self.norm(features))
        return logits.squeeze(-1) if self.flat else logits


class LocalLearning(Method):
    """Train a network block by block, each block through a head of its own; by default a linear one on its mean features.

    Adds the term `local_loss`, the sum of the losses of all blocks but the last (without a graph: its gradients are taken during the
    forward pass). A weight given to it scales them.

    Args:
        example: inputs of one or more samples, as the network takes them; `setup` reads the layers' shapes from them.
        blocks: how many; None makes every layer a block. Each is as long as makes the largest as small as can be, counted in features that
            its layers and its head give.
        layers: module paths in the order of the forward pass, one or several in a row for each layer, such as
            `["layer1", "layer2", "layer3", "layer4"]`; None finds them (`find_layers`). What runs before the first belongs to it, what runs
            after the last to the last block.
        loss: `(output, targets) -> scalar` for the heads; None takes the run's objective. Of several terms the sum, of the objective's own
            with the weights that the run gives them (those that other combiners than `WeightedSum` find do not reach the heads).
        head: `(layers, index) -> module` makes the head for a block that ends with `layers[index]`. If it has an attribute `takes_arguments`
            that is true, it is called with whatever further arguments the layer had.
        clip_norm: largest gradient norm of each block with its head. (`fit(clip_norm=...)` would take all blocks together.)

    Attributes:
        heads: one for each cut, from `setup` on.
        cuts: module paths of the layers after which the network is cut, from `setup` on.
        block_losses: of the last step, one for each cut.

    Raises:
        InputError: for values out of range; in `setup`, for layers that the network does not run once each in this order, or if there is
            no loss; in the first step, if a parameter learns from two blocks, because they share it or a path leads round a cut.

    Cost: in time, the heads; in memory, the largest block with its head in place of the whole network.

    Source: Belilovsky et al. 2019, arXiv 1812.11446.

    Examples:
        >>> import coloss
        >>> from coloss.nn import MLP
        >>> data = (torch.randn(64, 4), torch.randint(3, (64,)))
        >>> method = LocalLearning(data[0][:2], blocks=3)
        >>> model = MLP(4, [8, 8, 8], 3)
        >>> run = coloss.fit(
        ...     model, data, nn.functional.cross_entropy, [method], budget=coloss.Budget(epochs=2)
        ... )
        >>> method.cuts, sorted(run.history[-1].terms)
        ([('layers.0', 'layers.1', 'layers.2'), ('layers.3', 'layers.4', 'layers.5')], ['cross_entropy', 'local_loss'])
    """

    accumulates = True
    joined_layers = 0

    def __init__(
        self,
        example: Any,
        *,
        blocks: int | None = None,
        layers: Sequence[str | Sequence[str]] | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
        head: HeadFactory | None = None,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__()
        if blocks is not None and blocks < 1:
            raise InputError(f"blocks must be >= 1, got {blocks}")
        if clip_norm is not None and not clip_norm > 0:
            raise InputError(f"clip_norm must be > 0, got {clip_norm}")
        self.example, self.blocks, self.layers = example, blocks, layers
        self.loss, self.head, self.clip_norm = loss, head, clip_norm
        self.heads = nn.ModuleList()
        self.cuts: list[LayerPaths] = []
        self.block_losses: list[Tensor] = []
        self._ends: list[nn.Module] = []
        self._hooks: list[Any] = []
        self._state: State | None = None
        self._parameters_of_model: list[nn.Parameter] = []
        self._gradients: dict[int, Tensor] = {}
        self._members: list[list[nn.Parameter]] = []
        self._armed = self._checked = self._whole = False

    def setup(self, state: State) -> None:
        if self.loss is None and state.objective is None:
            raise InputError("there is no loss for the heads: give an objective, or loss=...")
        remove_cuts(state.model)
        layers = read_layers(state.model, self.example, self.layers)
        blocks = len(layers) if self.blocks is None else self.blocks
        try:
            block_ends(len(layers), blocks, self.joined_layers)
        except ValueError as error:
            raise InputError(str(error)) from error
        sizes = self.head_sizes(layers, blocks)
        ends = balanced_ends([layer.size for layer in layers], sizes, self.joined_layers)
        if not ends and blocks > 1:
            raise InputError(
                f"blocks must leave a cut below the last {self.joined_layers + 1} layers, which stay together, got blocks={self.blocks} and "
                f"depth={self.joined_layers} for {len(layers)} layers: take a smaller depth, or join_last=False"
            )
        self.cuts, self._ends = [layers[end].paths for end in ends], [layers[end].modules[-1] for end in ends]
        self.heads = state.like_model(nn.ModuleList(self.new_heads(layers, ends))).train()
        self._hooks, self._checked = [], False

    def new_heads(self, layers: Sequence[Layer], ends: Sequence[int]) -> list[nn.Module]:
        """The heads for blocks that end with the layers of these indices."""
        return [self.new_head(layers, end) for end in ends]

    def head_sizes(self, layers: Sequence[Layer], blocks: int) -> list[list[float]]:
        """How many features the layers of the head of each block but the last would give, by the layer that the block ends with."""
        return [[self.head_size(layers, end) for end in range(len(layers))]] * (blocks - 1)

    def head_size(self, layers: Sequence[Layer], end: int) -> float:
        """How many features the layers of one head give for a sample."""
        return 0.0

    def new_head(self, layers: Sequence[Layer], end: int) -> nn.Module:
        """The head for one block."""
        if self.head is not None:
            return self.head(layers, end)
        layer = layers[end]
        return LocalHead([], layer.kind, layer.width, layer.output_shape)

    def block_loss(self, number: int, features: Tensor, arguments: Any, state: State) -> Tensor:
        """The loss of block `number` on the features that it gave, when its layer was called with these further arguments."""
        return self.head_loss(self.run_head(self.heads[number], features, arguments), state)

    def run_head(self, head: nn.Module, features: Tensor, arguments: Any) -> Any:
        """What a head makes of features."""
        args, kwargs = arguments
        return head(features, *args, **kwargs) if getattr(head, "takes_arguments", False) else head(features)

    def head_loss(self, output: Any, state: State) -> Tensor:
        """The loss of a head's output."""
        found = (self.loss or state.objective)(output, state.batch.targets)
        if not isinstance(found, Mapping):
            return found
        known = self.loss is None and isinstance(state.combine, WeightedSum)
        weights = state.combine.weights if known else {}
        parts = [value_at(weights.get(name, 1.0), state.progress) * term for name, term in found.items()]
        return torch.stack(parts).sum()

    def on_batch(self, state: State) -> None:
        if len(self._hooks) != len(self._ends):
            # Now, and not in setup: the hooks of every tap come first and see the features with their graph.
            self._hooks = [
                module.register_forward_hook(CutHook(weakref.ref(self), number), with_kwargs=True)
                for number, module in enumerate(self._ends)
            ]
            state.model.register_forward_pre_hook(PassHook(weakref.ref(self)))
        self._state, self._armed, self._whole = state, False, False
        self.block_losses, self._members, self._gradients = [], [], {}
        self._parameters_of_model = [p for p in state.model.parameters() if p.requires_grad]

    def at_pass(self, inputs: Any) -> None:
        """Tell the step's own pass, which takes the batch's inputs, from those of other methods."""
        if self._state is None:
            return
        self._armed = inputs is self._state.batch.inputs
        self._whole = not self._armed and any(
            isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(inputs)
        )
        if self._armed:
            self.block_losses, self._members, self._gradients = [], [], {}

    def at_cut(self, number: int, features: Any, arguments: Any) -> Any:
        """Take a block's gradients, and hand its features on without a graph."""
        if not self._armed:
            cut = self._state is not None and self._state.model.training and not self._whole
            return features.detach() if cut and torch.is_grad_enabled() else None
        assert self._state is not None
        if number != len(self.block_losses):
            raise InputError(
                f"layers must be run once each in their order, but {self.cuts[number][-1]!r} ran out of turn"
            )
        loss = self.block_loss(number, features, arguments, self._state)
        if torch.is_grad_enabled():
            self._take_gradients(number, loss)
        self.block_losses.append(loss.detach())
        self._armed = len(self.block_losses) < len(self.heads)
        return features.detach()

    def _take_gradients(self, number: int, loss: Tensor) -> None:
        assert self._state is not None
        parameters = [
            *self._parameters_of_model,
            *(p for p in self.heads[number].parameters() if p.requires_grad),
        ]
        # Freed here and not only where the last tensor of the block goes: the network's code may hold some.
        tapped = len(self._state.features) > 0
        with without_autocast(loss.device), _isolated():
            found = self._state.gradients(loss, parameters, keep_graph=tapped)
        reached = [
            (p, gradient) for p, gradient in zip(parameters, found, strict=True) if gradient is not None
        ]
        self._members.append([parameter for parameter, _ in reached])
        for parameter, gradient in reached:
            if id(parameter) in self._gradients:
                self._refuse(parameter)
            self._gradients[id(parameter)] = gradient

    def terms(self, state: State) -> dict[str, Tensor]:
        self._armed = False
        if len(self.block_losses) != len(self.heads):
            missed = self.cuts[len(self.block_losses)][-1]
            raise InputError(f"layers must be run once each in their order, but {missed!r} was not reached")
        if not self._checked and torch.is_grad_enabled():
            self._check_isolation(state)
            self._checked = True
        losses = [loss.float() for loss in self.block_losses]
        found = {"local_loss": torch.stack(losses).sum() if losses else torch.zeros(())}
        if state.objective is None:
            found["final_loss"] = self.head_loss(state.outputs, state)
        return found

    def backward(self, state: State, terms: dict[str, Tensor]) -> None:
        # Whatever the combiner does with the term, its derivative there is the term's weight.
        stand_in = terms["local_loss"].detach().requires_grad_()
        total = state.combine(state, {**terms, "local_loss": stand_in})
        (weight,) = torch.autograd.grad(total, stand_in, retain_graph=True, allow_unused=True)
        with _isolated():
            last = state.gradients(total, keep_graph=False)
        scale = float(weight) if weight is not None else 0.0
        local, self._gradients = self._gradients, {}
        merged: list[Tensor | None] = []
        for parameter, gradient in zip(state.trainable, last, strict=True):
            own = local.get(id(parameter))
            if own is not None:
                own = own if scale == 1.0 else own * scale
                gradient = own if gradient is None else gradient + own
            if gradient is not None and state.micro_batches > 1:
                gradient = gradient / state.micro_batches
                if state.micro_batch and parameter.grad is not None:
                    gradient = gradient + parameter.grad
            elif gradient is None and state.micro_batch:
                gradient = parameter.grad
            merged.append(gradient)
        state.set_gradients(merged)
        if self.clip_norm is not None and state.micro_batch + 1 == state.micro_batches:
            for members in self._blocks(state):
                nn.utils.clip_grad_norm_(members, self.clip_norm)

    def _blocks(self, state: State) -> Iterator[list[nn.Parameter]]:
        """The parameters of each block with its head; all that is left makes the last."""
        yield from self._members
        known = {id(parameter) for members in self._members for parameter in members}
        yield [parameter for parameter in state.trainable if id(parameter) not in known]

    def finish(self, state: State) -> None:
        remove_cuts(state.model)
        self._hooks, self._state = [], None

    def _check_isolation(self, state: State) -> None:
        outputs = [
            leaf.sum()
            for leaf in tree_leaves(state.outputs)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        known = [p for p in self._parameters_of_model if id(p) in self._gradients]
        if not outputs or not known:
            return
        with _isolated():
            found = torch.autograd.grad(
                torch.stack(outputs).sum(), known, retain_graph=True, allow_unused=True
            )
        for parameter, gradient in zip(known, found, strict=True):
            if gradient is not None:
                self._refuse(parameter)

    def _refuse(self, parameter: nn.Parameter) -> None:
        assert self._state is not None
        names = {id(p): name for name, p in self._state.model.named_parameters()}
        raise InputError(
            f"blocks must be isolated, but {names.get(id(parameter), 'a parameter')!r} learns from two of them: "
            "they share it, or a path leads round a cut; name other layers to cut after"
        )

    @classmethod
    def for_setting(cls, setting: Setting, **parameters: Any) -> "LocalLearning":
        """Build it for a task of the lab, whose training data are the example."""
        return cls(setting.splits.train.take(torch.arange(2)).inputs, **parameters)


@contextmanager
def _isolated() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise InputError(
            "blocks must be isolated, but a loss reaches the inside of an earlier one: a path leads round a cut (name other layers to cut "
            "after), or a method reads features there without state.tap"
        ) from error
