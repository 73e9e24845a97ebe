"""Which layers of a module are coded, and which of them are decoded together."""

from collections.abc import Mapping, Sequence

from torch import nn

from coloss.compression.bf16_codec import MINIMUM_WEIGHTS
from coloss.compression.coded_layers import Unit, is_coded
from coloss.compression.cost import CONVOLUTIONS
from coloss.compression.layer_choice import choose_layers
from coloss.compression.replaced_layers import check_called
from coloss.errors import InputError, suggest_names

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KINDS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.Embedding)
"""Layers whose weight can be coded."""

Paths = str | Sequence[str] | None


def layers_to_code(module: nn.Module, layers: Paths, keep: Paths) -> dict[str, nn.Module]:
    """Layers to code by their paths.

    Raises:
        InputError: for paths that do not exist or hold no such layer, and for a module with coded layers.
    """
    if any(is_coded(part) for part in module.modules()):
        raise InputError("module has coded layers already: decompress_module_ first")
    found = choose_layers(module, "" if layers is None else layers, kinds=KINDS, spare_ends=False)
    spared = choose_layers(module, keep, kinds=KINDS, spare_ends=False) if keep is not None else {}
    return {
        path: layer
        for path, layer in found.items()
        if path not in spared and layer._parameters.get("weight") is not None
    }


def units_of(module: nn.Module, chosen: Mapping[str, nn.Module], blocks: Paths) -> dict[str, Unit]:
    """The unit of each layer: its block, or itself.

    Raises:
        InputError: for blocks that do not exist, lie in one another or hold no layer to code.
    """
    if blocks is None:
        return {path: Unit(path) for path in chosen}
    modules = dict(module.named_modules())
    wanted: list[str] = []
    for path in (blocks,) if isinstance(blocks, str) else blocks:
        if path not in modules:
            raise InputError(f"blocks must be paths of the model, got {path!r}{suggest_names(path, modules)}")
        part = modules[path]
        inside = [name for name, _ in part.named_children()]
        listed = isinstance(part, nn.ModuleList) or (type(part) is nn.Sequential and path)
        wanted += [f"{path}.{name}" if path else name for name in inside] if listed else [path]
    for one in wanted:
        if any(other != one and one.startswith(f"{other}." if other else "") for other in wanted):
            raise InputError(f"blocks must lie beside one another, got {one!r} in another block")
    units = {path: Unit(path) for path in wanted}
    found = {}
    for path in chosen:
        block = next((b for b in wanted if path == b or path.startswith(f"{b}." if b else "")), None)
        found[path] = Unit(path) if block is None else units[block]
    for path, unit in units.items():
        if unit not in found.values():
            raise InputError(f"blocks must hold layers to code, got {path!r}")
    return found


def check_read(module: nn.Module, unit_of: Mapping[str, Unit], weights: Mapping[str, int]) -> None:
    """Refuse layers whose weights torch's TransformerEncoderLayer reads from outside, where they are not there.

    Args:
        module: that holds the layers.
        unit_of: unit of each layer.
        weights: path of each layer that would be coded -> how many weights it has.

    Raises:
        InputError: naming the first such layer.
    """
    try:
        check_called(
            module,
            [
                path
                for path, count in weights.items()
                if count >= MINIMUM_WEIGHTS
                and unit_of[path].path == path
                and isinstance(module.get_submodule(layer_of(path)), nn.TransformerEncoderLayer)
            ],
        )
    except InputError as error:
        raise InputError(
            f"{error}, leave it out with keep=[...], or give the module around it in blocks=[...]"
        ) from None


def all_chosen(names: Sequence[str], chosen: Mapping[str, nn.Module]) -> bool:
    """Whether a tensor with these names is the weight of chosen layers and nothing else."""
    return all(name.rpartition(".")[2] == "weight" and layer_of(name) in chosen for name in names)


def layer_of(name: str) -> str:
    return name.rpartition(".")[0]
