"""Which mask goes with which image, and where the result goes."""

import dataclasses
import zlib
from pathlib import Path

from moebius_jax.errors import UserError
from moebius_jax.imaging.picture import SUFFIXES

DISTINCT = ("", "_mask", "-mask")  # a mask's stem is its image's, or that and one of these


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
    image: Path, mask: Path, output: Path, *, seed: int, num_samples: int
) -> tuple[list[Task], list[str]]:
    """Pairs images with masks by stem.

    Args:
        image, mask: a file or a folder each; a mask file serves all images.
        output: a file if `image` is one and the name has an image's suffix, else a folder.
        seed: sample j of an image has seed + j.
        num_samples: results per image; more than one adds _0, _1, … to the names.

    Returns:
        Tasks in the order of their images' names, and a line for every image or mask without a partner.

    Raises:
        UserError: a path does not exist, or there is nothing to do.
    """
    images = _files(image, "image")
    masks = _files(mask, "mask")
    to_folder = image.is_dir() or output.is_dir() or output.suffix.lower() not in SUFFIXES
    if image.is_dir() and output.suffix.lower() in SUFFIXES and not output.is_dir():
        raise UserError(f"{output}: {image} is a folder, so the output must be one too")
    problems = _duplicates(images, "image") if to_folder else []
    by_stem = {f.stem: f for f in reversed(masks)}
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
                    index=zlib.crc32(file.stem.encode()),
                )
            )
    problems += [f"{f}: no image goes with this mask" for f in masks if f not in used and mask.is_dir()]
    return tasks, problems


def _files(path: Path, what: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such {what} file or folder")
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    if not files:
        raise UserError(f"{path}: no {what}s here (looked for {', '.join(SUFFIXES)})")
    return files


def _match(stem: str, by_stem: dict[str, Path]) -> Path | None:
    return next((by_stem[stem + suffix] for suffix in DISTINCT if stem + suffix in by_stem), None)


def _duplicates(files: list[Path], what: str) -> list[str]:
    """Two images of one stem would be written to one result; the later ones are left out."""
    seen: dict[str, Path] = {}
    problems = []
    for file in list(files):
        if file.stem in seen:
            problems.append(f"{file}: same name as {seen[file.stem].name}; rename one {what}")
            files.remove(file)
        seen.setdefault(file.stem, file)
    return problems
