"""`sample.py`: inpaint one image or a folder."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moebius_jax.cli.arguments import (
    add_model_arguments,
    add_process_arguments,
    load_pipeline,
    process_share,
    require_positive,
    require_seed,
)
from moebius_jax.cli.common import FAILED, CompileClock, enable_compilation_cache, progress, run
from moebius_jax.cli.pairing import Task, grid_path, plan_tasks
from moebius_jax.errors import UserError
from moebius_jax.files import remove_remains

if TYPE_CHECKING:
    import numpy as np

    from moebius_jax.inpaint import InpaintOptions, Item
    from moebius_jax.pipeline import MoebiusInpaintPipeline
    from moebius_jax.sampling.sampler import SamplingOptions

_DESCRIPTION = """\
Repaint the masked part of an image, or of every image in a folder, with Moebius.

White in the mask is repainted, black is kept. Images may have any size; the result has the same size, and
pixels the mask (with its soft edge) does not reach keep their exact values.
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
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = _parser().parse_args(argv)
    return run(lambda: _sample(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--image", type=Path, required=True, metavar="FILE|DIR", help="image, or folder of images")
    add(
        "--mask",
        type=Path,
        required=True,
        metavar="FILE|DIR",
        help="mask (white = repaint), or folder of masks",
    )
    add("--output", type=Path, required=True, metavar="FILE|DIR", help="result, or folder for results (PNG)")
    add_model_arguments(parser)
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--num-inference-steps", type=int, default=20, metavar="N", help="default 20")
    add(
        "--guidance-scale",
        type=float,
        metavar="S",
        help="default: the checkpoint's, 2.5 or 2.0; 1 is twice as fast",
    )
    add("--strength", type=float, default=0.99, help="share of the steps that is run (default 0.99)")
    add("--scheduler", choices=("ddim", "dpmpp_2m"), default="ddim", help="dpmpp_2m is meant for few steps")
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
        default=4.0,
        metavar="PX",
        help="width of the soft edge, in pixels of the 512 px square (default 4)",
    )
    add(
        "--padding-mask-crop",
        type=int,
        metavar="PX",
        help="context kept around the mask (default: half its size)",
    )
    add("--match-color", action="store_true", help="match the fill's colours to the image around it")
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
    require_positive(args, "num_samples", "batch_size")
    require_seed(args)
    # Before the model is loaded: what can be wrong should be said at once.
    tasks, problems = plan_tasks(
        args.image, args.mask, args.output, seed=args.seed, num_samples=args.num_samples, grid=args.grid
    )
    import jax

    process, count = process_share(args)
    tasks = tasks[process::count]
    todo = [t for t in tasks if args.overwrite or not t.output.exists()]
    if skipped := len(tasks) - len(todo):
        print(f"{skipped} of {len(tasks)} results exist already and are kept; --overwrite redoes them")
    if args.grid and skipped:
        problems += _missing_grids([t for t in tasks if t not in todo])
    for folder in {task.output.parent for task in todo}:
        remove_remains(folder)
    if todo:
        options, sampling = _options(args)
        if not args.no_compilation_cache:
            enable_compilation_cache()
        print(f"{jax.device_count()} x {jax.devices()[0].device_kind}", file=sys.stderr)
        problems += _Run(args, load_pipeline(args, args.variant), options, sampling).all(todo)
    if problems:
        print(f"{len(problems)} not done:", *problems, sep="\n  ", file=sys.stderr)
        return FAILED
    return 0


def _options(args: argparse.Namespace) -> tuple["InpaintOptions", "SamplingOptions"]:
    from moebius_jax.inpaint import InpaintOptions
    from moebius_jax.sampling.sampler import SamplingOptions

    options = InpaintOptions(
        mode=args.mode,
        invert_mask=args.invert_mask,
        mask_dilation=args.mask_dilation,
        mask_blur=args.mask_blur,
        padding_mask_crop=args.padding_mask_crop,
        match_color=args.match_color,
    )
    sampling = SamplingOptions(
        num_inference_steps=args.num_inference_steps,
        strength=args.strength,
        guidance_scale=1.0 if args.guidance_scale is None else args.guidance_scale,  # see _Run
        scheduler=args.scheduler,
        truncate=args.mode == "release",
    )
    return options, sampling


class _Run:
    """Reads, inpaints and writes a list of tasks; keeps count of what failed."""

    def __init__(
        self,
        args: argparse.Namespace,
        pipe: "MoebiusInpaintPipeline",
        options: "InpaintOptions",
        sampling: "SamplingOptions",
    ) -> None:
        import dataclasses

        guidance = pipe.guidance_scale if args.guidance_scale is None else args.guidance_scale
        self.sampler = pipe.sampler
        self.options = options
        self.sampling = dataclasses.replace(sampling, guidance_scale=guidance)
        self.batch_size = pipe.sampler.batch_size(args.batch_size)
        self.overwrite = args.overwrite
        self.grid = args.grid
        self.problems: list[str] = []

    def all(self, tasks: list[Task]) -> list[str]:
        """Does the tasks; returns a line for each that failed."""
        from moebius_jax.inpaint import inpaint_stream

        done = 0
        with (
            CompileClock() as compiling,
            progress(None, desc="inpainting", total=len(tasks), unit="image") as bar,
        ):
            start = time.perf_counter()
            items = self._items(tasks, bar)
            for result in inpaint_stream(
                self.sampler, items, self.options, self.sampling, batch_size=self.batch_size
            ):
                task, picture = result.item.tag
                try:
                    if result.error:
                        raise result.error
                    self._write(task, picture, result)
                    done += 1
                except UserError as error:
                    self.problems.append(str(error))
                bar.update()
            seconds = time.perf_counter() - start
        running = max(seconds - compiling.seconds, 1e-9)
        print(
            f"{done} result{'s' * (done != 1)} in {running:.1f} s ({done / running:.2f} images/s) "
            f"after {compiling.seconds:.1f} s of compiling"
        )
        return self.problems

    def _items(self, tasks: list[Task], bar) -> Iterator["Item"]:
        from moebius_jax.imaging.picture import read_mask, read_picture, require_alpha_format
        from moebius_jax.inpaint import Item

        for task in tasks:
            try:
                picture, mask = read_picture(task.image), read_mask(task.mask)
                if picture.alpha is not None:
                    require_alpha_format(task.output)  # now, not after the work is done
            except UserError as error:
                self.problems.append(str(error))
                bar.update()
                continue
            yield Item(
                rgb=picture.rgb,
                mask=mask,
                seed=task.seed,
                index=task.index,
                name=str(task.image),
                mask_name=str(task.mask),
                tag=(task, picture),
            )

    def _write(self, task: Task, picture, result) -> None:
        from moebius_jax.imaging.picture import write_image

        write_image(task.output, picture.with_rgb(result.rgb), overwrite=self.overwrite)
        if self.grid:
            _write_grid(task, picture.rgb, result.item.mask, result.rgb)


def _write_grid(task: Task, *panels: "np.ndarray") -> None:
    from moebius_jax.imaging.grid import side_by_side
    from moebius_jax.imaging.picture import write_image

    write_image(grid_path(task.output), side_by_side(*panels), overwrite=True)


def _missing_grids(tasks: list[Task]) -> list[str]:
    """Makes the grids of results that exist already; returns a line for each that failed."""
    from moebius_jax.imaging.picture import read_mask, read_picture

    problems = []
    for task in tasks:
        try:
            if task.output.exists() and not grid_path(task.output).exists():
                result = read_picture(task.output)
                _write_grid(task, read_picture(task.image).rgb, read_mask(task.mask), result.rgb)
        except UserError as error:
            problems.append(str(error))
    return problems
