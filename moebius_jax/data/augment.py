"""One training sample: an image, its hole and its task, drawn with a NumPy generator of its own."""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from pydantic import Field

from moebius_jax.data.random_masks import PRESETS, Mixed, mask_generator
from moebius_jax.data.records import TASKS, Record
from moebius_jax.data.samples import PixelSample
from moebius_jax.errors import UserError
from moebius_jax.imaging.masks import THRESHOLD, Hole, dilate
from moebius_jax.imaging.picture import read_mask, read_picture
from moebius_jax.schema import Location, Probability, checked, one_of

OWN_MASKS = "own"
_STRETCH = 1.05  # of a mask that is resized to its image, one axis against the other
_DILATIONS = (3, 5, 7)
_MEGAPIXELS, _NARROWEST = 120, 32  # what a picture may have, as a whole and as one side to the other


@checked
class AugmentConfig:
    """How a file becomes a sample (docs/data.md); probabilities are the release's.

    Attributes:
        image_size: side of the square samples, pixels.
        masks: random-mask presets, drawn from with equal probability.
        random_mask: probability of a random mask for a background sample that has a mask file.
        holes_on: what holes are drawn on, intersected and grown: the "square" that is a sample, or the whole
            "image" before a square is cut from it, as the release does.
        foreground_masks: masks of objects: a folder, a JSON-lines file (its foreground samples'), or "own"
            (the data's own foreground samples'; a folder of that name is ./own). Background masks are
            intersected with one of them with probability `intersection`.
        intersection: see there.
        dilation: probability of growing the mask by a square of 3, 5 or 7, once or twice.
        flip: probability of a horizontal flip.

    Raises:
        ValueError: a field is out of range.
    """

    image_size: Annotated[int, Field(ge=8, le=8192)] = 512
    masks: Annotated[tuple[Annotated[str, one_of(PRESETS)], ...], Field(min_length=1)] = (
        "thin_512",
        "medium_512",
        "thick_512",
    )
    random_mask: Probability = 0.5
    holes_on: Literal["square", "image"] = "square"
    foreground_masks: Location | None = None
    intersection: Probability = 0.5
    dilation: Probability = 0.99
    flip: Probability = 0.5

    def __post_init__(self) -> None:
        square = [name for name in self.masks if not isinstance(PRESETS[name], Mixed)]
        if self.holes_on == "image" and square:
            raise ValueError(f"holes_on is image and masks has {square[0]}, which is made for squares")


def draw_sample(
    record: Record, config: AugmentConfig, objects: Sequence[Path], rng: np.random.Generator
) -> PixelSample:
    """Loads and augments a sample.

    The image's short side is resized to the sample's, and its mask to the same size; a square is cut from the
    long side: anywhere for a random mask that is drawn on the square, else so that it shows at least half of
    the hole's extent.

    Args:
        record: files and task.
        config: see there.
        objects: mask files to intersect with.
        rng: all randomness.

    Raises:
        UserError: a file is missing or unreadable, or image and mask are of other proportions.

    Warns:
        UserWarning: image and mask differ in size (once); an object's mask cannot be read.
    """
    size = config.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's about single files would come once per epoch and worker
        image = read_picture(record.image, max_megapixels=_MEGAPIXELS).rgb
        use_file = record.mask is not None and (
            record.task == "foreground" or rng.random() >= config.random_mask
        )
        grey = read_mask(record.mask, max_megapixels=_MEGAPIXELS) if use_file else None
    if grey is not None and grey.shape != image.shape[:2]:
        _require_same_proportions(record, grey.shape, image.shape)
        _say_once_that_masks_are_resized()
    if max(image.shape[:2]) > _NARROWEST * min(image.shape[:2]):
        raise UserError(
            f"{record.image}: {image.shape[1]} x {image.shape[0]} pixels; expected no side more than "
            f"{_NARROWEST} times the other"
        )
    image = _short_side(image, size)
    whole = None if grey is None else _resized(grey, image.shape[:2]) > THRESHOLD
    if config.holes_on == "image":
        if whole is None:
            whole = PRESETS[config.masks[rng.integers(len(config.masks))]].draw_on(rng, *image.shape[:2])
        whole = _altered(whole, record.task, config, objects, rng)
        corner = _corner(whole, size, rng)
        hole = _cut(whole, corner, size)
    else:
        if whole is None:
            corner = [int(rng.integers(n - size + 1)) for n in image.shape[:2]]
            hole = mask_generator(config.masks[rng.integers(len(config.masks))])(rng, size)
        else:
            corner = _corner(whole, size, rng)
            hole = _cut(whole, corner, size)
        hole = _altered(hole, record.task, config, objects, rng)
    image = _cut(image, corner, size)
    if rng.random() < config.flip:
        image, hole = image[:, ::-1], hole[:, ::-1]
    return PixelSample(
        image=np.ascontiguousarray(image),
        hole=np.ascontiguousarray(hole),
        task=np.int32(TASKS.index(record.task)),
    )


def _altered(
    hole: Hole, task: str, config: AugmentConfig, objects: Sequence[Path], rng: np.random.Generator
) -> Hole:
    """Intersected with an object's mask, and grown, as it comes."""
    if task == "background" and len(objects) and rng.random() < config.intersection:
        hole = _intersect(hole, objects[int(rng.integers(len(objects)))])
    if rng.random() < config.dilation:
        square, times = rng.choice(_DILATIONS), rng.integers(1, 3)
        # Twice by a square of s is once by one of 2s - 1.
        hole = dilate(hole, int(times * (square - 1) + 1))
    return hole


def _short_side(image: np.ndarray, size: int) -> np.ndarray:
    H, W = image.shape[:2]
    scale = size / min(H, W)
    target = (max(size, round(W * scale)), max(size, round(H * scale)))
    return np.asarray(Image.fromarray(image).resize(target, Image.Resampling.LANCZOS))


def _resized(grey: UInt8[np.ndarray, "h w"], shape: tuple[int, int]) -> UInt8[np.ndarray, "H W"]:
    return np.asarray(Image.fromarray(grey).resize(shape[::-1], Image.Resampling.BICUBIC))


def _require_same_proportions(record: Record, mask: tuple[int, ...], image: tuple[int, ...]) -> None:
    ratio = mask[1] * image[0] / (mask[0] * image[1])
    if not 1 / _STRETCH < ratio < _STRETCH:
        raise UserError(
            f"{record.mask}: {mask[1]} x {mask[0]} pixels, of other proportions than its image's "
            f"{image[1]} x {image[0]}"
        )


@functools.cache
def _say_once_that_masks_are_resized() -> None:
    warnings.warn("some masks are not of their images' sizes, and are resized to them", stacklevel=3)


def _corner(whole: Hole, size: int, rng: np.random.Generator) -> list[int]:
    return [_offset(whole.any(1 - axis), size, rng) for axis in (0, 1)]


def _cut(array: np.ndarray, corner: Sequence[int], size: int) -> np.ndarray:
    return array[corner[0] : corner[0] + size, corner[1] : corner[1] + size]


def _offset(is_hole: Bool[np.ndarray, " n"], size: int, rng: np.random.Generator) -> int:
    """Where a window of `size` starts so that it shows at least half of the hole's extent."""
    last = len(is_hole) - size
    where = np.flatnonzero(is_hole)
    if not len(where) or last == 0:
        return int(rng.integers(last + 1))
    first, end = int(where[0]), int(where[-1]) + 1
    half = min(-(-(end - first) // 2), size)
    low = max(0, first + half - size)
    high = min(last, end - half)
    return int(rng.integers(low, high + 1))


def _intersect(hole: Hole, other: Path) -> Hole:
    """The common part; `hole` itself where there is none, since a sample without a hole teaches nothing."""
    try:
        grey = read_mask(other, max_megapixels=_MEGAPIXELS)
    except UserError as error:  # the sample is none the worse for it
        warnings.warn(f"{error}; holes stay as they are instead", stacklevel=2)
        return hole
    common = hole & (_resized(grey, hole.shape) > THRESHOLD)
    return common if common.any() else hole
