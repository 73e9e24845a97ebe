"""One image through a segmenter whose patches leave after the first block: gathered out, or hidden from attention by masks.

Processor time on one busy core, and by the wall clock the median ratio to the same network without exits:

    patches that leave      none     25 %             50 %             75 %
    48 of width 64          5.5 ms   7.2 ms (1.8 x)   6.6 ms (1.3 x)   6.1 ms (1.4 x)    gathered out
                                     6.2 ms (1.6 x)   6.3 ms (1.4 x)   5.8 ms (1.4 x)    hidden
    432 of width 192        63 ms    55 ms (0.8 x)    49 ms (0.6 x)    26 ms (0.4 x)     gathered out
                                     82 ms (1.1 x)    71 ms (1.0 x)    60 ms (0.9 x)     hidden

So few small patches take longer with exits than without, and many large ones less, but only if those that leave are gathered out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from coloss.compression import EarlyExitSegmenter
from coloss.lab.benchmarks.measure import Report, interleaved, silent
from coloss.lab.benchmarks.output_layer import timed
from coloss.lab.benchmarks.row import Row

PATCH, DEPTH, CLASSES = 5, 6, 11


def measure(
    report: Report = silent,
    *,
    sizes: Sequence[tuple[int, int, int]] = ((6, 8, 64), (18, 24, 192)),
    shares: Sequence[float] = (0.25, 0.5, 0.75),
    calls: int = 1,
    rounds: int = 5,
) -> list[Row]:
    """Latency of one image, forward, one thread of a CPU, six blocks: some share of its patches leaves after the first.

    Args:
        report: told the share done.
        sizes: rows and columns of patches, and width of the network.
        shares: of the patches that leave.
        calls: images in one measurement; their median is taken.
        rounds: measurements of each case.
    """
    cases: dict[str, Callable[[], Tensor]] = {}
    wholes: dict[str, str] = {}
    for height, width, dim in sizes:
        image = torch.rand(1, 3, PATCH * height, PATCH * width, generator=torch.Generator().manual_seed(0))
        whole = f"{height * width} patches of width {dim}"
        cases[whole], wholes[whole] = one_image(image, dim, None), whole
        for share in shares:
            for way in ("gathered out", "hidden"):
                name = f"{whole}, {share:.0%} {way}"
                cases[name] = one_image(image, dim, share, gather=way == "gathered out")
                wholes[name] = whole
    with _one_thread():
        work = {name: partial(timed, step, calls) for name, step in cases.items()}  # type: ignore[arg-type]
        found = interleaved(work, rounds, report)
    return [Row.of(name, found[name], "ms", over=found[whole]) for name, whole in wholes.items()]


def one_image(image: Tensor, dim: int, share: float | None, *, gather: bool = True) -> Callable[[], Tensor]:
    """A pass of a segmenter in which a share of the patches, evenly spread, leaves after the first block; None: no head is on the way.

    Examples:
        >>> one_image(torch.rand(1, 3, 10, 10), dim=8, share=0.5)().shape
        torch.Size([1, 11, 10, 10])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exits = (DEPTH,) if share is None else (1, DEPTH)
        model = EarlyExitSegmenter(
            (image.shape[2], image.shape[3]), PATCH, CLASSES, dim=dim, depth=DEPTH, exit_after=exits
        ).eval()
    if share is not None:
        model.early_exit.select = lambda probabilities, active: active & _spread(active, share)
    model.early_exit.gather = gather

    def step() -> Tensor:
        with torch.no_grad():
            return model(image)

    return step


def _spread(active: Tensor, share: float) -> Tensor:
    place = torch.arange(active.shape[1] + 1, device=active.device)
    return (place * share).floor().diff() > 0


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
