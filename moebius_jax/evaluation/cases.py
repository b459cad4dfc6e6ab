"""Which files an evaluation is made of: images with their masks, or results with their originals."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from moebius_jax.errors import UserError
from moebius_jax.imaging.masks import to_hole
from moebius_jax.imaging.picture import MASK_ENDINGS, SUFFIXES, read_mask, read_picture

Rgb = UInt8[np.ndarray, "H W 3"]
Hole = Bool[np.ndarray, "H W"]
PairBy = Literal["name", "order"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One picture of an evaluation.

    Attributes:
        name: path below the images' folder, without suffix.
        truth: the original's file.
        mask: file, white = hole; None where nothing is said of holes.
        mask_name: its path below its set's folder, without suffix: part of the set's hash.
        result: the file with what was painted.
    """

    name: str
    truth: Path
    mask: Path | None
    mask_name: str = ""
    result: Path


def list_pictures(folder: Path, what: str = "images") -> dict[str, Path]:
    """Image files in a folder and its subfolders, links to folders too, by path without suffix, sorted.

    Raises:
        UserError: no such folder, nothing in it, or two files of one name.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: {'is a file, expected' if folder.exists() else 'no such'} folder of {what}"
        )
    found: dict[str, Path] = {}
    for file in sorted(_files(folder, set())):
        if file.suffix.lower() not in SUFFIXES:
            continue
        relative = file.relative_to(folder)
        name = relative.with_suffix("").as_posix()
        if not file.is_file():
            raise UserError(f"{file}: a link to a file that is not there")
        if not name.isprintable():  # the reports could not hold it
            raise UserError(f"{folder}: the file name {name!r} is not plain text; rename it")
        if name in found:
            raise UserError(f"{file}: same name as {found[name].name}; rename or remove one")
        found[name] = file
    if not found:
        raise UserError(f"{folder}: no {what} here (looked for {', '.join(SUFFIXES)})")
    return found


def _files(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Every file below a folder that is not hidden; through links, but no folder twice."""
    try:
        if (real := folder.resolve(strict=True)) in seen:
            return
        seen.add(real)
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error})") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files(entry, seen)
        else:
            yield entry


def pair_masks(
    names: Iterable[str], masks: dict[str, Path], folder: Path, by: PairBy = "name"
) -> dict[str, str]:
    """The name of each image's mask.

    Args:
        names: of the images, sorted.
        masks: from `list_pictures`.
        folder: of the masks, for messages.
        by: "name", with or without `_mask` at its end, or "order": the first image has the first mask.

    Raises:
        UserError: an image has no mask.
    """
    names = list(names)
    if by == "order":
        if len(masks) < len(names):
            raise UserError(
                f"{folder}: {len(masks)} masks for {len(names)} images; expected at least as many"
            )
        return dict(zip(names, masks, strict=False))
    endings = ("", *MASK_ENDINGS)
    found = {name: next((name + end for end in endings if name + end in masks), None) for name in names}
    missing = [name for name in names if found[name] is None]
    if missing:
        more = f" (and {len(missing) - 1} more images have none)" if len(missing) > 1 else ""
        raise UserError(
            f"{folder}: no mask {missing[0]}.*{more}; masks are paired by name, --pair-by order pairs the "
            "first image with the first mask"
        )
    return found


def preparation(size: int | None) -> str:
    """How originals are brought to size x size, for reports; None leaves them as they are."""
    if size is None:
        return "as they are"
    return f"short side resized to {size} pixels (Lanczos, PIL), centre crop; files of that size as they are"


def read_truth(case: Case, size: int | None) -> Rgb:
    """An original, brought to size x size as `preparation` says; None leaves it as it is.

    Raises:
        UserError: unreadable.
    """
    rgb = read_picture(case.truth).rgb
    return rgb if size is None else prepare(rgb, size)


def prepare(rgb: Rgb, size: int) -> Rgb:
    """The middle square of a picture at size x size."""
    height, width = rgb.shape[:2]
    if (height, width) == (size, size):
        return rgb
    scale = size / min(height, width)
    box = (max(size, round(width * scale)), max(size, round(height * scale)))
    image = Image.fromarray(rgb).resize(box, Image.Resampling.LANCZOS)
    left, top = (box[0] - size) // 2, (box[1] - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def read_hole(file: Path, truth: Rgb | None = None, *, invert: bool = False) -> Hole:
    """A mask as a hole, of the picture's size where one is given.

    Raises:
        UserError: unreadable, or of another size.
    """
    hole = to_hole(read_mask(file), invert=invert)
    if truth is not None and hole.shape != truth.shape[:2]:
        raise UserError(_sizes(file, "mask", hole, truth))
    return hole


def read_result(case: Case, truth: Rgb) -> Rgb:
    """A painted picture.

    Raises:
        UserError: unreadable, or not of the original's size.
    """
    result = read_picture(case.result).rgb
    if result.shape != truth.shape:
        raise UserError(_sizes(case.result, "result", result, truth))
    return result


def pixel_digest(rgb: Rgb) -> bytes:
    """Digest of one picture's size and pixels."""
    return hashlib.sha256(repr(rgb.shape).encode() + np.ascontiguousarray(rgb).tobytes()).digest()


def _sizes(file: Path, what: str, found: np.ndarray, truth: Rgb) -> str:
    (h, w), (H, W) = found.shape[:2], truth.shape[:2]
    return f"{file}: the {what} is {w} x {h} pixels and its image {W} x {H}; they must agree"
