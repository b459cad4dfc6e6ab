"""Files through a pipeline: read, inpainted in one stream, written whole or not at all."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moebius_jax.buckets import is_bucket, reaching
from moebius_jax.errors import UserError
from moebius_jax.files import remove_remains
from moebius_jax.imaging.grid import grid_path, write_grid
from moebius_jax.imaging.picture import (
    Picture,
    is_result,
    read_mask,
    read_picture,
    require_alpha_format,
    require_fitting_format,
    require_replaceable,
    write_image,
)
from moebius_jax.inpaint.pairing import Task
from moebius_jax.inpaint.pipeline import MoebiusInpaintPipeline
from moebius_jax.inpaint.sampler import SamplingOptions
from moebius_jax.inpaint.stream import InpaintOptions, Item, Result, inpaint_stream
from moebius_jax.timing import CompileClock


@dataclasses.dataclass(kw_only=True)
class FileRun:
    """What became of a list of tasks.

    Attributes:
        done: results written.
        seconds: it took, without compiling.
        compiling_seconds: of compiling beside.
        problems: a line for every task that failed.
    """

    done: int = 0
    seconds: float = 0.0
    compiling_seconds: float = 0.0
    problems: list[str] = dataclasses.field(default_factory=list)


def inpaint_files(
    pipe: MoebiusInpaintPipeline,
    tasks: Sequence[Task],
    options: InpaintOptions,
    sampling: SamplingOptions,
    *,
    batch_size: int,
    overwrite: bool,
    grid: bool,
    advance: Callable[[], Any] = lambda: None,
) -> FileRun:
    """Does the tasks; one that fails does not keep the others from being done.

    Args:
        pipe: that paints.
        tasks: see `pairing.plan_tasks`.
        options, sampling: how.
        batch_size: squares per batch.
        overwrite: replace results that exist.
        grid: also write original, mask and result side by side.
        advance: called after each task.
    """
    run = FileRun()
    for folder in {task.output.parent for task in tasks if not is_bucket(task.output)}:
        remove_remains(folder)

    def require_room(task: Task, picture: Picture) -> None:
        """Raises UserError if the result could not be written: now, not after the work is done."""
        if overwrite:
            require_replaceable(task.output)
        if grid:
            require_replaceable(grid_path(task.output))
        own_size = picture.rgb.shape[1::-1]
        size = own_size if options.mode == "crop" else (pipe.sampler.image_size,) * 2
        require_fitting_format(task.output, size)
        if picture.alpha is not None and size == own_size:  # else it has none, see `Picture.with_rgb`
            require_alpha_format(task.output)

    def items() -> Iterator[Item]:
        for task in tasks:
            try:
                picture, mask = read_picture(task.image), read_mask(task.mask)
                require_room(task, picture)
            except UserError as error:
                run.problems.append(str(error))
                advance()
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

    def write(result: Result) -> None:
        if result.error:
            raise result.error
        task, picture = result.item.tag
        # Half a PNG of ours, or an empty file, counts as none; buckets have no such.
        is_half = not is_bucket(task.output) and task.output.is_file() and not is_result(task.output)
        replace = overwrite or is_half
        write_image(task.output, picture.with_rgb(result.rgb), overwrite=replace)
        if grid:
            write_grid(task.output, picture.rgb, result.item.mask, result.rgb, overwrite=True)

    start = time.perf_counter()
    with CompileClock() as compiling:
        batch = pipe.sampler.batch_size(batch_size)
        for result in inpaint_stream(pipe.sampler, items(), options, sampling, batch_size=batch):
            try:
                write(result)
                run.done += 1
            except UserError as error:
                run.problems.append(str(error))
            advance()
    run.compiling_seconds = compiling.seconds
    run.seconds = max(time.perf_counter() - start - compiling.seconds, 1e-9)
    return run


def add_missing_grids(tasks: Sequence[Task]) -> list[str]:
    """Makes the grids of results that exist already; returns a line for each that failed."""
    problems = []
    for task in tasks:
        try:
            with reaching(task.output):
                is_missing = task.output.exists() and not grid_path(task.output).exists()
            if is_missing:
                panels = (read_picture(task.image).rgb, read_mask(task.mask), read_picture(task.output).rgb)
                write_grid(task.output, *panels, overwrite=False)
        except UserError as error:
            problems.append(str(error))
    return problems
