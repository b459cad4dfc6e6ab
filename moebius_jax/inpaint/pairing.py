"""Which mask goes with which image, and where the result goes."""

import dataclasses
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from moebius_jax.buckets import forget_listings, is_bucket, reaching
from moebius_jax.errors import UserError
from moebius_jax.files import resolved
from moebius_jax.imaging.grid import grid_path
from moebius_jax.imaging.picture import MASK_ENDINGS, SUFFIXES, is_ours, is_result


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
        image, mask: a file or a folder each, here or in a bucket; a mask file serves all images.
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
    one_image, one_mask = images == [image], masks == [mask]  # not asked again: buckets take their time
    problems = []
    if one_image and not one_mask:
        masks = [f for f in masks if not _is_same(f, image)]
    if not one_image and not one_mask and _is_same(image, mask):
        # photo.png beside photo_mask.png: what has a partner without the ending is a mask.
        stems = {f.stem for f in images}
        masks = [f for f in masks if any(f.stem.removesuffix(e) in stems - {f.stem} for e in MASK_ENDINGS)]
        images = [f for f in images if f not in masks]
    with reaching(output):
        to_folder = _is_folder(output, None if one_image else image)
    if to_folder:
        images, double = _without_duplicates(images, "image")
        problems += double
    if not one_mask:
        masks, double = _without_duplicates(masks, "mask")
        problems += [] if one_image else double
    by_stem = {f.stem: f for f in masks}
    used = set()
    tasks = []
    for file in images:
        found = mask if one_mask else _match(file.stem, by_stem)
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
    if not one_image and not one_mask:
        problems += [f"{f}: no image goes with this mask" for f in masks if f not in used]
    _refuse_collisions(tasks, listed, grid)
    return tasks, problems


def finished(tasks: Sequence[Task]) -> list[Task]:
    """Those whose results exist, and are whole: in a bucket whatever exists is."""
    there: set[Path] = set()
    for folder in {task.output.parent for task in tasks if is_bucket(task.output)}:
        with reaching(folder):
            forget_listings()
            there |= set(folder.iterdir()) if folder.is_dir() else set()  # not one request a result
    return [t for t in tasks if (t.output in there if is_bucket(t.output) else is_result(t.output))]


def _is_folder(output: Path, images: Path | None) -> bool:
    """Whether results go into `output` as a folder; `images` is a folder of images, if there is one."""
    if output.is_dir():
        return True
    suffix = output.suffix.lower()
    if images:
        if suffix in SUFFIXES:
            raise UserError(f"{output}: {images} is a folder, so the output must be one too")
        return True
    if suffix and suffix not in SUFFIXES:
        raise UserError(f"{output}: expected a folder or one of {', '.join(SUFFIXES)}, found {suffix}")
    return not suffix


def _is_same(a: Path, b: Path) -> bool:
    return str(a) == str(b) if is_bucket(a) or is_bucket(b) else a.exists() and a.samefile(b)


def _refuse_collisions(tasks: list[Task], listed: list[Path], grid: bool) -> None:
    inputs = {_resolved(f) for task in tasks for f in (task.image, task.mask)}
    # Also what has no partner, or another's name; but results of an earlier run are no inputs.
    outputs = {_place(task.output) for task in tasks}
    written = outputs | {_place(grid_path(task.output)) for task in tasks if grid}
    inputs |= {path for f in listed if (path := _resolved(f)) in written and not is_ours(f)}
    for task in tasks:
        if _place(task.output) in inputs:
            raise UserError(
                f"{task.output}: the result would have the name of an input; choose another --output"
            )
        if grid and _place(grid_path(task.output)) in inputs | outputs:
            raise UserError(
                f"{grid_path(task.output)}: is also the name of the grid of {task.output.name}; rename it"
            )


def _place(path: Path) -> Path:
    return path if is_bucket(path) else resolved(path)


def _resolved(path: Path) -> Path:
    """Of an input, which is told of as unreadable later if it is a loop of links."""
    try:
        return _place(path)
    except UserError:
        return path


def _files(path: Path, what: str) -> list[Path]:
    with reaching(path):
        if path.is_file():
            return [path]
        if not path.is_dir():
            is_other = os.path.lexists(path) and not is_bucket(path)
            found = "no ordinary file or folder" if is_other else f"no such {what} file or folder"
            raise UserError(f"{path}: {found}")
        listed = list(path.iterdir())
    files = sorted(f for f in listed if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
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
