"""`sample.py`: inpaint one image or a folder."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from moebius_jax.cli.arguments import (
    add_model_arguments,
    add_process_arguments,
    any_location,
    load_pipeline,
    part,
    process_share,
    require_positive,
    require_seed,
)
from moebius_jax.cli.durations import last_time, remember
from moebius_jax.cli.terminal import FAILED, enable_compilation_cache, progress, run
from moebius_jax.defaults import DEFAULT_MODEL, TINY
from moebius_jax.inpaint.pairing import finished, plan_tasks

if TYPE_CHECKING:
    from moebius_jax.inpaint.stream import InpaintOptions

_DESCRIPTION = """\
Repaint the masked part of an image, or of every image in a folder, with Moebius.

White in the mask is repainted, black is kept. Images may have any size; the result has the same size, and
pixels outside the mask keep their exact values (beyond the soft edge, where there is one).
"""

_EXAMPLES = """\
examples:
  python sample.py --image photo.jpg --mask mask.png --output result.png
  python sample.py --image photos/ --mask masks/ --output results/ --batch-size 8
  python sample.py --image face.png --mask m.png --output out.png --variant ft_ffhq --num-samples 4
  python sample.py --image photo.jpg --mask m.png --output out.png --model converted/ft_places2 --grid

Objects leave ghosts when the mask ends at their edge: try --mask-dilation 9.
Masks are paired with images by name (photo.png, photo_mask.png); one mask file serves all images.
Existing results are skipped, so a stopped run continues where it was.
All three may be in a bucket: gs://bucket/photos (docs/data.md, "Buckets").
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = _parser().parse_args(argv)
    return part(args, run(lambda: _sample(args)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--image", type=any_location, required=True, metavar="FILE|DIR", help="image, or folder of images")
    add(
        "--mask",
        type=any_location,
        required=True,
        metavar="FILE|DIR",
        help="mask (white = repaint), or folder of masks",
    )
    add("--output", type=any_location, required=True, metavar="FILE|DIR", help="result, or folder for PNGs")
    add_model_arguments(parser, default=f"{DEFAULT_MODEL}, or {TINY} where the Hub cannot be reached")
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--num-inference-steps", type=int, metavar="N", help="default: the model's, 20; tiny's is 1")
    add(
        "--guidance-scale",
        type=float,
        metavar="S",
        help="default: the model's, 2.5 or 2.0; 1 is twice as fast",
    )
    add(
        "--strength",
        type=float,
        help="share of the steps that is run (default: the model's, 0.99; tiny's is 1)",
    )
    add(
        "--scheduler",
        help="default: the model's, ddim; dpmpp_2m is meant for few steps, ddim_trailing for very few of a "
        "network that predicts the velocity (tiny's, with --strength 1)",
    )
    add(
        "--refine",
        type=float,
        metavar="STRENGTH",
        help="large holes: paint again what was painted small and enlarged, in tiles at the picture's own "
        "size; sharper, and slower (a larger --batch-size helps). Default: the model's, 0 for not at all; "
        "tiny's is 0.5",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="default 0; a result depends on it and on the image's name",
    )
    add(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="results per image, with seeds SEED, SEED+1, …",
    )
    add("--batch-size", type=int, default=1, metavar="N", help="squares per batch (default 1)")
    group = parser.add_argument_group("mask and border")
    add = group.add_argument
    add("--invert-mask", action="store_true", help="black is repainted instead")
    add("--mask-dilation", type=int, default=0, metavar="PX", help="grow the mask by a square of this side")
    add(
        "--mask-blur",
        type=float,
        metavar="PX",
        help="width of a soft edge around the hole, in pixels of the 512 px square, or of a refined picture "
        "(default 0: matched colours leave no edge to hide; 4 where they are not matched)",
    )
    add(
        "--padding-mask-crop",
        type=int,
        metavar="PX",
        help="context kept around the mask (default: half its size)",
    )
    add(
        "--match-color",
        action=argparse.BooleanOptionalAction,
        help="make the fill's colours agree with the image's all along the edge (default: yes; with --mode "
        "release no, and if so on average, as the release can)",
    )
    add(
        "--mode",
        choices=("crop", "release"),
        default="crop",
        help="release: squash to the model's square, as the release does",
    )
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--grid", action="store_true", help="also write NAME_grid.png: original | mask | result")
    add("--overwrite", action="store_true", help="redo existing results instead of skipping them")
    add("--no-compilation-cache", action="store_true", help="do not keep compiled programs between runs")
    add_process_arguments(parser)
    return parser


def _sample(args: argparse.Namespace) -> int:
    require_positive(args, "batch_size")
    require_positive(args, "num_samples", most=10_000)
    require_seed(args)
    # Before the model is loaded: what can be wrong should be said at once.
    tasks, problems = plan_tasks(
        args.image, args.mask, args.output, seed=args.seed, num_samples=args.num_samples, grid=args.grid
    )
    if not args.distributed:  # shares of all there is: the others may look earlier or later
        process, count = process_share(args)
        tasks = tasks[process::count]
    kept = [] if args.overwrite else finished(tasks)
    is_kept = {t.output for t in kept}
    todo = [t for t in tasks if t.output not in is_kept]
    if args.distributed:  # of what is left: after this all have looked, and before it none has painted
        process, count = process_share(args)
        kept, todo = kept[process::count], todo[process::count]
    if kept:
        total = len(kept) + len(todo)
        print(f"{len(kept)} of {total} results exist already and are kept; --overwrite redoes them")
    from moebius_jax.inpaint.files import add_missing_grids, inpaint_files

    if args.grid and kept:
        problems += add_missing_grids(kept)
    if todo:
        options, asked = _options(args), _asked(args)
        _require_possible(asked)
        if not args.no_compilation_cache:
            enable_compilation_cache()
        import jax

        print(f"{jax.device_count()} x {jax.devices()[0].device_kind}", file=sys.stderr)
        print("loading the model …", file=sys.stderr)
        pipe = load_pipeline(args, args.variant, or_tiny=True)
        sampling = pipe.defaults.changed(**asked)
        compiling = f"{pipe.unet.config.channels} {pipe.sampler.image_size} px, batches of {args.batch_size}"
        print(f"compiling{last_time(compiling)}, then painting …", file=sys.stderr)
        with progress(None, desc="inpainting", total=len(todo), unit="image") as bar:
            done = inpaint_files(
                pipe,
                todo,
                options,
                sampling,
                batch_size=args.batch_size,
                overwrite=args.overwrite,
                grid=args.grid,
                advance=bar.update,
            )
        print(
            f"{done.done} result{'s' * (done.done != 1)} in {done.seconds:.1f} s "
            f"({done.done / done.seconds:.2f} images/s) after {done.compiling_seconds:.1f} s of compiling"
        )
        if done.compiling_seconds > 1 and not args.no_compilation_cache:
            remember(compiling, done.compiling_seconds)
        problems += done.problems
    if problems:
        print(f"{len(problems)} not done:", *problems, sep="\n  ", file=sys.stderr)
        return FAILED
    return 0


def _options(args: argparse.Namespace) -> "InpaintOptions":
    from moebius_jax.inpaint.stream import InpaintOptions

    return InpaintOptions(
        mode=args.mode,
        invert_mask=args.invert_mask,
        mask_dilation=args.mask_dilation,
        mask_blur=args.mask_blur,
        padding_mask_crop=args.padding_mask_crop,
        match_color=args.match_color,
    )


def _require_possible(asked: dict[str, Any]) -> None:
    """Raises UserError for what no model can do, before one is loaded."""
    from moebius_jax.diffusion.solvers import find_solver
    from moebius_jax.inpaint.sampler import SamplingOptions

    most = find_solver(asked["scheduler"] or SamplingOptions().scheduler).most_steps
    SamplingOptions(num_inference_steps=most, strength=1.0).changed(**asked)


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """What of `SamplingOptions` is asked for; None where it is left to the model."""
    names = ("num_inference_steps", "strength", "guidance_scale", "scheduler", "refine")
    return {name: getattr(args, name) for name in names} | {"truncate": args.mode == "release"}
