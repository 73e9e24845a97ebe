"""A trained switchable network at a precision that it was not trained at."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from coloss.compression.low_rank import refresh_batch_norm
from coloss.compression.multibit_quantizers import check_bits
from coloss.compression.switchable_layers import SwitchableBatchNorm, find_switchable, set_bits, to_plain
from coloss.data import Batch, IndexedDataset
from coloss.errors import InputError
from coloss.metrics import evaluation_mode


def calibrate_precision(model: nn.Module, bits: int, data: Any) -> None:
    """Let a trained switchable model run at a precision that it was not trained at.

    Weights need nothing but the second rounding. Batch norms of the new precision begin as those of the nearest higher one, with
    statistics taken anew from `data`; steps of rounded inputs are set by its first batch. Leaves the model at the new precision.

    Args:
        model: switchable, with batch norms that are not transitional.
        bits: in 2 to the highest trained.
        data: inputs as in training: a tensor, an `IndexedDataset`, or an iterable of batches.

    Raises:
        InputError: if the precision is there already or cannot be; for transitional norms; if data hold no batch.

    Cost: one forward pass of the data, and a copy of the model.

    Examples:
        >>> from coloss.compression import bits_of, make_switchable
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> _ = make_switchable(model, (8, 4))
        >>> calibrate_precision(model, 3, torch.randn(16, 4))
        >>> bits_of(model), model[2].key
        ({'1': 3}, '3')
    """
    layers = find_switchable(model)
    high = max(layer.weight_quantizer.high_bits for layer in layers.values())
    check_bits((bits,), high)
    norms = [part for part in model.modules() if isinstance(part, SwitchableBatchNorm)]
    if any(bits in layer.weight_quantizer.bits for layer in layers.values()):
        raise InputError(f"bits must be a precision that the model lacks, got {bits}")
    if any(norm.transitional for norm in norms):
        raise InputError("transitional batch norms are trained for pairs of precisions: train this one too")
    if isinstance(data, Iterable) and not isinstance(data, Tensor | IndexedDataset):
        data = list(data)
    first = _first_batch(model, data)
    for layer in layers.values():
        layer.weight_quantizer.add_precision(bits)
        if layer.input_quantizer is not None:
            layer.input_quantizer.add_precision(bits)
    for norm in norms:
        higher = min((int(key) for key in norm.norms if int(key) > bits), default=high)
        norm.norms[str(bits)] = copy.deepcopy(norm.norms[str(higher)])
    set_bits(model, bits)
    with evaluation_mode(model):
        for layer in layers.values():
            layer.train(layer.input_quantizer is not None)
        if any(layer.training for layer in layers.values()):
            model(first)
    if norms:
        plain = copy.deepcopy(model)
        to_plain(plain)
        refresh_batch_norm(plain, data)
        for path, part in model.named_modules():
            if isinstance(part, SwitchableBatchNorm):
                part.norm.load_state_dict(plain.get_submodule(path).state_dict())


def _first_batch(model: nn.Module, data: Any) -> Any:
    if isinstance(data, IndexedDataset):
        data = data.take(torch.arange(min(len(data), 256)))
    if isinstance(data, list):
        if not data:
            raise InputError("data must give at least one batch, got none")
        data = data[0]
    device = next(model.parameters()).device
    return Batch.of(data).to(device).inputs
