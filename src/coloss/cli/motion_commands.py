"""`coloss generate`, `coloss retrieve` and `coloss caption`: motion from words, found by words, and put into words."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from coloss.cli.display import output, plain_json, status
from coloss.errors import InputError

Model = Annotated[Path, typer.Option(help="Folder of a trained LaMP (coloss run lamp).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
AllowUnknown = Annotated[
    bool, typer.Option("--allow-unknown", help="Read words that the model has never seen as 'unknown'.")
]

Scale = Annotated[
    float,
    typer.Option(
        help="What positions are multiplied by: 0.01 for clips in centimetres, as most .bvh files are, and a model of metres."
    ),
]

_MODEL = Path("runs/lamp-bandai")
_CLIP_SUFFIXES = (".npz", ".bvh")


def generate(
    text: Annotated[str, typer.Argument(help="What the motion should be, as a sentence.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Joints as .npz. Default: motion.npz, if nothing else is asked for."
        ),
    ] = None,
    gif: Annotated[Path | None, typer.Option(help="An animated picture.")] = None,
    bvh: Annotated[Path | None, typer.Option(help="For Blender and other animation programs.")] = None,
    svg: Annotated[Path | None, typer.Option(help="A strip of poses.")] = None,
    model: Model = _MODEL,
    seconds: Annotated[float | None, typer.Option(help="How long. Default: drawn by the model.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another motion; at least 0.")] = 0,
    guidance: Annotated[float, typer.Option(help="How much the sentence counts; 1: as trained.")] = 2.0,
    allow_unknown: AllowUnknown = False,
    as_json: AsJson = False,
) -> None:
    """Make a motion from a sentence: joints, a moving picture, a file for Blender."""
    if out is None and gif is None and bvh is None and svg is None:
        out = Path("motion.npz")
    for path, suffix in ((out, ".npz"), (gif, ".gif"), (bvh, ".bvh"), (svg, ".svg")):
        if path is not None and path.suffix != suffix:
            raise InputError(f"{path} must end in {suffix}")
    if seed < 0:
        raise InputError(f"seed must be >= 0, got {seed}")
    lamp = _loaded(model)
    with status("generating"):
        clips = lamp.generate(
            text, seconds=seconds, guidance=guidance, seed=seed, allow_unknown=allow_unknown
        )
        joints, skeleton = clips.clip(0), clips.skeleton
        if out is not None:
            from coloss.data import save_motion

            out.parent.mkdir(parents=True, exist_ok=True)
            save_motion(out, clips)
        if gif is not None:
            from coloss.motion.motion_picture import save_gif

            save_gif(gif, joints, skeleton, clips.fps, text)
        if bvh is not None:
            from coloss.motion.bvh import write_bvh

            write_bvh(bvh, joints, skeleton, clips.fps)
        if svg is not None:
            from coloss.motion.motion_picture import film_strip_svg
            from coloss.train.atomic_text import write_atomically

            write_atomically(svg, film_strip_svg(joints, skeleton, clips.fps, text))
    files = [str(path) for path in (out, gif, bvh, svg) if path is not None]
    found = {
        "text": text,
        "frames": len(joints),
        "fps": clips.fps,
        "seconds": len(joints) / clips.fps,
        "files": files,
    }
    if as_json:
        _print_json(found)
        return
    output().print(
        f"{len(joints)} frames, {len(joints) / clips.fps:.1f} s: {', '.join(files)}",
        soft_wrap=True,
        markup=False,
    )


def retrieve(
    query: Annotated[
        str, typer.Argument(help="A sentence; or a clip (.npz, .bvh), to find sentences for it.")
    ],
    clips: Annotated[
        str | None, typer.Argument(help="Folder, file or data set of clips to look for the sentence in.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="File of sentences, one a line, for a clip. Default: those of the training."),
    ] = None,
    count: Annotated[int, typer.Option(help="How many to show, at least 1.")] = 5,
    model: Model = _MODEL,
    scale: Scale = 1.0,
    allow_unknown: AllowUnknown = False,
    as_json: AsJson = False,
) -> None:
    """Find the clips that fit a sentence, or the sentences that fit a clip."""
    if count < 1:
        raise InputError(f"count must be >= 1, got {count}")
    by_clip = Path(query).suffix in _CLIP_SUFFIXES
    if by_clip and clips is not None:
        raise InputError(
            "clips must be left out where a clip is the query: sentences are looked for, with --texts FILE"
        )
    if not by_clip and clips is None:
        raise InputError("clips must be a folder, file or data set to look for the sentence in")
    sentences = _sentences(texts) if by_clip and texts is not None else None
    lamp = _loaded(model)
    with status("looking"):
        from coloss.motion.clip_files import read_clips

        source = query if clips is None else clips
        gallery = read_clips(source, lamp.skeleton_of_clips(), lamp.fps, scale=scale)
        if by_clip:
            ranked = dict(zip(gallery.names, lamp.retrieve_texts(gallery, sentences, count)))
        else:
            ranked = {query: lamp.retrieve_clips(query, gallery, count, allow_unknown=allow_unknown)}
    if as_json:
        _print_json(
            {
                name: [{"found": found, "score": score} for found, score in rows]
                for name, rows in ranked.items()
            }
        )
        return
    console = output()
    for name, rows in ranked.items():
        if len(ranked) > 1:
            console.print(f"{name}:", soft_wrap=True, markup=False)
        for found, score in rows:
            console.print(f"{score:+.3f}  {found}", soft_wrap=True, markup=False)


def caption(
    clips: Annotated[str, typer.Argument(help="A clip (.npz, .bvh), or a folder of clips.")],
    model: Model = _MODEL,
    scale: Scale = 1.0,
    as_json: AsJson = False,
) -> None:
    """Say in a sentence what a clip shows."""
    lamp = _loaded(model)
    with status("writing"):
        from coloss.motion.clip_files import read_clips

        gallery = read_clips(clips, lamp.skeleton_of_clips(), lamp.fps, scale=scale)
        sentences = lamp.caption(gallery)
    if as_json:
        _print_json(dict(zip(gallery.names, sentences)))
        return
    console = output()
    for name, sentence in zip(gallery.names, sentences):
        console.print(f"{name}: {sentence}" if len(sentences) > 1 else sentence, soft_wrap=True, markup=False)


def _loaded(model: Path) -> Any:
    if not (model / "model.safetensors").exists():  # said before torch is imported
        raise InputError(f"{model} holds no trained LaMP: train one with coloss run lamp --out {model}")
    with status("starting"):
        from coloss.motion.lamp_model import load_lamp

        return load_lamp(model)


def _sentences(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    found = [line for line in lines if line]
    if not found:
        raise InputError(f"{path} holds no sentences")
    return found


def _print_json(found: Any) -> None:
    typer.echo(json.dumps(plain_json(found), indent=1, allow_nan=False))
