"""Stores bfloat16 weights in about two thirds of their bytes and gives them back bit for bit, so a model's outputs stay what they are.

Tianyi Zhang, Mohsen Hariri, Shaochen Zhong, Vipin Chaudhary, Yang Sui, Xia Hu, Anshumali Shrivastava 2025, "70% Size, 100% Accuracy: Lossless
LLM Compression for Efficient GPU Inference via Dynamic-Length Float (DFloat11)", NeurIPS 2025, arXiv 2504.11651.

A bfloat16 number is a sign, 8 bits of exponent e and 7 of mantissa. Trained weights fill sign and mantissa evenly, but use few exponents:

    bits of a weight  =  8  +  L,        H(e) <= L < H(e) + 1        H(e) = -sum_e p(e) log2 p(e)

with p the share of each exponent and L the mean length of a Huffman code for it. Of weights that are normal H is 2.55 bits whatever their
scale, since scaling by a power of two only moves the exponents; so 16 bits become about 10.6. Nothing can go below 8 + H that codes the
exponents one by one.

    coloss compress model.safetensors              a checkpoint, or a folder of shards: `compress_checkpoint`
    compress_module_(model, blocks="layers")       in memory, decoded block by block as the model runs; `open_compressed` from a file
    encode_bf16(tensor)                            one tensor

When it helps: any checkpoint in bfloat16, without a setting to choose or a loss to weigh: what comes back is the same file, to the bit.
Measured (`coloss verify dfloat11`: a character model and a classifier of digits, both trained in float32 and rounded to bfloat16; the 565,000
weights of their matrices, five seeds): 65.9 % of the bytes, 0.85 % above what the entropy of the exponents allows, weights and outputs
equal to the bit. General-purpose compressors of the bytes as they lie leave 79.2 % (zlib), 77.8 % (zstd) and 71.9 % (lzma). The split of
exponents from the rest does that work: after it any entropy coder does as well, zlib with Huffman codes only (65.66 %) and zstd at level 19
(65.7 %) even a little better, with a table for every 32 and 128 kB; zlib and lzma as they are leave 68.9 and 66.9 %. What the coder here adds
is decoding speed (with numba 1,300 MB a second of one core, zstd -3 on both planes 440) and access by block, so that a model runs from what
is stored. The rounding to bfloat16 before it, which is not lossless, moved the loss from 2.4415 to 2.4416 nats for each character and the
accuracy from 98.27 % to 98.33 %.

When not: where memory is not what is missing, for a model that decodes as it runs is slower, by the same time for every forward whatever its
batch: with two blocks of 3 million weights each, on one core of a CPU, 25 ms in place of 5 for one token, 61 in place of 45 for 64, 566 in place
of 554 for 1,024. Weights in float32 keep 16 more bits that cannot be coded and save a sixth only; float16 next to nothing. Pruned or quantised
weights have smaller exact forms, which `compress_model` and `compress_checkpoint` find. Weights under 16,384 entries are left as they are. The
authors' kernels for GPUs are not here: a GPU gets weights that the CPU decoded, so their claims on throughput are not measured.

What differs from the paper: one code for each tensor and not for each block of the network, so that a tensor can be read alone; codes are found
again by the start of each 4,096 weights, which costs 0.012 bits a weight at most where their 64-bit chunks cost 0.2; code lengths are the best
under the limit of 32 bits; and exponents from 240 on, which their tables take for pointers, are coded like any other.

`BFloat16Storage` is for networks trained in float32: it rounds weights to bfloat16 when training ends. That rounding changes the network and is
not lossless; what is lossless is the storage of the rounded network. It acts when a run ends and not before, so it needs no state, resumes
like any run and is the same on any number of processes.
"""

import lzma
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from coloss.compression.bf16_codec import encode_bf16, exponent_stats
from coloss.compression.decoding_units import KINDS
from coloss.compression.just_in_time import compress_module_
from coloss.compression.layer_choice import choose_layers
from coloss.data import character_windows, load, load_characters
from coloss.data.characters import spaced_windows
from coloss.errors import InputError
from coloss.metrics import evaluate_classifier, evaluation_mode
from coloss.nn import MLP, CausalLanguageModel, Classifier, next_token_loss
from coloss.train import Budget, Claim, Method, Setting, State, System, cosine, fit


class BFloat16Storage(Method):
    """Rounds weights to bfloat16 when training ends, so that they can be stored in about 11 bits each.

    The network keeps its types: float32 weights that are bfloat16 numbers, to run as before anywhere; `compress_model` finds that they are.
    Nothing happens while it trains.

    Args:
        layers: paths of layers or blocks; default: all linear layers, convolutions and embeddings, the first and the last too, because
            rounding to bfloat16 costs them little. Biases and norms stay as they are. A layer with a parametrization is rounded if that is gone
            when training ends: methods that put one on layers and take it off again stand before this one.

    Raises:
        InputError: in `setup`, for paths that do not exist or hold no such layer; at the first batch, if a method behind this one put a
            parametrization on a layer; in `finish`, if a layer has one still, and for sharded weights.

    Source: Zhang et al. 2025, arXiv 2504.11651, for the storage.

    Examples:
        >>> import coloss
        >>> from coloss.compression import compress_model
        >>> inputs = torch.randn(64, 8)
        >>> run = coloss.fit(
        ...     MLP(8, (128, 256), 2),
        ...     (inputs, (inputs[:, 0] > 0).long()),
        ...     nn.functional.cross_entropy,
        ...     [BFloat16Storage()],
        ...     budget=coloss.Budget(steps=2),
        ... )
        >>> stored = compress_model(run.model).weights["layers.3.weight"]
        >>> stored.kind, round(8 * stored.nbytes / (128 * 256), 1) < 11
        ('dfloat11', True)
    """

    reads_outputs = False

    def __init__(self, *, layers: str | Sequence[str] | None = None) -> None:
        super().__init__()
        self.layers = layers

    def setup(self, state: State) -> None:
        self._plain: set[str] | None = set(_weights(state.model, self.layers)[0])

    def on_batch(self, state: State) -> None:
        if self._plain is not None:
            late = [path for path in _weights(state.model, self.layers)[1] if path in self._plain]
            if late:
                raise _computed_error(late[0])
        self._plain = None

    @torch.no_grad()
    def finish(self, state: State) -> None:
        weights, computed = _weights(state.model, self.layers)
        if computed:
            raise _computed_error(computed[0])
        seen: set[int] = set()
        for path, weight in weights.items():
            if hasattr(weight, "placements"):
                raise InputError(
                    f"{path or 'model'}.weight is sharded: rounding needs whole weights, use strategy ddp"
                )
            if id(weight) not in seen:
                weight.copy_(weight.bfloat16())
            seen.add(id(weight))


def _weights(model: nn.Module, layers: str | Sequence[str] | None) -> tuple[dict[str, Tensor], list[str]]:
    """Weights to round by the paths of their layers, and the paths of layers whose weight is computed from others."""
    computing = {type(part) for part in model.modules() if type_before_parametrizations(part) in KINDS}
    kinds = tuple(dict.fromkeys((*KINDS, *computing)))
    chosen = choose_layers(model, "" if layers is None else layers, kinds=kinds, spare_ends=False)
    weights = {path: layer._parameters.get("weight") for path, layer in chosen.items()}
    plain: dict[str, Tensor] = {path: weight for path, weight in weights.items() if weight is not None}
    return plain, [path for path in weights if path not in plain]


def _computed_error(path: str) -> InputError:
    return InputError(
        f"the weight of {path or 'the model'} has a parametrization, and cannot be rounded: put BFloat16Storage behind the method that takes "
        "it off, or name other layers"
    )


SYSTEM = System(
    slug="dfloat11",
    title="70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via Dynamic-Length Float (DFloat11)",
    paper="Zhang et al. 2025, arXiv 2504.11651",
    family="compression",
    acts_on=("weights",),
    api=(
        "coloss.compression.compress_checkpoint",
        "coloss.compression.decompress_checkpoint",
        "coloss.compression.CompressedCheckpoint",
        "coloss.compression.compress_module_",
        "coloss.compression.decompress_module_",
        "coloss.compression.open_compressed",
        "coloss.compression.encode_bf16",
        "coloss.compression.exponent_stats",
        "coloss.compression.BFloat16Storage",
    ),
    method="coloss.compression.BFloat16Storage",
    kinds=("classification", "regression", "multilabel", "retrieval", "self-supervised", "next-token"),
)


def _zlib(content: bytes) -> int:
    return len(zlib.compress(content, 9))


def _huffman(content: bytes) -> int:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return len(coder.compress(content)) + len(coder.flush())


def _lzma(content: bytes) -> int:
    """Presets above 6 differ in the dictionary alone, and its 8 MB hold any content here: same bytes, in less time."""
    return len(lzma.compress(content, preset=6))


def _zstd(content: bytes, level: int) -> int:
    import zstandard

    return len(zstandard.ZstdCompressor(level=level).compress(content))


def general_purpose_bytes(weights: Iterable[Tensor]) -> dict[str, int]:
    """Bytes that compressors of everyday make of bfloat16 tensors, one by one: of the numbers as they lie in memory, and of their two planes.

    The planes are the exponents, and sign and mantissa, a byte each; whatever does not shrink counts as it is.

    Returns:
        Name -> bytes: "zlib", "lzma" and, where the package zstandard is installed, "zstd 3" and "zstd 19", each also "... on planes"; and "zlib
        Huffman-only on planes", which codes bytes one by one and looks for no repetitions.

    Examples:
        >>> sizes = general_purpose_bytes([torch.randn(20_000).bfloat16()])
        >>> sizes["zlib on planes"] < sizes["zlib"] < 40_000
        True
    """
    coders: dict[str, Callable[[bytes], int]] = {"zlib": _zlib, "lzma": _lzma}
    if find_spec("zstandard") is not None:
        coders |= {f"zstd {level}": partial(_zstd, level=level) for level in (3, 19)}
    on_planes = coders | {"zlib Huffman-only": _huffman}
    sizes = {**dict.fromkeys(coders, 0), **{f"{name} on planes": 0 for name in on_planes}}
    for weight in weights:
        words = weight.detach().cpu().contiguous().reshape(-1).view(torch.int16).int() & 0xFFFF
        exponents, rest = (words >> 7) & 0xFF, ((words >> 8) & 0x80) | (words & 0x7F)
        planes = [plane.to(torch.uint8).numpy().tobytes() for plane in (exponents, rest)]
        whole = words.to(torch.int16).numpy().tobytes()
        for name, size in coders.items():
            sizes[name] += min(size(whole), len(whole))
        for name, size in on_planes.items():
            sizes[f"{name} on planes"] += sum(min(size(plane), len(plane)) for plane in planes)
    return sizes


LENGTH = 64


def _language_model(setting: Setting) -> tuple[nn.Module, Tensor, Callable[[nn.Module], float]]:
    """A trained character model, inputs for it, and what it is worth: nats for each character of test text."""
    text = load_characters()
    model = fit(
        CausalLanguageModel(len(text.characters), 128, 2, 4, context=LENGTH),
        character_windows(text.train, LENGTH),
        next_token_loss,
        budget=Budget(steps=2 if setting.smoke else 100),
        batch_size=16,
        optimizer=partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1),
        learning_rate_schedule=cosine(warmup=0.1),
        seed=setting.seed,
    ).model.cpu()
    ids = spaced_windows(text.test, LENGTH + 1, 2 if setting.smoke else 64)

    def loss(network: nn.Module) -> float:
        with evaluation_mode(network):
            return next_token_loss(network(ids[:, :-1]), ids[:, 1:]).item()

    return model, ids[:, :-1], loss


def _classifier(setting: Setting) -> tuple[nn.Module, Tensor, Callable[[nn.Module], float]]:
    """A trained classifier of digits, inputs for it, and its test accuracy."""
    splits: Any = load("digits", seed=setting.seed)
    model = fit(
        Classifier(MLP(64, (384, 384)), splits.num_classes),
        splits.train,
        nn.functional.cross_entropy,
        budget=Budget(steps=2) if setting.smoke else Budget(epochs=8),
        batch_size=64,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        learning_rate_schedule=cosine(),
        seed=setting.seed,
    ).model.cpu()
    return model, splits.test.inputs, lambda network: evaluate_classifier(network, splits.test)["accuracy"]


def _sizes(setting: Setting) -> Mapping[str, Mapping[str, float]]:
    """Stored bytes over bfloat16 bytes of all weights that are coded, of both networks together, for every compressor."""
    weights: list[Tensor] = []
    known: dict[str, float] = {}
    exact = equal_outputs = True
    for name, build in (("nll", _language_model), ("accuracy", _classifier)):
        model, inputs, evaluate = build(setting)
        known[f"{name}_float32"] = evaluate(model)
        model = model.bfloat16().eval().requires_grad_(False)
        if inputs.is_floating_point():
            inputs = inputs.bfloat16()
        expected = model(inputs)
        plain = {key: value.clone() for key, value in model.state_dict().items()}
        known[f"{name}_bfloat16"] = _worth(evaluate, model)
        keep = "embedding" if name == "nll" else None  # it is the output layer, too
        compress_module_(model, keep=keep)
        equal_outputs &= _same_bits(model(inputs), expected)
        known[f"{name}_stored"] = _worth(evaluate, model)
        for key, value in model.state_dict().items():
            exact &= _same_bits(value, plain[key])
        weights += [w for w in plain.values() if w.dtype == torch.bfloat16 and encode_bf16(w).coded]
    weights = sorted(weights, key=Tensor.numel)[-2:] if setting.smoke else weights
    before = sum(weight.nbytes for weight in weights)
    bound = sum(weight.numel() * (8 + exponent_stats(weight).entropy) / 8 for weight in weights)
    after = sum(encode_bf16(weight).nbytes for weight in weights)
    arms: dict[str, dict[str, float]] = {
        name: {"stored_bytes_ratio": size / before} for name, size in general_purpose_bytes(weights).items()
    }
    arms["dfloat11"] = {
        "stored_bytes_ratio": after / before,
        "over_entropy_bound": after / bound - 1,
        "entropy_bound_ratio": bound / before,
        "weights_exact": float(exact),
        "outputs_exact": float(equal_outputs),
        **known,
    }
    return arms


def _worth(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    class InBFloat16(nn.Module):
        def forward(self, inputs: Tensor) -> Any:
            found = model(inputs.bfloat16() if inputs.is_floating_point() else inputs)
            return found.float()

    return evaluate(InBFloat16().eval())


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(*(part.contiguous().reshape(-1).view(torch.uint8) for part in (first, second)))


CLAIM = Claim(
    statement=(
        "Trained weights in bfloat16 take fewer bytes as DFloat11, which gives weights and outputs back bit for bit, than the best "
        "general-purpose compressor (lzma; zlib and zstd leave more) makes of the checkpoint's bytes as they lie. The split of exponents from the "
        "rest does that: after the same split any entropy coder does as well, zlib with Huffman codes only and zstd at level 19 a little better; "
        "what this coder adds is decoding speed and access by block."
    ),
    metric="stored_bytes_ratio",
    direction="lower",
    baseline="lzma",
    method="dfloat11",
    trial=_sizes,
    tried=(
        "The baseline is the smallest of zlib, zstd at levels 3 and 19, and lzma (preset 6, whose dictionary holds these tensors whole, so that "
        "higher presets give the same bytes). The arms on planes are ablations of the method: its split, with another coder behind. They show that "
        "the split does the work: 0.6566 for zlib Huffman-only and 0.657 for zstd at level 19, which make a table for every 32 and 128 kB, against 0.659 "
        "here, with one table for each tensor."
    ),
)
