"""`coloss exercise`: watch a recorded body, frame after frame, and see what it is taken to do and how often."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coloss.cli.display import output, plain_json, status
from coloss.errors import InputError

if TYPE_CHECKING:
    from coloss.motion import Reading

_MODELS = Path("runs")
_COLUMNS, _ROWS = 28, 14


def exercise(
    source: Annotated[
        str, typer.Argument(help="A data set of motion (hdm05, bandai, msr-action3d) or an .npz of clips.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of coloss run fitness-bilstm. Default: the newest runs/fitness-bilstm-*."),
    ] = None,
    clip: Annotated[
        list[str] | None, typer.Option(help="Number or name of a clip; several are shown as one session.")
    ] = None,
    repeat: Annotated[int, typer.Option(help="Show the clips so many times, one after another.")] = 1,
    missing: Annotated[float, typer.Option(help="Share of the joints to hide, in [0, 1).")] = 0.0,
    speed: Annotated[float, typer.Option(help="Times the recording's own; 0 is as fast as it goes.")] = 1.0,
    stride: Annotated[int, typer.Option(help="Frames from one decision to the next.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Watch a body: what it does, how sure that is, and the repetitions so far, with a small picture of it.

    Without a clip: the first three of the test part. In a terminal the view is live; else every change is a line.
    """
    if repeat < 1:
        raise InputError(f"repeat must be >= 1, got {repeat}")
    if not 0 <= missing < 1:
        raise InputError(f"missing must be in [0, 1), got {missing}")
    if not 0 <= speed < float("inf"):
        raise InputError(f"speed must be >= 0 and finite, got {speed}")
    folder = model if model is not None else _newest_model()
    with status("starting"):
        from coloss.data import load_motion
        from coloss.motion import ExerciseMonitor, load_exercise_model, pose_spec

        trained = load_exercise_model(folder)
        clips = load_motion(source)
        if pose_spec(clips.skeleton) != trained.spec:
            raise InputError(
                f"{source} has its landmarks at other joints than the data that the model in {folder} was trained on: "
                f"train one with coloss run fitness-bilstm --data {source}"
            )
        chosen = _clips(clips, clip)
        monitor = ExerciseMonitor(trained, fps=clips.fps, stride=stride)
    session = _session(clips, chosen * repeat, monitor, missing)
    names = [_name(clips, index) for index in chosen]
    console = output()
    pause = 0.0 if speed == 0 else 1 / (clips.fps * speed)
    last: Reading | None = None
    if as_json:
        last = [reading for reading, _ in session][-1]
    elif console.is_terminal:
        last = _live(console, session, clips.skeleton.parents, pause, names)
    else:
        for reading, _ in session:
            if last is None or (reading.label, reading.count) != (last.label, last.count):
                console.print(_line(reading), soft_wrap=True, markup=False)
            last = reading
    assert last is not None
    if as_json:
        found = {
            "model": str(folder),
            "clips": names,
            "frames": last.frame,
            "label": last.label,
            "probability": last.probability,
            "counts": dict(last.counts),
        }
        typer.echo(json.dumps(plain_json(found), indent=1, allow_nan=False))
        return
    counted = ", ".join(f"{label} {count}" for label, count in last.counts.items() if count) or "none"
    console.print(f"repetitions: {counted} ({last.frame} frames)", soft_wrap=True, markup=False)


def _newest_model() -> Path:
    found = sorted(_MODELS.glob("fitness-bilstm*/counters.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(
            "there is no trained model under runs: train one with coloss run fitness-bilstm, or name one with --model"
        )
    return found[-1].parent


def _clips(clips: Any, wanted: list[str] | None) -> list[int]:
    if not wanted:
        from coloss.motion.exercise_data import recordings_for_test

        test = recordings_for_test(clips).nonzero()[0].tolist() or list(range(len(clips)))
        return test[:3]
    chosen = []
    for name in wanted:
        if name in clips.names:
            chosen.append(clips.names.index(name))
        elif name.isdecimal() and int(name) < len(clips):
            chosen.append(int(name))
        else:
            raise InputError(f"clip must be a name or a number below {len(clips)}, got {name!r}")
    return chosen


def _name(clips: Any, index: int) -> str:
    label = next(iter(clips.labels), None)
    if label is None:
        return str(clips.names[index])
    number, names = int(clips.labels[label][index]), clips.label_names.get(label, ())
    return str(names[number]) if number < len(names) else str(number)


def _session(clips: Any, chosen: list[int], monitor: Any, missing: float) -> Iterator[tuple[Any, Any]]:
    """Each frame's reading, and the joints that were seen."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for index in chosen:
        for frame in clips.clip(index):
            joints = torch.tensor(frame)
            hidden = torch.rand(len(joints), generator=generator) < missing
            joints = joints.masked_fill(hidden[:, None], torch.nan)
            yield monitor.update(joints), joints


def _live(
    console: Any, session: Iterator[tuple[Any, Any]], parents: Any, pause: float, names: list[str]
) -> Any:
    from rich.columns import Columns
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    from coloss.motion import draw_skeleton

    last = None
    due = time.perf_counter()
    title = " · ".join(dict.fromkeys(names))
    with Live(console=console, refresh_per_second=30, transient=False) as view:
        for last, joints in session:
            picture = draw_skeleton(joints, parents, columns=_COLUMNS, rows=_ROWS)
            bar = "█" * round(20 * last.probability)
            facts = Text.assemble(
                (f"{last.label or 'watching'}\n", "bold green" if last.label else "dim"),
                f"{bar:░<20} {last.probability:.0%}\n\n",
                (f"{last.count if last.count is not None else '–'}", "bold cyan"),
                " repetition\n\n" if last.count == 1 else " repetitions\n\n",
                (f"frame {last.frame}, {last.missing:.0%} of the joints missing\n", "dim"),
                *((f"{label}: {count}\n", "dim") for label, count in last.counts.items() if count),
            )
            view.update(
                Panel(Columns([Text(picture), facts], padding=(0, 3)), title=Text(title), expand=False)
            )
            due += pause
            time.sleep(max(0.0, due - time.perf_counter()))
    return last


def _line(reading: Any) -> str:
    count = "" if reading.count is None else f", {reading.count} repetition{'s' * (reading.count != 1)}"
    what = "watching" if reading.label is None else f"{reading.label} ({reading.probability:.0%})"
    return f"frame {reading.frame}: {what}{count}"
