"""Which mask goes with which image, and where the result goes."""

import dataclasses
import os
import zlib
from pathlib import Path

from moebius_jax.errors import UserError
from moebius_jax.files import resolved
from moebius_jax.imaging.picture import MASK_ENDINGS, SUFFIXES, is_ours


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One result to make.

    Attributes:
        image, mask: files to read.
        output: file to write.
        seed, index: of the random numbers; the index is a hash of the image's stem, so a picture comes out
            the same alone, in a folder, and in a folder that has grown.
    """

    image: Path
    mask: Path
    output: Path
    seed: int
    index: int


def plan_tasks(
    image: Path, mask: Path, output: Path, *, seed: int, num_samples: int, grid: bool = False
) -> tuple[list[Task], list[str]]:
    """Pairs images with masks by stem.

    Args:
        image, mask: a file or a folder each; a mask file serves all images.
        output: a file if `image` is one and the name has an image's suffix, else a folder.
        seed: sample j of an image has seed + j.
        num_samples: results per image; more than one adds _0, _1, … to the names.
        grid: whether a grid is written beside every result, whose name must then be free as well.

    Returns:
        Tasks in the order of their images' names, and a line for every image or mask without a partner.

    Raises:
        UserError: a path does not exist, or there is nothing to do.
    """
    images = _files(image, "image")
    masks = _files(mask, "mask")
    listed = [*images, *masks]
    problems = []
    if image.is_file() and mask.is_dir():
        masks = [f for f in masks if not (f.exists() and f.samefile(image))]
    if image.is_dir() and mask.is_dir() and image.samefile(mask):
        # photo.png beside photo_mask.png: what has a partner without the ending is a mask.
        stems = {f.stem for f in images}
        masks = [f for f in masks if any(f.stem.removesuffix(e) in stems - {f.stem} for e in MASK_ENDINGS)]
        images = [f for f in images if f not in masks]
    to_folder = _is_folder(output, image)
    if to_folder:
        images, double = _without_duplicates(images, "image")
        problems += double
    if mask.is_dir():
        masks, double = _without_duplicates(masks, "mask")
        problems += double if image.is_dir() else []
    by_stem = {f.stem: f for f in masks}
    used = set()
    tasks = []
    for file in images:
        found = mask if mask.is_file() else _match(file.stem, by_stem)
        if found is None:
            problems.append(f"{file}: no mask {file.stem}.* in {mask}")
            continue
        used.add(found)
        for j in range(num_samples):
            number = f"_{j}" if num_samples > 1 else ""
            target = (
                output / f"{file.stem}{number}.png" if to_folder else output.with_stem(output.stem + number)
            )
            tasks.append(
                Task(
                    image=file,
                    mask=found,
                    output=target,
                    seed=(seed + j) % 2**32,
                    index=zlib.crc32(os.fsencode(file.stem)),
                )
            )
    if image.is_dir() and mask.is_dir():
        problems += [f"{f}: no image goes with this mask" for f in masks if f not in used]
    _refuse_collisions(tasks, listed, grid)
    return tasks, problems


def grid_path(output: Path) -> Path:
    """Where the side-by-side picture of a result goes."""
    return output.with_name(f"{output.stem}_grid.png")


def _is_folder(output: Path, image: Path) -> bool:
    """Whether results go into `output` as a folder."""
    if output.is_dir():
        return True
    suffix = output.suffix.lower()
    if image.is_dir():
        if suffix in SUFFIXES:
            raise UserError(f"{output}: {image} is a folder, so the output must be one too")
        return True
    if suffix and suffix not in SUFFIXES:
        raise UserError(f"{output}: expected a folder or one of {', '.join(SUFFIXES)}, found {suffix}")
    return not suffix


def _refuse_collisions(tasks: list[Task], listed: list[Path], grid: bool) -> None:
    inputs = {_resolved(f) for task in tasks for f in (task.image, task.mask)}
    # Also what has no partner, or another's name; but results of an earlier run are no inputs.
    outputs = {resolved(task.output) for task in tasks}
    written = outputs | {resolved(grid_path(task.output)) for task in tasks if grid}
    inputs |= {path for f in listed if (path := _resolved(f)) in written and not is_ours(f)}
    for task in tasks:
        if resolved(task.output) in inputs:
            raise UserError(
                f"{task.output}: the result would have the name of an input; choose another --output"
            )
        if grid and resolved(grid_path(task.output)) in inputs | outputs:
            raise UserError(
                f"{grid_path(task.output)}: is also the name of the grid of {task.output.name}; rename it"
            )


def _resolved(path: Path) -> Path:
    """Of an input, which is told of as unreadable later if it is a loop of links."""
    try:
        return resolved(path)
    except UserError:
        return path


def _files(path: Path, what: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        found = "no ordinary file or folder" if os.path.lexists(path) else f"no such {what} file or folder"
        raise UserError(f"{path}: {found}")
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    if not files:
        raise UserError(f"{path}: no {what}s here (looked for {', '.join(SUFFIXES)})")
    return files


def _match(stem: str, by_stem: dict[str, Path]) -> Path | None:
    return next((by_stem[stem + ending] for ending in ("", *MASK_ENDINGS) if stem + ending in by_stem), None)


def _without_duplicates(files: list[Path], what: str) -> tuple[list[Path], list[str]]:
    """The first file of every stem, and a line for each other: their results would have one name."""
    first: dict[str, Path] = {}
    problems = []
    for file in files:
        if file.stem in first:
            problems.append(f"{file}: same name as {first[file.stem].name}; rename one {what}")
        first.setdefault(file.stem, file)
    return list(first.values()), problems
