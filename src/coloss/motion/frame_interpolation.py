"""Pictures between two pictures: a small network that moves both by flows of its own and fuses them, and how good its pictures are."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.metrics import evaluation_mode
from coloss.ops import full_precision, without_autocast

Frames = tuple[Tensor, Tensor, Tensor] | list[Tensor]
"""First picture, last picture, and the share of the time between them; some loaders make a list of it."""


def backward_warp(
    images: Float[Tensor, "batch channels height width"], flow: Float[Tensor, "batch 2 height width"]
) -> Float[Tensor, "batch channels height width"]:
    """Each pixel takes the colour from where its flow points; bilinear, differentiable in both.

    Args:
        images: float.
        flow: from each pixel to its source, in pixels, x (to the right) and y (downwards). Beyond the edge the nearest pixel counts.

    Returns:
        In the type of the pictures.

    Examples:
        >>> row = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 1, 3)
        >>> right = torch.tensor([1.0, 0.0])[None, :, None, None].expand(1, 2, 1, 3)
        >>> backward_warp(row, right), backward_warp(row, right / 2)
        (tensor([[[[2., 3., 3.]]]]), tensor([[[[1.5000, 2.5000, 3.0000]]]]))
    """
    height, width = images.shape[2:]
    pictures = full_precision(images)
    flow = full_precision(flow).to(pictures.dtype)
    rows = torch.arange(height, dtype=pictures.dtype, device=images.device)[:, None]
    columns = torch.arange(width, dtype=pictures.dtype, device=images.device)[None, :]
    x = (2 * (columns + flow[:, 0]) + 1) / width - 1
    y = (2 * (rows + flow[:, 1]) + 1) / height - 1
    with without_autocast(images.device):
        warped = F.grid_sample(
            pictures, torch.stack([x, y], -1), mode="bilinear", padding_mode="border", align_corners=False
        )
    return warped.to(images.dtype)


class FrameInterpolator(nn.Module):
    r"""A small network that makes the picture at any time between two pictures.

    A U-net of six convolutions at three scales looks at both pictures and the time t, and gives at half size, brought to full size bilinearly: a flow to each picture
    $f_0, f_1$, a logit a of how much the first one counts, and a correction r. With W the backward warp and s the sigmoid,

        x_t = w W(x_0, t f_0) + (1 - w) W(x_1, (1 - t) f_1) + 4 t (1 - t) r
        w = s(a + log((1 - t) / t))

    so that t = 0 and t = 1 give the pictures themselves, whatever the weights, and a new network gives $(1 - t) x_0 + t x_1$.

    Args:
        width: channels at half size, >= 1; twice and four times as many below.
        channels: of a picture.

    Returns:
        From `forward(first, last, time)`: pictures (batch, channels, height, width), neither cut to [0, 1] nor rounded. `time` is a number,
        or one for each sample. One tuple `(first, last, time)`, as `coloss.fit` passes it, is taken too.

    Raises:
        InputError: for a width < 1, unequal or too small pictures (sides < 4), or (on the CPU) a time outside [0, 1].

    Examples:
        >>> network = FrameInterpolator(8)
        >>> first, last = torch.rand(2, 4, 3, 16, 16).unbind(0)
        >>> torch.allclose(network(first, last, 0.25), 0.75 * first + 0.25 * last, atol=1e-6)
        True
    """

    def __init__(self, width: int = 16, channels: int = 3) -> None:
        super().__init__()
        if width < 1 or channels < 1:
            raise InputError(f"width and channels must be >= 1, got {width} and {channels}")
        self.channels = channels
        self.at_half = _layer(2 * channels + 1, width, 2)
        self.at_quarter = _layer(width, 2 * width, 2)
        self.at_eighth = _layer(2 * width, 4 * width, 2)
        self.up_quarter = _layer(6 * width, 2 * width, 1)
        self.up_half = _layer(3 * width, width, 1)
        self.head = nn.Conv2d(width, 5 + channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        first: Float[Tensor, "batch channels height width"] | Frames,
        last: Float[Tensor, "batch channels height width"] | None = None,
        time: float | Float[Tensor, " batch"] = 0.5,
    ) -> Float[Tensor, "batch channels height width"]:
        if isinstance(first, tuple | list):
            first, last, time = first
        if last is None or first.shape != last.shape or first.shape[1] != self.channels:
            shapes = tuple(first.shape), None if last is None else tuple(last.shape)
            raise InputError(
                f"pictures must be two of {self.channels} channels and equal shape, got {shapes}"
            )
        if min(first.shape[2:]) < 4:
            raise InputError(f"pictures must be at least 4 x 4 pixels, got {tuple(first.shape[2:])}")
        share = torch.as_tensor(time, dtype=first.dtype, device=first.device).expand(len(first))
        if share.device.type == "cpu" and not bool(((share >= 0) & (share <= 1)).all()):
            raise InputError(f"time must be in [0, 1], got {time}")
        share = share[:, None, None, None]
        flows, logit, correction = self._moves(first, last, share)
        # In full precision, where the ends are infinite odds and no logit is large enough to leave 0 / 0.
        exact = full_precision(share)
        weight = (full_precision(logit) + ((1 - exact) / exact).log()).sigmoid().to(first.dtype)
        moved = weight * backward_warp(first, share * flows[:, :2])
        moved = moved + (1 - weight) * backward_warp(last, (1 - share) * flows[:, 2:])
        return moved + 4 * share * (1 - share) * correction

    def _moves(self, first: Tensor, last: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Flows in pixels (x and y to the first, x and y to the last), logit and correction, at full size."""
        half = self.at_half(torch.cat([first, last, share.expand_as(first[:, :1])], 1))
        quarter = self.at_quarter(half)
        up = self.up_quarter(torch.cat([quarter, _resized(self.at_eighth(quarter), quarter)], 1))
        up = self.up_half(torch.cat([half, _resized(up, half)], 1))
        found = _resized(self.head(up), first)
        # A unit of the head is a quarter of the picture's side, so that like weights suit like motion at any size.
        unit = max(first.shape[2:]) / 4
        return unit * found[:, :4], found[:, 4:5], found[:, 5:]


def _layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.PReLU(outputs))


def _resized(values: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(values, like.shape[2:], mode="bilinear", align_corners=False)


def interpolation_metrics(
    predicted: Float[Tensor, "batch channels height width"],
    truth: Float[Tensor, "batch channels height width"],
) -> dict[str, float]:
    """How close pictures are to the true ones, after cutting them to [0, 1]; each the mean over pictures.

    Args:
        predicted: colours.
        truth: colours in [0, 1], at least 11 pixels high and wide, one picture or more.

    Returns:
        `psnr` in dB (-10 log10 of a picture's mean squared error; infinite if one of them is exact), `ssim` (Gaussian window of 11 pixels, where it is wholly inside), and
        `interpolation_error`, the mean absolute difference on the scale of 0 to 255.

    Raises:
        InputError: for unequal or too small pictures, or none.

    Examples:
        >>> truth = torch.full((2, 3, 16, 16), 0.5)
        >>> {name: round(value, 2) for name, value in interpolation_metrics(truth + 0.1, truth).items()}
        {'psnr': 20.0, 'ssim': 0.98, 'interpolation_error': 25.5}
    """
    from kornia.metrics import ssim  # its import takes a fraction of a second

    if predicted.shape != truth.shape or not len(truth) or min(truth.shape[2:]) < 11:
        raise InputError(
            "pictures must be one or more of equal shape, at least 11 x 11 pixels, "
            f"got {tuple(predicted.shape)} and {tuple(truth.shape)}"
        )
    predicted, truth = full_precision(predicted).clamp(0, 1), full_precision(truth)
    squares = (predicted - truth).square().flatten(1).mean(1)
    similarity = ssim(predicted, truth, 11, 1.0, eps=0.0, padding="valid")
    return {
        "psnr": float((-10 * squares.log10()).mean()),
        "ssim": float(similarity.mean()),
        "interpolation_error": float((predicted - truth).abs().mean() * 255),
    }


@torch.no_grad()
def slow_motion(
    network: nn.Module, frames: Float[Tensor, "frames channels height width"], factor: int
) -> Float[Tensor, "more channels height width"]:
    """A video with `factor` times as many frames: the frames themselves, and pictures between each two of them.

    Args:
        network: takes (first, last, time), as a `FrameInterpolator`; runs in evaluation mode and has its own mode back afterwards.
        frames: two or more, colours in [0, 1], on the network's device.
        factor: >= 1.

    Returns:
        (frames - 1) * factor + 1 pictures with colours in [0, 1].

    Raises:
        InputError: for fewer than two frames, or a factor < 1.

    Cost:
        One forward pass over all pairs for each picture between.

    Examples:
        >>> video = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 8, 8)
        >>> slow_motion(FrameInterpolator(4), video, 4)[:, 0, 0, 0]
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000])
    """
    if len(frames) < 2:
        raise InputError(f"frames must be two or more, got {len(frames)}")
    if factor < 1:
        raise InputError(f"factor must be >= 1, got {factor}")
    first, last = frames[:-1], frames[1:]
    columns = [first]
    with evaluation_mode(network):
        for turn in range(1, factor):
            share = torch.full((len(first),), turn / factor, dtype=frames.dtype, device=frames.device)
            columns.append(network((first, last, share)).clamp(0, 1))
    return torch.cat([torch.stack(columns, 1).flatten(0, 1), frames[-1:]])
