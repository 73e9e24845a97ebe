"""What a network said about each sample one epoch ago, as targets that are softer than the labels.

Progressive self-knowledge distillation (PS-KD): Kim, Ji, Yoon and Hwang, 2021, arXiv 2006.12000.

    target   (1 - share) * onehot(y) + share * p_before(x)

`PredictionMemory` keeps p_before by sample id, `soften_targets` mixes, and any cross-entropy with probabilities does the rest.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.ops import full_precision
from coloss.train.sample_table import SampleTable


def soften_targets(
    targets: Integer[Tensor, "batch *copies"],
    past: Float[Tensor, "batch *copies classes"],
    share: float,
    seen: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch *copies classes"]:
    """Labels mixed with what the network said before.

    Args:
        targets: class numbers.
        past: earlier probabilities of all classes; no gradient reaches them.
        share: weight of the earlier probabilities, in [0, 1].
        seen: which samples have any; the others keep their labels. None: all have.

    Returns:
        Probabilities in at least float32; each row sums to 1 if the row of `past` does.

    Raises:
        ValueError: if `share` is out of range.

    Source:
        Kim et al., 2021, arXiv 2006.12000, equation 4.

    Examples:
        >>> past = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.2, 0.6]])
        >>> soften_targets(torch.tensor([0, 2]), past, 0.5, torch.tensor([True, False]))
        tensor([[0.7500, 0.2500, 0.0000],
                [0.0000, 0.0000, 1.0000]])
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    past = full_precision(past.detach())
    labels = F.one_hot(targets.long(), past.shape[-1]).to(past)
    mixed = (1 - share) * labels + share * past
    if seen is None:
        return mixed
    return torch.where(seen.reshape(-1, *(1,) * (past.ndim - 1)), mixed, labels)


class PredictionMemory(nn.Module):
    """The last probabilities that a network gave for each sample, found by the sample's id and saved with the run.

    Rows know the epoch they were written in, so what a sampler left out for longer than `max_age` epochs is reported as missing instead of
    being passed off as fresh. Probabilities come back with the sum that half precision took from them restored. For ids that come twice,
    several processes and checkpoints see `coloss.train.SampleTable`, which holds the rows.

    Args:
        shapes: what is kept of a sample: name -> shape, classes in the last dimension.
        max_age: epochs after which a row no longer counts, >= 1; 1 is the epoch before.
        num_samples: None takes any ids and grows; with a number, ids are row numbers below it, which is quicker.
        dtype: of the rows.

    Raises:
        InputError: for a value out of range, or no shape.

    Cost:
        In float16, 2 bytes for each number and sample, on every process and on the device of the module: 10 MB for the 100 classes of
        50,000 samples.

    Examples:
        >>> memory = PredictionMemory({"classes": (2,)})
        >>> memory.write(torch.tensor([7, 3]), 0, {"classes": torch.tensor([[0.1, 0.9], [0.5, 0.5]])})
        >>> past, seen = memory.read(torch.tensor([3, 4]), epoch=1)
        >>> past["classes"][0], seen
        (tensor([0.5000, 0.5000]), tensor([ True, False]))
        >>> memory.read(torch.tensor([3]), epoch=2)[1]  # two epochs old
        tensor([False])
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        *,
        max_age: int = 1,
        num_samples: int | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        if max_age < 1:
            raise InputError(f"max_age must be >= 1 epoch, got {max_age}")
        for name, shape in shapes.items():
            if not shape or min(shape) < 1:
                raise InputError(f"shapes must be of one or more sizes >= 1, got {tuple(shape)} for {name!r}")
        self.max_age = max_age
        initial = {name: torch.zeros(*shape) for name, shape in shapes.items()}
        self.rows = SampleTable(initial, num_samples=num_samples, dtype=dtype)
        # A table of its own: half precision cannot count epochs beyond 2,048.
        self.epochs = SampleTable({"epoch": -1.0}, num_samples=num_samples)

    def read(
        self, ids: Int[Tensor, " batch"], epoch: int
    ) -> tuple[dict[str, Float[Tensor, "batch ..."]], Bool[Tensor, " batch"]]:
        """What was said about some samples at their last visit.

        Args:
            ids: of the samples.
            epoch: the present one, from 0.

        Returns:
            Probabilities by name, in at least float32, and which samples have any that are not too old. Other rows are not to be used.
        """
        values, seen = self.rows.read(ids)
        (written,) = self.epochs.read(ids)[0].values()
        found = {}
        for name, value in values.items():
            value = full_precision(value)
            found[name] = value / value.sum(-1, keepdim=True).clamp(min=torch.finfo(value.dtype).tiny)
        return found, seen & (written >= epoch - self.max_age)

    def write(
        self, ids: Int[Tensor, " batch"], epoch: int, probabilities: Mapping[str, Float[Tensor, "batch ..."]]
    ) -> None:
        """Keep what was said about some samples; no gradient is kept. All processes must call it together.

        Args:
            ids: of the samples.
            epoch: the present one, from 0.
            probabilities: by name.
        """
        self.rows.write(ids, probabilities)
        self.epochs.write(ids, {"epoch": torch.full(ids.shape, float(epoch), device=ids.device)})
