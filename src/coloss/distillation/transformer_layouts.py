"""Which dimension of which parameter holds what, for transformers by the names of their weights: what `grow` and `coalesce` go by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coloss.errors import InputError
from coloss.train.axis_map import Axis, AxisMap
from coloss.train.state_map import find_rules

AXES = ("width", "heads", "key_value_heads", "hidden")

Dimensions = tuple[str | None, ...]


@dataclass(frozen=True)
class TransformerLayout:
    """A table of a transformer's parameters.

    Args:
        parameters: by name, what each dimension holds; see `coloss.train.StateMap` for the names, in which `{layer}` stands for a layer's
            number. A dimension is None (nothing that grows: vocabulary, positions, features inside a head) or a width: "width" (the residual
            stream), "heads" (heads times their size), "key_value_heads", "hidden" (of the feed-forward networks); several in a row
            joined by "+"; with ":read" where the parameter reads the width, without where it makes it. An empty tuple leaves a tensor as it is.
        required: names without which a state dict is not of this layout.

    Raises:
        InputError: for a width that is none of the four.

    Examples:
        >>> layout = TransformerLayout({"blocks.{layer}.up.weight": ("hidden", "width:read")})
        >>> wider = layout.extended({"classifier.weight": (None, "width:read")})
        >>> sorted(wider.parameters)
        ['blocks.{layer}.up.weight', 'classifier.weight']
    """

    parameters: Mapping[str, Dimensions]
    required: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern, dimensions in self.parameters.items():
            for dimension in dimensions:
                for name in _widths(dimension):
                    if name not in AXES:
                        raise InputError(
                            f"dimensions of {pattern!r} must be of {', '.join(AXES)}, got {name!r}"
                        )

    def extended(self, parameters: Mapping[str, Dimensions]) -> "TransformerLayout":
        """The same with further parameters, such as those of a head of one's own; a name that is there already changes its meaning."""
        return TransformerLayout({**self.parameters, **parameters}, self.required)

    def rules(self, maps: Mapping[str, AxisMap]) -> dict[str, tuple[Axis | None, ...]]:
        """What a `StateMap` does with each parameter, given what is done with each width."""
        return {
            pattern: tuple(
                Axis(
                    tuple(maps[name] for name in _widths(dimension)),
                    "read" if dimension.endswith(":read") else "made",
                )
                if dimension is not None
                else None
                for dimension in dimensions
            )
            for pattern, dimensions in self.parameters.items()
        }

    def axis_sizes(self, state: Mapping[str, Any]) -> dict[str, int]:
        """Features of each width, read from a state dict's shapes; without key and value heads of their own, those of the queries.

        Raises:
            InputError: if a tensor has no rule, a required one is missing, or widths cannot be told or contradict one another.
        """
        found: dict[str, int] = {}
        joined: list[tuple[str, list[str], int]] = []
        for name, pattern in find_rules(state, self.parameters).items():
            dimensions = self.parameters[pattern]
            if not dimensions:
                continue
            shape = tuple(state[name].shape)
            if len(shape) != len(dimensions):
                raise InputError(f"{name!r} must have {len(dimensions)} dimensions, got shape {shape}")
            for dimension, size in zip(dimensions, shape):
                widths = _widths(dimension)
                if len(widths) == 1 and found.setdefault(widths[0], size) != size:
                    raise InputError(f"{name!r} has {widths[0]} {size} where others have {found[widths[0]]}")
                if len(widths) > 1:
                    joined.append((name, widths, size))
        for name, widths, size in joined:
            missing = {width for width in widths if width not in found}
            if len(missing) > 1:
                continue
            width = missing.pop() if missing else widths[-1]
            rest, odd = divmod(
                size - sum(found[other] for other in widths if other != width), widths.count(width)
            )
            if odd or rest < 1 or found.setdefault(width, rest) != rest:
                told = ", ".join(f"{axis} {found[axis]}" for axis in dict.fromkeys(widths) if axis in found)
                raise InputError(f"{name!r} must hold {'+'.join(widths)} of {told}, got {size} features")
        found.setdefault("key_value_heads", found.get("heads", 0))
        lacking = [axis for axis in AXES if not found.get(axis)]
        if lacking:
            raise InputError(
                f"the state must tell the size of {lacking[0]!r} by a parameter of the layout, it does not"
            )
        return found

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a state dict that is not of this layout.

        Raises:
            InputError: if a tensor has no rule, or a required one is missing.
        """
        patterns = set(find_rules(state, self.parameters).values())
        for pattern in self.required:
            if pattern not in patterns:
                raise InputError(
                    f"the layout needs {pattern!r}, which the state lacks: is the output layer tied or not?"
                )


def causal_language_model_layout(*, tied: bool = True) -> TransformerLayout:
    """Names of `coloss.nn.CausalLanguageModel`; `tied` as there."""
    block = "transformer.blocks.{layer}"
    fused = "heads+key_value_heads+key_value_heads"
    parameters: dict[str, Dimensions] = {
        "embedding.weight": (None, "width"),
        "positions.weight": (None, "width"),
        **_norm(f"{block}.attention_norm"),
        **_linear(f"{block}.attention.query_key_value", fused, "width"),
        **_linear(f"{block}.attention.output", "width", "heads"),
        **_norm(f"{block}.mlp_norm"),
        **_linear(f"{block}.mlp.0", "hidden", "width"),
        **_linear(f"{block}.mlp.3", "width", "hidden"),
        "query_norms.{layer}.weight": (None,),
        "key_norms.{layer}.weight": (None,),
        **_last_norm("transformer.norm", tied),
    }
    if not tied:
        parameters["output.weight"] = (None, "width:read")
    return TransformerLayout(
        parameters, ("embedding.weight",) if tied else ("embedding.weight", "output.weight")
    )


def encoder_layout() -> TransformerLayout:
    """Names of `torch.nn.TransformerEncoder`, pre-norm or post-norm, with or without a last norm.

    Embeddings and heads of one's own are added with `extended`; what follows the last norm reads the width.
    """
    layer = "layers.{layer}"
    return TransformerLayout(
        {
            f"{layer}.self_attn.in_proj_weight": ("heads+heads+heads", "width:read"),
            f"{layer}.self_attn.in_proj_bias": ("heads+heads+heads",),
            **_linear(f"{layer}.self_attn.out_proj", "width", "heads"),
            **_linear(f"{layer}.linear1", "hidden", "width"),
            **_linear(f"{layer}.linear2", "width", "hidden"),
            **_norm(f"{layer}.norm1"),
            **_norm(f"{layer}.norm2"),
            **_norm("norm"),
        },
        (f"{layer}.self_attn.in_proj_weight",),
    )


def gpt2_layout(*, tied: bool = True) -> TransformerLayout:
    """Names of GPT-2 in Hugging Face's transformers, with or without a language model's head; its layers store weights (in, out).

    Args:
        tied: whether `lm_head.weight` is the table of token embeddings, as it is unless a configuration says otherwise; a model without
            head that something else reads is not tied.
    """
    block = "h.{layer}"
    parameters: dict[str, Dimensions] = {
        "wte.weight": (None, "width"),
        "wpe.weight": (None, "width"),
        **_norm(f"{block}.ln_1"),
        **_transposed(f"{block}.attn.c_attn", "heads+heads+heads", "width"),
        **_transposed(f"{block}.attn.c_proj", "width", "heads"),
        f"{block}.attn.bias": (),
        f"{block}.attn.masked_bias": (),
        **_norm(f"{block}.ln_2"),
        **_transposed(f"{block}.mlp.c_fc", "hidden", "width"),
        **_transposed(f"{block}.mlp.c_proj", "width", "hidden"),
        **_last_norm("ln_f", tied),
        "lm_head.weight": (None, "width" if tied else "width:read"),
    }
    return TransformerLayout(parameters, ("wte.weight",) if tied else ("wte.weight", "ln_f.weight"))


def bert_layout(*, tied: bool = True) -> TransformerLayout:
    """Names of BERT in Hugging Face's transformers: the encoder, its pooler, the heads of pre-training and of classification.

    Args:
        tied: whether the masked-word head's output layer is the table of word embeddings.
    """
    layer = "encoder.layer.{layer}"
    head = "cls.predictions"
    parameters: dict[str, Dimensions] = {
        **{
            f"embeddings.{name}_embeddings.weight": (None, "width")
            for name in ("word", "position", "token_type")
        },
        "embeddings.position_ids": (),
        "embeddings.token_type_ids": (),
        **_norm("embeddings.LayerNorm"),
        **_linear(f"{layer}.attention.self.query", "heads", "width"),
        **_linear(f"{layer}.attention.self.key", "heads", "width"),
        **_linear(f"{layer}.attention.self.value", "heads", "width"),
        **_linear(f"{layer}.attention.output.dense", "width", "heads"),
        **_norm(f"{layer}.attention.output.LayerNorm"),
        **_linear(f"{layer}.intermediate.dense", "hidden", "width"),
        **_linear(f"{layer}.output.dense", "width", "hidden"),
        **_norm(f"{layer}.output.LayerNorm"),
        **_linear("pooler.dense", "width", "width"),
        **_linear(f"{head}.transform.dense", "width", "width"),
        **_last_norm(f"{head}.transform.LayerNorm", tied),
        f"{head}.bias": (None,),
        f"{head}.decoder.weight": (None, "width" if tied else "width:read"),
        f"{head}.decoder.bias": (None,),
        **_linear("cls.seq_relationship", None, "width"),
        **_linear("classifier", None, "width"),
    }
    return TransformerLayout(parameters, ("embeddings.word_embeddings.weight",))


def _linear(name: str, makes: str | None, reads: str) -> dict[str, Dimensions]:
    return {f"{name}.weight": (makes, f"{reads}:read"), f"{name}.bias": (makes,)}


def _transposed(name: str, makes: str, reads: str) -> dict[str, Dimensions]:
    return {f"{name}.weight": (f"{reads}:read", makes), f"{name}.bias": (makes,)}


def _norm(name: str, width: str = "width") -> dict[str, Dimensions]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _last_norm(name: str, tied: bool) -> dict[str, Dimensions]:
    """Before a tied table, which is copied and not divided, the norm is divided in its place."""
    return _norm(name, "width:read" if tied else "width")


def _widths(dimension: str | None) -> list[str]:
    return [] if dimension is None else dimension.removesuffix(":read").split("+")
